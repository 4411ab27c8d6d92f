"""The search behind ``plan_layout``: small models by trying all, others by moves.

What a rank has to do and to hold are sums over its items; how long a step takes comes from
replaying the schedule, for many layouts at once.

Dynamic programming over the pipeline ranks finds where to begin, with one or two chunks a rank: a
state is how far both chunks have come (and, interleaved, where the second one began). Every rank
adds a segment to each, and the largest stage time, rank time or peak over the ranks is minimised.
With more chunks, moves begin at the layout at hand.
"""

import math
from collections.abc import Iterator, Sequence
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
    """Of each item of the model, in order, or of runs of items: ``[n]`` each; see ``LayerCost``."""

    seconds: Array
    activation: Array
    static: Array
    workspace: Array  # of a run the largest one, of all else sums
    mtp: Array  # how many MTP layers


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
        self._segments: dict[int, Costs] = {}

    def _takes_mtp(self, rank: int, chunk: int) -> bool:
        """Megatron's rule: in the last chunk of a rank.

        Its parser lets the first rank's last chunk pass, where the embedding is in another chunk.
        Those two copies are never added up, and with tied weights the ranks wait for each other.
        """
        last, alone = self.pipeline.chunks - 1, 1 in (self.pipeline.ranks, self.pipeline.chunks)
        return chunk == last and (rank > 0 or alone)

    def segments(self, length: int) -> Costs:
        """Of runs of ``length`` items, from any start: ``[n + 1 - length]`` each."""
        if length not in self._segments:
            sums = Costs(*(total[length:] - total[: len(total) - length] for total in self.totals))
            self._segments[length] = sums._replace(workspace=np.diagonal(self.workspace, length))
        return self._segments[length]

    def rank_measures(self, cuts: ArrayLike) -> Array:
        """What each rank has to do and to hold, in one layout or in many.

        The peak is static bytes, plus the activations of the worst moment of the schedule, plus the
        largest workspace. Cuts int ``[..., P * V + 1]`` give the fields of :class:`Measures`,
        float64 ``[..., P, 3]``.
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
        starts = [cuts, self.best(cuts, first, limits)] if self.pipeline.chunks < 3 else [cuts]
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
        mtp = np.diff(self.totals.mtp[cuts])
        cuts = cuts[((mtp == 0) | self.takes_mtp & (mtp == self.totals.mtp[-1])).all(-1)]
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

    def best(self, cuts: list[int], name: str, limits: Measures) -> list[int]:
        """The layout with the least of one of :data:`CRITERIA`, none above its limit.

        It is exact with one or two chunks a rank; with more, moves begin at ``cuts``, within the
        limits.
        """
        if self.pipeline.chunks > 2:
            return self.plan(cuts, [name], limits, np.inf)
        bound = min(getattr(limits, name), getattr(self.measures(cuts), name))
        limits, size = limits._replace(**{name: bound}), self.items + 1
        # [C, n + 1, n + 1]: where the second chunk begins, how far the first one is, and it is.
        begins = np.arange(self.items if self.pipeline.chunks == 1 else 0, size)
        state = np.full((len(begins), size, size), np.inf)
        state[range(len(begins)), 0, begins] = -np.inf
        states = [state]
        for rank in range(self.pipeline.ranks):
            after = np.full_like(state, np.inf)
            for (a, b), cost in self._rank_costs(rank, name, limits):
                reached = after[:, a:, b:]
                before = states[-1][:, : size - a, : size - b]
                np.minimum(reached, np.maximum(before, cost), out=reached)
            states.append(after)
        chosen = int(states[-1][range(len(begins)), begins, self.items].argmin())
        place, found = (chosen, int(begins[chosen]), self.items), list(cuts)
        for rank in reversed(range(self.pipeline.ranks)):
            place = next(
                was
                for (a, b), cost in self._rank_costs(rank, name, limits)
                if min(was := (chosen, place[1] - a, place[2] - b)) >= 0
                and max(states[rank][was], cost[was[1:]]) == states[rank + 1][place]
            )
            for stage, begin in zip(self.stages[rank], place[1:], strict=False):
                found[stage] = begin
        return found

    def _rank_costs(
        self, rank: int, name: str, limits: Measures
    ) -> Iterator[tuple[tuple[int, int], Array]]:
        """For each pair of lengths, the value for every pair of places; inf beyond the limits."""
        for a in range(1, self.items + 1):
            first = self._allowed(a, rank, 0, limits)
            if first is None:
                break
            for b in range(1, self.items + 1) if self.pipeline.chunks == 2 else (0,):
                second = self._allowed(b, rank, 1, limits)
                if second is None:
                    break
                measured = self._combined(rank, a, b)
                inside = first[:, None] & second[None, :]
                for value, limit in zip(measured, limits, strict=True):
                    inside = inside & (value <= limit * _SLACK)
                if inside.any():
                    yield (a, b), np.where(inside, measured[CRITERIA.index(name)], np.inf)

    def _allowed(
        self, length: int, rank: int, chunk: int, limits: Measures
    ) -> NDArray[np.bool_] | None:
        """Where a segment may start, None if it is too long everywhere (longer ones are too)."""
        sums = self.segments(length)
        if chunk == self.pipeline.chunks:
            return np.ones(len(sums.seconds), dtype=np.bool_)
        live = self.live[rank][:, chunk].max()
        fits = sums.seconds <= limits.stage_time * _SLACK
        fits &= sums.static + live * sums.activation + sums.workspace <= limits.peak * _SLACK
        if not fits.any():
            return None
        takes = self.takes_mtp[self.stages[rank, chunk]]
        return fits & ((sums.mtp == 0) | (takes & (sums.mtp == self.totals.mtp[-1])))

    def _combined(self, rank: int, a: int, b: int) -> tuple[Array, ...]:
        """The rank's measures for every pair of places, ``[n + 1 - a, n + 1 - b]`` each."""
        one, two = self.segments(a), self.segments(b)
        held = np.full((len(one.static), len(two.static)), -np.inf)
        for row in self.live[rank]:
            second = row[1] * two.activation if len(row) == 2 else np.zeros(len(two.static))
            held = np.maximum(held, row[0] * one.activation[:, None] + second)
        space = np.maximum(one.workspace[:, None], two.workspace)
        peak = one.static[:, None] + two.static + held + space
        longest = np.maximum(one.seconds[:, None], two.seconds)
        return longest, one.seconds[:, None] + two.seconds, peak
