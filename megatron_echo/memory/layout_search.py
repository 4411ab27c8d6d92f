"""The exact search behind ``plan_layout``: dynamic programming over pipeline ranks.

With one or two chunks a rank, a state is how far both chunks have come (and, interleaved, where
the second one began). Every rank adds a segment to each. The largest stage time, rank time or peak
over the ranks is then minimised one after the other, each among the layouts that keep what was
reached before. More chunks are searched two neighbours at a time until nothing improves.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_echo.memory.schedules import Pipeline

Array = NDArray[np.float64]
CRITERIA = ("stage_time", "rank_time", "peak")
_SLACK = 1 + 1e-9
"""Sums that differ by rounding count as equal."""


class Measures(NamedTuple):
    """A layout's longest stage and busiest rank, in seconds a microbatch, and highest peak."""

    stage_time: float
    rank_time: float
    peak: float

    def keeps(self, limits: "Measures") -> bool:
        """True if nothing is above its limit."""
        return all(a <= b * _SLACK for a, b in zip(self, limits, strict=True))


class Costs(NamedTuple):
    """Of each item of the model, in order: ``[n]`` each. See ``LayerCost``."""

    seconds: Array
    activation: Array
    static: Array
    workspace: Array
    is_mtp: Array  # 1 or 0


class Segments:
    """Sums over runs of items, from any start, for one length: all ``[n + 1 - length]``."""

    def __init__(self, costs: Costs, length: int) -> None:
        def sums(values: NDArray) -> Array:
            total = np.concatenate(([0], np.cumsum(values, dtype=np.float64)))
            return total[length:] - total[: len(total) - length]

        self.seconds, self.activation = sums(costs.seconds), sums(costs.activation)
        self.static, self.mtp = sums(costs.static), sums(costs.is_mtp)
        self.workspace = np.zeros(len(self.seconds))
        if length > 0:
            windows = np.lib.stride_tricks.sliding_window_view(costs.workspace, length)
            self.workspace = windows.max(1)


class Search:
    """Layouts of one model on one pipeline.

    A layout is its cuts: int ``[P * V + 1]``, stage ``s`` holds the items ``cuts[s]`` to
    ``cuts[s + 1]``, from 0 to n.
    """

    def __init__(self, costs: Costs, pipeline: Pipeline) -> None:
        self.costs, self.pipeline = costs, pipeline
        self.items = len(costs.seconds)
        self.live = [
            np.array(pipeline.live(rank), dtype=np.float64) for rank in range(pipeline.ranks)
        ]
        self._segments: dict[int, Segments] = {}

    def segments(self, length: int) -> Segments:
        """Sums over runs of ``length`` items."""
        if length not in self._segments:
            self._segments[length] = Segments(self.costs, length)
        return self._segments[length]

    def rank_measures(self, cuts: Sequence[int], rank: int) -> Measures:
        """What one rank has to do and to hold.

        The peak is static bytes, plus the activations of the worst moment of the schedule, plus
        the largest workspace.
        """
        seconds, static, workspace = [], 0.0, 0.0
        activation = np.zeros(self.pipeline.chunks)
        for chunk in range(self.pipeline.chunks):
            stage = self.pipeline.stage(rank, chunk)
            start, length = cuts[stage], cuts[stage + 1] - cuts[stage]
            sums = self.segments(length)
            seconds.append(float(sums.seconds[start]))
            static += float(sums.static[start])
            workspace = max(workspace, float(sums.workspace[start]))
            activation[chunk] = sums.activation[start]
        peak = static + float((self.live[rank] @ activation).max()) + workspace
        return Measures(max(seconds), sum(seconds), peak)

    def measures(self, cuts: Sequence[int]) -> Measures:
        """The maxima over the ranks."""
        ranks = [self.rank_measures(cuts, rank) for rank in range(self.pipeline.ranks)]
        return Measures(*(max(values) for values in zip(*ranks, strict=True)))

    def best(self, cuts: list[int], order: Sequence[str], limits: Measures) -> list[int]:
        """Minimise the criteria, in order.

        Args:
            cuts: a layout that keeps the limits.
            order: some of :data:`CRITERIA`.
            limits: what no layout may exceed.
        """
        pairs = [(0, 1)] if self.pipeline.chunks == 2 else [(0, None)]
        if self.pipeline.chunks > 2:
            pairs = [(chunk, chunk + 1) for chunk in range(self.pipeline.chunks - 1)]
        while True:
            before = self.measures(cuts)
            for first, second in pairs:
                cuts = _Pair(self, cuts, first, second).best(order, limits)
            after = self.measures(cuts)
            if len(pairs) == 1 or not any(
                getattr(after, name) * _SLACK < getattr(before, name) for name in order
            ):
                return cuts


