"""EchoMoELayer with cloned experts over all ranks; the argument names a check.

A check is a function ``check_...`` below, built on those of the layer without clones.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from megatron.core import parallel_state
from megatron.core.activations import quick_gelu
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from moe_cases import HIDDEN, ForcedRouter, experts_for, forced, layer_config, router_probs
from torch import Tensor
from unit_tests.workers.moe_layer import (
    BATCH,
    BIAS_RESULTS,
    RESULTS,
    SEQUENCE,
    TOKENS,
    TRANSPORTS,
    Problem,
    advised,
    biases,
    build,
    dense,
    errors,
    fill_uninitialized_memory,
    forward,
    gathered,
    main,
    overflow_message,
    problem,
    report,
    run,
    run_quietly,
    same_bits,
    thinned,
    weights,
)

from megatron_echo import cpu_backend
from megatron_echo.dispatch.clones_of_call import Clones
from megatron_echo.dispatch.layout import round_rows
from megatron_echo.dispatch.transports import CollectiveWeights, PeerToPeerWeights
from megatron_echo.experts import clones as clones_module
from megatron_echo.experts.clones import WeightPool
from megatron_echo.experts.grouped_linear import GroupedGemm
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.plan_settings import AUTO_CAPACITY
from megatron_echo.planner import ClonePlan, balance_bound
from megatron_echo.step.self_check import EchoCheckError, SelfCheck
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

KINDS = ("hot", "random", "empty", "balanced", "padding", "idle rank")
PARAMETERS = ("dfc1", "dfc2")


def case_of(kind: str, topk: int, dtype: torch.dtype, seed: int = 0) -> Problem:
    """A problem; ``idle rank``: the last rank has no tokens, the others are hot."""
    case = problem("hot" if kind == "idle rank" else kind, topk, dtype, seed)
    if kind != "idle rank":
        return case
    chosen = case.chosen.clone()
    chosen[-TOKENS:] = False
    return replace(case, chosen=chosen, probs=torch.where(chosen, case.probs, 0))


def all_slots() -> list[int]:
    """S: 1, 2, and as many as a rank has experts."""
    ranks = dist.get_world_size()
    return sorted({1, 2, experts_for(ranks) // ranks})


def cloned(topk: int, dtype: torch.dtype, slots: int | None = None, **fields: Any) -> EchoMoELayer:
    """A layer with S slots on each rank, by default as many as experts."""
    ranks = dist.get_world_size()
    slots = experts_for(ranks) // ranks if slots is None else slots
    settings = {"moe_num_echo_experts": slots * ranks, "moe_echo_tolerance": 0.0, **fields}
    return build(topk, dtype, **settings)


def plain(topk: int, dtype: torch.dtype, **fields: Any) -> EchoMoELayer:
    return build(topk, dtype, moe_num_echo_experts=0, **fields)


@contextlib.contextmanager
def watched(layer: EchoMoELayer) -> Iterator[list[tuple[int, Clones | None]]]:
    """Rows that the experts compute, and the clones, of each call."""
    seen: list[tuple[int, Clones | None]] = []

    def note(_: Any, args: tuple) -> None:
        seen.append((int(args[1][-1]), args[3]))

    hook = layer.experts.register_forward_pre_hook(note)
    yield seen
    hook.remove()


def with_clones_somewhere(layer: EchoMoELayer, case: Problem) -> Tensor:
    """Which experts have clones, bool ``[E]``; the hot routings must make some."""
    with watched(layer) as seen:
        run(layer, case)
    ((_, clones),) = seen
    assert clones is not None
    experts = torch.zeros(layer.config.num_moe_experts + 1, dtype=torch.bool)
    experts[clones.slot_expert.flatten()] = True
    return experts[:-1]


def against(
    dtype: torch.dtype, limit: float, kinds: tuple[str, ...], topk: int, many: int = 1,
    **fields: Any,
) -> None:  # fmt: skip
    """Each routing and number of slots with so many of the eight other combinations, in turn."""
    worst = dict.fromkeys(RESULTS, 0.0)
    most_clones = 0
    variants = itertools.cycle(itertools.product((0.0, 0.02), TRANSPORTS, (True, False)))
    for kind in kinds:
        case = case_of(kind, topk, dtype)
        oracle = dense(plain(topk, dtype, **fields), case)
        unmoved = {
            wire: run(plain(topk, dtype, moe_echo_token_transport=wire, **fields), case)
            for wire in TRANSPORTS
        }
        for slots, _ in thinned(itertools.product(all_slots(), range(many))):
            tolerance, wire, again = next(variants)
            layer = cloned(
                topk, dtype, slots, moe_echo_tolerance=tolerance, moe_echo_token_transport=wire,
                moe_echo_recompute_expert_dispatch=again, moe_echo_row_alignment=4 if again else 1,
                **fields,
            )  # fmt: skip
            with watched(layer) as seen:
                result = run(layer, case)
            ((_, clones),) = seen
            assert clones is not None
            most_clones = max(most_clones, int((clones.slot_expert >= 0).sum()))
            for expected in (oracle, unmoved[wire]):
                expected = {name: tensor.double() for name, tensor in expected.items()}
                found = errors(result, expected)
                assert max(found.values()) <= limit, (kind, slots, tolerance, wire, again, found)
                worst = {name: max(worst[name], found[name]) for name in RESULTS}
            StepEnd.of(layer.config).overflow.check()
    assert most_clones >= dist.get_world_size() - 1
    report(f"worst errors in {dtype}", {name: f"{value:.1e}" for name, value in worst.items()})


def layer_experts(ranks: int) -> int:
    """Experts of a rank."""
    return experts_for(ranks) // ranks


def check_auto_tolerance() -> None:
    """Clones where they are cheap; where they are not, the layer without, bit by bit."""
    ranks = dist.get_world_size()
    for kind, slots in itertools.product(("hot", "random"), (1, layer_experts(ranks))):
        case = case_of(kind, 2, torch.float64)
        without = run(plain(2, torch.float64), case)
        for rows, way in ((0, "collective"), (3, "p2p"), (10**6, "collective"), (None, "p2p")):
            layer = cloned(
                2, torch.float64, slots, moe_echo_tolerance=None, moe_echo_rows_per_clone=rows,
                moe_echo_expert_dispatcher_type=way, moe_received_token_capacity=float(ranks),
            )  # fmt: skip
            with watched(layer) as seen:
                found = run(layer, case)
            ((_, clones),) = seen
            assert clones is not None
            number = int((clones.slot_expert >= 0).sum())
            assert (number == 0) if rows == 10**6 else (number > 0 or rows != 0 or kind != "hot")
            assert max(errors(found, without).values()) <= 1e-12
            if number == 0:
                assert all(torch.equal(found[name], without[name]) for name in RESULTS)
            step = StepEnd.of(layer.config)
            step.overflow.check()
            step.statistics.end_step()
            values = step.statistics.read()
            assert values["clones"] == number
            assert (values["seconds_saved"] > 0) == (number > 0), (rows, number, values)


def of_tensor_ranks(slices: int) -> int:
    """Let two ranks share a sequence, and so many an expert: how many share the experts."""
    ranks = dist.get_world_size() // slices
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2,
        expert_model_parallel_size=ranks,
        expert_tensor_parallel_size=slices,
    )
    return ranks


def sliced(slices: int, dtype: torch.dtype, slots: int, **fields: Any) -> EchoMoELayer:
    """A layer behind :func:`of_tensor_ranks`; the same weights on every call."""
    ranks = dist.get_world_size() // slices
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    return EchoMoELayer(
        layer_config(
            ranks, 2, dtype, tensor_model_parallel_size=2, sequence_parallel=True,
            expert_tensor_parallel_size=slices, num_attention_heads=2,
            moe_num_echo_experts=slots * ranks, moe_received_token_capacity=float(ranks * slices),
            **fields,
        )
    )  # fmt: skip


def check_expert_tensor_parallelism() -> None:
    """Slices of experts on two ranks each, with clones of slices and without them."""
    slices = 2
    ranks = of_tensor_ranks(slices)
    experts = experts_for(ranks)
    cases = itertools.product(("hot", "random", "padding"), (0, 2), TRANSPORTS)
    for kind, slots, wire in thinned(cases):
        layer = sliced(slices, torch.float64, slots, moe_echo_token_transport=wire)
        case = problem(kind, 2, torch.float64, experts=experts)
        if kind == "hot" and slots and ranks > 1:
            assert with_clones_somewhere(layer, case).any()
        found = errors(run(layer, case), dense(layer, case, slices))
        assert max(found.values()) <= 1e-12, (kind, slots, wire, found)
        StepEnd.of(layer.config).overflow.check()


GPT_OSS: dict[str, Any] = {
    "add_bias_linear": True,
    "activation_func": quick_gelu,
    "activation_func_clamp_value": 1.0,
    "glu_linear_offset": 1.0,
}


def with_biases(topk: int, dtype: torch.dtype, slots: int, **fields: Any) -> EchoMoELayer:
    """A layer of GPT-OSS's experts, each with biases of its own."""
    layer = cloned(topk, dtype, slots, **{**GPT_OSS, **fields})
    generator = torch.Generator().manual_seed(dist.get_rank())
    with torch.no_grad():
        for bias in biases(layer):
            assert not bias.any()  # as Megatron's before the first step
            bias.copy_(torch.randn(bias.shape, generator=generator))
    return layer


