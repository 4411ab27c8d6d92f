"""What happens in a step, in order: the material of the schedule."""

import collections
import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

from megatron_echo.copy_lanes import Backend
from megatron_echo.offload.schedule import Item, Timeline
from megatron_echo.offload.storages import Blob


@dataclasses.dataclass
class Chunk:
    """One forward pass of one model chunk.

    Attributes:
        number: of the forward pass in the step.
        model: index of the model chunk.
        entries: its storages, in closing order.
        is_ready: its forward pass is over.
    """

    number: int
    model: int
    entries: list["Entry"] = dataclasses.field(default_factory=list)
    is_ready: bool = False

    def before(self, entry: "Entry") -> Iterator["Entry"]:
        """The storages that closed before this one, newest first."""
        return itertools.dropwhile(lambda other: other.close >= entry.close, reversed(self.entries))

    def is_untouched(self) -> bool:
        """True while backward needed none of its storages."""
        return all(entry.need is None for entry in self.entries)


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
    """Marks, storages and times of one step.

    Args:
        backend: for timestamps.
        is_timed: whether to take them.

    Attributes:
        marks: what happened, in order.
        entries: all storages, in closing order.
        chunks: all forward passes, in order.
        is_broken: one of them failed.
        fates: bytes that went to the host, by ``Blob.fate``, of storages that are gone.
    """

    def __init__(self, backend: Backend, is_timed: bool) -> None:
        self._backend = backend
        self.is_timed = is_timed
        self.marks: list[Hashable] = []
        self.entries: list[Entry] = []
        self.chunks: list[Chunk] = []
        self.is_broken = False
        self.fates: collections.Counter[str] = collections.Counter()
        self._stamps: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def mark(self, what: Hashable) -> Iterator[int]:
        """A mark; the time inside, which is waiting, does not count. Gives its index."""
        before = self._backend.timestamp() if self.is_timed else None
        self.marks.append(what)
        yield len(self.marks) - 1
        if self.is_timed:
            self._stamps.append((before, self._backend.timestamp()))

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
        chunk = self.entries[index].chunk
        yield from chunk.before(self.entries[index])
        others = [c for c in self.chunks if c.is_ready and c.entries and c.is_untouched()]
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
