"""The layer in the stages of Megatron's overlapping schedule; the argument names a check.

The stages are Megatron's own, of a transformer layer whose attention does nothing, so that its
output is that of the MoE layer plus its input. Three microbatches: two forward passes come before
the first backward pass, and each forward pass between the stages of a backward pass.
"""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.model_chunk_schedule_plan import TransformerLayerSchedulePlan
from megatron.core.pipeline_parallel.utils import get_comm_stream, get_comp_stream, set_streams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from moe_cases import HIDDEN, experts_for, forced, layer_config
from torch import Tensor
from unit_tests.workers import moe_layer
from unit_tests.workers.clones import case_of
from unit_tests.workers.moe_layer import (
    BATCH,
    RESULTS,
    SEQUENCE,
    TOKENS,
    Problem,
    dense,
    errors,
    main,
    report,
    same_bits,
    weights,
)

from megatron_echo import cpu_backend
from megatron_echo.copy_lanes import Errand
from megatron_echo.dispatch.clones_of_call import Clones
from megatron_echo.experts import clones as clones_module
from megatron_echo.experts.delayed import DelayedGradients
from megatron_echo.free_ticket import FreeQueue
from megatron_echo.layer_specs import moe_module_spec
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.step.step_end import StepEnd
from megatron_echo.transformer_layer import keep_padding

KINDS = ("hot", "random", "idle rank")
OVERLAP = {
    "overlap_moe_expert_parallel_comm": True,
    "moe_token_dispatcher_type": "alltoall",
    "transformer_impl": "local",
    "bf16": True,  # Megatron asks for it
}
WIRES = (
    ("all_gather", "collective"),
    ("all_to_all", "p2p"),
    ("symmetric_memory", "symmetric_memory"),
)


class NoAttention(IdentityOp):
    def backward_dw(self) -> None:
        """It has no weights."""


def build(slots: int, **fields: Any) -> TransformerLayer:
    """A layer with S slots on each rank; the same weights on every call."""
    ranks = dist.get_world_size()
    settings = {"moe_num_echo_experts": slots * ranks, "moe_echo_tolerance": 0.0}
    config = layer_config(ranks, 2, torch.float64, **{**settings, **OVERLAP, **fields})
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    parts = TransformerLayerSubmodules(
        self_attention=NoAttention, mlp=moe_module_spec(config), mlp_bda=get_bias_dropout_add
    )
    layer = TransformerLayer(config, parts, hidden_dropout=0.0)
    assert isinstance(layer.mlp, EchoMoELayer)
    return layer


