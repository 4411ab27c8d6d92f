"""Rows written straight to their place on the rank that computes them, and summed from there.

Only rows that are needed travel, each once, over NVLink. A source knows the row of each of its
pairs on any rank from the counts of all ranks (``place_pairs``), so nobody sorts what arrives.

Two movements do everything. A *push* writes rows into the buffers of peers, and each rank copies
what came to it: the dispatch, and the backward pass of the combine. In a *pull* each rank lays rows
open, and the others sum those that they want: the combine, and the backward pass of the dispatch.
The counts are pushed too.

Buffers belong to the model, not to a layer or a call, and a movement is safe on these terms:

1. It writes, passes one barrier of the group, and reads. So whoever reads sees all that was
   written for it.
2. A buffer may be written once every rank has read what the movement before left in it. A rank
   that arrives at a barrier has finished the reads of all earlier movements. So one barrier of
   another movement in between is enough, and that is the rule: counts, rows there and rows back
   have buffers of their own and take turns. A movement whose buffer is also the last one used
   passes a barrier before it writes.
3. Nothing refers to a buffer after its movement: what autograd keeps are the copies and the int32
   places. A buffer may hold anything between movements.

Every rank makes the same movements in the same order, as with collectives. On CUDA they are on
one stream, and barriers are waited for by the stream, not by the host.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.layout import PairPlaces, place_pairs
from megatron_echo.dispatch.permute import take_rows
from megatron_echo.dispatch.transports.base import RowDelivery, RowTransport
from megatron_echo.dispatch.transports.peer_memory import (
    PeerRows,
    PlainMemory,
    peer_memory,
)


class PeerBuffers:
    """The buffers of one model, of each shape and purpose one: :meth:`of` finds or makes them."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """Find out how the ranks of the group reach each other; they call it together.

        Args:
            group: the expert-parallel group, R ranks.

        Raises:
            ValueError: they do not.
        """
        self.group = group
        self._memory = peer_memory(group)
        self._rows: dict[tuple, PeerRows] = {}
        self._last: set[tuple] = set()

    @classmethod
    def of(cls, config: Any, group: dist.ProcessGroup) -> "PeerBuffers":
        """The buffers of a model, from its ``TransformerConfig``."""
        buffers = getattr(config, "echo_peer_buffers", None)
        if buffers is None:
            buffers = config.echo_peer_buffers = cls(group)
        return buffers

    def __deepcopy__(self, memo: dict) -> "PeerBuffers":
        return self  # Megatron copies configurations for some layers; the model stays one

    def push(self, name: str, moved: list[tuple[Tensor, Tensor]], num_rows: int) -> list[Tensor]:
        """Write rows to other ranks and give back views of what came to this one.

        Args:
            name: the purpose.
            moved: values ``[T, H]`` and their places, int32 ``[T, C]``; see ``PeerRows.put``.
            num_rows: N.

        Returns:
            For each ``[N, H]``, *in the buffer*: copy it before the next movement. Rows that
            nobody wrote hold anything.
        """
        buffers = self._take(name, num_rows, [values for values, _ in moved])
        for buffer, (values, places) in zip(buffers, moved, strict=True):
            buffer.put(values, places)
        self._memory.barrier()
        return [buffer.own[:-1] for buffer in buffers]

    def pull(self, name: str, moved: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Lay rows open, and sum those of all ranks that this one wants.

        Args:
            name: the purpose.
            moved: rows ``[N, H]``, and the places to sum, int32 ``[T, C]``.

        Returns:
            For each ``[T, H]`` in the wide dtype.
        """
        buffers = self._take(name, len(moved[0][0]), [rows for rows, _ in moved])
        for buffer, (rows, _) in zip(buffers, moved, strict=True):
            buffer.offer(rows)
        self._memory.barrier()
        return [buffer.pull(places) for buffer, (_, places) in zip(buffers, moved, strict=True)]

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank."""
        return sum(rows.own.nbytes for rows in self._rows.values())

    @property
    def rows(self) -> tuple[PeerRows, ...]:
        """All buffers."""
        return tuple(self._rows.values())

    def _take(self, name: str, num_rows: int, values: list[Tensor]) -> list[PeerRows]:
        """Buffers to write to now; the host waits where they are new."""
        keys = [
            (name, number, num_rows, tensor.shape[1], tensor.dtype, tensor.device)
            for number, tensor in enumerate(values)
        ]
        for key in keys:
            if key not in self._rows:
                *_, columns, dtype, device = key
                memory = (
                    PlainMemory(self.group.size(), device)
                    if device.type == "meta"
                    else self._memory
                )
                with torch.inference_mode(False):  # evaluation may come first
                    self._rows[key] = memory.allocate(num_rows + 1, columns, dtype)
        if not self._last.isdisjoint(keys):
            self._memory.barrier()
        self._last = set(keys)
        return [self._rows[key] for key in keys]


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probs: Tensor, place: Tensor, received: Tensor,
        buffers: PeerBuffers,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(place)
        ctx.buffers, ctx.dtypes = buffers, (hidden.dtype, probs.dtype)
        moved = [(hidden, place), (probs.reshape(-1, 1), place.reshape(-1, 1))]
        rows, row_probs = buffers.push("there", moved, len(received))
        return take_rows(rows, received), take_rows(row_probs, received).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, probs: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        moved = [(rows, place), (probs.unsqueeze(1), place.reshape(-1, 1))]
        to_hidden, to_probs = ctx.buffers.pull("back", moved)
        hidden_dtype, probs_dtype = ctx.dtypes
        to_probs = to_probs.view(place.shape).to(probs_dtype)
        return to_hidden.to(hidden_dtype), to_probs, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, place: Tensor, received: Tensor, buffers: PeerBuffers
    ) -> Tensor:
        ctx.save_for_backward(place, received)
        ctx.buffers, ctx.dtype = buffers, rows.dtype
        (total,) = buffers.pull("back", [(rows, place)])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        place, received = ctx.saved_tensors
        moved = [(grad.to(ctx.dtype), place)]
        (rows,) = ctx.buffers.push("there", moved, len(received))
        return take_rows(rows, received), None, None, None


class SymmetricMemoryTransport(RowTransport):
    """Pushes rows and probabilities there, pulls results back; sums in the wide dtype, over k."""

    def __init__(self, buffers: PeerBuffers, experts_per_rank: int, alignment: int = 1) -> None:
        """Set the sizes.

        Args:
            buffers: the model's.
            experts_per_rank: G, physical experts on each rank.
            alignment: rows of each group are padded to a multiple of this.
        """
        self._buffers, self._groups, self._alignment = buffers, experts_per_rank, alignment

    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int
    ) -> RowDelivery:
        """See :class:`RowTransport`."""
        places = self._place(experts, num_rows)
        rows, row_probs = _Dispatch.apply(
            hidden, probs, places.place, places.received, self._buffers
        )
        return RowDelivery(
            rows, row_probs, places.ends, places.need, places.dropped,
            receipt=(places.place, places.received),
        )  # fmt: skip

    def combine(self, rows: Tensor, receipt: tuple[Tensor, Tensor]) -> Tensor:
        """See :class:`RowTransport`."""
        return _Combine.apply(rows, *receipt, self._buffers)

    @torch.no_grad()
    def _place(self, experts: Tensor, num_rows: int) -> PairPlaces:
        """Tell all ranks how many pairs go to each expert, and find the place of each pair."""
        ranks, rank = self._buffers.group.size(), self._buffers.group.rank()
        flat = experts.reshape(-1).to(torch.int64)
        count = flat.new_zeros(ranks * self._groups + 1)
        count = count.scatter_add_(0, flat, torch.ones_like(flat))
        row_of_this_rank = torch.arange(ranks, device=flat.device) * (ranks + 1) + rank
        moved = [(count[None, :-1], row_of_this_rank[None].int())]
        (counts,) = self._buffers.push("counts", moved, ranks)
        return place_pairs(experts, counts, rank, num_rows, self._alignment)
