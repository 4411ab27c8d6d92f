"""Router losses over several ranks; the argument names a check, a function ``check_...`` below.

Each rank takes its part of one global batch, cut over microbatches, data-parallel ranks and the
ranks that share sequences. Gradients are then combined as Megatron does: summed over
tensor-parallel ranks and averaged over the others, or, with ``--calculate-per-token-loss``, summed
and divided by the tokens.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import checkpoint, model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "routing"))

from loss_reference import gradients
from router_cases import (
    ALL_LOSSES,
    EXPERTS,
    SCORES,
    TOPK,
    build,
    config,
    end_step,
    logged,
    loss_gradient,
    only,
    set_scale,
    tokens,
)

from megatron_echo import cpu_backend
from megatron_echo.routing.router import EchoRouter
from megatron_echo.step.load_metrics import read_load_metrics
from megatron_echo.testing import no_host_sync

LENGTH, SEQUENCES = 16, 8
UNEVEN = (16, 3, 9, 16, 1, 12, 0, 5)
Layout = tuple[int, int]
"""Tensor- and context-parallel size; the rest is data parallel."""


def layouts() -> list[Layout]:
    ranks = dist.get_world_size()
    sizes = [(tp, cp) for tp in (1, 2, 4) for cp in (1, 2, 4) if ranks % (tp * cp) == 0]
    return [(tp, cp) for tp, cp in sizes if tp * cp <= ranks]


def enter(layout: Layout) -> None:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout[0], context_parallel_size=layout[1]
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    destroy_moe_metrics_tracker()


def mine(whole: Tensor, microbatches: int) -> list[Tensor]:
    """What this rank has of each microbatch of ``[S, B, ...]``."""
    tp, cp = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
    )
    place = parallel_state.get_context_parallel_rank() * tp
    place += parallel_state.get_tensor_model_parallel_rank()
    rows = whole.chunk(tp * cp)[place]
    batches = rows.chunk(parallel_state.get_data_parallel_world_size(), dim=1)
    batch = batches[parallel_state.get_data_parallel_rank()]
    return [part.contiguous() for part in batch.chunk(microbatches, dim=1)]


def main_loss(probs: Tensor, valid: Tensor | None) -> Tensor:
    """A sum over tokens."""
    each = (probs * torch.arange(probs.shape[1])).square().sum(1)
    return each.sum() if valid is None else torch.where(valid.reshape(-1), each, 0).sum()


def combined(grad: Tensor, divisor: int | None) -> Tensor:
    """What Megatron makes of the gradients of all ranks."""
    grad = grad.clone()
    dist.all_reduce(grad)
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return grad / (ranks if divisor is None else divisor)


def step(
    router: TopKRouter, microbatches: int, lengths: tuple[int, ...] | None, strength: float
) -> Tensor:
    """A step in GPipe's order: the combined gradient of ``strength`` times a main loss."""
    padding = None
    if lengths is not None:
        padding = torch.arange(LENGTH)[:, None] >= torch.tensor(lengths)
    per_token, cp = (
        router.config.calculate_per_token_loss,
        parallel_state.get_context_parallel_world_size(),
    )
    set_scale(1.0 if per_token else cp / microbatches)
    parts = mine(tokens(LENGTH, SEQUENCES), microbatches)
    masks = [None] * microbatches if padding is None else mine(padding, microbatches)
    router.weight.grad, losses = None, []
    for hidden, mask in zip(parts, masks, strict=True):
        probs, _ = router(hidden, mask)
        value = main_loss(probs, None if mask is None else ~mask)
        if not per_token:
            local = hidden.shape[0] * hidden.shape[1]
            value = value / (local * parallel_state.get_tensor_model_parallel_world_size())
            value = value / microbatches
        losses.append(strength * value)
    for loss in losses:
        loss.backward()
    if isinstance(router, EchoRouter) and router.losses is not None:
        end_step(router)
    count = LENGTH * SEQUENCES if lengths is None else sum(lengths)
    return combined(router.weight.grad, count if per_token else None)


