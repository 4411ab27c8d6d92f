"""The default number of slots, and that the table holds on the loads it is made from."""

import sys

import launch
import pytest

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

import planner_slots as benchmark

from megatron_echo.planner.slots import LEAST, LEAST_OF_FEW, SLOTS, auto_slots


@pytest.mark.parametrize(("ranks", "experts"), [(2, 8), (2, 256), (4, 16), (8, 32), (3, 96)])
def test_few_ranks_or_experts_get_as_many_slots_as_experts(ranks: int, experts: int) -> None:
    assert auto_slots(ranks, experts) == experts // ranks


def test_between_two_sizes_of_the_table_the_larger_need_counts() -> None:
    """Fewer ranks and more experts on a rank need more slots."""
    assert auto_slots(12, 12 * 24) == auto_slots(8, 8 * 32)
    assert auto_slots(8, 8 * 128) == 128, "nothing was measured for so many"
    for ranks, row in SLOTS.items():
        for local, slots in row.items():
            least = LEAST if ranks >= 32 else LEAST_OF_FEW
            assert auto_slots(ranks, ranks * local) == min(local, max(slots, least))


@pytest.mark.parametrize(("ranks", "local"), [(8, 8), (8, 32), (32, 8)])
def test_the_table_holds(ranks: int, local: int) -> None:
    """On the first draws; one slot, where a rank has many experts, does not."""
    loads = list(benchmark.draws(ranks, ranks * local, 1))
    assert benchmark.is_enough(loads, auto_slots(ranks, ranks * local))
    assert local == 8 or not benchmark.is_enough(loads, 1)