def check_biases() -> None:
    against_biases({})


def against_biases(fields: dict[str, Any]) -> None:
    """Those of clones come with the weights and take their gradients home, by every way."""
    ways = itertools.cycle(("collective", "p2p", "symmetric_memory"))
    wires = itertools.cycle(TRANSPORTS)
    cases = itertools.product(("hot", "random", "padding", "idle rank"), (0, 1, 2))
    for kind, slots in thinned(cases):
        case = case_of(kind, 2, torch.float64)
        way = next(ways)
        layer = with_biases(
            2, torch.float64, slots, moe_echo_expert_dispatcher_type=way,
            moe_echo_token_transport=next(wires), moe_received_token_capacity=4.0, **fields,
        )  # fmt: skip
        if kind == "hot" and slots:
            assert with_clones_somewhere(layer, case).any()
        with no_host_sync("raise") if way != "p2p" else contextlib.nullcontext():
            result = run(layer, case)
        found = errors(result, dense(layer, case))
        assert set(found) == {*RESULTS, *BIAS_RESULTS}
        assert max(found.values()) <= 1e-12, (kind, slots, found)
        StepEnd.of(layer.config).overflow.check()
        same_bits(run(layer, case), result)


def check_biases_in_bf16() -> None:
    """Parts of a gradient are added wide and rounded once: as near as without clones."""
    case = case_of("hot", 2, torch.bfloat16)
    for slots in (0, 2):
        # Rounding would decide what a clamp lets through.
        layer = with_biases(2, torch.bfloat16, slots, activation_func_clamp_value=None)
        found = errors(run(layer, case), dense(layer, case))
        assert max(found.values()) <= 0.04, (slots, found)


