"""Rows on each rank of a group that every rank of it can read and write.

On CUDA they are ``torch.distributed._symmetric_memory``, reached over NVLink. On a CPU they are a
file that the processes of one machine map, so that all that is built on them runs in tests and on
a laptop. One rank, and meta tensors, have plain memory.
"""

import os
import secrets
import tempfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, override

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.dispatch.permute import add_rows, sum_rows
from megatron_echo.environment import machine_number, on_gpu

_NOT_SHARED = (
    "symmetric_memory needs expert-parallel ranks on one machine that reach each other's memory, "
    "and these {fault}. Use another transport, or a smaller --expert-model-parallel-size."
)


@dataclass(frozen=True)
class PeerRows:
    """``[B + 1, H]`` on each of R ranks; row i of rank r is the place ``r * (B + 1) + i``.

    The last row of each rank stands for none: nothing is kept that is written there, and whoever
    reads it gets zeros.

    Attributes:
        own: ``[B + 1, H]``, those of this rank.
        everyone: ``[R * (B + 1), H]``, where one tensor can hold the rows of all; else None.
        offsets: int64 ``[R]``, elements between the begin of ``own`` and of each rank's rows, on
            the device, for kernels; None where ``everyone`` is used.
    """

    own: Tensor
    everyone: Tensor | None
    offsets: Tensor | None = None

    def put(self, values: Tensor, places: Tensor) -> None:
        """Write each value to its places.

        Args:
            values: ``[T, H]``.
            places: int32 ``[T, K]``; no two name the same row, except the last one of this rank.
        """
        if self.offsets is not None:
            from megatron_echo.dispatch.transports import kernels

            kernels.put_rows(self.own, self.offsets, values, places)
            return
        assert self.everyone is not None
        copies = values.unsqueeze(1).expand(*places.shape, values.shape[1])
        index = places.reshape(-1).to(torch.int64)
        self.everyone.index_copy_(0, index, copies.reshape(-1, values.shape[1]))

    def offer(self, rows: Tensor, sums: Tensor | None = None) -> None:
        """Put ``[B, H]`` into this rank's own rows.

        Args:
            rows: of the same dtype.
            sums: int32 ``[B, K]``, the rows to sum into each, B for none; None copies them.
        """
        if sums is None:
            self.own[:-1].copy_(rows)
        else:
            sum_rows(rows, sums, self.own[:-1])
        if self.offsets is None:  # kernels do not read the last row
            self.own[-1].zero_()

    def pull(self, places: Tensor, into: Tensor | None = None) -> Tensor:
        """Sum the rows at some places, in order.

        Args:
            places: int32 ``[T, K]``.
            into: where to write, contiguous ``[T, H]``; new, in the wide dtype, if None.
        """
        if self.offsets is not None:
            from megatron_echo.dispatch.transports import kernels

            return kernels.pull_rows(self.own, self.offsets, places, into)
        assert self.everyone is not None
        total = add_rows(self.everyone, places)
        return total if into is None else into.copy_(total)

    def put_matrices(self, matrices: Tensor, source: Tensor) -> None:
        """Write matrices ``[M, out, in]`` into slots of ranks, out rows for each.

        Args:
            matrices: contiguous; H is in.
            source: int32 ``[R, S]``, which of them goes to each slot, -1 for none. No two ranks
                write the same slot.
        """
        if self.offsets is not None:
            from megatron_echo.dispatch.transports import kernels

            kernels.put_matrices(self.own, self.offsets, matrices, source)
            return
        assert self.everyone is not None
        (ranks, slots), out, stride = source.shape, matrices.shape[1], len(self.own)
        first = torch.arange(ranks, device=source.device)[:, None] * stride
        first = first + torch.arange(slots, device=source.device) * out
        rows = first.reshape(-1, 1) + torch.arange(out, device=source.device)
        wanted = source.reshape(-1).to(torch.int64)
        nowhere = len(self.everyone) - 1  # nobody reads it in a buffer of matrices
        rows = rows.masked_fill_(wanted[:, None] < 0, nowhere)
        sent = matrices.index_select(0, wanted.clamp_(min=0))
        self.everyone.index_copy_(0, rows.flatten(), sent.flatten(0, 1))

    def offer_matrices(self, matrices: Tensor, used: Tensor) -> None:
        """Put matrices ``[S, out, in]`` into this rank's own slots.

        Args:
            matrices: contiguous.
            used: int32 ``[S]``, each slot's own number, -1 where it may hold anything.
        """
        if self.offsets is None:
            self.offer(matrices.flatten(0, 1))
            return
        from megatron_echo.dispatch.transports import kernels

        here = torch.zeros_like(self.offsets[:1])
        kernels.put_matrices(self.own, here, matrices, used[None])

    def add_matrices(self, places: Tensor, slots: int, home: Tensor) -> None:
        """Add matrices that lie in slots to those of this rank.

        Args:
            places: int32 ``[m, n]``, ``rank * S + slot`` of what is added, -1 for nothing.
            slots: S.
            home: ``[m, out, in]``, contiguous; sums are wide, in the order of the columns, and
                rounded once. A matrix to which nothing is added keeps its bits.
        """
        if self.offsets is not None:
            from megatron_echo.dispatch.transports import kernels

            kernels.add_matrices(self.own, self.offsets, places, slots, home)
            return
        assert self.everyone is not None
        total, stride = home.to(wide_dtype(home.dtype)), len(self.own)
        row = torch.arange(home.shape[1], device=home.device)
        for place in places.to(torch.int64).unbind(1):
            first = place // slots * stride + place % slots * home.shape[1]
            rows = first.clamp_(min=0)[:, None] + row
            part = self.everyone.index_select(0, rows.flatten()).view_as(home)
            total = torch.where((place >= 0)[:, None, None], total + part, total)
        home.copy_(total)


