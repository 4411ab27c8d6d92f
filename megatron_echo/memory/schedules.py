"""Pipeline schedules, replayed: what a rank runs, in order, and how many microbatches it holds.

``1f1b``, ``interleaved`` and ``interleaved-ep-overlap`` are Megatron-Core's.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SCHEDULES = ("1f1b", "interleaved", "interleaved-ep-overlap")
BACKWARD_SHARE = 2 / 3
"""Part of a layer's time that its backward pass takes, where only the sum is known."""

Work = tuple[int, int]
"""A chunk of the rank and a microbatch."""
Pass = tuple[str, int, int]
"""``F`` or ``B``, a stage and a microbatch."""


class Turn(NamedTuple):
    """What a rank does next: a forward pass, a backward pass, or both at the same time."""

    forward: Work | None
    backward: Work | None


class Pipeline(NamedTuple):
    """A schedule with its sizes.

    A rank runs ``group`` microbatches through one chunk before it turns to the next (Megatron's
    ``--microbatch-group-size-per-virtual-pipeline-stage``).
    """

    schedule: str  # one of :data:`SCHEDULES`
    ranks: int  # P
    chunks: int  # V, model chunks on each rank
    microbatches: int  # M, of a step and a data-parallel rank
    group: int

    @classmethod
    def make(
        cls,
        schedule: str,
        ranks: int,
        chunks: int = 1,
        microbatches: int | None = None,
        group: int | None = None,
    ) -> "Pipeline":
        """Fill in the defaults and check.

        Without a number there are enough microbatches to fill the pipeline; groups are of P,
        Megatron's default; ``interleaved`` with one chunk is ``1f1b``, as it is in Megatron.

        Raises:
            ValueError: a schedule that does not exist or cannot run with these sizes.
        """
        if schedule not in SCHEDULES:
            raise ValueError(
                f"There is no schedule {schedule!r}. Use one of {', '.join(SCHEDULES)}."
            )
        if ranks < 1 or chunks < 1:
            raise ValueError(f"{ranks} ranks of {chunks} chunks are no pipeline. Use 1 or more.")
        if schedule == "interleaved" and chunks == 1:
            schedule = "1f1b"
        is_interleaved = schedule != "1f1b"
        if is_interleaved != (chunks > 1):
            fix = "2 or more" if is_interleaved else "exactly 1"
            raise ValueError(
                f"The schedule {schedule} does not run {chunks} chunks a rank. Use {fix}."
            )
        group = ranks if group is None else group
        if group < ranks:
            raise ValueError(
                f"A group of {group} microbatches is below the {ranks} ranks. Use more."
            )
        least = group if is_interleaved else 1
        full = max(4 * ranks, 2 * group)
        microbatches = full + (-full) % group if microbatches is None else microbatches
        rest = microbatches % group
        if microbatches < least or (is_interleaved and 0 < rest < ranks):
            fix = f"a multiple of {group}" if is_interleaved else "1 or more"
            raise ValueError(
                f"The schedule {schedule} does not run {microbatches} microbatches. Use {fix}."
            )
        return cls(schedule, ranks, chunks, microbatches, group)

    def stage(self, rank: int, chunk: int) -> int:
        """Where in the model a rank's chunk is: stage 0 has the embedding, P * V - 1 the loss."""
        return chunk * self.ranks + rank

    def turns(self, rank: int) -> list[Turn]:
        """Everything that one rank runs in a step, in order."""
        if self.schedule == "1f1b":
            forwards = [(0, m) for m in range(self.microbatches)]
            return _one_forward_one_backward(forwards, forwards, self.ranks - rank - 1)
        forwards = _interleaved_order(self)
        backwards = [(self.chunks - 1 - chunk, m) for chunk, m in forwards]
        overlap = self.schedule == "interleaved-ep-overlap"
        warmup = 2 * (self.ranks - rank - 1) + (self.chunks - 1) * self.group + overlap
        return _one_forward_one_backward(forwards, backwards, warmup, overlap)

    def live(self, rank: int) -> list[tuple[int, ...]]:
        """Microbatches held by each chunk of a rank, ``[V]`` each: the maximal ones, sorted.

        A microbatch is held from the start of its forward to the end of its backward pass. What
        the rank holds is at no time more, in every chunk, than one of the vectors says.
        """
        held, seen = [0] * self.chunks, set()
        for turn in self.turns(rank):
            if turn.forward is not None:
                held[turn.forward[0]] += 1
                seen.add(tuple(held))
            if turn.backward is not None:
                held[turn.backward[0]] -= 1
        return sorted(v for v in seen if not any(v != w and _covers(w, v) for w in seen))

    def step_time(self, stage_seconds: ArrayLike) -> NDArray[np.float64]:
        """Seconds of a step: every pass starts when its rank is free and its input is there.

        ``stage_seconds`` are forward and backward time of a microbatch in each stage, ``[..., P *
        V]`` of one layout or of many at once; the result is float64 ``[...]``. Communication takes
        no time, and two passes in one turn take the sum of theirs.
        """
        seconds = np.moveaxis(np.asarray(stage_seconds, dtype=np.float64), -1, 0)
        share = {"F": seconds * (1 - BACKWARD_SHARE), "B": seconds * BACKWARD_SHARE}
        clock = [np.zeros(seconds.shape[1:])] * self.ranks
        done: dict[Pass, NDArray[np.float64]] = {}
        for rank, needs, makes in _replay(self):
            now = clock[rank]
            for need in needs:
                now = np.maximum(now, done.pop(need))
            for way, stage, _ in makes:
                now = now + share[way][stage]
            clock[rank] = now
            done |= dict.fromkeys(makes, now)
        return np.max(clock, axis=0)

    def passes(self, rank: int, turn: Turn) -> tuple[list[Pass], list[Pass]]:
        """What a turn waits for, and what it runs."""
        last = self.ranks * self.chunks - 1
        needs: list[Pass] = []
        makes: list[Pass] = []
        if turn.forward is not None:
            stage, microbatch = self.stage(rank, turn.forward[0]), turn.forward[1]
            needs += [("F", stage - 1, microbatch)] if stage > 0 else []
            makes.append(("F", stage, microbatch))
        if turn.backward is not None:
            stage, microbatch = self.stage(rank, turn.backward[0]), turn.backward[1]
            needs.append(("B", stage + 1, microbatch) if stage < last else ("F", last, microbatch))
            makes.append(("B", stage, microbatch))
        return needs, makes


