"""What happens in a step, in order: the material of the schedule."""

import collections
import contextlib
import dataclasses
import itertools
import logging
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

from megatron_echo.copy_lanes import Backend
from megatron_echo.offload.schedule import Item, Plan, Timeline
from megatron_echo.offload.storages import Blob

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Chunk:
    """The ``number``-th forward pass of the step, one of model chunk ``model``."""

    number: int
    model: int
    entries: list["Entry"] = dataclasses.field(default_factory=list)  # in closing order
    is_ready: bool = False  # the pass is over


@dataclasses.dataclass
class Entry:
    """A storage of the step; it does not keep it alive."""

    blob: weakref.ref[Blob]
    nbytes: int
    chunk: Chunk
    close: int
    need: int | None = None
    drop: int | None = None
    is_held: bool = False


class StepRecord:
    """Marks, storages and times of one step, and the plan that it follows so far.

    A step that is captured in a CUDA graph has to be as planned, as replays repeat all copies.
    """

    def __init__(
        self, backend: Backend, is_timed: bool, plan: Plan | None, is_captured: bool
    ) -> None:
        self._backend = backend
        self.is_timed = is_timed  # the backend gives timestamps
        self.plan = plan  # None while the schedule is learnt
        self.is_captured = is_captured
        self.marks: list[Hashable] = []  # what happened, in order
        self.entries: list[Entry] = []  # all storages, in closing order
        self.chunks: list[Chunk] = []  # all forward passes, in order
        self.is_broken = False  # one of them failed
        self.fates: collections.Counter[str] = collections.Counter()  # bytes of storages now gone
        self._stamps: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def mark(self, what: Hashable) -> Iterator[int]:
        """A mark; the time inside, which is waiting, does not count. Gives its index.

        A step whose next mark is not the planned one leaves the plan; a captured one would do so
        in every replay, which is a ``RuntimeError``.
        """
        position = len(self.marks)
        if self.plan is not None and self.plan.marks[position : position + 1] != (what,):
            self._depart(position)
        before = self._backend.timestamp() if self.is_timed else None
        self.marks.append(what)
        yield position
        if self.is_timed:
            self._stamps.append((before, self._backend.timestamp()))

    def check_complete(self) -> None:
        """Raise a ``RuntimeError`` if a captured step ends before its plan does."""
        if self.plan is None or len(self.marks) < len(self.plan.marks):
            self._depart(len(self.marks))

    def _depart(self, position: int) -> None:
        if self.is_captured:
            raise RuntimeError(
                "The step that is captured in a CUDA graph departs from the plan of offloading at "
                f"mark {position}: the steps before it had another schedule. Capture a step like "
                "those."
            )
        logger.info("The schedule departs from the plan at mark %d; no plan for now", position)
        self.plan = None

    def add(self, blob: Blob, chunk: Chunk, position: int) -> Entry:
        """A new storage, at the mark of this index."""
        entry = Entry(weakref.ref(blob), blob.nbytes, chunk, position)
        blob.index = len(self.entries)
        self.entries.append(entry)
        chunk.entries.append(entry)
        blob.on_drop = lambda blob: self._on_drop(entry, blob)
        return entry

    def _on_drop(self, entry: Entry, blob: Blob) -> None:
        entry.drop = len(self.marks)
        entry.is_held = blob.is_held
        if blob.fate is not None:
            self.fates[blob.fate] += blob.nbytes

    def owns(self, blob: Blob) -> bool:
        """Whether the blob is one of this step's."""
        return blob.index < len(self.entries) and self.entries[blob.index].blob() is blob

    def next_needed(self, index: int) -> Iterator[Entry]:
        """What backward probably needs after this storage, soonest first.

        The rest of its chunk backwards, then the oldest complete chunk of the last model chunk
        that has one. A plan knows better; this is for steps without one.
        """
        chunk, close = self.entries[index].chunk, self.entries[index].close
        yield from itertools.dropwhile(lambda e: e.close >= close, reversed(chunk.entries))
        others = [
            chunk
            for chunk in self.chunks
            if chunk.is_ready and chunk.entries and all(e.need is None for e in chunk.entries)
        ]
        if others:
            last = max(c.model for c in others)
            yield from reversed(next(c for c in others if c.model == last).entries)

    def timeline(self) -> Timeline:
        """The whole step."""
        marks = len(self.marks)
        items = tuple(
            Item(
                entry.nbytes, entry.chunk.number, entry.close,
                marks if entry.need is None else entry.need,
                marks if entry.drop is None else entry.drop,
                entry.is_held,
            )
            for entry in self.entries
        )  # fmt: skip
        if not self.is_timed:
            return Timeline(tuple(self.marks), items)
        self._backend.synchronize()
        between = (
            self._backend.ticks(after, before)
            for (_, after), (before, _) in itertools.pairwise(self._stamps)
        )
        times = tuple(itertools.accumulate(between, initial=0)) if marks else ()
        return Timeline(tuple(self.marks), items, times)
