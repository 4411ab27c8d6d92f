"""Which storages to offload, when to let them go and bring them back; and which plan comes next.

A step is a sequence of marks on the compute lane: a region closes in forward, a storage is first
needed in backward. Copies to the host run in closing order, copies back in the order of need, one
at a time each. A storage is let go of at the first mark at which its copy is done, and its way
back starts at the last mark from which it arrives in time, as late as all those behind it permit.
What cannot go and come back in time stays. All numbers are integers.
"""

import bisect
import collections
import dataclasses
import logging
from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise

from megatron_echo.copy_lanes import Backend, Link
from megatron_echo.offload.config import OffloadConfig
from megatron_echo.offload.host_arena import size_class

logger = logging.getLogger(__name__)

_MOST_PLANS = 8

_TRIALS = 512
"""Above so many storages, some are tried together: what cannot all go then stays."""

KEPT_REASONS = ("fraction", "target", "link", "held")


@dataclasses.dataclass(frozen=True)
class Item:
    """A storage that could be offloaded; marks by their index."""

    nbytes: int
    chunk: int  # number of the forward pass in the step
    close: int  # mark at which its region closed
    need: int  # mark of its first use in backward; the number of marks if none
    drop: int  # it was dropped before this mark
    held: bool = False  # something else kept it on the device, so that offloading freed nothing


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A recorded step."""

    marks: tuple[Hashable, ...]  # what each was, in order; equal steps have equal marks
    items: tuple[Item, ...]  # in closing order
    times: tuple[int, ...] | None = None  # of each mark on the compute lane, without waits

    @property
    def signature(self) -> Hashable:
        """What a plan is kept for: the marks, and the size class of all items together.

        Single sizes may vary, as those of experts with a dynamic number of tokens do.
        """
        return self.marks, size_class(sum(item.nbytes for item in self.items))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do at each mark."""

    marks: tuple[Hashable, ...]  # of the timeline; a step with others cannot follow the plan
    kept: tuple[str | None, ...]  # for each item None (offload it) or one of KEPT_REASONS
    release: tuple[tuple[int, ...], ...]  # for each mark the items to let go of
    reload: tuple[tuple[int, ...], ...]  # for each mark the items to begin to bring back
    peak_bytes: int  # forecast of the most bytes of all items on the device at once