def check_mutants_of_biases() -> None:
    """A bias that is not cloned, and a clone's that takes no gradient home, are seen."""
    case = case_of("hot", 2, torch.float64)
    push, bring = CollectiveWeights.push, CollectiveWeights.bring_home

    def no_bias(self: Any, weight: Tensor, *rest: Any) -> None:
        push(self, weight, *rest)
        if weight.shape[1] == 1:
            rest[-1].zero_()

    def no_gradient(self: Any, grads: Tensor, *rest: Any) -> Tensor:
        home = bring(self, grads.clone(), *rest)
        return grads[: len(home)] if grads.shape[1] == 1 else home

    for name, mutant, wrong in (
        ("push", no_bias, {"output", "dbias1"}),
        ("bring_home", no_gradient, {"dbias1", "dbias2"}),
    ):
        layer = with_biases(2, torch.float64, 2)
        with mock.patch.object(CollectiveWeights, name, mutant):
            found = errors(run(layer, case), dense(layer, case))
        assert wrong <= {result for result, error in found.items() if error > 1e-3}, found


class Projection(torch.nn.Module):
    """Stands in for Transformer Engine's linear layer, in which Megatron projects latent tokens."""

    def __init__(self, in_features: int, out_features: int, **_: Any) -> None:
        super().__init__()
        drawn = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(3))
        self.weight = torch.nn.Parameter(drawn.double())

    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden @ self.weight.T, None


def check_latent() -> None:
    """Experts and clones of the latent width against a dense loop between two projections."""
    latent = HIDDEN // 2
    stand_ins = {"HAVE_TE": True, "TELinear": Projection}
    for kind, slots, every in (("hot", 0, 0), ("hot", 2, 1), ("random", 2, 0)):
        with mock.patch.multiple("megatron.core.transformer.moe.moe_layer", **stand_ins):
            layer = cloned(
                2, torch.float64, slots, moe_latent_size=latent, moe_echo_check_every=every
            )
        case = case_of(kind, 2, torch.float64)
        assert layer.experts.linear_fc1.weight.shape[2] == latent
        down, up = (part.weight.detach() for part in (layer.fc1_latent_proj, layer.fc2_latent_proj))
        given = replace(case, hidden=case.hidden @ down.T, weight=case.weight @ up)
        expected = dense(layer, given)
        to_latent = expected["dx"]
        expected |= {"dx": to_latent @ down, "output": expected["output"] @ up.T}
        found = errors(run(layer, case), expected)
        assert max(found.values()) <= 1e-12, (kind, slots, found)
        to_down = to_latent.T @ case.mine().hidden
        error = (layer.fc1_latent_proj.weight.grad - to_down).abs().max()
        assert error <= 1e-12 * to_down.abs().max()
        StepEnd.of(layer.config).overflow.check()


def check_dense_fp64() -> None:
    against(torch.float64, 1e-12, KINDS, 2, 2 if dist.get_world_size() == 3 else 1)


def check_dense_fp32() -> None:
    against(torch.float32, 1e-5, ("hot", "random", "idle rank"), 2)


def check_dense_topk() -> None:
    """One expert for each token, and three."""
    for topk in (1, 3):
        against(torch.float64, 1e-12, ("hot", "padding"), topk)


def check_probs_on_input() -> None:
    """Probabilities as factors of the rows; that is not what they are behind the activation."""
    on_input, case = {"moe_apply_probs_on_input": True}, case_of("hot", 1, torch.float64)
    for topk in (1, 2):
        against(torch.float64, 1e-12, ("hot", "padding"), topk, **on_input)
    layer = cloned(1, torch.float64, **on_input)
    assert errors(run(layer, case), dense(plain(1, torch.float64), case))["output"] > 1e-3
    against_biases(on_input)