def ratio(
    kind: type[TopKRouter],
    microbatches: int,
    lengths: tuple[int, ...] | None,
    expected: tuple[Tensor, Tensor],
    **fields: Any,
) -> float:
    """Strength of the losses' gradient against that of the main loss, 1.0 as in one batch."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    made = dict(tensor_model_parallel_size=tp, sequence_parallel=tp > 1, **fields)
    auxiliary = step(build(kind, config(**made)), microbatches, lengths, 0.0)
    off = {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": None}
    main = step(build(kind, config(**{**made, **off})), microbatches, lengths, 1.0)
    shares = [(a * e).sum() / (e * e).sum() for a, e in zip((auxiliary, main), expected)]
    for share, actual, whole in zip(shares, (auxiliary, main), expected):
        assert (actual - share * whole).norm() <= 1e-6 * actual.norm()  # the same direction
    return float(shares[0] / shares[1])


def one_batch(lengths: tuple[int, ...] | None, **fields: Any) -> tuple[Tensor, Tensor]:
    """Losses' and main loss's gradient of the whole batch on one rank, without padding."""
    return gradients(tokens(LENGTH, SEQUENCES), lengths, build, config(**fields))


def check_cuts() -> None:
    """Every cut of the batch: our losses are as strong as in one batch, to 1e-6."""
    for layout in layouts():
        enter(layout)
        dp = parallel_state.get_data_parallel_world_size()
        for kind, microbatches in itertools.product(("aux", "seq", "global", "z"), (1, 2, 4)):
            if SEQUENCES % (dp * microbatches) or (kind == "aux" and dp * microbatches > 1):
                continue  # a loss of a microbatch is another one if the microbatch is
            fields = {**SCORES["pre_softmax" if microbatches == 1 else "sigmoid"], **only(kind)}
            expected = one_batch(None, **fields)
            found = ratio(EchoRouter, microbatches, None, expected, **fields)
            assert abs(found - 1) < 1e-6, (layout, kind, microbatches, found)
        parallel_state.destroy_model_parallel()


def check_cuts_with_padding() -> None:
    """The same for sequences of all lengths, with ``--calculate-per-token-loss``."""
    for layout in layouts():
        enter(layout)
        dp = parallel_state.get_data_parallel_world_size()
        for kind, microbatches in itertools.product(("seq", "global", "z"), (1, 2, 4)):
            if SEQUENCES % (dp * microbatches):
                continue
            fields = {**only(kind), "calculate_per_token_loss": True}
            expected = one_batch(UNEVEN, **fields)
            found = ratio(EchoRouter, microbatches, UNEVEN, expected, **fields)
            assert abs(found - 1) < 1e-6, (layout, kind, microbatches, found)
        parallel_state.destroy_model_parallel()


def check_megatron_divides_by_data_parallel() -> None:
    """D1: Megatron's global loss has 1/dp of the strength that it has on one rank."""
    fields = only("global")
    for layout in layouts():
        enter(layout)
        dp = parallel_state.get_data_parallel_world_size()
        expected = one_batch(None, **fields)
        assert abs(ratio(TopKRouter, 1, None, expected, **fields) - 1 / dp) < 1e-6
        assert abs(ratio(EchoRouter, 1, None, expected, **fields) - 1) < 1e-6
        parallel_state.destroy_model_parallel()


def check_z_with_padding() -> None:
    """D3: the mean over all valid tokens; Megatron takes a mean over ranks of means."""
    for layout in layouts():
        enter(layout)
        padding = torch.arange(LENGTH)[:, None] >= torch.tensor(UNEVEN)
        (part,), (mask,) = mine(tokens(LENGTH, SEQUENCES), 1), mine(padding, 1)
        values, hidden = {}, tokens(LENGTH, SEQUENCES)
        for kind in (EchoRouter, TopKRouter):
            router = build(kind, config(**only("z")))
            set_scale(float(parallel_state.get_context_parallel_world_size()))
            grad = combined(loss_gradient(router, part, mask), None)
            weight = router.weight.detach().clone().requires_grad_()
            z = (hidden @ weight.T)[~padding].logsumexp(-1).square().mean()
            z.backward()
            values[kind] = (grad - 0.1 * weight.grad).norm() / (0.1 * weight.grad).norm()
            found = logged()["z_loss"][0]
            if kind is EchoRouter:
                assert abs(found - z) < 1e-6 * z
        assert values[EchoRouter] < 1e-6
        assert values[TopKRouter] > 0.05, values
        parallel_state.destroy_model_parallel()


def check_logged_values() -> None:
    """What is logged is the loss over its coefficient, as on one rank, whatever the cut."""
    names = {
        "seq": "seq_load_balancing_loss",
        "global": "global_load_balancing_loss",
        "z": "z_loss",
    }
    for layout, (kind, name) in itertools.product(layouts(), names.items()):
        enter(layout)
        expected = loss_value(kind)
        for per_token in (False, True):
            fields = {**only(kind), "calculate_per_token_loss": per_token}
            step(build(EchoRouter, config(**fields)), 1, None, 1.0)
            found = logged()[name][0]
            group = parallel_state.get_data_parallel_group()
            dist.all_reduce(found, group=group)  # as Megatron: the mean over data parallel ranks
            found /= group.size()
            assert abs(found - expected) < 1e-6 * expected, (layout, kind, found, expected)
        parallel_state.destroy_model_parallel()