def make_plan(timeline: Timeline, link: Link | None, config: OffloadConfig) -> Plan:
    """Choose items of a recorded step and fix the marks of their copies.

    Without a link, or without times, copies take one mark and everything may go.
    """
    planner = _Planner(timeline, link, config.max_slowdown)
    kept: list[str | None] = ["held" if item.held else "fraction" for item in timeline.items]
    wanted = planner.ordered(config.policy, config.fraction)
    chosen = planner.hidden([], wanted, 1 + len(wanted) // _TRIALS)
    for index in wanted:
        kept[index] = "link"
    if config.target_bytes is not None:
        count = bisect.bisect_left(
            range(len(chosen)),
            -config.target_bytes,
            key=lambda count: -planner.plan(kept, chosen[:count]).peak_bytes,
        )
        for index in chosen[count:]:
            kept[index] = "target"
        chosen = chosen[:count]
    for index in chosen:
        kept[index] = None
    return planner.plan(kept, chosen)


class _Planner:
    """Finds the marks of the copies of one timeline; see :func:`make_plan`."""

    def __init__(self, timeline: Timeline, link: Link | None, max_slowdown: float) -> None:
        self._timeline, self._items = timeline, timeline.items
        self._times: Sequence[int] = range(len(timeline.marks) + 1)  # of marks, and of the end
        self._ticks: list[tuple[int, int]] | None = None  # of the copies of each item, if measured
        if timeline.times is not None and link is not None:
            times = [int(time * (1 + max_slowdown)) for time in timeline.times]
            self._times = [*times, times[-1] if times else 0]
            self._ticks = [
                (link.ticks(item.nbytes, to_host=True), link.ticks(item.nbytes, to_host=False))
                for item in self._items
            ]

    def ordered(self, policy: str, fraction: float) -> list[int]:
        """The items of the first ``fraction`` of each chunk's bytes, all chunks side by side."""
        items, times = self._items, self._times
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
            (total / totals[items[index].chunk], number, index)
            for number, (index, total) in enumerate(zip(order, sums, strict=True))
        )
        return [index for share, _, index in shares if share <= fraction]

    def hidden(self, chosen: list[int], block: list[int], smallest: int) -> list[int]:
        """``chosen`` and, in order, the parts of ``block`` with which all copies are in time."""
        if not block or self._marks([*chosen, *block])[2]:
            return [*chosen, *block]
        if len(block) <= smallest:
            return chosen
        half = len(block) // 2
        chosen = self.hidden(chosen, block[:half], smallest)
        return self.hidden(chosen, block[half:], smallest)

    def _marks(self, chosen: Sequence[int]) -> tuple[dict[int, int], dict[int, int], bool]:
        """Marks of release and of reload by item, and whether all items are out and back in time.

        The reloads are in the order of their copies, backwards.
        """
        items, times, release, reload = self._items, self._times, {}, {}
        latest_need_first = sorted(chosen, key=lambda index: (-items[index].need, index))
        if self._ticks is None:
            release = {index: items[index].close + 1 for index in sorted(chosen)}
            for index in latest_need_first:
                reload[index] = max(release[index], items[index].need - 1)
            return release, reload, all(release[i] < items[i].need for i in chosen)
        end = 0
        for index in sorted(chosen):
            item = items[index]
            end = max(end, times[item.close]) + self._ticks[index][0]
            release[index] = max(bisect.bisect_left(times, end), item.close + 1)
        start = times[-1]
        for index in latest_need_first:
            item = items[index]
            start = min(start, times[item.need]) - self._ticks[index][1]
            reload[index] = bisect.bisect_right(times, start, hi=item.need) - 1
        return release, reload, all(release[index] < reload[index] for index in chosen)

    def plan(self, kept: Sequence[str | None], chosen: Sequence[int]) -> Plan:
        """The plan that offloads ``chosen``; of the others ``kept`` has the reasons.

        Its peak: drops come before a mark; in it new items, then releases, then reloads.
        """
        items, marks = self._items, len(self._timeline.marks)
        release: list[list[int]] = [[] for _ in range(marks)]
        reload: list[list[int]] = [[] for _ in range(marks)]
        released, reloaded, _ = self._marks(chosen)
        for index, mark in released.items():
            release[mark].append(index)
        for index, mark in reversed(reloaded.items()):
            reload[mark].append(index)
        changes = [0] * (marks + 1)
        for item in items:
            changes[item.close] += item.nbytes
            changes[item.drop] -= item.nbytes
        live = peak = 0
        for mark in range(marks):
            live += changes[mark]
            freed = sum(items[index].nbytes for index in release[mark])
            back = sum(items[index].nbytes for index in reload[mark])
            peak = max(peak, live, live - freed + back)
            live += back - freed
        return Plan(
            self._timeline.marks,
            tuple(kept),
            tuple(map(tuple, release)),
            tuple(map(tuple, reload)),
            peak,
        )


class Scheduler:
    """Chooses the plan of the next step: the one of a step like the last, if it is known."""

    def __init__(self, config: OffloadConfig, backend: Backend) -> None:
        self._config = config
        self._backend = backend
        self._plans: dict[Hashable, Plan] = {}
        self._observed: list[Timeline] = []  # equal steps
        self.plan: Plan | None = None  # for the next step; None while there is something to learn

    @property
    def wants_times(self) -> bool:
        """Whether the next step should be timed."""
        return self.plan is None and self._backend.link is not None

    def learn(self, timeline: Timeline) -> None:
        """Take a complete step into account."""
        signature = timeline.signature
        self.plan = self._plans.get(signature)
        if self.plan is not None:
            return
        if self._backend.link is not None and timeline.times is None:
            return  # it departed from a plan; the next one is timed
        if self._observed and self._observed[-1].signature != signature:
            self._observed = []
        self._observed.append(timeline)
        if len(self._observed) < self._config.learning_steps and timeline.times is not None:
            return
        timeline, self._observed = _shortest(self._observed), []
        self.plan = self._plans[signature] = make_plan(timeline, self._backend.link, self._config)
        if len(self._plans) > _MOST_PLANS:
            del self._plans[next(iter(self._plans))]
        kept = zip(timeline.items, self.plan.kept, strict=True)
        logger.info(
            "Offload plan: %d of %d MiB in %d storages, at most %d MiB on the device",
            sum(item.nbytes for item, reason in kept if reason is None) >> 20,
            sum(item.nbytes for item in timeline.items) >> 20,
            len(timeline.items),
            self.plan.peak_bytes >> 20,
        )


def _shortest(steps: list[Timeline]) -> Timeline:
    """The last of equal steps, with the shortest time between each two marks."""
    if not steps[-1].times:
        return steps[-1]
    spans = zip(*([b - a for a, b in pairwise(step.times or ())] for step in steps), strict=True)
    return dataclasses.replace(steps[-1], times=tuple(accumulate(map(min, spans), initial=0)))
