"""A device on an integer clock: what the copies cost, and whether their order is complete.

Three lanes, no noise. The host is infinitely fast and ahead: it never learns what is done, it can
only make a lane wait. Copies move real bytes, but only when the clock says so, and until then their
target holds 0xFF (NaN as a float). Memory that is freed is filled with it too. Independent of all
times, vector clocks tell whether conflicting accesses to a block are ordered by events.
"""

import collections
import heapq
import itertools
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_echo.copy_lanes import Backend, Lane, Link
from megatron_echo.cpu_backend.access_order import AccessOrder, Clock

_POISON = 0xFF

Latency = Callable[[Lane, int], int]
"""Ticks of a copy from its lane and bytes."""


class Event(NamedTuple):
    """When everything that a lane was given was done, and what was ordered before that."""

    time: int
    clock: Clock


def _block(tensor: Tensor) -> tuple[int, int]:
    """The same for two tensors at the same place of one storage, and for no others, ever.

    The weak references in ``SimulatedBackend._tracked`` keep the numbers from being used again.
    """
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


class SimulatedBackend(Backend):
    """A device whose tensors are CPU tensors.

    The planner is told the link's bytes per tick; ``latency`` is what copies take, by default the
    same.

    Attributes:
        races: descriptions of conflicting accesses that no event orders.
        premature_reads: copies back that began, on the clock, before the block was written.
        live_bytes: of the storages that the offloader took note of or allocated, until freed.
        peak_bytes: most of them.
        copied_bytes: of each lane.
        trace: a line for each operation.
    """

    def __init__(self, link: Link, latency: Latency | None = None) -> None:
        self._link = link
        self._latency = latency or self._by_link
        self._time = dict.fromkeys(Lane, 0)
        self._order = AccessOrder()
        self._actions: list[tuple[int, int, Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._landing: dict[tuple[int, int], int] = {}
        self._tracked: list[StorageWeakRef] = []
        self.races: list[str] = []
        self.premature_reads = 0
        self.live_bytes = 0
        self.peak_bytes = 0
        self.copied_bytes: collections.Counter[Lane] = collections.Counter()
        self.trace: list[str] = []

    def _by_link(self, lane: Lane, nbytes: int) -> int:
        return self._link.ticks(nbytes, to_host=lane is Lane.TO_HOST)

    @property
    def now(self) -> int:
        """The compute lane's time in ticks."""
        return self._time[Lane.COMPUTE]

    def compute(self, ticks: int) -> None:
        """Keep the compute lane busy."""
        self._time[Lane.COMPUTE] += ticks
        self._run_until(self.now)

    def surviving_storages(self) -> int:
        """How many storages that the offloader saw still have memory, whoever holds them."""
        return sum(not storage.expired() for storage in self._tracked)

    def _run_until(self, time: int) -> None:
        while self._actions and self._actions[0][0] <= time:
            heapq.heappop(self._actions)[2]()

    def _at(self, time: int, action: Callable[[], object]) -> None:
        heapq.heappush(self._actions, (time, next(self._numbers), action))

    # ----------------------------------------------------------------- the backend

    def allocate_device(self, nbytes: int, device: torch.device) -> Tensor:
        """Poisoned memory, last used by the compute lane."""
        tensor = torch.full((nbytes,), _POISON, dtype=torch.uint8)
        self.note(tensor, "write")
        return tensor

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """Read the source when the lane gets there, write the target when it is through."""
        nbytes = source.numel()
        start = self._time[lane]
        end = self._time[lane] = start + self._latency(lane, nbytes)
        self._access(lane, source, writes=False)
        self._access(lane, target, writes=True)
        self.premature_reads += self._landing.get(_block(source), start) > start
        self._landing[_block(target)] = end
        self.copied_bytes[lane] += nbytes
        self.trace.append(f"{start}..{end} {lane.value} {nbytes}")
        staged: list[Tensor] = []

        def read() -> None:
            is_there = source.untyped_storage().nbytes() >= nbytes
            staged.append(source.clone() if is_there else torch.full_like(target, _POISON))
            target.fill_(_POISON)

        self._at(start, read)
        self._at(end, lambda: target.copy_(staged[0]))
        self._run_until(self.now)

    def record(self, lane: Lane) -> Event:
        """The lane's time, and its vector clock."""
        return Event(self._time[lane], self._order.record(lane))

    def wait(self, lane: Lane, event: Event) -> None:
        """Move the lane's time and clock behind the event's."""
        self._time[lane] = max(self._time[lane], event.time)
        self._order.wait(lane, event.clock)
        if lane is Lane.COMPUTE:
            self._run_until(self.now)

    def note(self, tensor: Tensor, access: Literal["write", "read", "free"]) -> None:
        """Keep the ledger, check the order, and poison freed memory that nobody else holds."""
        self._access(Lane.COMPUTE, tensor, writes=access != "read")
        if access == "write":
            self.live_bytes += tensor.numel()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self._tracked.append(StorageWeakRef(tensor.untyped_storage()))
        elif access == "free":
            self.live_bytes -= tensor.numel()
            storage = tensor.untyped_storage()
            if torch._C._storage_Use_Count(storage._cdata) <= 2 and storage.nbytes():
                tensor.fill_(_POISON)

    def timestamp(self) -> int:
        """The compute lane's time."""
        return self.now

    def ticks(self, start: int, end: int) -> int:
        """The difference."""
        return end - start

    @property
    def link(self) -> Link:
        """What the planner is told."""
        return self._link

    def _access(self, lane: Lane, tensor: Tensor, writes: bool) -> None:
        kinds = ("read", "write")
        self.races += [
            f"{kinds[writes]} in lane {lane.value} is not ordered behind a "
            f"{kinds[other.writes]} in lane {Lane(other.lane).value}"
            for other in self._order.access(lane, _block(tensor), 0, tensor.numel(), writes)
        ]
