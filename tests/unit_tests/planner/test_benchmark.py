"""The benchmark's own parts: workloads, baselines and columns mean what they say."""

import sys

import launch
import numpy as np
import pytest
import torch

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

import planner as benchmark
import planner_baselines as baselines

from megatron_echo.planner import balance_bound, plan_clones

BASELINES = {
    "interval_overlap": baselines.interval_overlap,
    "bucketed_bin_packing": baselines.bucketed_bin_packing,
    "alias_table": baselines.alias_table,
    "threshold_quota": baselines.threshold_quota,
    "least_loaded_spill": baselines.least_loaded_spill,
}


@pytest.mark.parametrize("workload", benchmark.WORKLOADS)
def test_workloads_depend_on_their_name_and_draw_only(workload: str) -> None:
    first = benchmark.draw_counts(workload, 16, 64, 4, 1)
    assert torch.equal(first, benchmark.draw_counts(workload, 16, 64, 4, 1))
    assert not torch.equal(first, benchmark.draw_counts(workload, 16, 64, 4, 2))
    assert first.shape == (16, 64)
    assert (first >= 0).all()
    if workload != "ragged sources":
        assert (first.sum(1) == 4 * benchmark.TOKENS_PER_RANK).all()


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("workload", ["zipf 0.9", "one hot expert", "empty experts and ranks"])
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_baselines_conserve_tokens_and_do_not_make_it_worse(name, workload, slots) -> None:
    counts = benchmark.draw_counts(workload, 8, 32, 4, 0)
    plan = benchmark.plan_from(counts, BASELINES[name](counts.sum(0).numpy(), 8, slots))
    assert (plan.allocation >= 0).all()
    assert torch.equal(plan.allocation.sum(1), counts.sum(0))
    assert plan.load_after.max() <= plan.load_before.max()
    figures = benchmark.measure(plan)
    assert figures["most received"] <= (1 if name == "bucketed_bin_packing" else slots)


def test_the_alias_table_is_exact_with_enough_slots() -> None:
    for draw in range(5):
        counts = benchmark.draw_counts("zipf 0.9", 8, 32, 4, draw)
        plan = benchmark.plan_from(counts, baselines.alias_table(counts.sum(0).numpy(), 8, 4))
        assert plan.load_after.max() == balance_bound(int(counts.sum()), 8)


def test_columns_against_the_split_itself() -> None:
    """The closed forms for tokens that leave their rank or node equal the plan's own split."""
    counts = benchmark.draw_counts("lognormal 1.0", 16, 64, 4, 0)
    plan = plan_clones(counts, 4, ranks_per_node=benchmark.RANKS_PER_NODE)
    splits = torch.stack([plan.split_for(rank) for rank in range(16)]).sum(1).numpy()
    total = counts.sum().item()
    node = np.arange(16) // benchmark.RANKS_PER_NODE
    figures = benchmark.measure(plan)
    assert figures["leave rank"] == pytest.approx(1 - np.trace(splits) / total)
    same_node = node[:, None] == node[None, :]
    assert figures["leave node"] == pytest.approx(1 - splits[same_node].sum() / total)
    assert figures["clones"] == plan.num_clones


@pytest.mark.parametrize("workload", ["lognormal 1.0", "one hot rank", "empty experts and ranks"])
def test_more_tolerance_never_costs_more_clones_on_average(workload: str) -> None:
    """With enough slots; with fewer, a bound that comes into reach is paid for with clones."""
    draws = [benchmark.draw_counts(workload, 8, 64, 8, d) for d in range(benchmark.DRAWS)]
    clones = [
        sum(int(plan_clones(counts, 8, tolerance).num_clones) for counts in draws)
        for tolerance in (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    ]
    assert clones == sorted(clones, reverse=True)


LOGNORMAL = [(8, 256, 1.5, 2, 0), (8, 256, 1.0, 2, 2), (8, 128, 1.0, 1, 2)]
"""R, E, sigma, S and seed of draws in which a greedy that looks at ranks alone wastes slots."""


@pytest.mark.parametrize(("ranks", "experts", "sigma", "slots", "seed"), LOGNORMAL)
def test_few_slots_reach_what_published_planners_reach(ranks, experts, sigma, slots, seed) -> None:
    """A deep hole with few slots gets experts that fill it, not those of the fullest rank."""
    generator = np.random.default_rng([seed, ranks, experts, int(sigma * 10)])
    popularity = generator.lognormal(0, sigma, experts)
    tokens = generator.multinomial(4096 * ranks, popularity / popularity.sum())
    counts = torch.zeros(ranks, experts, dtype=torch.int64)
    counts[0] = torch.from_numpy(tokens)
    published = [
        benchmark.plan_from(counts, planner(tokens, ranks, slots)).load_after.max()
        for planner in BASELINES.values()
    ]
    assert plan_clones(counts, slots).load_after.max() <= min(published)
