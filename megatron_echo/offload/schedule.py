"""Which storages to offload, when to let go of them and when to bring them back: pure planning.

A step is a sequence of marks on the compute lane: a region closes in forward, a storage is first
needed in backward. Copies to the host run in closing order, copies back in the order of need, one
at a time each. A storage is let go of at the first mark at which its copy is done, and its way
back starts at the last mark from which it arrives in time, as late as all those behind it permit.
What cannot go and come back in time stays. All numbers are integers.
"""

import bisect
import collections
import dataclasses
from collections.abc import Hashable, Sequence

from megatron_echo.copy_lanes import Link
from megatron_echo.offload.host_arena import size_class

_TRIALS = 512
"""Above so many storages, some are tried together: what cannot all go then stays."""

_Ticks = list[tuple[int, int]]

KEPT_REASONS = ("fraction", "target", "link", "held")


@dataclasses.dataclass(frozen=True)
class Item:
    """A storage that could be offloaded.

    Attributes:
        nbytes: its size.
        chunk: number of the forward pass in the step.
        close: index of the mark at which its region closed.
        need: index of the mark of its first use in backward; the number of marks if none.
        drop: it was dropped before the mark of this index.
        held: something else kept it alive on the device, so that offloading freed nothing.
    """

    nbytes: int
    chunk: int
    close: int
    need: int
    drop: int
    held: bool = False


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A recorded step.

    Attributes:
        marks: what each mark was, in order; equal steps have equal marks.
        items: in closing order.
        times: tick of each mark on the compute lane, waits left out; None if not measured.
    """

    marks: tuple[Hashable, ...]
    items: tuple[Item, ...]
    times: tuple[int, ...] | None = None

    @property
    def signature(self) -> Hashable:
        """What a plan is kept for: the marks, and the size class of all items together.

        Single sizes may vary, as those of experts with a dynamic number of tokens do.
        """
        return self.marks, size_class(sum(item.nbytes for item in self.items))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do at each mark.

    Attributes:
        marks: those of the timeline; a step with others cannot follow the plan.
        kept: for each item None (offload it) or one of :data:`KEPT_REASONS`.
        release: for each mark the items to let go of.
        reload: for each mark the items to begin to bring back.
        peak_bytes: forecast of the most bytes of all items on the device at once.
    """

    marks: tuple[Hashable, ...]
    kept: tuple[str | None, ...]
    release: tuple[tuple[int, ...], ...]
    reload: tuple[tuple[int, ...], ...]
    peak_bytes: int


@dataclasses.dataclass(frozen=True)
class _Transfers:
    release: dict[int, int]
    reload: dict[int, int]
    late: set[int]


