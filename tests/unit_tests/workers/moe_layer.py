"""EchoMoELayer over all ranks against a dense loop over experts; the argument names a check.

A check is a function ``check_...`` below. Every rank draws the tokens and routings of all ranks
and takes its own; rank 0 prints the worst errors.
"""

import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.utils.deterministic
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from moe_cases import (
    HIDDEN,
    ROUTINGS,
    ForcedRouter,
    ShapeRecorder,
    experts_for,
    forced,
    layer_config,
    router_probs,
    routing_map,
)
from torch import Tensor

from megatron_echo import cpu_backend
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.step.overflow import MoEOverflowError
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

SEQUENCE, BATCH = 6, 2
TOKENS = SEQUENCE * BATCH  # on each rank
TRANSPORTS = ("all_gather", "all_to_all")
RESULTS = ("output", "dx", "dprobs", "dfc1", "dfc2")
BIAS_RESULTS = ("dbias1", "dbias2")


@dataclass(frozen=True)
class Problem:
    """Tokens, routing and output gradients of all ranks, ``[R * T, ...]``."""

    hidden: Tensor
    chosen: Tensor
    probs: Tensor
    weight: Tensor

    def mine(self) -> "Problem":
        """The part of this rank."""
        return Problem(*(t.chunk(dist.get_world_size())[dist.get_rank()] for t in self.parts()))

    def parts(self) -> tuple[Tensor, ...]:
        return self.hidden, self.chosen, self.probs, self.weight


def problem(
    kind: str,
    topk: int,
    dtype: torch.dtype,
    seed: int = 0,
    experts: int | None = None,
    tokens: int = TOKENS,
) -> Problem:
    """A problem of so many tokens on each rank."""
    tokens *= dist.get_world_size()
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(2, tokens, HIDDEN, generator=generator, dtype=torch.float64)
    experts = experts or experts_for(dist.get_world_size())
    chosen = routing_map(kind, tokens, experts, topk, seed)
    wide = torch.promote_types(dtype, torch.float32)
    return Problem(hidden.to(dtype), chosen, router_probs(chosen, wide), weight.to(dtype))


def build(topk: int, dtype: torch.dtype, **fields: Any) -> EchoMoELayer:
    """A layer, its clones by ``collective``, as in a graph; the same weights on every call."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    fields = {"moe_echo_expert_dispatcher_type": "collective", **fields}
    return EchoMoELayer(layer_config(dist.get_world_size(), topk, dtype, **fields))


def run(layer: EchoMoELayer, case: Problem) -> dict[str, Tensor]:
    """Forward and backward of this rank's part: output and all gradients."""
    finish = forward(layer, case)
    return finish()


