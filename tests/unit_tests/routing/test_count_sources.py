"""Whose counts a batch-wise loss uses: what each source is, how near it comes, what is saved."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_reference import batch_loss
from megatron.core import dist_checkpointing
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter
from router_cases import (
    GPIPE,
    LAST_STAGE,
    TOPK,
    build,
    close,
    config,
    end_step,
    loss_gradient,
    only,
    set_scale,
    tokens,
)
from torch import Tensor

from megatron_echo.routing import aux_loss
from megatron_echo.routing.losses import LayerLosses, estimate_whole
from megatron_echo.routing.router import EchoRouter
from megatron_echo.step import counts

S, B = 12, 3


@pytest.fixture(scope="module", autouse=True)
def unscaled(one_rank: None) -> Iterator[None]:
    set_scale(1.0)
    yield
    destroy_moe_metrics_tracker()


def steps(source: str, order: str, count: int = 3, microbatches: int = 4) -> list[Tensor]:
    """The batch-wise loss's gradient in each of some steps, in an order of F and B."""
    made = config(**only("global"), moe_echo_aux_count_source=source)
    router = build(EchoRouter, made)
    found = []
    for step in range(count):
        router.weight.grad, waiting = None, []
        for word in order.split():
            if word == "F":
                index = len(found) * microbatches + len(router.losses.counts.seen())
                waiting.append(router(tokens(S, B, index))[0])
            else:
                (0 * waiting.pop(0 if word == "B" else -1)).sum().backward()
        found.append(router.weight.grad / microbatches)
        end_step(router)
        assert step == len(found) - 1
    return found


def exact(step: int, microbatches: int = 4) -> Tensor:
    """One batch of all microbatches."""
    whole = [tokens(S, B, step * microbatches + index) for index in range(microbatches)]
    return loss_gradient(build(EchoRouter, config(**only("global"))), torch.cat(whole, dim=1))