def check_balance() -> None:
    """With E / R slots no rank computes more rows than the bound, and the buffer is that size."""
    ranks = dist.get_world_size()
    variants = itertools.cycle([*itertools.product(TRANSPORTS, (1, 3))][::-1] + [("all_gather", 2)])
    for kind, tolerance in itertools.product(KINDS, (0.0, 0.02)):
        wire, topk = next(variants)
        case = case_of(kind, topk, torch.float32)
        layer = cloned(
            topk, torch.float32, moe_echo_tolerance=tolerance, moe_echo_token_transport=wire
        )
        with watched(layer) as seen:
            run(layer, case)
        ((rows, _),) = seen
        total = int(case.chosen.sum())
        assert rows <= balance_bound(total, ranks, tolerance), (kind, rows, total)
        if tolerance == 0:
            assert rows <= -(-total // ranks)
        every = torch.tensor(rows)
        dist.all_reduce(every)
        assert every == total  # nothing is dropped
        budget = balance_bound(TOKENS * topk * ranks, ranks, tolerance)
        assert layer.token_dispatcher.buffer_rows(TOKENS) == round_rows(budget)
        check = StepEnd.of(layer.config).overflow
        check.check()
        assert check.dropped == 0
    if ranks < 4:
        few_slots_overflow(ranks)


def few_slots_overflow(ranks: int) -> None:
    """Rank 0 keeps most of a load that is even over its experts; ``auto`` says what suffices."""
    case = case_of("random", 2, torch.float64)
    per_rank = case.chosen.shape[1] // ranks
    experts = (torch.arange(len(case.chosen))[:, None] * 2 + torch.arange(2)) % per_rank
    chosen = torch.zeros_like(case.chosen).scatter_(1, experts, True)
    case = replace(case, chosen=chosen, probs=router_probs(chosen, torch.float64))
    layer = cloned(2, torch.float64, slots=1)
    run(layer, case)
    enough = advised(overflow_message(layer), "received-token-capacity")
    assert AUTO_CAPACITY < enough <= ranks
    layer = cloned(2, torch.float64, slots=1, moe_received_token_capacity=enough)
    found = errors(run(layer, case), dense(plain(2, torch.float64), case))
    assert max(found.values()) <= 1e-12
    StepEnd.of(layer.config).overflow.check()


def check_unmoved_experts() -> None:
    """Experts without clones have the gradients of the layer without clones, bit by bit."""
    seen = 0
    wires = itertools.cycle(TRANSPORTS)
    for kind, slots in itertools.product(("hot", "random"), all_slots()):
        case, wire = case_of(kind, 2, torch.float32), next(wires)
        fields: dict[str, Any] = {"moe_echo_token_transport": wire}
        without = run(plain(2, torch.float32, **fields), case)
        layer = cloned(2, torch.float32, slots, **fields)
        moved = with_clones_somewhere(layer, case).chunk(dist.get_world_size())[dist.get_rank()]
        found = run(layer, case)
        seen += int(moved.sum())
        for name in PARAMETERS:
            assert torch.equal(found[name][~moved], without[name][~moved]), (name, kind, slots)
    total = torch.tensor(seen)
    dist.all_reduce(total)
    assert total > 0


def layers_of(number: int, topk: int, dtype: torch.dtype, **fields: Any) -> list[EchoMoELayer]:
    """Layers that share one configuration."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = layer_config(dist.get_world_size(), topk, dtype, **fields)
    return [EchoMoELayer(config) for _ in range(number)]


def spoil(layer: EchoMoELayer) -> None:
    """Fill the pool with NaN."""
    with torch.no_grad():
        for stack in WeightPool.of(layer.config).stacks:
            stack.fill_(float("nan"))


def two_layers_twice(layers: list[EchoMoELayer], spoiling: bool) -> list[Tensor]:
    """Two microbatches, forward of both before backward of both: outputs and gradients."""
    cases = [case_of("hot", 2, torch.float32, 1), case_of("random", 2, torch.float32, 2)]
    hiddens, outputs, routes = [], [], []
    for layer in layers:
        layer.zero_grad()
    for case in cases:
        mine = case.mine()
        hidden = mine.hidden.reshape(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_()
        hiddens.append(hidden)
        for index, layer in enumerate(layers):
            probs = mine.probs.clone().requires_grad_()
            routes.append(probs)
            # The second layer has another routing than the first.
            shift = index * 3
            hidden, _ = forced(layer, probs.roll(shift, 1), mine.chosen.roll(shift, 1))(hidden)
            if spoiling:
                spoil(layer)
                hidden.register_hook(lambda grad, layer=layer: spoil(layer))
        outputs.append(hidden)
    for case, output in zip(cases, outputs, strict=True):
        output.backward(case.mine().weight.view_as(output))
        if spoiling:
            spoil(layers[0])
    weights = [parameter.grad for layer in layers for parameter in layer.experts.parameters()]
    grads = [leaf.grad for leaf in (*hiddens, *routes)] + weights
    return [*outputs, *(grad.clone() for grad in grads if grad is not None)]


def check_pool() -> None:
    """The pool may be anything between two uses, and does not grow with the layers."""
    for slots, again in zip([*all_slots(), 1], (True, False, True, False), strict=True):
        fields: dict[str, Any] = {
            "moe_num_echo_experts": slots * dist.get_world_size(),
            "moe_echo_recompute_expert_dispatch": again,
        }
        layers = layers_of(2, 2, torch.float32, **fields)
        pool = WeightPool.of(layers[0].config)
        assert pool is WeightPool.of(layers[1].config)
        clean = two_layers_twice(layers, False)
        nbytes = pool.nbytes
        assert nbytes > 0
        assert len(clean) == 2 + 2 + 4 + 4
        spoiled = two_layers_twice(layers, True)
        for number, (left, right) in enumerate(zip(spoiled, clean, strict=True)):
            assert torch.equal(left, right), (slots, again, number)
        assert pool.nbytes == nbytes
        if slots == 2:
            many = layers_of(8, 2, torch.float32, **fields)
            two_layers_twice(many, False)
            assert WeightPool.of(many[0].config).nbytes == nbytes
        experts = layers[0].num_local_experts
        sizes = sum(weight[0].nbytes for weight in layers[0].experts.parameters())
        assert nbytes == (experts + slots) * sizes


def check_no_host_sync() -> None:
    """Forward and backward read nothing on the host."""
    variants = itertools.cycle(itertools.product(TRANSPORTS, ("hot", "padding"), (True, False)))
    for dtype, slots, _ in itertools.product(
        (torch.float64, torch.bfloat16), all_slots(), range(2)
    ):
        wire, kind, again = next(variants)
        layer = cloned(
            2, dtype, slots, moe_echo_token_transport=wire,
            moe_echo_recompute_expert_dispatch=again,
            moe_echo_tolerance=0.02 if again else 0.0,
        )  # fmt: skip
        case = case_of(kind, 2, dtype)
        with no_host_sync("raise") as sync:
            run_quietly(layer, case)
        assert sync.hits == []


def checkpointed(layer: EchoMoELayer, case: Problem, reentrant: bool) -> dict[str, Tensor]:
    """:func:`run` with the whole layer recomputed; the routing is not differentiated through."""
    mine = case.mine()
    hidden = mine.hidden.reshape(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_()
    layer.experts.zero_grad()
    output = torch.utils.checkpoint.checkpoint(
        lambda tensor: layer(tensor)[0], hidden, use_reentrant=reentrant, preserve_rng_state=False
    )
    output.backward(mine.weight.view_as(output))
    fc1, fc2 = layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight
    results = {"output": output.detach(), "dx": hidden.grad, "dfc1": fc1.grad, "dfc2": fc2.grad}
    assert all(tensor is not None for tensor in results.values())
    for name in ("output", "dx"):
        results[name] = results[name].view(TOKENS, HIDDEN)
    return results


def check_gradient_hooks() -> None:
    """What watches a parameter fires once a backward pass, with the whole gradient."""
    for (kind, again), mode in itertools.product(
        (("hot", True), ("idle rank", False)), ("plain", "reentrant", "not reentrant")
    ):
        case = case_of(kind, 2, torch.float32)
        expected = run(plain(2, torch.float32), case)
        layer = cloned(2, torch.float32, moe_echo_recompute_expert_dispatch=again)
        fired: dict[int, list[Tensor]] = {}

        def note(parameter: Tensor, fired: dict[int, list[Tensor]] = fired) -> None:
            assert parameter.grad is not None
            fired.setdefault(id(parameter), []).append(parameter.grad.clone())

        parameters = [layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight]
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(note)
        for step in (1, 2):
            if mode == "plain":
                found = run(layer, case)
            else:
                mine = case.mine()
                forced(layer, mine.probs.clone().requires_grad_(), mine.chosen)
                found = checkpointed(layer, case, mode == "reentrant")
            for name, parameter in zip(PARAMETERS, parameters, strict=True):
                snapshots = fired[id(parameter)]
                assert len(snapshots) == step, (mode, len(snapshots))
                assert torch.equal(snapshots[-1], found[name])
                scale = expected[name].abs().max().clamp(min=1)
                assert (found[name] - expected[name]).abs().max() <= 1e-5 * scale


def check_data_parallel() -> None:
    """Megatron's DDP: the main gradient is whole when the parameter is reported ready."""
    for again, mode in itertools.product((True, False), ("plain", "reentrant")):
        case, mine = case_of("hot", 2, torch.float32), case_of("hot", 2, torch.float32).mine()
        layer = cloned(2, torch.float32, moe_echo_recompute_expert_dispatch=again)
        settings = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1)
        forced(layer, mine.probs.clone().requires_grad_(), mine.chosen)
        model = DistributedDataParallel(layer.config, settings, layer)
        ready: list[tuple[int, Tensor]] = []
        original = _ParamAndGradBucketGroup.register_grad_ready

        def note(
            self: Any, param: Any, *args: Any, ready: list = ready, original: Any = original,
            **kwargs: Any,
        ) -> None:  # fmt: skip
            ready.append((id(param), param.main_grad.clone()))
            original(self, param, *args, **kwargs)

        with mock.patch.object(_ParamAndGradBucketGroup, "register_grad_ready", note):
            model.zero_grad_buffer()
            hidden = mine.hidden.reshape(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_()
            if mode == "plain":
                output, _ = model(hidden)
            else:
                output = torch.utils.checkpoint.checkpoint(
                    lambda tensor, model=model: model(tensor)[0], hidden,
                    use_reentrant=True, preserve_rng_state=False,
                )  # fmt: skip
            output.backward(mine.weight.view_as(output))
            model.finish_grad_sync()
        expected = run(plain(2, torch.float32), case)
        parameters = [layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight]
        assert len(ready) == len(parameters), len(ready)
        for name, parameter in zip(PARAMETERS, parameters, strict=True):
            ((_, snapshot),) = [pair for pair in ready if pair[0] == id(parameter)]
            final: Tensor = parameter.main_grad
            # Only scaled since, by one over the data-parallel size.
            assert torch.equal(snapshot / dist.get_world_size(), final), (name, mode)
            scale = expected[name].abs().max().clamp(min=1)
            assert (snapshot - expected[name]).abs().max() <= 1e-5 * scale


def check_nan_weights() -> None:
    """NaN in the weights of one expert, cloned or not, reaches the tokens that go there only."""
    ranks = dist.get_world_size()
    variants = itertools.cycle(itertools.product(TRANSPORTS, (True, False)))
    for kind, slots, dtype in thinned(
        itertools.product(("hot", "padding"), all_slots(), (torch.float64, torch.float32))
    ):
        case = case_of(kind, 2, dtype)
        wire, again = next(variants)
        fields: dict[str, Any] = {
            "moe_echo_token_transport": wire,
            "moe_echo_recompute_expert_dispatch": again,
        }
        clean = run(cloned(2, dtype, slots, **fields), case)
        for broken in (0, experts_for(ranks) - 2):
            layer = cloned(2, dtype, slots, **fields)
            local = broken - dist.get_rank() * layer.num_local_experts
            if 0 <= local < layer.num_local_experts:
                with torch.no_grad():
                    layer.experts.linear_fc1.weight[local] = float("nan")
                    layer.experts.linear_fc2.weight[local] = float("nan")
            found = run(layer, case)
            touched = case.mine().chosen[:, broken]
            for name in ("output", "dx", "dprobs"):
                assert torch.equal(found[name][~touched], clean[name][~touched]), (name, kind)
            assert found["output"][touched].isnan().all()
            others = torch.arange(layer.num_local_experts) != local
            for name in PARAMETERS:
                assert torch.equal(found[name][others], clean[name][others]), (name, kind, slots)


def check_unused_slots() -> None:
    """NaN in the slots without an expert changes nothing."""
    original, filled = clones_module._filled, 0

    def fill(
        pool: WeightPool, gemm: GroupedGemm, weight: Tensor, clones: Clones,
        kept: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        nonlocal filled
        stack = original(pool, gemm, weight, clones, kept)
        unused = clones.slot_expert[dist.get_rank()] < 0
        stack[-clones.slots :][unused] = float("nan")
        filled += int(unused.sum())
        return stack

    keeps = itertools.cycle((True, False))
    for dtype, kind, slots in itertools.product(
        (torch.float64, torch.float32), ("hot", "random"), all_slots()
    ):
        case, again = case_of(kind, 2, dtype), next(keeps)
        fields: dict[str, Any] = {"moe_echo_recompute_expert_dispatch": again}
        clean = run(cloned(2, dtype, slots, **fields), case)
        with mock.patch.object(clones_module, "_filled", fill):
            same_bits(run(cloned(2, dtype, slots, **fields), case), clean)
    assert filled > 0


def check_same_bits() -> None:
    """Twice the same; and the same when every uninitialised tensor is full of NaN."""
    variants = itertools.cycle(itertools.product(("hot", "padding"), TRANSPORTS))
    for dtype, slots in thinned(
        itertools.product((torch.float64, torch.float32, torch.bfloat16), all_slots())
    ):
        kind, wire = next(variants)
        fields: dict[str, Any] = {
            "moe_echo_token_transport": wire,
            "moe_echo_recompute_expert_dispatch": slots != 2,
        }
        layer, case = cloned(2, dtype, slots, **fields), case_of(kind, 2, dtype)
        first = run(layer, case)
        same_bits(run(layer, case), first)
        torch.use_deterministic_algorithms(True)
        try:
            fill_uninitialized_memory(False)
            unfilled = run(layer, case)
            fill_uninitialized_memory(True)
            assert torch.empty(3).isnan().all()
            same_bits(run(cloned(2, dtype, slots, **fields), case), unfilled)
        finally:
            torch.use_deterministic_algorithms(False)
        same_bits(unfilled, first)


def check_bf16() -> None:
    """Gradients of the weights are as near to fp64 as without clones."""
    worst = 0.0
    for kind, slots in itertools.product(("hot", "random"), all_slots()):
        squares = torch.zeros(2, 2, dtype=torch.float64)  # with and without; fc1 and fc2
        for seed in range(2):
            case = case_of(kind, 2, torch.bfloat16, seed)
            without = plain(2, torch.bfloat16)
            exact = dense(without, case)
            runs = (run(cloned(2, torch.bfloat16, slots), case), run(without, case))
            for row, found in enumerate(runs):
                for column, name in enumerate(PARAMETERS):
                    squares[row, column] += (found[name].double() - exact[name]).square().sum()
        dist.all_reduce(squares)
        ratio = (squares[0] / squares[1]).sqrt()
        assert (ratio <= 1.05).all(), (kind, slots, ratio)
        worst = max(worst, float(ratio.max()))
    report("bf16", {"worst error over that without clones": f"{worst:.3f}"})


def inference(layer: EchoMoELayer, case: Problem, tokens: int = TOKENS) -> Tensor:
    """The output for the first tokens of each rank."""
    mine = case.mine()
    hidden = mine.hidden[:tokens].view(-1, BATCH, HIDDEN)
    output, _ = forced(layer, mine.probs[:tokens], mine.chosen[:tokens])(hidden)
    return output.view(tokens, HIDDEN).detach()


def check_evaluation() -> None:
    """Evaluation between training steps, without gradients, and with other numbers of tokens."""
    wires = itertools.cycle(TRANSPORTS)
    for kind, slots in thinned(itertools.product(("hot", "idle rank"), all_slots())):
        case, wire = case_of(kind, 2, torch.float64), next(wires)
        fields: dict[str, Any] = {"moe_echo_token_transport": wire}
        layer = cloned(2, torch.float64, slots, **fields)
        without = plain(2, torch.float64, **fields)
        first = run(layer, case)
        for tokens in (TOKENS, 4):
            expected = inference(without, case, tokens)
            limit = 1e-12 * expected.abs().max().clamp(min=1)
            for training, context in (
                (True, torch.no_grad), (False, torch.no_grad), (False, torch.inference_mode)
            ):  # fmt: skip
                layer.train(training)
                with context():
                    found = inference(layer, case, tokens)
                assert found.isfinite().all()
                assert (found - expected).abs().max() <= limit, (kind, slots, tokens, training)
        layer.train()
        same_bits(run(layer, case), first)
        StepEnd.of(layer.config).overflow.check()


def check_evaluation_drops_nothing() -> None:
    """A peer capacity that is too small in training does not cut in evaluation."""
    case = case_of("hot", 2, torch.float64)
    fields: dict[str, Any] = {"moe_echo_token_transport": "all_to_all", "moe_num_echo_experts": 0}
    expected = inference(build(2, torch.float64, **fields).eval(), case)
    found = inference(build(2, torch.float64, moe_echo_peer_capacity=0.25, **fields).eval(), case)
    assert torch.equal(found, expected)


def check_inference_first() -> None:
    """Training after the pool was made in inference mode."""
    case = case_of("hot", 2, torch.float64)
    layer = cloned(2, torch.float64).eval()
    with torch.inference_mode():
        inference(layer, case)
    layer.train()
    same_bits(run(layer, case), run(cloned(2, torch.float64), case))


def check_one_rank() -> None:
    """A single rank makes no clones, whatever the setting."""
    assert dist.get_world_size() == 1
    for total in (None, 0, 3, 12):
        layer = build(2, torch.float32, moe_num_echo_experts=total)
        case = case_of("hot", 2, torch.float32)
        with watched(layer) as seen:
            found = run(layer, case)
        assert seen[0][1] is None
        assert WeightPool.of(layer.config).nbytes == 0
        assert WeightPool.of(layer.config).stacks == ()
        same_bits(found, run(plain(2, torch.float32), case))


class FlippingRouter(ForcedRouter):
    """Answers with one routing, then with another."""

    def __init__(self, first: Problem, then: Problem) -> None:
        super().__init__(first.probs, first.chosen)
        self.then, self.calls = then, 0

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        if self.calls == 1:
            return self.probs, self.chosen
        return self.then.probs, self.then.chosen


def check_flipping_router() -> None:
    """Recomputed with another routing, on one rank: planned again, gradients are the new one's."""
    ways = ("collective", "p2p", "symmetric_memory")
    variants = thinned(itertools.product(ways, (True, False), (False, True)))
    cycles = map(itertools.cycle, (all_slots(), TRANSPORTS))
    for slots, wire, (way, again, reentrant) in zip(*cycles, variants, strict=False):
        first = case_of("hot", 2, torch.float64)
        chosen, probs = first.chosen.clone(), first.probs.clone()
        last = chosen.shape[1] - 1  # some tokens of rank 0 now prefer the last expert to the first
        for token in range(TOKENS // 2):
            chosen[token, [0, last]] = torch.tensor([False, True])
            probs[token, last], probs[token, 0] = probs[token, 0], 0.0
        then = replace(first, chosen=chosen, probs=probs)
        layer = cloned(
            2, torch.float64, slots, moe_echo_token_transport=wire,
            moe_echo_recompute_expert_dispatch=again, moe_echo_expert_dispatcher_type=way,
        )  # fmt: skip
        before, expected = dense(layer, first), dense(layer, then)
        with watched(layer) as seen:
            layer.router = FlippingRouter(first.mine(), then.mine())
            found = checkpointed(layer, first, reentrant)
        assert layer.router.calls == 2
        plans = [clones.slot_expert for _, clones in seen if clones is not None]
        assert len(plans) == 2
        scale = gathered(before["output"]).abs().max()
        assert (found["output"] - before["output"]).abs().max() <= 1e-12 * scale
        for name in ("dx", *PARAMETERS):
            assert found[name].isfinite().all()
            limit = 1e-12 * gathered(expected[name]).abs().max()
            assert (found[name] - expected[name]).abs().max() <= limit, (name, slots, wire, way)


def check_calls_in_flight() -> None:
    """Two forward passes of one layer before the first backward, with different clones."""
    for wire, again in itertools.product(TRANSPORTS, (True, False)):
        layer = cloned(
            2, torch.float64, moe_echo_token_transport=wire,
            moe_echo_recompute_expert_dispatch=again,
        )  # fmt: skip
        cases = [case_of("random", 2, torch.float64, 1), case_of("hot", 2, torch.float64, 2)]
        expected = [run(layer, case) for case in cases]
        finish: list[Callable[[], dict[str, Tensor]]] = [forward(layer, case) for case in cases]
        for backward, results in zip(finish, expected, strict=True):
            same_bits(backward(), results)


def check_peer_to_peer() -> None:
    """The same bits as with collectives, one copy of the plan a call, and fewer bytes."""
    variants = itertools.cycle(itertools.product(TRANSPORTS, (True, False)))
    used = 0
    for kind, slots, dtype in thinned(
        itertools.product(KINDS, all_slots(), (torch.float64, torch.bfloat16))
    ):
        wire, again = next(variants)
        fields = {"moe_echo_token_transport": wire, "moe_echo_recompute_expert_dispatch": again}
        case = case_of(kind, 2, dtype)
        expected = run(cloned(2, dtype, slots, **fields), case)
        layer = cloned(2, dtype, slots, moe_echo_expert_dispatcher_type="p2p", **fields)
        with watched(layer) as seen:
            same_bits(run(layer, case), expected)
        transport = layer.token_dispatcher._weights
        assert isinstance(transport, PeerToPeerWeights)
        assert transport.host_copies == 1
        with no_host_sync("raise", ["host_copy.py:HostCopy.read"]):
            run_quietly(layer, case)
        assert transport.host_copies == 2
        ((_, clones),) = seen
        assert clones is not None
        sent = transport.sent_bytes(clones.slot_expert, 1)
        assert sent == (clones.slot_expert >= 0).sum()
        static = CollectiveWeights(transport._group, 1).sent_bytes(clones.slot_expert, 1)
        ranks = dist.get_world_size()
        assert sent <= static == ranks * (ranks - 1) * slots
        used += sent
    assert used > 0


def check_peer_to_peer_reads_the_host_once() -> None:
    layer = cloned(2, torch.float32, moe_echo_expert_dispatcher_type="p2p")
    case = case_of("hot", 2, torch.float32)
    with no_host_sync("record") as sync:
        run_quietly(layer, case)
    assert [hit.kind for hit in sync.hits] == ["Tensor.tolist"]
    assert "host_copy.py" in sync.hits[0].where


def check_one_expert_each() -> None:
    """As many experts as ranks."""
    ranks = dist.get_world_size()
    for kind, wire in itertools.product(("hot", "random"), TRANSPORTS):
        fields: dict[str, Any] = {"num_moe_experts": ranks, "moe_echo_token_transport": wire}
        case = problem(kind, 2, torch.float64, experts=ranks)
        layer = cloned(2, torch.float64, 1, **fields)
        with watched(layer) as seen:
            found = run(layer, case)
        ((rows, _),) = seen
        assert rows <= -(-int(case.chosen.sum()) // ranks)
        oracle = dense(plain(2, torch.float64, **fields), case)
        assert max(errors(found, oracle).values()) <= 1e-12


def frozen_run(layer: EchoMoELayer, case: Problem, needs_hidden: bool) -> dict[str, Tensor | None]:
    """The output and the gradients that there are."""
    mine = case.mine()
    hidden = mine.hidden.reshape(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_(needs_hidden)
    probs = mine.probs.clone().requires_grad_()
    output, _ = forced(layer, probs, mine.chosen)(hidden)
    output.backward(mine.weight.view_as(output))
    leaves = (hidden, probs, *weights(layer), *biases(layer))
    names = (*RESULTS[1:], *BIAS_RESULTS)
    grads = {name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}
    return {RESULTS[0]: output.detach(), **grads}


def check_experts_frozen_on_one_rank() -> None:
    """What is trained elsewhere gets the gradient that it gets when nothing is frozen."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    ways = ("collective", "p2p", "symmetric_memory")
    frozen = itertools.cycle((("linear_fc1", "linear_fc2"), ("linear_fc1",), ("linear_fc2",)))
    for way, needs_hidden in itertools.product(ways, (True, False)):
        names = next(frozen)
        case = case_of("hot", 2, torch.float32)
        settings = {
            "moe_echo_expert_dispatcher_type": way,
            "moe_echo_token_transport": "all_to_all",
            "add_bias_linear": True,
        }
        expected = frozen_run(cloned(2, torch.float32, **settings), case, needs_hidden)
        for who in range(ranks):
            layer = cloned(2, torch.float32, **settings)
            if rank == who:
                for name in names:
                    getattr(layer.experts, name).requires_grad_(False)
            found = frozen_run(layer, case, needs_hidden)
            for name, tensor in found.items():
                module = f"linear_{name[1:].replace('bias', 'fc')}"
                is_frozen = rank == who and module in names
                whole = None if is_frozen else expected[name]
                assert (tensor is None) == (whole is None), (way, who, name)
                assert tensor is None or torch.equal(tensor, whole), (way, who, name)


def check_exception_then_a_clean_step() -> None:
    """All ranks fail in forward, or in backward; the next step is as if nothing had been."""
    case = case_of("hot", 2, torch.float32)
    for again, way in itertools.product((True, False), ("collective", "p2p")):
        fields: dict[str, Any] = {
            "moe_echo_recompute_expert_dispatch": again,
            "moe_echo_expert_dispatcher_type": way,
        }
        expected = run(cloned(2, torch.float32, **fields), case)
        layer = cloned(2, torch.float32, **fields)

        def fail(*_: Any) -> None:
            raise ArithmeticError

        for register in (
            layer.experts.linear_fc2.register_forward_pre_hook,
            layer.experts.linear_fc1.register_full_backward_hook,
        ):
            hook = register(fail)
            with contextlib.suppress(ArithmeticError):
                run(layer, case)
                raise AssertionError("the hook did not fail")
            hook.remove()
            layer.zero_grad()
            same_bits(run(layer, case), expected)
        StepEnd.of(layer.config).overflow.check()


def check_state_dict() -> None:
    """Clones leave no trace in the state: keys, shapes and initial weights."""
    layers = [plain(2, torch.float32), cloned(2, torch.float32)]
    run(layers[1], case_of("hot", 2, torch.float32))
    states = [layer.experts.state_dict() for layer in layers]
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    shards = [layer.experts.sharded_state_dict(prefix="x.") for layer in layers]
    assert list(shards[0]) == list(shards[1])
    for name, shard in shards[0].items():
        assert type(shard) is type(shards[1][name])
        assert shard.key == shards[1][name].key
    for one, other in (layers, reversed(layers)):
        one.experts.load_state_dict(other.experts.state_dict())


def stepped(layers: list[EchoMoELayer], case: Problem) -> float | None:
    """A step of some layers: the error that the self-check found, None if it did not look."""
    for layer in layers:
        run(layer, case)
        run(layer, case)
    return StepEnd.of(layers[0].config).self_check.check()


def check_self_check() -> None:
    """It takes a layer every N steps, is quiet when all is well, and sees what is wrong."""
    for dtype, way, wire in (
        (torch.float64, "collective", "all_gather"),
        (torch.bfloat16, "p2p", "all_to_all"),
    ):
        case = case_of("hot", 2, dtype)
        fields: dict[str, Any] = {
            "moe_num_echo_experts": experts_for(dist.get_world_size()),
            "moe_echo_expert_dispatcher_type": way,
            "moe_echo_token_transport": wire,
            "moe_echo_check_every": 2,
            "moe_received_token_capacity": 1.1,
        }
        layers = layers_of(2, 2, dtype, **fields)
        found = [stepped(layers, case) for _ in range(4)]
        assert [error is None for error in found] == [False, True, False, True]
        assert max(found[0] or 0, found[2] or 0) <= (1e-12 if dtype == torch.float64 else 0.03)

        # Wrong weights in the slots of one rank, of the layer that is looked at first.
        push = type(layers[0].token_dispatcher._weights).push

        def wrong(self: Any, weight: Tensor, slot_expert: Tensor, announced: Any, slots: Tensor,
                  push: Any = push) -> None:  # fmt: skip
            push(self, weight, slot_expert, announced, slots)
            if dist.get_rank() == 1:
                slots *= 1.1

        with mock.patch.object(type(layers[0].token_dispatcher._weights), "push", wrong):
            message = failing(layers, case)
        assert "from itself without" in message
        assert stepped(layers, case) is None

        # A plan that one rank makes differently.
        record = SelfCheck.record

        def other(self: Any, actual: Tensor, expected: Tensor, plan: ClonePlan, *rest: Any,
                  record: Any = record) -> None:  # fmt: skip
            moved = plan.allocation.roll(dist.get_rank(), 0)
            record(self, actual, expected, replace(plan, allocation=moved), *rest)

        with mock.patch.object(SelfCheck, "record", other):
            message = failing(layers, case)
        assert "planned different clones" in message


def failing(layers: list[EchoMoELayer], case: Problem) -> str:
    """The message of a step that must fail."""
    try:
        stepped(layers, case)
    except EchoCheckError as error:
        return str(error)
    raise AssertionError("nothing was noticed")


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main(globals())
