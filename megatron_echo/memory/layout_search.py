"""The search behind ``plan_layout``: small models by trying all, others by moves.

What a rank has to do and to hold are sums over its items; how long a step takes comes from
replaying the schedule, for many layouts at once.

Dynamic programming over the pipeline ranks finds where to begin. With one or two chunks a rank, a
state is how far both chunks have come (and, interleaved, where the second one began). Every rank
adds a segment to each. The largest stage time, rank time or peak over the ranks is then minimised
one after the other, each among the layouts that keep what was reached before. More chunks are
searched two neighbours at a time until nothing improves.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_echo.memory.schedules import Pipeline

Array = NDArray[np.float64]
CRITERIA = ("stage_time", "rank_time", "peak")
FEW = 20_000
"""Up to so many layouts are all tried."""
KEPT = 4
"""Layouts that the moves of a round start from."""
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


class Segments(NamedTuple):
    """Sums over runs of items of one length, from any start: all ``[n + 1 - length]``."""

    seconds: Array
    activation: Array
    static: Array
    mtp: Array
    workspace: Array  # the largest one


class Search:
    """Layouts of one model on one pipeline.

    A layout is its cuts: int ``[P * V + 1]``, stage ``s`` holds the items ``cuts[s]`` to
    ``cuts[s + 1]``, from 0 to n.
    """

    def __init__(self, costs: Costs, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.totals = Costs(*(np.cumsum(np.append(0.0, values)) for values in costs))
        self.items, ranks = len(costs.seconds), range(pipeline.ranks)
        self.live = [np.array(pipeline.live(rank), dtype=np.float64) for rank in ranks]
        chunks = range(pipeline.chunks)
        self.stages = np.array([[pipeline.stage(r, c) for c in chunks] for r in ranks])
        self.takes_mtp = np.zeros(self.stages.size, dtype=np.bool_)
        self.takes_mtp[self.stages] = [[self._takes_mtp(r, c) for c in chunks] for r in ranks]
        self.workspace = np.zeros((self.items + 1, self.items + 1))
        for start in range(self.items):
            self.workspace[start, start + 1 :] = np.maximum.accumulate(costs.workspace[start:])
        self._segments: dict[int, Segments] = {}

    def _takes_mtp(self, rank: int, chunk: int) -> bool:
        """Megatron's rule: in the last chunk of a rank.

        Its parser lets the first rank's last chunk pass, where the embedding is in another chunk.
        Those two copies are never added up, and with tied weights the ranks wait for each other.
        """
        last, alone = self.pipeline.chunks - 1, 1 in (self.pipeline.ranks, self.pipeline.chunks)
        return chunk == last and (rank > 0 or alone)

    def segments(self, length: int) -> Segments:
        """Sums over runs of ``length`` items."""
        if length not in self._segments:
            seconds, activation, static, _, mtp = (
                total[length:] - total[: len(total) - length] for total in self.totals
            )
            longest = np.diagonal(self.workspace, length)
            self._segments[length] = Segments(seconds, activation, static, mtp, longest)
        return self._segments[length]

    def rank_measures(self, cuts: ArrayLike) -> Array:
        """What each rank has to do and to hold, in one layout or in many.

        The peak is static bytes, plus the activations of the worst moment of the schedule, plus
        the largest workspace.

        Args:
            cuts: int ``[..., P * V + 1]``.

        Returns:
            float64 ``[..., P, 3]``, the fields of :class:`Measures`.
        """
        cuts = np.asarray(cuts)
        seconds, activation, static, _, _ = (
            np.diff(total[cuts])[..., self.stages] for total in self.totals
        )
        held = [(activation[..., r, :] @ live.T).max(-1) for r, live in enumerate(self.live)]
        space = self.workspace[cuts[..., :-1], cuts[..., 1:]][..., self.stages].max(-1)
        peak = static.sum(-1) + np.stack(held, -1) + space
        return np.stack((seconds.max(-1), seconds.sum(-1), peak), -1)

    def measures(self, cuts: Sequence[int]) -> Measures:
        """The maxima over the ranks."""
        return Measures(*self.rank_measures(cuts).max(-2).tolist())

    def step_time(self, cuts: ArrayLike) -> Array:
        """Seconds of a step, replayed: ``[...]`` for cuts ``[..., P * V + 1]``."""
        return self.pipeline.step_time(np.diff(self.totals.seconds[np.asarray(cuts)]))

    def plan(
        self, cuts: list[int], order: Sequence[str], limits: Measures, enough: float = 0
    ) -> list[int]:
        """The best layout, with its replayed step among the criteria.

        Up to :data:`FEW` layouts are all tried. Of more, the best so far are changed by moving an
        item from any stage to any other, until no move makes them better.

        Args:
            cuts: a layout that keeps the limits.
            order: some of ``step`` and :data:`CRITERIA`; among equals, the most regular one.
            limits: what no layout may exceed.
            enough: seconds of a step; layouts above it come last, the fastest of them first.
        """
        slowest = max(float(self.step_time(cuts)), enough)
        most = slowest / self.pipeline.microbatches  # of a rank, as it runs each of them
        limits = Measures(min(limits[0], most), min(limits[1], most), limits.peak)
        count = self.stages.size
        if math.comb(self.items - 1, count - 1) <= FEW:
            inner = np.array(list(combinations(range(1, self.items), count - 1)), dtype=np.int64)
            every = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, self.items)))
            return self._ranked(every, order, limits, enough, slowest)[0].tolist()
        first = order[0] if order[0] in CRITERIA else "rank_time"
        starts = [cuts, self.best(cuts, [], limits), self.best(cuts, [first], limits)]
        kept = self._ranked(np.array(starts), order, limits, enough, slowest)
        begins = np.triu(np.ones((count, count + 1), dtype=np.int64), 1)
        moves = (begins[:, None] - begins).reshape(-1, count + 1)
        while True:
            before = kept
            if len(kept) == KEPT:
                slowest = max(float(self.step_time(kept).max()), enough)
            tried = np.unique((kept[:, None] + moves).reshape(-1, count + 1), axis=0)
            kept = self._ranked(tried, order, limits, enough, slowest)[:KEPT]
            if np.array_equal(kept, before):
                return kept[0].tolist()

    def _ranked(
        self, cuts: NDArray[np.int64], order: Sequence[str], limits: Measures, enough: float,
        slowest: float,
    ) -> NDArray[np.int64]:  # fmt: skip
        """Those that are legal, within the limits and no slower than that: the best one first."""
        cuts = cuts[(np.diff(cuts) > 0).all(-1)]
        mtp = np.diff(self.totals.is_mtp[cuts])
        cuts = cuts[((mtp == 0) | self.takes_mtp & (mtp == self.totals.is_mtp[-1])).all(-1)]
        ranks = self.rank_measures(cuts)
        # Before a rank's first pass and after its last one the stages before it take their time.
        before = self.totals.seconds[cuts[:, : self.pipeline.ranks]]
        least = (self.pipeline.microbatches * ranks[..., 1] + before).max(-1)
        inside = (ranks.max(-2) <= np.array(limits) * _SLACK).all(-1) & (least <= slowest * _SLACK)
        cuts, ranks = cuts[inside], ranks[inside]
        values = dict(zip(CRITERIA, np.moveaxis(ranks.max(-2), -1, 0), strict=True))
        values |= {"step": self.step_time(cuts), "uneven": (ranks[..., :2] ** 2).sum((-1, -2))}
        keys = [np.maximum(values["step"], enough), *(values[n] for n in (*order, "uneven"))]
        # Sums that differ by rounding are equal.
        keys = [np.ldexp(np.round(part, 12), power) for part, power in map(np.frexp, keys)]
        return cuts[np.lexsort(keys[::-1])]

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

    States are arrays ``[C, n + 1, n + 1]``: where the second chunk begins (one of :attr:`begins`),
    the end of the first chunk so far, and that of the second.
    """

    def __init__(self, search: Search, cuts: list[int], first: int, second: int | None) -> None:
        self.search, self.cuts, self.first, self.second = search, cuts, first, second
        self.pipeline = search.pipeline
        last = first if second is None else second
        self.low, self.high = (cuts[chunk * self.pipeline.ranks] for chunk in (first, last + 1))
        self.begins = np.arange(self.high if second is None else self.low, self.high + 1)

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
        size, count = self.search.items + 1, len(self.begins)
        state = np.full((count, size, size), np.inf)
        state[range(count), self.low, self.begins] = -np.inf if combine is np.maximum else 0
        states = [state]
        for rank in range(self.pipeline.ranks):
            after = np.full_like(state, np.inf)
            for (a, b), cost in self._rank_costs(rank, limits, value):
                before, reached = states[-1][:, : size - a, : size - b], after[:, a:, b:]
                np.minimum(reached, combine(before, cost), out=reached)
            states.append(after)
        return self._trace(states, limits, value, combine)

    def _trace(
        self, states: list[Array], limits: Measures, value: Callable, combine: Callable
    ) -> list[int]:
        """Walk back from the best final state."""
        final = states[-1][range(len(self.begins)), self.begins, self.high]
        best = int(final.argmin())
        assert np.isfinite(final[best]), "the layout at hand was within the limits"
        place = (best, int(self.begins[best]), self.high)
        cuts = list(self.cuts)
        for rank in reversed(range(self.pipeline.ranks)):
            place = self._step_back(
                states[rank], states[rank + 1], place, rank, limits, value, combine
            )
            for chunk, begin in zip((self.first, self.second), place[1:], strict=True):
                if chunk is not None:
                    cuts[self.pipeline.stage(rank, chunk)] = begin
        return cuts

    def _step_back(
        self, before: Array, after: Array, place: tuple[int, int, int], rank: int,
        limits: Measures, value: Callable, combine: Callable,
    ) -> tuple[int, int, int]:  # fmt: skip
        begin, x, y = place
        for (a, b), cost in self._rank_costs(rank, limits, value):
            was = begin, x - a, y - b
            if min(was) >= 0 and combine(before[was], cost[was[1:]]) == after[place]:
                return was
        raise AssertionError("a state without a predecessor")

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
        total = self.search.totals.is_mtp[-1]
        takes = self.search.takes_mtp[self.pipeline.stage(rank, chunk)]
        return fits & ((sums.mtp == 0) | (takes & (sums.mtp == total)))

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