def forward(layer: EchoMoELayer, case: Problem) -> Callable[[], dict[str, Tensor]]:
    """Forward; the backward pass and all results when called."""
    mine = case.mine()
    hidden = mine.hidden.reshape(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_()
    probs = mine.probs.clone().requires_grad_()
    output, bias = forced(layer, probs, mine.chosen)(hidden)
    assert bias is None
    assert (output.shape, output.dtype) == (hidden.shape, hidden.dtype)

    def backward() -> dict[str, Tensor]:
        parameters = [*weights(layer), *biases(layer)]
        for parameter in parameters:
            parameter.grad = None
        output.backward(mine.weight.view_as(output))
        grads = [leaf.grad for leaf in (hidden, probs, *parameters)]
        tensors = [output.detach(), *(grad for grad in grads if grad is not None)]
        tensors[:2] = [tensor.view(TOKENS, HIDDEN) for tensor in tensors[:2]]
        names = RESULTS + (BIAS_RESULTS if biases(layer) else ())
        return dict(zip(names, tensors, strict=True))

    return backward


def weights(layer: EchoMoELayer) -> list[Tensor]:
    return [layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight]


def biases(layer: EchoMoELayer) -> list[Tensor]:
    """Of both projections, or none."""
    both = (layer.experts.linear_fc1.bias, layer.experts.linear_fc2.bias)
    return [bias for bias in both if bias is not None]


def gathered(tensor: Tensor) -> Tensor:
    whole = tensor.new_empty(dist.get_world_size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(whole, tensor.detach().contiguous())
    return whole


def whole(weight: Tensor, slices: int, is_fc1: bool) -> Tensor:
    """All experts ``[E, out, in]`` from the parts of all ranks, of which ``slices`` share F."""
    parts = gathered(weight).unflatten(0, (-1, slices, len(weight)))  # [R, t, m, out, in]
    if not is_fc1:
        return parts.permute(0, 2, 3, 1, 4).flatten(3, 4).flatten(0, 1)
    return parts.unflatten(3, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 4).flatten(0, 1)


def part(weights: Tensor, slices: int, is_fc1: bool) -> Tensor:
    """Of all experts what this rank holds, as :func:`whole` puts them together."""
    expert_rank, rank = divmod(dist.get_rank(), slices)
    mine = weights.chunk(dist.get_world_size() // slices)[expert_rank]
    if not is_fc1:
        return mine.chunk(slices, dim=2)[rank]
    return torch.cat([half.chunk(slices, dim=1)[rank] for half in mine.chunk(2, dim=1)], dim=1)


def dense(layer: EchoMoELayer, case: Problem, slices: int = 1) -> dict[str, Tensor]:
    """The same from all tokens and the weights of all experts, expert by expert, in fp64."""
    hidden, probs = (t.double().clone().requires_grad_() for t in (case.hidden, case.probs))
    fc1, fc2 = (
        whole(linear.weight.double(), slices, linear is layer.experts.linear_fc1).requires_grad_()
        for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2)
    )
    added = [gathered(bias.double()).requires_grad_() for bias in biases(layer)]
    output = torch.zeros_like(hidden)
    for expert in range(len(fc1)):
        bias1, bias2 = (bias[expert] for bias in added) if added else (0, 0)
        factor = probs[:, expert, None]
        on_input, behind = (factor, 1) if layer.config.moe_apply_probs_on_input else (1, factor)
        inner = gated_unit(layer.config, (hidden * on_input) @ fc1[expert].T + bias1)
        result = (inner @ fc2[expert].T + bias2) * behind
        output = output + torch.where(case.chosen[:, expert, None], result, 0)
    leaves = (hidden, probs, fc1, fc2, *added)
    grads = torch.autograd.grad(output, leaves, case.weight.double())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    of_tokens = (tensor.chunk(ranks)[rank] for tensor in (output.detach(), *grads[:2]))
    of_weights = (part(grad, slices, grad is grads[2]) for grad in grads[2:4])
    of_biases = (grad.chunk(ranks)[rank] for grad in grads[4:])
    names = RESULTS + (BIAS_RESULTS if added else ())
    return dict(zip(names, (*of_tokens, *of_weights, *of_biases), strict=True))


def gated_unit(config: Any, inner: Tensor) -> Tensor:
    """The activation of an expert, with the clamp and the offset of the configuration."""
    gate, up = inner.chunk(2, dim=1)
    limit = config.activation_func_clamp_value
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return config.activation_func(gate) * (up + config.glu_linear_offset)


@functools.cache
def dense_problem(kind: str, topk: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """:func:`dense` of a problem and the weights that every layer has here."""
    return dense(build(topk, dtype), problem(kind, topk, dtype))


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference over the largest value on all ranks, of each tensor."""
    assert all(actual[name].shape == expected[name].shape for name in expected)
    differences = [(actual[name].double() - expected[name]).abs().max() for name in expected]
    sizes = torch.stack([*differences, *(expected[name].abs().max() for name in expected)])
    sizes = torch.where(sizes.isfinite(), sizes, torch.inf)  # a maximum over ranks may lose NaN
    dist.all_reduce(sizes, dist.ReduceOp.MAX)
    pairs = zip(*sizes.view(2, -1).tolist(), strict=True)
    found = [error / scale if scale else error for error, scale in pairs]
    return dict(zip(expected, found, strict=True))


def same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def thinned(cases: Iterable[tuple]) -> list[tuple]:
    """Each N-th case, N being ``EVERY`` of the environment; a prime that meets all settings."""
    return list(cases)[:: int(os.environ.get("EVERY", "1"))]


def combinations(
    topks: tuple[int, ...] = (1, 3), alignments: tuple[int, ...] = (1, 16)
) -> list[tuple[str, int, dict[str, Any]]]:
    """Routing, top-k, and the fields of the configuration."""
    return [
        (kind, topk, {"moe_echo_token_transport": wire, "moe_echo_row_alignment": alignment})
        for kind, topk, wire, alignment in thinned(
            itertools.product(ROUTINGS, topks, TRANSPORTS, alignments)
        )
    ]


def against_dense(dtype: torch.dtype, limit: float, alignments: tuple[int, ...]) -> None:
    worst = dict.fromkeys(RESULTS, 0.0)
    for kind, topk, fields in combinations((1, 2, 3, 4), alignments):
        layer, case = build(topk, dtype, **fields), problem(kind, topk, dtype)
        found = errors(run(layer, case), dense_problem(kind, topk, dtype))
        assert max(found.values()) <= limit, (kind, topk, fields, found)
        worst = {name: max(worst[name], found[name]) for name in RESULTS}
        StepEnd.of(layer.config).overflow.check()  # auto never overflows
    report(f"worst errors in {dtype}", {name: f"{value:.1e}" for name, value in worst.items()})


def check_dense_fp64() -> None:
    against_dense(torch.float64, 1e-12, (1, 16))


def check_dense_fp32() -> None:
    against_dense(torch.float32, 1e-5, (16,))


def check_dense_bf16() -> None:
    against_dense(torch.bfloat16, 0.04, (16,))


def fill_uninitialized_memory(on: bool) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = on  # type: ignore[attr-defined]


def check_same_bits() -> None:
    """Twice the same; and the same when every uninitialised tensor is full of NaN."""
    for dtype, (kind, topk, fields) in itertools.product(
        (torch.float64, torch.float32, torch.bfloat16), combinations((3,), (16,))
    ):
        layer, case = build(topk, dtype, **fields), problem(kind, topk, dtype)
        first = run(layer, case)
        same_bits(run(layer, case), first)
        torch.use_deterministic_algorithms(True)
        try:
            fill_uninitialized_memory(False)
            unfilled = run(layer, case)
            fill_uninitialized_memory(True)
            assert torch.empty(3).isnan().all()
            same_bits(run(layer, case), unfilled)
        finally:
            torch.use_deterministic_algorithms(False)
        same_bits(unfilled, first)


def check_nan_weights() -> None:
    """NaN in the weights of one expert reaches the tokens that go there, and no other."""
    ranks = dist.get_world_size()
    broken = experts_for(ranks) - 2  # on the last rank
    for (kind, topk, fields), dtype in itertools.product(
        combinations(alignments=(16,)), (torch.float64, torch.float32)
    ):
        case = problem(kind, topk, dtype)
        clean = run(build(topk, dtype, **fields), case)
        layer = build(topk, dtype, **fields)
        local = broken - dist.get_rank() * layer.num_local_experts
        if 0 <= local < layer.num_local_experts:
            with torch.no_grad():
                layer.experts.linear_fc1.weight[local] = float("nan")
                layer.experts.linear_fc2.weight[local] = float("nan")
        found = run(layer, case)
        touched = case.mine().chosen[:, broken]
        for name in ("output", "dx", "dprobs"):
            assert torch.equal(found[name][~touched], clean[name][~touched]), (name, kind, fields)
        assert found["output"][touched].isnan().all()
        others = torch.arange(layer.num_local_experts) != local
        for name in ("dfc1", "dfc2"):
            assert torch.equal(found[name][others], clean[name][others]), (name, kind, fields)


def check_special_choices() -> None:
    """A choice of probability 0 is computed and has a gradient; no choice is no output."""
    for topk, wire in itertools.product((1, 3), TRANSPORTS):
        layer = build(topk, torch.float64, moe_echo_token_transport=wire)
        case = problem("random", topk, torch.float64)
        zero = Problem(case.hidden, case.chosen, torch.zeros_like(case.probs), case.weight)
        found = run(layer, zero)
        assert (found["output"] == 0).all()
        assert ((found["dprobs"] != 0) == zero.mine().chosen).all()
        assert max(errors(found, dense(layer, zero)).values()) <= 1e-12

        padded = problem("padding", topk, torch.float64)
        found, empty = run(layer, padded), ~padded.mine().chosen.any(1)
        assert empty.any()
        assert not empty.all()
        assert (found["output"][empty] == 0).all()
        assert (found["dx"][empty] == 0).all()
        assert (found["dprobs"][~padded.mine().chosen] == 0).all()

        found = run(layer, problem("no tokens", topk, torch.float64))
        assert all((tensor == 0).all() for tensor in found.values())


def check_no_host_sync() -> None:
    """Forward and backward read nothing on the host, with a forced routing and with a router."""
    for dtype, (kind, topk, fields) in itertools.product(
        (torch.float64, torch.bfloat16), combinations()
    ):
        layer, case = build(topk, dtype, **fields), problem(kind, topk, dtype)
        with no_host_sync("raise") as sync:
            run_quietly(layer, case)
        assert sync.hits == []
    for wire in TRANSPORTS:
        layer = build(2, torch.float32, moe_echo_token_transport=wire)
        hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
        with no_host_sync("raise") as sync:
            output, _ = layer(hidden)
            output.sum().backward()
        assert sync.hits == []
        assert layer.router.weight.grad is not None


def run_quietly(layer: EchoMoELayer, case: Problem) -> None:
    """Forward and backward without the assertions of :func:`run`, which read."""
    mine = case.mine()
    hidden = mine.hidden.reshape(SEQUENCE, BATCH, HIDDEN).clone().requires_grad_()
    layer.router = ForcedRouter(mine.probs.clone().requires_grad_(), mine.chosen)
    output, _ = layer(hidden)
    output.backward(mine.weight.view_as(output))


def check_static_shapes() -> None:
    """The same operators on tensors of the same shapes, for every routing and on every rank."""
    for topk, wire, alignment in thinned(itertools.product((1, 3), TRANSPORTS, (1, 16))):
        fields = {"moe_echo_token_transport": wire, "moe_echo_row_alignment": alignment}
        seen = set()
        for kind in (*ROUTINGS, "no tokens"):
            layer, case = build(topk, torch.float32, **fields), problem(kind, topk, torch.float32)
            with ShapeRecorder() as recorder:
                run_quietly(layer, case)
            seen.add(tuple(recorder.made))
        assert len(seen) == 1, (topk, wire, alignment)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, seen.pop())
        assert len(everyone[0]) > 100
        assert all(made == everyone[0] for made in everyone)


def overflow_message(layer: EchoMoELayer) -> str:
    """What the check raises: the same on every rank, and only once."""
    check, words = StepEnd.of(layer.config).overflow, ""
    try:
        check.check()
    except MoEOverflowError as error:
        words = str(error)
    assert words, "nothing was raised"
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, words)
    assert set(everyone) == {words}, everyone
    check.check()
    return words


def advised(words: str, flag: str) -> float:
    found = re.search(rf"--moe-{flag} ([0-9.]+) or more", words)
    assert found is not None, words
    return float(found[1])


def kept(case: Problem, rows: int, alignment: int) -> tuple[Problem, int, int]:
    """The problem without the pairs beyond a buffer's rows, their number, and the rows needed."""
    ranks, chosen = dist.get_world_size(), case.chosen.clone()
    needs = []
    for experts in torch.arange(chosen.shape[1]).chunk(ranks):
        start = 0
        for expert in experts.tolist():
            tokens = chosen[:, expert].nonzero().flatten()
            chosen[tokens[max(rows - start, 0) :], expert] = False
            start += -(-len(tokens) // alignment) * alignment
        needs.append(start)
    probs = torch.where(chosen, case.probs, 0)
    dropped = int(case.chosen.sum() - chosen.sum())
    return replace(case, chosen=chosen, probs=probs), dropped, max(needs)


def check_overflow_raises() -> None:
    """One hot rank is enough; the capacity in the message suffices and nothing else changes."""
    seen = set()
    for (kind, topk, fields), capacity in itertools.product(combinations((2,)), (0.3, 0.9)):
        case, alignment = problem(kind, topk, torch.float64), fields["moe_echo_row_alignment"]
        layer = build(topk, torch.float64, moe_received_token_capacity=capacity, **fields)
        rows = layer.token_dispatcher.buffer_rows(TOKENS)
        run(layer, case)
        _, dropped, need = kept(case, rows, alignment)
        seen.add(need > rows)
        if need <= rows:
            StepEnd.of(layer.config).overflow.check()
            continue
        words = overflow_message(layer)
        assert words.startswith(f"Token-expert pairs of this step ({dropped}) had"), (
            words,
            dropped,
        )
        enough = advised(words, "received-token-capacity")
        if alignment == 1:
            assert enough == math.ceil(100 * need / (TOKENS * topk)) / 100
        layer = build(topk, torch.float64, moe_received_token_capacity=enough, **fields)
        expected = dense_problem(kind, topk, torch.float64)
        assert max(errors(run(layer, case), expected).values()) <= 1e-12
        StepEnd.of(layer.config).overflow.check()
    assert True in seen
    assert seen == {True, False} or dist.get_world_size() == 1


def check_overflow_drops() -> None:
    """What was dropped is counted, over layers and steps, and is as if it had not been chosen."""
    for (kind, topk, fields), dtype in itertools.product(
        combinations((2,)), (torch.float64, torch.float32)
    ):
        case = problem(kind, topk, dtype)
        layer = build(
            topk, dtype, moe_echo_overflow="drop", moe_received_token_capacity=0.4, **fields
        )
        rows = layer.token_dispatcher.buffer_rows(TOKENS)
        rest, dropped, _ = kept(case, rows, fields["moe_echo_row_alignment"])
        check = StepEnd.of(layer.config).overflow
        for step in (1, 2):
            found = errors(run(layer, case), dense(layer, rest))
            assert max(found.values()) <= (1e-12 if dtype == torch.float64 else 1e-5), found
            check.check()
            assert check.dropped == step * dropped, (check.dropped, dropped)
        assert dropped > 0 or kind != "hot" or dist.get_world_size() == 1 or rows > TOKENS * topk


def check_evaluation_never_overflows() -> None:
    """A small capacity is for training; the mode may change between two calls."""
    for kind, topk, fields in combinations(alignments=(1,)):
        case = problem(kind, topk, torch.float64)
        layer = build(topk, torch.float64, moe_received_token_capacity=0.1, **fields)
        expected = dense_problem(kind, topk, torch.float64)
        layer.eval()
        with torch.no_grad():
            output, _ = forced(layer, case.mine().probs, case.mine().chosen)(
                case.mine().hidden.view(SEQUENCE, BATCH, HIDDEN)
            )
        error = (output.view(TOKENS, HIDDEN) - expected["output"]).abs().max()
        assert error <= 1e-12 * gathered(expected["output"]).abs().max().clamp(min=1)
        StepEnd.of(layer.config).overflow.check()
        layer.train()
        run(layer, case)
        overflow_message(layer)


def check_recomputation() -> None:
    """The layer recomputed in backward: the same bits, and an overflow is counted once."""
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    small = {"moe_echo_overflow": "drop", "moe_received_token_capacity": 0.4}
    for (kind, topk, fields), limits in itertools.product(
        combinations(alignments=(1,)), ({}, small)
    ):
        case = problem(kind, topk, torch.float32)
        plain = build(topk, torch.float32, **fields, **limits)
        again = build(topk, torch.float32, **fields, **limits, **recompute)
        assert again.moe_layer_recompute
        same_bits(run(again, case), run(plain, case))
        counts = []
        for layer in (plain, again):
            StepEnd.of(layer.config).overflow.check()
            counts.append(StepEnd.of(layer.config).overflow.dropped)
        assert counts[0] == counts[1]
        assert counts[0] > 0 or kind != "hot" or not limits


def check_calls_in_flight() -> None:
    """Two forward passes before the first backward, as a pipeline has them."""
    for wire in TRANSPORTS:
        layer = build(2, torch.float64, moe_echo_token_transport=wire)
        cases = [problem("random", 2, torch.float64, 1), problem("hot", 2, torch.float64, 2)]
        expected = [run(layer, case) for case in cases]
        finish = [forward(layer, case) for case in cases]
        for backward, results in zip(finish, expected, strict=True):
            same_bits(backward(), results)


def cut(case: Problem, places: int) -> tuple[Problem, int]:
    """The problem without what the all-to-all's places have no room for, and its size."""
    ranks, chosen = dist.get_world_size(), case.chosen.clone()
    for source in range(ranks):
        tokens = torch.arange(source * TOKENS, (source + 1) * TOKENS)
        for experts in torch.arange(chosen.shape[1]).chunk(ranks):
            wanting = tokens[chosen[tokens][:, experts].any(1)]
            for token in wanting[places:]:
                chosen[token, experts] = False
    probs = torch.where(chosen, case.probs, 0)
    return replace(case, chosen=chosen, probs=probs), int(case.chosen.sum() - chosen.sum())


def check_peer_capacity() -> None:
    """Tokens beyond a peer's places are counted and as if not chosen; or the message is right."""
    fields: dict[str, Any] = {"moe_echo_token_transport": "all_to_all"}
    for part, kind, topk in thinned(itertools.product((0.2, 0.5, 0.75), ROUTINGS, (1, 3))):
        case = problem(kind, topk, torch.float64)
        limited = {**fields, "moe_echo_peer_capacity": part}
        layer = build(topk, torch.float64, moe_echo_overflow="drop", **limited)
        rest, dropped = cut(case, math.ceil(TOKENS * part))
        assert max(errors(run(layer, case), dense(layer, rest)).values()) <= 1e-12
        check = StepEnd.of(layer.config).overflow
        check.check()
        assert check.dropped == dropped, (kind, topk, part, check.dropped, dropped)
        assert dropped > 0 or kind != "hot"
        layer = build(topk, torch.float64, **limited)
        run(layer, case)
        if not dropped:
            StepEnd.of(layer.config).overflow.check()
            continue
        words = overflow_message(layer)
        assert words.startswith(f"Token-expert pairs of this step ({dropped}) had"), (
            words,
            dropped,
        )
        limited["moe_echo_peer_capacity"] = advised(words, "echo-peer-capacity")
        layer = build(topk, torch.float64, **limited)
        expected = dense_problem(kind, topk, torch.float64)
        assert max(errors(run(layer, case), expected).values()) <= 1e-12
        StepEnd.of(layer.config).overflow.check()


def check_advice_of_two_limits() -> None:
    """Both capacities of a message together suffice, whichever of the two was too small."""
    wire: dict[str, Any] = {"moe_echo_token_transport": "all_to_all"}
    for kind, capacity in itertools.product(("hot", "random"), (None, 0.5)):
        case = problem(kind, 2, torch.float64)
        limits = {"moe_received_token_capacity": capacity, "moe_echo_peer_capacity": 0.25}
        layer = build(2, torch.float64, **wire, **limits)
        run(layer, case)
        words = overflow_message(layer)
        limits["moe_echo_peer_capacity"] = advised(words, "echo-peer-capacity")
        if capacity is not None:  # the default, auto, suffices as it is and is not named
            enough = advised(words, "received-token-capacity")
            limits["moe_received_token_capacity"] = enough
        else:
            assert "received-token-capacity" not in words
        layer = build(2, torch.float64, **wire, **limits)
        run(layer, case)
        StepEnd.of(layer.config).overflow.check()


def report(title: str, values: dict[str, str]) -> None:
    if dist.get_rank() == 0:
        print(f"{title}, {dist.get_world_size()} ranks:", values, flush=True)


def main(checks: dict[str, Any]) -> None:
    """Run the checks that the command line names, on all ranks together."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    for name in sys.argv[1:]:
        checks[f"check_{name}"]()
    dist.barrier()


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main(globals())
