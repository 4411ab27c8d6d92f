"""Host memory for offloaded storages: slabs, cut into blocks of few sizes that are used again."""

import bisect
import collections
import dataclasses
import gc
import itertools
from collections.abc import Callable
from typing import Any

from torch import Tensor

_SMALLEST = 512
_STEPS = 8
_MANY = 4  # blocks of one size in a slab


def size_class(nbytes: int) -> int:
    """The block size for ``nbytes`` (at least 1): eight steps in each power of two.

    A block is less than an eighth larger than what it holds, except below 512 bytes.
    """
    if nbytes <= _SMALLEST:
        return _SMALLEST
    step = (1 << (nbytes - 1).bit_length() - 1) // _STEPS
    return -(-nbytes // step) * step


@dataclasses.dataclass
class Lease:
    """A block on loan."""

    block: Tensor  # uint8 ``[size_class(nbytes)]`` on the host
    guard: Any = None  # event of its last read; whoever writes next waits for it
    is_of_graph: bool = False  # a captured copy has its address, so that replays write it


class HostArena:
    """Lends blocks of host memory and takes them back.

    **In a capture** nothing is pinned: CUDA forbids it, and the memory would be the graph's for
    good. The steps before it, which send everything, have pinned what a planned one needs; beyond
    that the arena is full. What a capture was lent is never lent again outside of it, because each
    replay writes it; the arena keeps it, as a graph holds addresses and no memory. No slab is given
    back to PyTorch, which would ask an event of the capture whether the copies are done.

    Args:
        allocate: gives so many bytes as a uint8 tensor, pinned where there is a device. It is asked
            for powers of two only: to them PyTorch rounds what it pins.
        max_bytes: most bytes to allocate, None for no limit.
        slab_bytes: bytes of one allocation at least, rounded up, where the limit leaves them.
    """

    def __init__(
        self, allocate: Callable[[int], Tensor], max_bytes: int | None, slab_bytes: int
    ) -> None:
        self._allocate = allocate
        self._max_bytes = max_bytes
        self._slab_bytes = slab_bytes
        self._rests: list[Tensor] = []  # of slabs, the smallest first
        self._cuts: collections.Counter[int] = collections.Counter()
        self._free: dict[int, collections.deque[Lease]] = collections.defaultdict(collections.deque)
        self._of_graphs: list[Lease] = []
        self._is_captured = False
        self.allocations = 0
        self.allocated_bytes = 0
        self.leased_bytes = 0
        self.peak_leased_bytes = 0

    def lease(self, nbytes: int) -> Lease | None:
        """A block of at least ``nbytes``, with the guard of its last user; None when full."""
        size = size_class(nbytes)
        if self._free[size]:
            lease = self._free[size].popleft()
        else:
            block = self._cut(size)
            if block is None:
                return None
            lease = Lease(block)
        if self._is_captured and not lease.is_of_graph:
            lease.is_of_graph = True
            self._of_graphs.append(lease)
        self.leased_bytes += size
        self.peak_leased_bytes = max(self.peak_leased_bytes, self.leased_bytes)
        return lease

    def give_back(self, lease: Lease) -> None:
        """End a loan; what still reads the block must be ``lease.guard``."""
        self.leased_bytes -= lease.block.numel()
        if self._is_captured or not lease.is_of_graph:
            self._free[lease.block.numel()].append(lease)

    def begin_capture(self) -> None:
        """Pin nothing from now on, and forget the guards: a capture begins with an idle device.

        Blocks that an earlier step still holds are a ``RuntimeError``.
        """
        if self.leased_bytes:
            gc.collect()  # what only cycles hold is not in use
        if self.leased_bytes:
            raise RuntimeError(
                f"{self.leased_bytes} offloaded bytes of an earlier step are still in use where a "
                "CUDA graph is captured. Let go of that step's losses and outputs before."
            )
        self._is_captured = True
        for lease in itertools.chain.from_iterable(self._free.values()):
            lease.guard = None

    def end_capture(self) -> None:
        """Leave to the graph what it was lent; does nothing where there is no capture."""
        if not self._is_captured:
            return
        self._is_captured = False
        for size, leases in self._free.items():
            self._free[size] = collections.deque(one for one in leases if not one.is_of_graph)

    def _cut(self, size: int) -> Tensor | None:
        """A new block, from the smallest rest that holds it or else from a new slab."""
        at = bisect.bisect_left(self._rests, size, key=Tensor.numel)
        if at == len(self._rests):
            nbytes = None if self._is_captured else self._slab_size(size)
            if nbytes is None:
                return None
            self._rests.append(self._allocate(nbytes))
            self.allocations += 1
            self.allocated_bytes += nbytes
        rest = self._rests.pop(at)
        if rest.numel() >= size + _SMALLEST:
            bisect.insort(self._rests, rest[size:], key=Tensor.numel)
        self._cuts[size] += 1
        return rest[:size]

    def _slab_size(self, size: int) -> int | None:
        """A power of two that holds the block, within the limit; None where there is none.

        It has room for one block more than were cut of this size before, up to four: a single one
        may leave almost half of its slab to smaller ones, many leave less than a fifth.
        """
        many = min(self._cuts[size] + 1, _MANY)
        wanted = 1 << (max(many * size, self._slab_bytes) - 1).bit_length()
        if self._max_bytes is not None:
            left = self._max_bytes - self.allocated_bytes
            wanted = min(wanted, 1 << left.bit_length() >> 1)
        return wanted if wanted >= size else None