class _Pair:
    """The search over one or two chunks, with the others as they are.

    States are arrays ``[C, n + 1, n + 1]``: where the second chunk began (C is 1 where that is
    known), the end of the first chunk so far, and that of the second; the second chunk of a V
    comes from the model's end, so its "end" is where its items begin.
    """

    def __init__(self, search: Search, cuts: list[int], first: int, second: int | None) -> None:
        self.search, self.cuts, self.first, self.second = search, cuts, first, second
        self.pipeline = search.pipeline
        self.mirrored = second is None or self.pipeline.schedule == "dualpipev"
        ranks = self.pipeline.ranks
        self.low = cuts[first * ranks]
        self.high = search.items if self.mirrored else cuts[(first + 2) * ranks]

    def best(self, order: Sequence[str], limits: Measures) -> list[int]:
        """The cuts of the best layout; see :meth:`Search.best`."""
        for name in order:
            bound = min(getattr(limits, name), getattr(self.search.measures(self.cuts), name))
            limits = limits._replace(**{name: bound})
            self.cuts = self._solve(limits, lambda m, name=name: getattr(m, name), np.maximum)
            limits = limits._replace(**{name: getattr(self.search.measures(self.cuts), name)})
        # Among equals, the most regular one.
        self.cuts = self._solve(limits, lambda m: m.rank_time**2 + m.stage_time**2, np.add)
        return self.cuts

    def _solve(self, limits: Measures, value: Callable, combine: Callable) -> list[int]:
        """Cuts with the lowest combined value of all ranks, within the limits."""
        size = self.search.items + 1
        begins = 1 if self.mirrored else size
        state = np.full((begins, size, size), np.inf)
        if self.mirrored:
            state[0, self.low, self.high] = -np.inf if combine is np.maximum else 0
        else:
            start = np.arange(self.low, self.high + 1)
            state[start, self.low, start] = -np.inf if combine is np.maximum else 0
        states = [state]
        for rank in range(self.pipeline.ranks):
            after = np.full_like(state, np.inf)
            for lengths, cost in self._rank_costs(rank, limits, value):
                source, target = self._windows(*lengths)
                np.minimum(after[target], combine(states[-1][source], cost), out=after[target])
            states.append(after)
        return self._trace(states, limits, value, combine)

    def _windows(self, a: int, b: int) -> tuple[tuple, tuple]:
        """Index of the states before and after segments of the lengths a and b."""
        size = self.search.items + 1
        if self.mirrored:
            return np.s_[:, : size - a, b:], np.s_[:, a:, : size - b]
        return np.s_[:, : size - a, : size - b], np.s_[:, a:, b:]

    def _trace(
        self, states: list[Array], limits: Measures, value: Callable, combine: Callable
    ) -> list[int]:
        """Walk back from the best final state."""
        ends = np.arange(self.search.items + 1)
        final = states[-1][0, ends, ends] if self.mirrored else states[-1][ends, ends, self.high]
        begin = int(final.argmin())
        place = (0, begin, begin) if self.mirrored else (begin, begin, self.high)
        assert np.isfinite(final[begin]), "the layout at hand was within the limits"
        cuts = list(self.cuts)
        cuts[(self.first + 1) * self.pipeline.ranks] = begin
        for rank in reversed(range(self.pipeline.ranks)):
            place = self._step_back(
                states[rank], states[rank + 1], place, rank, limits, value, combine
            )
            self._write(cuts, rank, place)
        return cuts

    def _step_back(
        self, before: Array, after: Array, place: tuple[int, int, int], rank: int,
        limits: Measures, value: Callable, combine: Callable,
    ) -> tuple[int, int, int]:  # fmt: skip
        begin, x, y = place
        for (a, b), cost in self._rank_costs(rank, limits, value):
            was = (begin, x - a, y + b if self.mirrored else y - b)
            if min(was) < 0 or was[2] > self.search.items:
                continue
            index = (was[1], was[2] - b) if self.mirrored else was[1:]
            if combine(before[was], cost[index]) == after[place] and np.isfinite(after[place]):
                return was
        raise AssertionError("a state without a predecessor")

    def _write(self, cuts: list[int], rank: int, place: tuple[int, int, int]) -> None:
        """Set where this rank's stages begin (the second stage of a V: where it ends)."""
        cuts[self.pipeline.stage(rank, self.first)] = place[1]
        if self.second is not None:
            stage = self.pipeline.stage(rank, self.second)
            cuts[stage + 1 if self.mirrored else stage] = place[2]

    def _rank_costs(
        self, rank: int, limits: Measures, value: Callable
    ) -> Iterator[tuple[tuple[int, int], Array]]:
        """For each pair of lengths, the value for every pair of places; inf beyond the limits."""
        fixed = self._fixed(rank)
        most = self.high - self.low
        for a in range(1, most + 1):
            first = self._allowed(a, rank, self.first, limits)
            if first is None:
                break
            for b in range(1, most + 1) if self.second is not None else (0,):
                second = self._allowed(b, rank, self.second, limits)
                if second is None:
                    break
                measured = self._combined(rank, a, b, fixed)
                inside = first[:, None] & second[None, :]
                for name in CRITERIA:
                    inside = inside & (getattr(measured, name) <= getattr(limits, name) * _SLACK)
                if inside.any():
                    yield (a, b), np.where(inside, value(measured), np.inf)

    def _allowed(
        self, length: int, rank: int, chunk: int | None, limits: Measures
    ) -> NDArray[np.bool_] | None:
        """Where a segment may start, None if it is too long everywhere (longer ones are too)."""
        sums = self.search.segments(length)
        if chunk is None:
            return np.ones(len(sums.seconds), dtype=np.bool_)
        live = self.search.live[rank][:, chunk].max()
        fits = sums.seconds <= limits.stage_time * _SLACK
        fits &= sums.static + live * sums.activation + sums.workspace <= limits.peak * _SLACK
        if not fits.any():
            return None
        return fits & self._mtp_is_legal(sums.mtp, rank, chunk)

    def _mtp_is_legal(self, mtp: Array, rank: int, chunk: int) -> NDArray[np.bool_]:
        """Megatron's rule: all MTP layers in one stage, the last one of a rank after the first."""
        total = self.search.costs.is_mtp.sum()
        last = self.pipeline.schedule == "dualpipev" or chunk == self.pipeline.chunks - 1
        if last and (rank > 0 or self.pipeline.ranks == 1 or self.pipeline.schedule == "dualpipev"):
            return (mtp == 0) | (mtp == total)
        return mtp == 0

    def _fixed(self, rank: int) -> tuple[Measures, float, float, Array]:
        """What the chunks that are not searched add: times, static, workspace, activations [K]."""
        activation = np.zeros(len(self.search.live[rank]))
        stage_time = rank_time = static = workspace = 0.0
        for chunk in range(self.pipeline.chunks):
            if chunk in (self.first, self.second):
                continue
            stage = self.pipeline.stage(rank, chunk)
            start, length = self.cuts[stage], self.cuts[stage + 1] - self.cuts[stage]
            sums = self.search.segments(length)
            stage_time = max(stage_time, sums.seconds[start])
            rank_time += sums.seconds[start]
            static += sums.static[start]
            workspace = max(workspace, sums.workspace[start])
            activation += self.search.live[rank][:, chunk] * sums.activation[start]
        return Measures(stage_time, rank_time, 0.0), static, workspace, activation

    def _combined(self, rank: int, a: int, b: int, fixed: tuple) -> Measures:
        """The rank's measures for every pair of places, arrays ``[n + 1 - a, n + 1 - b]``."""
        times, static, workspace, activation = fixed
        one, two = self.search.segments(a), self.search.segments(b)
        live = self.search.live[rank]
        held = np.full((len(one.static), len(two.static)), -np.inf)
        for row, other in zip(live, activation, strict=True):
            second = 0.0 if self.second is None else row[self.second] * two.activation[None, :]
            held = np.maximum(held, row[self.first] * one.activation[:, None] + second + other)
        space = np.maximum(np.maximum(one.workspace[:, None], two.workspace[None, :]), workspace)
        peak = one.static[:, None] + two.static[None, :] + static + held + space
        longest = np.maximum(one.seconds[:, None], two.seconds[None, :])
        total = one.seconds[:, None] + two.seconds[None, :] + times.rank_time
        return Measures(np.maximum(longest, times.stage_time), total, peak)