class Microbatch:
    """One on its way through the stages."""

    def __init__(self, layer: TransformerLayer, case: Problem) -> None:
        set_streams()
        names = ("attention_mask", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
        names += ("packed_seq_params", "sequence_len_offset")
        decoder = SimpleNamespace(final_layernorm=None)
        self.chunk = SimpleNamespace(model=SimpleNamespace(decoder=decoder), **dict.fromkeys(names))
        event = torch.cuda.Event()
        self.plan = TransformerLayerSchedulePlan(
            layer, event, self.chunk, get_comp_stream, get_comm_stream, {}
        )
        self.layer, self.mine = layer, case.mine()
        self.probs = self.mine.probs.clone().requires_grad_()
        self.hidden = self.mine.hidden.reshape(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_()
        self.output = self.hidden

    @property
    def weight(self) -> Tensor:
        return self.mine.weight.view_as(self.hidden)

    def results(self, to_hidden: Tensor) -> dict[str, Tensor]:
        """Of the MoE layer alone; weight gradients are taken and cleared."""
        tensors = [self.output.detach() - self.hidden.detach(), to_hidden - self.weight]
        tensors += [self.probs.grad]
        for weight in weights(self.layer.mlp):
            assert weight.grad is not None
            tensors.append(weight.grad)
            weight.grad = None
        tensors[:2] = [tensor.view(TOKENS, HIDDEN) for tensor in tensors[:2]]
        return dict(zip(RESULTS, tensors, strict=True))


def overlapped(forward: Microbatch | None, backward: Microbatch | None) -> Any:
    """Megatron's order of the stages of two microbatches."""
    if forward is not None:
        forced(forward.layer.mlp, forward.probs, forward.mine.chosen)
    output, to_hidden = TransformerLayerSchedulePlan.run(
        forward.plan if forward else None,
        backward.plan if backward else None,
        f_input=forward.hidden if forward else None,
        b_grad=backward.weight if backward else None,
    )
    if forward is not None:
        forward.output = output.clone()
    return None if backward is None else backward.results(to_hidden)


def scheduled(layer: TransformerLayer, cases: list[Problem]) -> list[dict[str, Tensor]]:
    """Each microbatch's results; the pattern of interleaved 1F1B, two in flight."""
    some = [Microbatch(layer, case) for case in cases]
    overlapped(some[0], None)
    overlapped(some[1], None)
    found = [overlapped(some[2], some[0]), overlapped(None, some[1]), overlapped(None, some[2])]
    StepEnd.of(layer.config).overflow.check()
    return found


def cases() -> list[Problem]:
    return [case_of(kind, 2, torch.float64, seed) for seed, kind in enumerate(KINDS)]


def check_padding() -> None:
    """Padded tokens go to no expert, in each of two microbatches in flight; else they would."""
    for keeps in (True, False):
        layer, some, expected = build(2, delay_wgrad_compute=True), [], []
        for number, case in enumerate(cases()[:2]):
            mask = torch.arange(BATCH * SEQUENCE).view(BATCH, SEQUENCE) % (3 + number) == 0
            padded = mask.T.reshape(-1, 1).repeat(dist.get_world_size(), 1)
            each = Microbatch(layer, case)
            each.chunk.padding_mask = mask
            if keeps:
                keep_padding(each.plan)
            overlapped(each, None)
            some.append(each)
            expected.append(dense(layer.mlp, replace(case, chosen=case.chosen & ~padded)))
        found = [overlapped(None, each) for each in some]
        error = max(max(errors(*pair).values()) for pair in zip(found, expected, strict=True))
        assert (error <= 1e-12) == keeps, error
        assert layer.mlp.schedule_state is None


def worst(found: list[dict[str, Tensor]], layer: TransformerLayer) -> float:
    pairs = zip(found, cases(), strict=True)
    return max(max(errors(results, dense(layer.mlp, case)).values()) for results, case in pairs)


def check_dense() -> None:
    """Against a loop over experts, with clones and without; early gradients and delayed ones."""
    ranks = dist.get_world_size()
    for delayed, slots in itertools.product((True, False), (0, experts_for(ranks) // ranks)):
        layer = build(slots, delay_wgrad_compute=delayed)
        found = worst(scheduled(layer, cases()), layer)
        report(f"delayed {delayed}, {slots} slots", {"error": f"{found:.1e}"})
        assert found <= 1e-12


def check_same_bits() -> None:
    """Delayed or not, whatever carries tokens and weights; and no frozen weight gets a gradient."""
    for tokens, experts in WIRES:
        way = {"moe_echo_token_transport": tokens, "moe_echo_expert_dispatcher_type": experts}
        both = [
            scheduled(build(2, delay_wgrad_compute=delayed, **way), cases())
            for delayed in (False, True)
        ]
        for early, late in zip(*both, strict=True):
            same_bits(late, early)
    in_fp8 = {"moe_echo_expert_precision": "fp8-rowwise", "moe_ffn_hidden_size": HIDDEN}
    found = scheduled(build(2, delay_wgrad_compute=True, **in_fp8), cases())
    for late, case in zip(found, cases(), strict=True):
        assert max(errors(late, moe_layer.run(build(2, **in_fp8).mlp, case)).values()) <= 1e-12
    layer = build(2, delay_wgrad_compute=True)
    layer.mlp.experts.linear_fc1.weight.requires_grad_(dist.get_rank() > 0)
    some = Microbatch(layer, cases()[0])
    overlapped(some, None)
    with mock.patch.object(Microbatch, "results", return_value=None):
        overlapped(None, some)
    assert (layer.mlp.experts.linear_fc1.weight.grad is None) == (dist.get_rank() == 0)
    assert layer.mlp.experts.linear_fc2.weight.grad is not None


def two_backward_passes(layer: TransformerLayer) -> list[dict[str, Tensor]]:
    """The weight gradients of two microbatches, computed after both backward passes."""
    some = [Microbatch(layer, case) for case in cases()[:2]]
    for each in some:
        overlapped(each, None)
    grads = []
    for each in some:
        plan, grad = each.plan, each.weight
        for stage in (plan.moe_combine, plan.mlp, plan.moe_dispatch, plan.pre_dispatch_computation):
            grad = stage.backward(grad)
        assert all(weight.grad is None for weight in weights(layer.mlp))
        grads.append(grad)
    found = []
    for each, grad in zip(some, grads, strict=True):
        each.plan.mlp.backward_dw()
        found.append(each.results(grad))
    return found


def check_weight_gradients_of_two_calls() -> None:
    """They wait for each other, each with its own rows and plan."""
    layer = build(2, delay_wgrad_compute=True)
    for results, case in zip(two_backward_passes(layer), cases()[:2], strict=True):
        assert max(errors(results, dense(layer.mlp, case)).values()) <= 1e-12


@contextlib.contextmanager
def without_clones_parts() -> Iterator[None]:
    """``backward_dw`` forgets what clones computed."""

    def home_only(
        grad: Any, rows: Any, weight: Tensor, ends: Any, clones: Clones, gemm: Any
    ) -> tuple[Tensor, Errand]:
        errand = clones.run(lambda: gemm.outer(grad, rows, ends, weight.dtype)[: len(weight)])
        return errand.result, errand

    with mock.patch.object(clones_module, "_weight_gradient", home_only):
        yield


@contextlib.contextmanager
def with_the_last_plan() -> Iterator[None]:
    """Backward passes use the plan of the last forward pass."""
    last: list[Tensor] = []

    def replaced(given: Clones, slot_expert: Tensor) -> Clones:
        return replace(given, slot_expert=last[-1])

    original = clones_module._filled

    def note(pool: Any, gemm: Any, weight: Any, given: Clones, *kept: Any) -> Tensor:
        last.append(given.slot_expert)
        return original(pool, gemm, weight, given, *kept)

    with (
        mock.patch.object(clones_module, "_filled", note),
        mock.patch.object(Clones, "given_back", replaced),
    ):
        yield


@contextlib.contextmanager
def last_call_first() -> Iterator[None]:
    """Weight gradients that wait are computed in the wrong order."""

    def compute(self: DelayedGradients, weight: torch.nn.Parameter) -> None:
        self._waiting.rotate(1)
        original(self, weight)

    original = DelayedGradients.compute
    with mock.patch.object(DelayedGradients, "compute", compute):
        yield


def check_mutants() -> None:
    """What must not go unnoticed."""
    runs: tuple[tuple[Callable, Callable], ...] = (
        (without_clones_parts, lambda layer: scheduled(layer, cases())),
        (with_the_last_plan, lambda layer: scheduled(layer, cases())),
        (last_call_first, two_backward_passes),
    )
    for mutant, run in runs:
        layer = build(experts_for(dist.get_world_size()) // dist.get_world_size(),
                      delay_wgrad_compute=True,
                      moe_echo_expert_dispatcher_type="collective")  # fmt: skip
        with mutant():
            found = run(layer)
        pairs = list(zip(found, cases(), strict=False))
        error = max(max(errors(r, dense(layer.mlp, case)).values()) for r, case in pairs)
        report(mutant.__name__, {"error": f"{error:.1e}"})
        assert error > 1e-3


def held_bytes(plans: list[TransformerLayerSchedulePlan]) -> int:
    """Of what the stages hold between forward and backward."""
    found: dict[int, int] = {}
    for plan in plans:
        for node in (plan.pre_dispatch_computation, plan.moe_dispatch, plan.mlp, plan.moe_combine):
            outputs = node.output if isinstance(node.output, tuple) else (node.output,)
            for tensor in (*node.inputs, *outputs, *node.detached, *node.before_detached):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def check_early_frees() -> None:
    """Nobody reads what is freed, whatever carries tokens; and what that saves."""
    shared = {"moe_shared_expert_intermediate_size": 8}
    for (tokens, experts), mode in itertools.product(WIRES, ("off", "poison", "free")):
        way = {"moe_echo_token_transport": tokens, "moe_echo_expert_dispatcher_type": experts}
        model = build(2, delay_wgrad_compute=True, **shared, **way)
        model.mlp.frees = FreeQueue(mode)
        some = [Microbatch(model, case) for case in cases()]
        with mock.patch.object(torch.UntypedStorage, "resize_", unless_by_megatron):
            for each in some[:2]:
                overlapped(each, None)
            held = held_bytes([each.plan for each in some[:2]])
            found = [overlapped(some[2], some[0]), overlapped(None, some[1])]
            found.append(overlapped(None, some[2]))
        if mode == "off":
            expected, held_before = found, held
            continue
        for results, wanted in zip(found, expected, strict=True):
            same_bits(results, wanted)
        frees = model.mlp.frees
        rows = model.mlp.token_dispatcher.buffer_rows(TOKENS)
        each_call = rows * HIDDEN * torch.float64.itemsize
        # Of the shared expert's output an alias is left where one rank has all of it.
        assert set(frees.refusals) <= {"another tensor shares its storage"}, frees.refusals
        assert frees.freed_bytes >= 3 * each_call
        if mode == "free":
            report(tokens, {"held": f"{held_before:,} to {held:,} bytes"})
            assert held_before - held >= 2 * each_call


original_resize = torch.UntypedStorage.resize_


def unless_by_megatron(storage: torch.UntypedStorage, size: int) -> Any:
    """Its schedule frees the experts' output too, unasked; a ticket does so before it."""
    if sys._getframe(1).f_code.co_name == "_forward":
        return storage
    return original_resize(storage, size)


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main(globals())