class PeerMemory(ABC):
    """Where peer rows come from, and what orders the work of the ranks on them."""

    @abstractmethod
    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> PeerRows:
        """Make rows, uninitialised; all ranks call it together. The host may wait.

        Args:
            rows: ``B + 1``.
            columns: H.
            dtype: of the rows.
        """

    @abstractmethod
    def barrier(self, lane: int = 0) -> None:
        """Work that follows in a lane, on any rank, sees all that came before it in that lane.

        On CUDA the current stream waits, not the host.

        Args:
            lane: 0 or 1; two barriers may be under way at once in different lanes.
        """


class PlainMemory(PeerMemory):
    """Of one rank; or of several that have no values, on the meta device."""

    def __init__(self, ranks: int, device: torch.device) -> None:
        self._ranks, self._device = ranks, device

    @override
    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> PeerRows:
        everyone = torch.empty(self._ranks * rows, columns, dtype=dtype, device=self._device)
        if on_gpu(everyone):
            return PeerRows(everyone, None, torch.zeros(1, dtype=torch.int64, device=self._device))
        return PeerRows(everyone[:rows], everyone)

    def barrier(self, lane: int = 0) -> None:
        """Nothing to wait for."""


class FileMemory(PeerMemory):
    """A file in memory (``/dev/shm``, or else the temporary folder), unlinked once all have it."""

    def __init__(self, group: dist.ProcessGroup, name: str) -> None:
        self._group, self._files = group, 0
        shared = Path("/dev/shm")
        folder = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
        self._path = folder / f"megatron_echo-{name}"
        self._flags = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)

    @override
    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> PeerRows:
        ranks, rank = self._group.size(), self._group.rank()
        path = Path(f"{self._path}-{self._files}")
        self._files += 1
        try:
            storage = _mapped(path, ranks * rows * columns * dtype.itemsize)
        finally:  # a rank that fails keeps no other waiting
            self.barrier()
            if rank == 0:
                path.unlink(missing_ok=True)
        everyone = torch.empty(0, dtype=dtype).set_(storage).view(ranks * rows, columns)
        return PeerRows(everyone[rank * rows : (rank + 1) * rows], everyone)

    @override
    def barrier(self, lane: int = 0) -> None:
        dist.all_reduce(self._flags[lane], dist.ReduceOp.MAX, group=self._group)


def _mapped(path: Path, nbytes: int) -> Any:
    """A file that is there or is made, as a storage."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:  # without room this fails here, and not as a bus error later
        os.posix_fallocate(descriptor, 0, nbytes)
    finally:
        os.close(descriptor)
    return torch.UntypedStorage.from_file(str(path), shared=True, nbytes=nbytes)


class SymmetricMemory(PeerMemory):
    """Of GPUs that are linked; the signals of the barrier are those of the first allocation."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._handle: Any = None

    @override
    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> PeerRows:
        from torch.distributed import _symmetric_memory as symmetric_memory

        own = symmetric_memory.empty(rows, columns, dtype=dtype, device=self._device)
        handle = symmetric_memory.rendezvous(own, self._group)
        ranks = range(self._group.size())
        peers = [handle.get_remote_tensor(rank, own.shape, dtype).data_ptr() for rank in ranks]
        offsets = [(peer - own.data_ptr()) // dtype.itemsize for peer in peers]
        self._handle = self._handle or handle
        return PeerRows(own, None, torch.tensor(offsets, device=self._device))

    @override
    def barrier(self, lane: int = 0) -> None:
        assert self._handle is not None
        self._handle.barrier(channel=lane)


def peer_memory(group: dist.ProcessGroup) -> PeerMemory:
    """The memory of a group on this machine's device, tried out. All ranks call it together.

    Args:
        group: its ranks' rows are to be shared.

    Raises:
        ValueError: the ranks are on several machines, or do not reach each other's memory.
    """
    has_cuda = torch.accelerator.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if has_cuda else torch.device("cpu")
    if group.size() == 1:
        return PlainMemory(1, device)
    number = _common_number(group, device)
    memory = SymmetricMemory(group, device) if has_cuda else FileMemory(group, f"{number:x}")
    _check_shared(memory, group, number, device)
    return memory


def highest(values: list[int], group: dist.ProcessGroup, device: torch.device) -> list[int]:
    """Of each value the largest on any rank; the host waits."""
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return tensor.tolist()


def _common_number(group: dist.ProcessGroup, device: torch.device) -> int:
    """A random number below 2^52 that all ranks know; fails on all if a machine is not theirs."""
    machine = machine_number()
    chosen = secrets.randbits(52) if group.rank() == 0 else 0
    most, least, number = highest([machine, -machine, chosen], group, device)
    if most != -least:
        raise ValueError(_NOT_SHARED.format(fault="are on several"))
    return number


def _check_shared(
    memory: PeerMemory, group: dist.ProcessGroup, number: int, device: torch.device
) -> None:
    """Let every rank read a number that rank 0 leaves in its rows; fails on all if one cannot."""
    rows, cause = None, None
    try:
        rows = memory.allocate(2, 1, torch.float64)
    except (OSError, RuntimeError) as error:
        cause = error
    is_failure = highest([rows is None], group, device)[0]
    if rows is not None and not is_failure:
        rows.offer(rows.own.new_full((1, 1), number if group.rank() == 0 else 0))
        memory.barrier()
        seen = rows.pull(torch.zeros(1, 1, dtype=torch.int32, device=device)).item()
        is_failure = highest([seen != number], group, device)[0]
    if is_failure:
        raise ValueError(_NOT_SHARED.format(fault="do not")) from cause
