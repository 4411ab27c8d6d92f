"""The planner against the exact optimum, and the oracle against brute force."""

import itertools

import numpy as np
import pytest
import torch
from planner_oracle import optimum

from megatron_echo.planner import balance_bound, plan_clones


def skewed(ranks: int, experts: int, seed: int, power: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    popularity = torch.rand(experts, generator=generator) ** power
    return (torch.rand(ranks, experts, generator=generator) * popularity * 500).long()


def test_oracle_against_brute_force() -> None:
    """Two ranks, one slot each: the best clone pair by trying all of them."""
    counts = np.array([[9, 4, 1, 0], [7, 2, 0, 1]])
    tokens = counts.sum(0)
    best = tokens[:2].sum()
    for clone in itertools.chain([None], range(2)):  # rank 0 is the hot one
        for moved in range(tokens[clone] + 1 if clone is not None else 1):
            best = min(best, max(tokens[:2].sum() - moved, tokens[2:].sum() + moved))
    result = optimum(counts, num_slots=1, bound=best)
    assert result.max_load <= best < result.max_load + 1
    assert result.num_clones == 1


@pytest.mark.parametrize(("ranks", "experts"), [(4, 8), (4, 16), (8, 16), (8, 32)])
@pytest.mark.parametrize("slots", [1, 2])
def test_gap_to_the_optimum(ranks: int, experts: int, slots: int) -> None:
    """Mean of the highest loads, in units of the mean load, at most 0.03 above the optimum's."""
    gaps = []
    for seed in range(3):
        counts = skewed(ranks, experts, seed)
        mean = counts.sum().item() / ranks
        ours = plan_clones(counts, slots).load_after.max().item()
        best = optimum(counts.numpy(), slots).max_load
        assert ours >= best - 1e-6 * mean
        gaps.append((ours - best) / mean)
    assert np.mean(gaps) <= 0.03, gaps


def test_clones_against_the_fewest() -> None:
    """Exact balance with few clones: within two of the fewest that any plan has."""
    for seed in range(3):
        counts = skewed(4, 8, seed)
        plan = plan_clones(counts, 2)
        bound = balance_bound(int(counts.sum()), 4)
        fewest = optimum(counts.numpy(), 2, bound=bound).num_clones
        assert fewest is not None
        assert fewest <= plan.num_clones <= fewest + 2


def test_an_unreachable_bound() -> None:
    with pytest.raises(RuntimeError, match="No proven optimum"):
        optimum(np.array([[9, 9, 0, 0], [9, 9, 0, 0]]), num_slots=1, bound=3.0)
