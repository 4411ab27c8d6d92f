"""The planner alone: no tensors, no clock."""

import itertools
import pickle
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_echo.copy_lanes import Link
from megatron_echo.offload import schedule
from megatron_echo.offload.config import POLICIES, OffloadConfig
from megatron_echo.offload.schedule import Item, Plan, Timeline


def make_plan(timeline: Timeline, link: Link, policy: str = "earliest", **rest: Any) -> Plan:
    return schedule.make_plan(timeline, link, OffloadConfig(policy=policy, **rest))


def one_pass(sizes: list[int], forward: list[int], backward: list[int]) -> Timeline:
    """A forward and a backward pass over regions with these bytes and ticks."""
    count = len(sizes)
    marks = [("close", i) for i in range(count)] + [("need", i) for i in reversed(range(count))]
    steps = [*forward[1:], 0, *reversed(backward[1:])]
    items = [Item(size, 0, i, 2 * count - 1 - i, 2 * count - i) for i, size in enumerate(sizes)]
    times = tuple(itertools.accumulate(steps, initial=0))
    return Timeline(tuple(marks), tuple(items), times)


regions = st.lists(
    st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12
)
rates = st.integers(1, 20)


def timeline_of(drawn: list[tuple[int, int, int]]) -> Timeline:
    return one_pass(*(list(values) for values in zip(*drawn, strict=True)))


@settings(max_examples=150, deadline=None)
@given(regions, rates, rates, st.sampled_from(POLICIES), st.floats(0, 1))
def test_every_copy_is_in_time(
    drawn: list[tuple[int, int, int]], out: int, back: int, policy: str, fraction: float
) -> None:
    """Played through, one copy at a time in each direction, nothing waits for a copy."""
    timeline, link = timeline_of(drawn), Link(Fraction(out), Fraction(back))
    plan = make_plan(timeline, link, policy, fraction=fraction)
    times = timeline.times
    assert times is not None
    done: dict[int, int] = {}
    free = 0
    for index, reason in enumerate(plan.kept):
        if reason is None:
            item = timeline.items[index]
            free = max(free, times[item.close]) + link.ticks(item.nbytes, to_host=True)
            done[index] = free
    free = 0
    for mark, (released, reloaded) in enumerate(zip(plan.release, plan.reload, strict=True)):
        for index in released:
            assert done[index] <= times[mark]
            assert mark > timeline.items[index].close
        for index in reloaded:
            assert any(index in earlier for earlier in plan.release[:mark])
            free = max(free, times[mark], done[index])
            free += link.ticks(timeline.items[index].nbytes, to_host=False)
            assert free <= times[timeline.items[index].need]
    moved = sorted(done)
    assert sorted(itertools.chain(*plan.release)) == moved
    assert sorted(itertools.chain(*plan.reload)) == moved


@settings(max_examples=60, deadline=None)
@given(regions, rates, st.sampled_from(POLICIES), st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_a_larger_fraction_offloads_no_less(
    drawn: list[tuple[int, int, int]], rate: int, policy: str, fractions: list[float]
) -> None:
    timeline, link = timeline_of(drawn), Link(Fraction(rate), Fraction(rate))
    plans = [make_plan(timeline, link, policy, fraction=fraction) for fraction in sorted(fractions)]
    sent = [
        sum(i.nbytes for i, reason in zip(timeline.items, plan.kept, strict=True) if not reason)
        for plan in plans
    ]
    assert sent == sorted(sent)
    total = sum(item.nbytes for item in timeline.items)
    assert all(s <= f * total + 1e-6 for s, f in zip(sent, sorted(fractions), strict=True))
    assert make_plan(timeline, link, policy, fraction=0).peak_bytes == total


def test_a_plan_depends_on_its_input_only() -> None:
    timeline = one_pass([5, 9, 2, 7], [3] * 4, [6] * 4)
    link = Link(Fraction(2), Fraction(3))
    plan = make_plan(timeline, link)
    assert make_plan(timeline, link) == plan == pickle.loads(pickle.dumps(plan))


def test_policies_choose_in_their_order() -> None:
    timeline = one_pass([4, 4, 8, 4], [10] * 4, [10] * 4)
    link = Link(Fraction(100), Fraction(100))

    def chosen(policy: str, fraction: float) -> list[int]:
        kept = make_plan(timeline, link, policy, fraction=fraction).kept
        return [index for index, reason in enumerate(kept) if reason is None]

    assert chosen("earliest", 0.5) == [0, 1]
    assert chosen("largest", 0.5) == [2]
    assert chosen("longest-lifetime", 0.3) == [0]


def test_reasons() -> None:
    items = list(one_pass([4] * 6, [10] * 6, [10] * 6).items)
    items[0] = Item(4, 0, 0, 11, 12, held=True)
    timeline = Timeline(tuple(range(12)), tuple(items), tuple(range(0, 120, 10)))
    plan = make_plan(timeline, Link(Fraction(1, 5), Fraction(1, 5)), fraction=0.9)
    assert plan.kept[0] == "held"
    assert plan.kept[5] == "fraction"
    assert "link" in plan.kept
    tight = make_plan(timeline, Link(Fraction(9), Fraction(9)), target_bytes=19)
    assert tight.peak_bytes <= 19
    assert tight.kept.count("target") > 0


@pytest.mark.parametrize("times", [None, ()])
def test_an_empty_step(times: tuple[int, ...] | None) -> None:
    plan = make_plan(Timeline((), (), times), Link(Fraction(1), Fraction(1)))
    assert plan.kept == plan.release == plan.reload == ()
    assert plan.peak_bytes == 0
