"""Invariants of the rerouting from logical to physical experts (property tests)."""

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from megatron_echo.dispatch.layout import PairCounts
from megatron_echo.dispatch.reroute import (
    compact_routing,
    home_experts,
    pair_counts,
    physical_experts,
)
from megatron_echo.planner import ClonePlan, plan_clones

properties = settings(deadline=None, max_examples=60, print_blob=True)


@st.composite
def instances(draw: st.DrawFn) -> tuple[Tensor, int, float, int | None, int]:
    """Choices ``[R, T, K]`` of every rank, slots S, tolerance, ranks of a node, and E."""
    ranks = draw(st.integers(1, 6))
    per_rank = draw(st.integers(1, 4))
    experts = ranks * per_rank
    tokens = draw(st.sampled_from([0, 1, 7, 40]))
    topk = draw(st.integers(1, min(3, experts)))
    slots = draw(st.sampled_from([0, 1, 2, per_rank]))
    kind = draw(st.sampled_from(["even", "skewed", "one expert", "one rank", "idle", "padding"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    score = torch.rand(ranks, tokens, experts, generator=generator)
    if kind == "skewed":
        score = score + 2 * torch.rand(experts, generator=generator) ** 3
    elif kind == "one expert":
        score[..., -1] += 1
        topk = 1
    elif kind == "one rank":
        score[..., :per_rank] += 1
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen.scatter_(2, score.topk(topk, dim=2).indices, True)
    if kind == "idle":
        chosen[ranks // 2] = False
    elif kind == "padding":
        chosen &= torch.rand(score.shape, generator=generator) < 0.6
    rows = chosen.view(ranks * tokens, experts)
    nodes = draw(st.sampled_from([None, *(n for n in range(1, ranks + 1) if ranks % n == 0)]))
    tolerance = draw(st.sampled_from([0.0, 0.02, 0.3]))
    return compact_routing(rows, topk).view(ranks, tokens, topk), slots, tolerance, nodes, experts


def counts_of(choices: Tensor, experts: int) -> Tensor:
    """``[R, E]``."""
    flat = choices.flatten(1).long()
    return torch.stack([torch.bincount(row, minlength=experts + 1)[:experts] for row in flat])


def hosted(plan: ClonePlan) -> dict[int, tuple[int, int]]:
    """Expert and rank of each physical id, from the definition of homes and slots."""
    ranks, experts = plan.counts.shape
    slots, per_rank = plan.slot_expert.shape[1], experts // ranks
    found = {}
    for rank in range(ranks):
        for group in range(per_rank):
            found[rank * (per_rank + slots) + group] = (rank * per_rank + group, rank)
        for slot, expert in enumerate(plan.slot_expert[rank].tolist()):
            if expert >= 0:
                found[rank * (per_rank + slots) + per_rank + slot] = (expert, rank)
    return found


def check_reroute(choices: Tensor, plan: ClonePlan) -> None:
    """T1-T3 and T5 for all sources."""
    ranks, experts = plan.counts.shape
    slots, hosts = plan.slot_expert.shape[1], hosted(plan)
    nowhere = experts + ranks * slots
    everywhere = torch.zeros(experts, ranks, dtype=torch.int64)
    sent = torch.zeros(ranks, nowhere, dtype=torch.int64)
    for rank in range(ranks):
        logical = choices[rank]
        physical = physical_experts(logical, plan, plan.split_for(rank))
        assert (physical.shape, physical.dtype) == (logical.shape, torch.int32)
        assert torch.equal(physical, physical_experts(logical, plan, plan.split_for(rank)))
        assert torch.equal(physical == nowhere, logical == experts)
        split = torch.zeros(experts, ranks, dtype=torch.int64)
        last_owner: dict[int, int] = {}
        pairs = zip(logical.flatten().tolist(), physical.flatten().tolist(), strict=True)
        for expert, place in pairs:
            if expert == experts:
                continue
            computed, owner = hosts[place]  # an unused slot is not there
            assert computed == expert
            assert last_owner.get(expert, 0) <= owner  # in the order of tokens, ranks ascend
            last_owner[expert] = owner
            split[expert, owner] += 1
        assert torch.equal(split, plan.split_for(rank))
        everywhere += split
        sent[rank] = torch.bincount(physical.flatten().long(), minlength=nowhere + 1)[:nowhere]
        for row in physical.tolist():
            real = [place for place in row if place != nowhere]
            assert len(set(real)) == len(real)
    assert torch.equal(everywhere, plan.allocation)
    assert torch.equal(everywhere.sum(0), plan.load_after)
    for rank in range(ranks):
        below, up_to = plan.split_up_to(rank)
        found, expected = pair_counts(plan, below, up_to - below), PairCounts.of(sent, rank)
        for field in dataclasses.fields(PairCounts):
            assert torch.equal(getattr(found, field.name), getattr(expected, field.name))


@properties
@given(instances())
def test_every_pair_goes_where_the_plan_says(
    instance: tuple[Tensor, int, float, int | None, int],
) -> None:
    choices, slots, tolerance, nodes, experts = instance
    plan = plan_clones(counts_of(choices, experts), slots, tolerance, 0, nodes)
    check_reroute(choices, plan)
    if plan.num_clones == 0:
        per_rank = experts // choices.shape[0]
        for rank, logical in enumerate(choices):
            home = home_experts(logical, per_rank, slots)
            assert torch.equal(physical_experts(logical, plan, plan.split_for(rank)), home)


@properties
@given(instances(), st.integers(0, 2**31))
def test_tokens_in_another_order(
    instance: tuple[Tensor, int, float, int | None, int], seed: int
) -> None:
    """Only which tokens move changes, never how many; padding tokens change nothing."""
    choices, slots, tolerance, nodes, experts = instance
    plan = plan_clones(counts_of(choices, experts), slots, tolerance, 0, nodes)
    ranks, tokens, topk = choices.shape
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    check_reroute(choices[:, order], plan)
    nowhere = experts + ranks * slots
    for rank in range(ranks):
        physical = physical_experts(choices[rank], plan, plan.split_for(rank))
        padding = choices.new_full((3, topk), experts)
        for padded, rows in (
            (torch.cat((choices[rank], padding)), slice(0, tokens)),
            (torch.cat((padding, choices[rank])), slice(3, None)),
        ):
            found = physical_experts(padded, plan, plan.split_for(rank))
            assert torch.equal(found[rows], physical)
            assert (found == nowhere).sum() == (physical == nowhere).sum() + 3 * topk


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 4))
def test_homes(ranks: int, per_rank: int, slots: int) -> None:
    """Homes first, then slots, rank by rank; no expert is behind the last slot."""
    ids = torch.arange(ranks * per_rank + 1, dtype=torch.int32)
    found = home_experts(ids, per_rank, slots)
    expected = [
        rank * (per_rank + slots) + group for rank in range(ranks) for group in range(per_rank)
    ]
    assert found.tolist() == [*expected, ranks * (per_rank + slots)]


def plan_by_hand(counts: list[list[int]], slots: list[list[int]], away: dict) -> ClonePlan:
    """A plan that moves ``away[expert, rank]`` tokens."""
    table, ranks = torch.tensor(counts), len(counts)
    experts = table.shape[1]
    home = torch.arange(experts) // (experts // ranks)
    allocation = torch.zeros(experts, ranks, dtype=torch.int64)
    allocation[torch.arange(experts), home] = table.sum(0)
    before = allocation.sum(0)
    for (expert, rank), moved in away.items():
        allocation[expert, home[expert]] -= moved
        allocation[expert, rank] += moved
    return ClonePlan(
        counts=table,
        slot_expert=torch.tensor(slots),
        allocation=allocation,
        load_before=before,
        load_after=allocation.sum(0),
        num_clones=torch.tensor(len(away)),
    )


def test_an_unused_slot_before_a_used_one() -> None:
    counts = [[6, 2, 0, 1], [4, 2, 1, 0]]
    choices = [[0] * 6 + [1] * 2 + [3], [0] * 4 + [1] * 2 + [2]]
    length = max(map(len, choices))
    padded = [row + [4] * (length - len(row)) for row in choices]
    plan = plan_by_hand(counts, [[-1, 2, -1], [-1, -1, 0]], {(0, 1): 5, (2, 0): 1})
    table = torch.tensor(padded, dtype=torch.int32)[:, :, None]
    check_reroute(table, plan)
    # Rank 1 keeps its four of expert 0 in the third slot, rank 0 sends it one more, its last.
    first = physical_experts(table[0], plan, plan.split_for(0)).flatten().tolist()
    assert first == [0] * 5 + [9] + [1] * 2 + [6]
    second = physical_experts(table[1], plan, plan.split_for(1)).flatten().tolist()
    assert second == [9] * 4 + [1] * 2 + [3] + [10] * 2


def test_a_slot_that_gets_no_tokens() -> None:
    plan = plan_by_hand([[3, 0], [0, 1]], [[1], [0]], {(0, 1): 0})
    table = torch.tensor([[0, 0, 0], [1, 2, 2]], dtype=torch.int32)[:, :, None]
    check_reroute(table, plan)
    assert physical_experts(table[0], plan, plan.split_for(0)).flatten().tolist() == [0, 0, 0]


def test_a_clone_on_the_home_rank_is_not_used() -> None:
    """A plan that names a home rank's own expert in a slot: its tokens stay in the home group."""
    plan = plan_by_hand([[3, 1], [0, 1]], [[0], [-1]], {})
    found = physical_experts(
        torch.tensor([[0, 1], [0, 2], [0, 2]], dtype=torch.int32), plan, plan.split_for(0)
    )
    assert found.tolist() == [[0, 2], [0, 4], [0, 4]]


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_all_tokens_to_one_expert(tokens: int, slots: int) -> None:
    ranks, per_rank = 4, 3
    choices = torch.full((ranks, tokens, 1), 4, dtype=torch.int32)
    plan = plan_clones(counts_of(choices, ranks * per_rank), slots)
    check_reroute(choices, plan)
    if slots == per_rank:
        assert plan.load_after.max() == tokens


def test_no_host_read() -> None:
    """Nothing is read: it runs on meta tensors."""
    counts = torch.zeros(4, 8, dtype=torch.int64, device="meta")
    plan = plan_clones(counts, 2)
    found = physical_experts(
        torch.zeros(5, 2, dtype=torch.int32, device="meta"), plan, plan.split_for(1)
    )
    assert (found.shape, found.dtype) == ((5, 2), torch.int32)
