"""Host memory for offloaded storages: slabs, cut into blocks of few sizes that are used again."""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

_SMALLEST = 512
_STEPS = 8


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
    """A block on loan.

    Attributes:
        block: uint8 ``[size_class(nbytes)]`` on the host.
        guard: event of the last read of the block; whoever writes next waits for it.
    """

    block: Tensor
    guard: Any = None


class HostArena:
    """Lends blocks of host memory and takes them back.

    Args:
        allocate: gives a uint8 tensor of so many bytes, pinned where there is a device.
        max_bytes: most bytes to allocate, None for no limit.
        slab_bytes: bytes of one allocation, unless a block needs more.
    """

    def __init__(
        self, allocate: Callable[[int], Tensor], max_bytes: int | None, slab_bytes: int
    ) -> None:
        self._allocate = allocate
        self._max_bytes = max_bytes
        self._slab_bytes = slab_bytes
        self._rest: Tensor | None = None
        self._free: dict[int, collections.deque[Lease]] = collections.defaultdict(collections.deque)
        self.allocations = 0
        self.allocated_bytes = 0
        self.leased_bytes = 0
        self.peak_leased_bytes = 0
        self.leases = 0

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
        self.leases += 1
        self.leased_bytes += size
        self.peak_leased_bytes = max(self.peak_leased_bytes, self.leased_bytes)
        return lease

    def give_back(self, lease: Lease) -> None:
        """End a loan; what still reads the block must be ``lease.guard``."""
        self.leases -= 1
        self.leased_bytes -= lease.block.numel()
        self._free[lease.block.numel()].append(lease)

    def _cut(self, size: int) -> Tensor | None:
        if self._rest is None or self._rest.numel() < size:
            slab = max(size, self._slab_bytes)
            if self._max_bytes is not None:
                slab = min(slab, self._max_bytes - self.allocated_bytes)
            if slab < size:
                return None
            self._rest = self._allocate(slab)
            self.allocations += 1
            self.allocated_bytes += slab
        block, self._rest = self._rest[:size], self._rest[size:]
        return block