def loss_value(kind: str) -> Tensor:
    """The loss of the whole batch, without its coefficient."""
    logits = build(TopKRouter, config()).gating(tokens(LENGTH, SEQUENCES)).detach()
    if kind == "z":
        return logits.logsumexp(-1).square().mean()
    scores = logits.float().softmax(-1)
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(-1, logits.topk(TOPK).indices, True)
    groups = [(0, 1)] if kind == "global" else [(0,)]
    fractions, means = chosen.float().mean(*groups) / TOPK, scores.mean(*groups)
    return EXPERTS * (fractions * means).sum(-1).mean()


def check_one_collective() -> None:
    """One asynchronous all-reduce a microbatch for all layers, started before any backward."""
    enter((1, 1))
    made = config(**only("global"), num_layers=3)
    routers = [build(EchoRouter, made, layer) for layer in range(1, 4)]
    calls: list[tuple[str, tuple[int, ...]]] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(("async" if kwargs.get("async_op") else "blocking", tuple(tensor.shape)))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = counted
    try:
        for recompute in (False, True):
            calls.clear()
            waiting = []
            for microbatch in range(3):
                hidden = tokens(LENGTH, 1, 10 * dist.get_rank() + microbatch)
                waiting.append(of_chunk(routers, hidden.requires_grad_(), recompute))
            launched = len(calls)
            for loss in waiting:
                loss.backward()
            assert calls == [("async", (3, routers[0].num_experts))] * 3, calls
            assert launched == 3, launched  # before any backward pass
            end_step(routers[0])
    finally:
        dist.all_reduce = original


def of_chunk(routers: list[TopKRouter], hidden: Tensor, recompute: bool) -> Tensor:
    def forward(x: Tensor) -> Tensor:
        return torch.stack([router(x.tanh())[0].sum() for router in routers]).sum()

    return checkpoint(forward, False, hidden) if recompute else forward(hidden)


def check_load_metrics() -> None:
    """The counts of all ranks and microbatches; a rank without routers joins in."""
    enter((1, 1))
    router = build(EchoRouter, config(**only("seq")))
    total = torch.zeros(EXPERTS, dtype=torch.int64)
    for microbatch in range(2):
        hidden = tokens(LENGTH, 1, 10 * dist.get_rank() + microbatch)
        total += router(hidden)[1].sum(0)
    end_step(router)
    dist.all_reduce(total)
    found = read_load_metrics(router.losses.exchange)
    assert found["expert_overload"] == found["expert_overload_max"]
    assert abs(found["expert_overload"] - float(total.max() / total.double().mean())) < 1e-12
    assert found["dead_experts"] == float((total == 0).sum())
    assert 0 < found["expert_entropy"] < 1
    assert read_load_metrics(None) == {}


def check_virtual_stages() -> None:
    """Two chunks of two layers, interleaved, recomputed: as one after the other."""
    enter((1, 1))
    order = ["F00", "F10", "F01", "F11", "B10", "B00", "F02", "F12", "B11", "B01", "B12", "B02"]
    plain = [f"{kind}{chunk}{m}" for kind in "FB" for m in range(3) for chunk in range(2)]
    found = []
    for schedule, recompute in itertools.product((order, plain), (False, True)):
        made = config(**ALL_LOSSES, num_layers=4, moe_echo_aux_count_source="microbatch")
        routers = [build(EchoRouter, made, layer) for layer in range(1, 5)]
        waiting: dict[str, Tensor] = {}
        with no_host_sync():
            for kind, chunk, microbatch in schedule:
                if kind == "B":
                    waiting.pop(chunk + microbatch).backward()
                    continue
                hidden = tokens(LENGTH, 2, 10 * dist.get_rank() + int(microbatch)).requires_grad_()

                waiting[chunk + microbatch] = of_chunk(
                    routers[2 * int(chunk) :][:2], hidden, recompute
                )
            end_step(routers[0])
        found.append([*(r.weight.grad for r in routers), *logged().values()])
    for other in found[1:]:
        for actual, expected in zip(other, found[0], strict=True):
            assert torch.equal(actual, expected)


def main() -> None:
    cpu_backend.enable(verbose=False)
    dist.init_process_group("gloo")
    checks: dict[str, Callable] = {k[6:]: v for k, v in globals().items() if k[:6] == "check_"}
    checks[sys.argv[1]]()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
