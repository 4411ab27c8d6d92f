"""Which accesses to memory are ordered: a vector clock for each lane of work.

One rule for the simulated device and for the recorded graph: two accesses to the same bytes, one of
them a write, must be ordered by program order in a lane or by an event that the other waits for.
"""

import collections
from collections.abc import Hashable
from typing import NamedTuple

Clock = dict[Hashable, int]
"""How much of each lane is over, as a lane or an event knows it."""


class Access(NamedTuple):
    """One use of the bytes from ``begin`` to ``end``."""

    lane: Hashable
    epoch: int
    begin: int
    end: int
    writes: bool


class AccessOrder:
    """Clocks of lanes, and the accesses that later ones must be ordered behind."""

    def __init__(self) -> None:
        self._clocks: dict[Hashable, Clock] = collections.defaultdict(dict)
        self._accesses: dict[Hashable, list[Access]] = {}
        self._worked: Clock = {}

    def record(self, lane: Hashable) -> Clock:
        """What an event knows that is recorded in the lane now."""
        clock = self._clocks[lane]
        seen = {**clock, lane: clock.get(lane, 1)}
        clock[lane] = seen[lane] + 1
        return seen

    def wait(self, lane: Hashable, seen: Clock) -> None:
        """Put what the lane is given from now on behind an event."""
        clock = self._clocks[lane]
        for other, epoch in seen.items():
            clock[other] = max(clock.get(other, 0), epoch)

    def access(
        self, lane: Hashable, memory: Hashable, begin: int, end: int, writes: bool
    ) -> list[Access]:
        """Use bytes of a memory in a lane.

        The earlier uses that conflict, and that nothing orders.
        """
        clock = self._clocks[lane]
        epoch = self._worked[lane] = clock.setdefault(lane, 1)
        races, rest = [], []
        for other in self._accesses.get(memory, ()):
            overlaps = begin < other.end and other.begin < end
            if overlaps and (writes or other.writes) and clock.get(other.lane, 0) < other.epoch:
                races.append(other)
            is_inside = begin <= other.begin and other.end <= end
            says_less = writes or (other.lane == lane and not other.writes)
            if not (is_inside and says_less):  # who is behind this one is behind that one too
                rest.append(other)
        self._accesses[memory] = [*rest, Access(lane, epoch, begin, end, writes)]
        return races

    def not_behind(self, lane: Hashable) -> list[Hashable]:
        """Lanes whose last work is not ordered before what this lane is given next."""
        clock = self._clocks[lane]
        return [
            other
            for other, epoch in self._worked.items()
            if other != lane and clock.get(other, 0) < epoch
        ]