def make_plan(
    timeline: Timeline,
    link: Link | None,
    policy: str = "earliest",
    fraction: float = 1.0,
    target_bytes: int | None = None,
    max_slowdown: float = 0.0,
) -> Plan:
    """Choose items and fix the marks of their copies.

    Args:
        timeline: the recorded step.
        link: without it, or without times, copies take one mark and everything may go.
        policy: ``earliest``, ``largest`` or ``longest-lifetime``.
        fraction: of the bytes of each chunk, taken in the policy's order.
        target_bytes: stop once the forecast peak is no higher.
        max_slowdown: plan as if computation took this much longer.
    """
    times = _planning_times(timeline, link, max_slowdown)
    ticks = _copy_ticks(timeline, link)
    kept: list[str | None] = ["held" if item.held else "fraction" for item in timeline.items]
    wanted = _ordered(timeline, times, policy, fraction)
    chosen = _hidden(timeline, times, ticks, [], wanted, 1 + len(wanted) // _TRIALS)
    for index in wanted:
        kept[index] = "link"
    if target_bytes is not None:
        chosen = _down_to(timeline, times, ticks, chosen, kept, target_bytes)
    for index in chosen:
        kept[index] = None
    return _as_plan(timeline, kept, _transfers(timeline, times, ticks, chosen))


def _planning_times(timeline: Timeline, link: Link | None, max_slowdown: float) -> Sequence[int]:
    """A tick for each mark and one for the end."""
    if timeline.times is None or link is None:
        return range(len(timeline.marks) + 1)
    times = [int(time * (1 + max_slowdown)) for time in timeline.times]
    return [*times, times[-1] if times else 0]


def _ordered(timeline: Timeline, times: Sequence[int], policy: str, fraction: float) -> list[int]:
    """The items of the first ``fraction`` of each chunk's bytes, all chunks side by side."""
    items = timeline.items
    order = [index for index, item in enumerate(items) if not item.held]
    if policy == "largest":
        order.sort(key=lambda index: -items[index].nbytes)
    elif policy == "longest-lifetime":
        order.sort(key=lambda index: times[items[index].close] - times[items[index].need])
    totals: collections.Counter[int] = collections.Counter()
    sums = []
    for index in order:
        totals[items[index].chunk] += items[index].nbytes
        sums.append(totals[items[index].chunk])
    shares = sorted(
        (total / totals[items[index].chunk], place, index)
        for place, (index, total) in enumerate(zip(order, sums, strict=True))
    )
    return [index for share, _, index in shares if share <= fraction]


def _copy_ticks(timeline: Timeline, link: Link | None) -> _Ticks | None:
    """Ticks to the host and back for each item, None where nothing is measured."""
    if timeline.times is None or link is None:
        return None
    return [
        (link.ticks(item.nbytes, to_host=True), link.ticks(item.nbytes, to_host=False))
        for item in timeline.items
    ]


def _hidden(
    timeline: Timeline, times: Sequence[int], ticks: _Ticks | None, chosen: list[int],
    block: list[int], smallest: int,
) -> list[int]:  # fmt: skip
    """``chosen`` and, in order, the parts of ``block`` with which all copies are still in time."""
    if not block or not _transfers(timeline, times, ticks, [*chosen, *block]).late:
        return [*chosen, *block]
    if len(block) <= smallest:
        return chosen
    half = len(block) // 2
    chosen = _hidden(timeline, times, ticks, chosen, block[:half], smallest)
    return _hidden(timeline, times, ticks, chosen, block[half:], smallest)


def _down_to(
    timeline: Timeline, times: Sequence[int], ticks: _Ticks | None, chosen: list[int],
    kept: list[str | None], target_bytes: int,
) -> list[int]:  # fmt: skip
    """The fewest of ``chosen``, from its beginning, whose forecast peak meets the target."""

    def peak(count: int) -> int:
        offloaded = set(chosen[:count])
        reasons = [None if i in offloaded else "target" for i in range(len(kept))]
        transfers = _transfers(timeline, times, ticks, chosen[:count])
        return _as_plan(timeline, reasons, transfers).peak_bytes

    counts = range(len(chosen))
    count = bisect.bisect_left(counts, -target_bytes, key=lambda count: -peak(count))
    for index in chosen[count:]:
        kept[index] = "target"
    return chosen[:count]


def _transfers(
    timeline: Timeline, times: Sequence[int], ticks: _Ticks | None, chosen: Sequence[int]
) -> _Transfers:
    """Marks of release and reload; ``late`` are the items that miss their way out or back."""
    items, release, reload = timeline.items, {}, {}
    if ticks is None:
        release = {index: items[index].close + 1 for index in chosen}
        reload = {index: max(release[index], items[index].need - 1) for index in chosen}
        return _Transfers(release, reload, {i for i in chosen if release[i] >= items[i].need})
    end = 0
    for index in sorted(chosen):
        item = items[index]
        end = max(end, times[item.close]) + ticks[index][0]
        release[index] = max(bisect.bisect_left(times, end), item.close + 1)
    start = times[-1]
    for index in sorted(chosen, key=lambda index: (-items[index].need, index)):
        item = items[index]
        start = min(start, times[item.need]) - ticks[index][1]
        reload[index] = bisect.bisect_right(times, start, hi=item.need) - 1
    late = {index for index in chosen if reload[index] <= release[index]}
    return _Transfers(release, reload, late)


def _as_plan(timeline: Timeline, kept: Sequence[str | None], transfers: _Transfers) -> Plan:
    marks = len(timeline.marks)
    release: list[list[int]] = [[] for _ in range(marks)]
    reload: list[list[int]] = [[] for _ in range(marks)]
    for index in sorted(transfers.release):
        release[transfers.release[index]].append(index)
    for index in sorted(transfers.reload, key=lambda i: (timeline.items[i].need, -i)):
        reload[transfers.reload[index]].append(index)
    return Plan(
        marks=timeline.marks,
        kept=tuple(kept),
        release=tuple(tuple(indices) for indices in release),
        reload=tuple(tuple(indices) for indices in reload),
        peak_bytes=_peak(timeline, release, reload),
    )


def _peak(timeline: Timeline, release: list[list[int]], reload: list[list[int]]) -> int:
    """Most bytes on the device: drops come before a mark; in it new items, releases, reloads."""
    items = timeline.items
    change_before = [0] * (len(timeline.marks) + 1)
    change_first = [0] * len(timeline.marks)
    for item in items:
        change_first[item.close] += item.nbytes
        change_before[item.drop] -= item.nbytes
    live = peak = 0
    for mark in range(len(timeline.marks)):
        live += change_before[mark] + change_first[mark]
        peak = max(peak, live)
        live -= sum(items[index].nbytes for index in release[mark])
        live += sum(items[index].nbytes for index in reload[mark])
        peak = max(peak, live)
    return peak