@lru_cache(maxsize=8)
def _replay(pipeline: Pipeline) -> list[tuple[int, list[Pass], list[Pass]]]:
    """All turns of all ranks in an order in which each finds its inputs, whatever they take."""
    todo = [[pipeline.passes(r, turn) for turn in pipeline.turns(r)] for r in range(pipeline.ranks)]
    place, done = [0] * pipeline.ranks, set[Pass]()
    order: list[tuple[int, list[Pass], list[Pass]]] = []
    while any(place[rank] < len(turns) for rank, turns in enumerate(todo)):
        before = len(order)
        for rank, turns in enumerate(todo):
            while place[rank] < len(turns) and done.issuperset(turns[place[rank]][0]):
                order.append((rank, *turns[place[rank]]))
                done.update(turns[place[rank]][1])
                place[rank] += 1
        assert len(order) > before, "the schedule waits for itself"
    return order


def _covers(large: tuple[int, ...], small: tuple[int, ...]) -> bool:
    return all(a >= b for a, b in zip(large, small, strict=True))


def _one_forward_one_backward(
    forwards: list[Work], backwards: list[Work], warmup: int, together: bool = False
) -> list[Turn]:
    """Forward passes to warm up, one of each by turns (or together), backward passes to drain."""
    warmup = min(warmup, len(forwards))
    turns = [Turn(work, None) for work in forwards[:warmup]]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        turns += (
            [Turn(forward, backward)] if together else [Turn(forward, None), Turn(None, backward)]
        )
    return turns + [Turn(None, work) for work in backwards[len(forwards) - warmup :]]


def _interleaved_order(pipeline: Pipeline) -> list[Work]:
    """Groups of microbatches through all chunks, one group after the other."""
    starts = range(0, pipeline.microbatches, pipeline.group)
    return [
        (chunk, microbatch)
        for start in starts
        for chunk in range(pipeline.chunks)
        for microbatch in range(start, min(start + pipeline.group, pipeline.microbatches))
    ]