@pytest.mark.parametrize("order", [GPIPE, "F F F F L L L L", "F F F F L B L B"])
def test_batch_wise_is_exact_after_all_forwards(
    order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPipe, and any order of backward passes: 1e-12."""
    monkeypatch.setattr(LayerLosses, "score_dtype", torch.float64)
    for source in ("late", "late+previous"):
        for step, grad in enumerate(steps(source, order)):
            close(grad, exact(step), 1e-12)
    wrong = steps("cumulative", order)
    assert all((grad - exact(i)).norm() > 0.02 * exact(i).norm() for i, grad in enumerate(wrong))


def test_cumulative_is_megatrons() -> None:
    """Where a backward pass follows each forward pass, late is cumulative, and Megatron's."""
    cumulative, late = steps("cumulative", LAST_STAGE), steps("late", LAST_STAGE)
    theirs = build(TopKRouter, config(**only("global")))
    for step, (first, second) in enumerate(zip(cumulative, late, strict=True)):
        assert torch.equal(first, second)
        theirs.weight.grad = None
        for index in range(4):
            (0 * theirs(tokens(S, B, 4 * step + index))[0]).sum().backward()
        close(first, theirs.weight.grad / 4, 1e-6)
        theirs.reset_global_aux_loss_tracker()


@pytest.mark.parametrize("source", ["microbatch", "cumulative"])
def test_sources_that_do_not_depend_on_the_schedule(source: str) -> None:
    for first, second in zip(steps(source, GPIPE), steps(source, LAST_STAGE), strict=True):
        assert torch.equal(first, second)


def test_own_microbatch_only() -> None:
    router = build(TopKRouter, config(**only("aux")))
    grads = [loss_gradient(router, tokens(S, B, index)) for index in range(4)]
    close(steps("microbatch", GPIPE, count=1)[0], torch.stack(grads).mean(0), 1e-6)


def test_previous_step_does_not_depend_on_the_schedule() -> None:
    first, second = steps("previous_step", GPIPE), steps("previous_step", LAST_STAGE)
    assert torch.equal(first[1], second[1])
    assert torch.equal(first[2], second[2])
    assert not torch.equal(first[1], steps("late", GPIPE)[1])


def counted(index: int) -> tuple[Tensor, Tensor]:
    """Scores ``[S, B, E]`` and counts ``[E]`` of some tokens, from Megatron's router."""
    logits = build(TopKRouter, config()).gating(tokens(S, B, index))
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(-1, logits.topk(TOPK).indices, True)
    return logits.softmax(-1), aux_loss.count_tokens(chosen, None).sum(0)


def test_what_is_not_seen_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the last stage, call m has seen m + 1 of 4 microbatches of its own step."""
    monkeypatch.setattr(counts, "get_num_microbatches", lambda: 4)
    monkeypatch.setattr(LayerLosses, "score_dtype", torch.float64)
    found = steps("late+previous", LAST_STAGE, count=2)[1]
    before = torch.stack([counted(index)[1] for index in range(4)]).float()
    mean, variance = before.mean(0).double(), before.var(0).double().sum()
    router, losses, used = build(TopKRouter, config()), [], []
    for index in range(4):
        logits = router.gating(tokens(S, B, 4 + index))
        used.append(counted(4 + index)[1].double())
        now, number = torch.stack(used).mean(0), index + 1
        distance = max((mean - now).square().sum(), variance / number + variance / 4)
        missing = now + variance / number / distance * (mean - now)
        whole = now * number + missing * (4 - number)
        losses.append(batch_loss(logits, "softmax", whole, torch.tensor(S * B)))
    (expected,) = torch.autograd.grad(0.1 * torch.stack(losses).mean(), router.weight)
    close(found, expected, 1e-7)  # the step before is kept in fp32


def test_the_estimate_leans_on_the_step_before_as_far_as_it_may() -> None:
    seen, mean = torch.tensor([3.0, 1.0, 8.0]).double(), torch.tensor([5.0, 4.0, 3.0]).double()
    zero, far = torch.zeros(()).double(), torch.tensor([0.0, 1e4, 0.0]).double()
    assert torch.equal(estimate_whole(seen, 2, 2, mean, zero + 9), seen)
    assert torch.equal(estimate_whole(seen, 2, 8, torch.zeros(3).double(), zero), seen)
    assert torch.equal(estimate_whole(seen, 2, 8, seen / 2, zero), seen)
    assert (estimate_whole(seen, 2, 8, far, zero + 1) - seen).norm() < 1e-2
    near = estimate_whole(seen, 2, 8, mean, zero + 1e9)
    pooled = (seen + 8 * mean) / 10  # the mean of all ten calls known
    close(near / near.sum(), (seen + 6 * pooled) / (seen + 6 * pooled).sum(), 1e-12)


@pytest.mark.parametrize(("topic", "moved"), [(30, 0), (1, 60)], ids=["differ", "move"])
def test_no_source_of_counts_is_nearer(topic: int, moved: int) -> None:
    """Microbatches that differ where the routing stands still; such as are alike where it moves."""
    generator = torch.Generator().manual_seed(0)
    errors = {"late": 0.0, "previous": 0.0, "ours": 0.0}
    for _ in range(50):
        means = torch.stack((torch.full((8,), 100.0), 100 + moved * torch.arange(8.0)))
        draws = topic * torch.randn(2, 8, 8, generator=generator)
        before, now = (means[:, None] + draws).double()
        whole = now.sum(0) / now.sum()
        for call in range(1, 8):
            seen, spread = now[:call].sum(0), before.var(0).sum()
            ours = estimate_whole(seen, call, 8, before.mean(0), spread)
            for name, used in (("late", seen), ("previous", before.sum(0)), ("ours", ours)):
                errors[name] += float((used / used.sum() - whole).square().sum())
    assert errors["ours"] < 1.01 * min(errors["late"], errors["previous"])
    assert errors["ours"] < 0.5 * max(errors["late"], errors["previous"])


def test_previous_counts_are_saved() -> None:
    """A router that loads a checkpoint in mid run goes on as one that never stopped."""
    made = config(**only("global"), moe_echo_aux_count_source="previous_step")
    router = build(EchoRouter, made)
    loss_gradient(router, tokens(S, B))
    end_step(router)
    again = build(EchoRouter, config(**only("global"), moe_echo_aux_count_source="previous_step"))
    again.load_state_dict(copy.deepcopy(router.state_dict()))
    hidden = tokens(S, B, 5)
    assert torch.equal(loss_gradient(again, hidden), loss_gradient(router, hidden))
    late = config(**only("global"), moe_echo_aux_count_source="late")
    for without in (late, config(**only("seq")), config()):
        assert "previous_counts" not in build(EchoRouter, without).state_dict()


def test_checkpoints_with_and_without_counts(tmp_path: Path) -> None:
    """Megatron's and older ones load, Megatron loads ours, and ours bring the counts along."""

    def save(router: TopKRouter, name: str) -> Path:
        (tmp_path / name).mkdir()
        metadata: dict[str, Any] = {}
        state = router.sharded_state_dict("", (), metadata)
        del metadata["dp_cp_group"]  # as Megatron
        dist_checkpointing.save({"model": state}, str(tmp_path / name), content_metadata=metadata)
        return tmp_path / name

    def load(router: TopKRouter, where: Path) -> TopKRouter:
        metadata = dist_checkpointing.load_content_metadata(str(where))
        state = router.sharded_state_dict("", (), metadata)
        router.load_state_dict(dist_checkpointing.load({"model": state}, str(where))["model"])
        return router

    ours, theirs = (build(kind, config(**only("global"))) for kind in (EchoRouter, TopKRouter))
    loss_gradient(ours, tokens(S, B))
    end_step(ours)
    with_counts, without = save(ours, "ours"), save(theirs, "theirs")
    again = load(build(EchoRouter, config(**only("global")), seed=1), with_counts)
    assert ours.previous_counts.any()
    assert torch.equal(again.previous_counts, ours.previous_counts)
    unstepped = load(build(EchoRouter, config(**only("global"))), save(again, "unstepped"))
    assert torch.equal(unstepped.previous_counts, ours.previous_counts)
    fresh = load(build(EchoRouter, config(**only("global")), seed=1), without)
    assert not fresh.previous_counts.any()
    stock = load(build(TopKRouter, config(**only("global")), seed=1), with_counts)
    for router in (again, fresh, stock):
        assert torch.equal(router.weight, ours.weight)


def test_previous_counts_stay_fp32() -> None:
    """A model in bf16 makes new buffers of all buffers."""
    fields = {**only("global"), "params_dtype": torch.bfloat16, "moe_router_dtype": "fp32"}
    router = build(EchoRouter, config(**fields, moe_echo_aux_count_source="previous_step"))
    router.bfloat16()
    hidden = tokens(S, B).bfloat16()
    loss_gradient(router, hidden)
    end_step(router)
    assert router.previous_counts.dtype == torch.float32
    assert router.previous_counts.sum() == S * B * TOPK
