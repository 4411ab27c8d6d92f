"""Invariants of the planner (property tests) and its edge cases."""

from pathlib import Path

import hypothesis.strategies as st
import launch
import pytest
import torch
from hypothesis import given, settings
from planner_cases import EDGES

from megatron_echo.planner import ClonePlan, ClonePrice, balance_bound, plan_clones
from megatron_echo.planner.split import split_up_to

settings.register_profile("planner", deadline=None, max_examples=150, print_blob=True)
settings.load_profile("planner")


@st.composite
def instances(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Counts ``[R, E]`` of many shapes and skews, up to 2^31, and a number of slots."""
    ranks = draw(st.integers(1, 9))
    per_rank = draw(st.integers(1, 5))
    slots = draw(st.integers(0, per_rank + 2))
    largest = draw(st.sampled_from([1, 3, 50, 1000, 2**24 + 1, 2**31]))
    seed = draw(st.integers(0, 2**31))
    kind = draw(st.sampled_from(["even", "skewed", "sparse", "one expert", "one rank", "ties"]))
    generator = torch.Generator().manual_seed(seed)
    shape = (ranks, ranks * per_rank)
    counts = torch.randint(0, largest + 1, shape, generator=generator)
    popularity = torch.rand(shape[1], generator=generator) ** 6
    if kind == "skewed":
        counts = (counts * popularity).long()
    elif kind == "sparse":
        counts = counts * (torch.rand(shape, generator=generator) < 0.15)
    elif kind == "one expert":
        counts = counts * (torch.arange(shape[1]) == seed % shape[1])
    elif kind == "one rank":
        counts = counts * (torch.arange(shape[1]) // per_rank == seed % ranks)
    elif kind == "ties":
        counts = torch.full(shape, largest) * (torch.arange(shape[1]) % 2 == seed % 2)
    return counts, slots


def check_plan(plan: ClonePlan, counts: torch.Tensor, slots: int) -> None:
    """P1-P6 and P12: conservation, slots, bounds, and a split that adds up."""
    ranks, experts = counts.shape
    tokens, home = counts.sum(0), torch.arange(experts) // (experts // ranks)
    assert plan.slot_expert.shape == (ranks, slots)
    assert plan.allocation.shape == (experts, ranks)
    for name in ("slot_expert", "allocation", "load_before", "load_after", "num_clones"):
        assert getattr(plan, name).dtype == torch.int64
    assert (plan.allocation >= 0).all()
    assert torch.equal(plan.allocation.sum(1), tokens)
    assert torch.equal(plan.allocation.sum(0), plan.load_after)
    assert plan.load_after.sum() == plan.load_before.sum() == counts.sum()
    assert -(-counts.sum() // ranks) <= plan.load_after.max() <= plan.load_before.max()

    away = plan.allocation * (home[:, None] != torch.arange(ranks))
    for rank in range(ranks):
        used = plan.slot_expert[rank][plan.slot_expert[rank] >= 0]
        assert torch.equal(used, torch.nonzero(away[:, rank]).flatten())
        assert (home[used] != rank).all()
    assert plan.num_clones == (plan.slot_expert >= 0).sum()

    splits = torch.stack([plan.split_for(rank) for rank in range(ranks)])
    assert (splits >= 0).all()
    assert torch.equal(splits.sum(0), plan.allocation)
    assert torch.equal(splits.sum(2), counts)


@given(instances(), st.sampled_from([0.0, 0.02, 0.3]), st.sampled_from([0, 5, 10**9]))
def test_every_plan_is_consistent_and_within_its_bound(
    instance: tuple[torch.Tensor, int], tolerance: float, minimum: int
) -> None:
    counts, slots = instance
    ranks, experts = counts.shape
    plan = plan_clones(counts, slots, tolerance, minimum)
    check_plan(plan, counts, slots)
    if slots >= experts // ranks:
        assert plan.load_after.max() <= balance_bound(int(counts.sum()), ranks, tolerance)


@given(instances(), st.sampled_from([0, 10**9]))
def test_enough_slots_balance_exactly(instance: tuple[torch.Tensor, int], minimum: int) -> None:
    """``load_after.max() == ceil(mean)`` for every input, a huge minimum included."""
    counts, _ = instance
    ranks, experts = counts.shape
    plan = plan_clones(counts, experts // ranks, 0.0, minimum)
    assert plan.load_after.max() == -(-int(counts.sum()) // ranks)


@given(instances(), st.data())
def test_nodes_keep_the_invariants(instance: tuple[torch.Tensor, int], data: st.DataObject) -> None:
    counts, slots = instance
    ranks, experts = counts.shape
    node = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    plan = plan_clones(counts, slots, ranks_per_node=node)
    check_plan(plan, counts, slots)
    if slots >= experts // ranks:
        assert plan.load_after.max() == -(-int(counts.sum()) // ranks)


@given(instances(), st.sampled_from([0.0, 0.02, 0.5]), st.data())
def test_a_node_that_holds_its_own_load_sends_no_clone_out(
    instance: tuple[torch.Tensor, int], tolerance: float, data: st.DataObject
) -> None:
    counts, _ = instance
    ranks, experts = counts.shape
    node = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    plan = plan_clones(counts, experts // ranks, tolerance, ranks_per_node=node)
    # With a tolerance the plan may be made for a tighter bound, down to that of none.
    bound = balance_bound(int(counts.sum()), ranks)
    nodes = ranks // node
    holds_its_own = plan.load_before.view(nodes, node).sum(1) <= node * bound
    by_node = plan.allocation.view(nodes, experts // nodes, nodes, node).sum((1, 3))
    sent_out = by_node.sum(1) - by_node.diagonal()
    assert not (holds_its_own & (sent_out > 0)).any()


def test_a_clone_across_nodes_is_not_made_for_the_larger_hole() -> None:
    """The fullest rank's node has room, the emptiest rank is in the other node."""
    counts = torch.zeros(8, 8, dtype=torch.int64)
    counts[0] = torch.tensor([7, 3, 34, 56, 19, 35, 6, 40])
    plan = plan_clones(counts, 1, ranks_per_node=4)
    assert plan.load_after.max() == 25
    assert plan.allocation[:4, 4:].sum() == 0
    assert plan.allocation[4:, :4].sum() == 0


def predicted(plan: ClonePlan, price: ClonePrice) -> int:
    """Rows of the fullest rank, and the clones of the busiest, counted one by one."""
    ranks = plan.counts.shape[0]
    per_rank, node = plan.counts.shape[1] // ranks, plan.ranks_per_node or ranks
    inside, across = torch.zeros(2, ranks, dtype=torch.int64), torch.zeros(2, ranks).long()
    for rank, expert in torch.nonzero(plan.allocation.t()).tolist():
        home = expert // per_rank
        if home != rank:
            link = inside if home // node == rank // node else across
            link[0, home] += 1
            link[1, rank] += 1
    spent = max(int(inside.max()) * price.inside, int(across.max()) * price.across)
    return int(plan.load_after.max()) + spent


@given(instances(), st.sampled_from([0, 1, 30, 10**6]), st.sampled_from([0.0, 0.25, 100.0]),
       st.data())  # fmt: skip
def test_a_price_never_makes_it_slower(
    instance: tuple[torch.Tensor, int], rows: int, tolerance: float, data: st.DataObject
) -> None:
    """Than no clones, where these are allowed, and with enough slots than exact balance."""
    counts, slots = instance
    ranks, experts = counts.shape
    node = data.draw(st.sampled_from([None, *(n for n in range(1, ranks + 1) if ranks % n == 0)]))
    price, minimum = ClonePrice(rows, 3 * rows), data.draw(st.sampled_from([0, 5, 10**9]))
    plan = plan_clones(counts, slots, tolerance, minimum, node, price=price)
    check_plan(plan, counts, slots)
    bound, time = balance_bound(int(counts.sum()), ranks, tolerance), predicted(plan, price)
    assert plan.rows_saved() == plan.load_before.max() - time
    if plan.load_before.max() <= bound:
        assert time <= plan.load_before.max()
    if slots >= experts // ranks:
        assert plan.load_after.max() <= bound
        exact = plan_clones(counts, slots, 0.0, 0, node)
        assert time <= predicted(exact, price)


@pytest.mark.parametrize("slots", [1, 4])
def test_a_price_decides_whether_a_clone_is_made(slots: int) -> None:
    """Rank 0 has 60 tokens above the others: worth a clone, or none."""
    counts = torch.full((4, 16), 25)
    counts[:, :4] += 5
    made = [
        int(plan_clones(counts, slots, 100.0, price=ClonePrice(rows, rows)).num_clones)
        for rows in (0, 15, 100)
    ]
    assert made[0] >= made[1] > made[2] == 0
    with pytest.raises(ValueError, match="knows no price"):
        plan_clones(counts, slots).rows_saved()


@given(instances(), st.sampled_from([0.0, 0.02, 0.5]), st.booleans(), st.data())
def test_no_clone_leaves_its_node(
    instance: tuple[torch.Tensor, int], tolerance: float, is_priced: bool, data: st.DataObject
) -> None:
    counts, slots = instance
    ranks, experts = counts.shape
    node = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    price = ClonePrice(20, 60) if is_priced else None
    minimum = data.draw(st.sampled_from([0, 5, 10**9]))
    plan = plan_clones(counts, slots, tolerance, minimum, node, True, price)
    check_plan(plan, counts, slots)
    home = torch.arange(experts) // (experts // ranks)
    used = plan.slot_expert >= 0
    there = torch.arange(ranks)[:, None].expand(plan.slot_expert.shape)[used]
    assert torch.equal(home[plan.slot_expert[used]] // node, there // node)
    fullest = int(plan.load_before.view(-1, node).sum(1).max())
    if slots >= experts // ranks:
        assert plan.load_after.max() <= balance_bound(fullest, node, tolerance)
    if node == ranks:
        alone = plan_clones(counts, slots, tolerance, minimum, None, False, price)
        assert torch.equal(plan.allocation, alone.allocation)


def test_a_node_below_the_fullest_is_not_balanced_for_nothing() -> None:
    """Its ranks wait for the other node's, whatever it does."""
    counts = torch.zeros(4, 8, dtype=torch.int64)
    counts[0] = torch.tensor([400, 400, 100, 100, 150, 150, 50, 50])
    plan = plan_clones(counts, 2, ranks_per_node=2, within_node=True)
    assert plan.load_after.tolist() == [500, 500, 300, 100]
    assert plan.num_clones == 1


@given(instances(), st.data())
def test_the_split_is_the_most_local_one(
    instance: tuple[torch.Tensor, int], data: st.DataObject
) -> None:
    """Tokens that stay on a rank, and in a node, are as many as supply and demand allow."""
    counts, slots = instance
    ranks, experts = counts.shape
    node = data.draw(st.sampled_from([n for n in range(1, ranks + 1) if ranks % n == 0]))
    plan = plan_clones(counts, slots, ranks_per_node=node)
    splits = torch.stack([plan.split_for(rank) for rank in range(ranks)])
    stays = torch.minimum(counts.t(), plan.allocation)
    assert torch.equal(splits.permute(1, 0, 2).diagonal(dim1=1, dim2=2), stays)
    by_node = splits.reshape(ranks // node, node, experts, ranks // node, node).sum((1, 4))
    supply = counts.reshape(ranks // node, node, experts).sum(1).t()
    demand = plan.allocation.reshape(experts, ranks // node, node).sum(2)
    assert torch.equal(
        by_node.permute(1, 0, 2).diagonal(dim1=1, dim2=2), torch.minimum(supply, demand)
    )


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_permutation_of_ranks_permutes_the_plan(slots: int) -> None:
    """P9: with random large counts no two values tie, and indices decide nothing."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ranks, per_rank = 6, 4
        counts = (torch.rand(ranks, ranks * per_rank, generator=generator) ** 4 * 2**30).long()
        order = torch.randperm(ranks, generator=generator)
        experts = (order[:, None] * per_rank + torch.arange(per_rank)).flatten()
        plan = plan_clones(counts, slots, 0.01)
        moved = plan_clones(counts[order][:, experts], slots, 0.01)
        assert torch.equal(moved.allocation, plan.allocation[experts][:, order])
        assert moved.num_clones == plan.num_clones


@given(instances(), st.integers(2, 5))
def test_scaling_the_counts_scales_the_plan(
    instance: tuple[torch.Tensor, int], factor: int
) -> None:
    """P10, where the mean is an integer and no index decides between equal values."""
    counts, slots = instance
    ranks = counts.shape[0]
    counts = counts * ranks
    plan, scaled = plan_clones(counts, slots), plan_clones(counts * factor, slots)
    if slots >= counts.shape[1] // ranks:
        assert torch.equal(scaled.allocation, plan.allocation * factor)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("slots", [0, 1, 2, 16])
def test_edges(name: str, slots: int) -> None:
    counts = EDGES[name].long()
    if counts.shape[1] % counts.shape[0]:
        counts = counts.repeat(counts.shape[0], 1)[: counts.shape[0], : counts.shape[1] // 8 * 8]
    plan = plan_clones(counts, slots)
    check_plan(plan, counts, slots)
    if slots >= counts.shape[1] // counts.shape[0]:
        assert plan.load_after.max() == -(-int(counts.sum()) // counts.shape[0])


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_a_balanced_input_gives_the_empty_plan(tolerance: float) -> None:
    counts = torch.full((4, 8), 100)
    counts[0, 0] += 30 if tolerance else 0
    plan = plan_clones(counts, 2, tolerance)
    assert plan.num_clones == 0
    assert (plan.slot_expert == -1).all()
    assert torch.equal(plan.load_after, plan.load_before)


def test_a_minimum_gives_up_small_clones_within_the_bound_only() -> None:
    generator = torch.Generator().manual_seed(5)
    counts = (torch.rand(8, 32, generator=generator) ** 4 * 200).long()
    plain, choosy = plan_clones(counts, 4, 0.1), plan_clones(counts, 4, 0.1, 10**9)
    bound = balance_bound(int(counts.sum()), 8, 0.1)
    assert choosy.num_clones <= plain.num_clones
    assert choosy.load_after.max() <= bound
    home = torch.arange(32) // 4
    for rank, expert in torch.nonzero(choosy.slot_expert >= 0):
        clone = choosy.slot_expert[rank, expert]
        given = choosy.allocation[clone, rank]
        assert choosy.load_after[home[clone]] + given > bound, "this clone was not needed"


@given(st.integers(0, 2**49), st.integers(1, 256), st.sampled_from([0, 1e-6, 0.02, 0.5, 3.0]))
def test_the_bound_is_one_integer_function(total: int, ranks: int, tolerance: float) -> None:
    scale = 10**6 + round(10**6 * tolerance)
    expected = max(-(-total // ranks), scale * total // (10**6 * ranks))
    assert balance_bound(total, ranks, tolerance) == expected
    assert balance_bound(torch.tensor(total), ranks, tolerance).item() == expected


@pytest.mark.parametrize("slots", [1, 4])
def test_shapes_do_not_depend_on_values(slots: int) -> None:
    """The meta device and fake tensors: nothing is read, every shape is known."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    plan = plan_clones(torch.zeros(8, 32, dtype=torch.int64, device="meta"), slots)
    assert plan.slot_expert.shape == (8, slots)
    assert plan.split_for(3).shape == (32, 8)
    with FakeTensorMode():
        plan = plan_clones(torch.zeros(8, 32, dtype=torch.int64), slots, ranks_per_node=4)
        assert plan.allocation.shape == (32, 8)
        assert plan.split_for(3).shape == (32, 8)


FAKE_CUDA = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megatron_echo import cpu_backend
from megatron_echo.planner import plan_clones
cpu_backend.disable()
with FakeTensorMode():
    counts = torch.empty(8, 32, dtype=torch.int64, device="cuda")
    for slots, tolerance in ((1, 0.0), (4, 0.0), (4, 0.1)):
        plan = plan_clones(counts, slots, tolerance)
        print(plan.slot_expert.device.type, tuple(plan.slot_expert.shape))
"""


def test_fake_tensors_of_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """Without the CPU backend, which would put them on the CPU."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE_CUDA)
    lines = launch.run([], script=script).check().output.splitlines()
    assert lines[-3:] == ["cuda (8, 1)", "cuda (8, 4)", "cuda (8, 4)"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": torch.zeros(2, 4)}, r"counts is torch.float32 \(2, 4\)"),
        ({"counts": torch.zeros(8, dtype=torch.int64)}, r"counts is torch.int64 \(8,\)"),
        ({"counts": torch.zeros(3, 4, dtype=torch.int64)}, "4 experts do not fit 3 ranks"),
        ({"counts": torch.zeros(2, 2048, dtype=torch.int64)}, "At most 256 ranks and 1024 experts"),
        ({"num_slots": -1}, "num_slots -1"),
        ({"tolerance": -0.1}, "tolerance -0.1 is not between 0 and 100"),
        ({"tolerance": float("nan")}, "tolerance nan"),
        ({"min_tokens_per_clone": -5}, "min_tokens_per_clone -5"),
        ({"ranks_per_node": 3}, "ranks_per_node 3 does not divide 4 ranks"),
        ({"within_node": True}, "within_node needs nodes. Give ranks_per_node."),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    good = {"counts": torch.zeros(4, 8, dtype=torch.int64), "num_slots": 2}
    with pytest.raises(ValueError, match=message):
        plan_clones(**{**good, **arguments})


@pytest.mark.parametrize("rows", [(-1, 0), (0, 2**31)])
def test_a_bad_price(rows: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"A clone's price of .* rows is out of range"):
        ClonePrice(*rows)


def test_a_rank_that_is_not_there() -> None:
    plan = plan_clones(torch.ones(4, 8, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="rank 4 is not one of 4 ranks"):
        plan.split_for(4)


def test_nodes_that_do_not_fit_the_split() -> None:
    counts = torch.ones(4, 8, dtype=torch.int64)
    plan = plan_clones(counts, 1)
    with pytest.raises(ValueError, match="ranks_per_node 3 does not divide 4 ranks"):
        split_up_to(counts, plan.allocation, 0, ranks_per_node=3)


def test_a_node_is_preferred_and_a_tolerance_saves_clones() -> None:
    """On average over draws: fewer clones across nodes, and fewer clones with slack."""
    across: dict[int | None, int] = {None: 0, 4: 0}
    clones = {0.0: 0, 0.05: 0, 0.3: 0}
    home_node = torch.arange(64) // 16
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        popularity = torch.rand(64, generator=generator) ** 3
        counts = (torch.rand(16, 64, generator=generator) * popularity * 900).long()
        for node in across:
            slots = plan_clones(counts, 4, ranks_per_node=node).slot_expert
            there = torch.arange(16)[:, None] // 4
            across[node] += int(((slots >= 0) & (home_node[slots] != there)).sum())
        for tolerance in clones:
            clones[tolerance] += int(plan_clones(counts, 4, tolerance).num_clones)
    assert across[4] < 0.75 * across[None]
    assert clones[0.3] < 0.8 * clones[0.05] < 0.7 * clones[0.0]
