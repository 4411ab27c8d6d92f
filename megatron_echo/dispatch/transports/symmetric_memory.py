"""Rows written straight to their place on the rank that computes them, and summed from there.

Only rows that are needed travel, over NVLink, and each token once to a rank: the first of its pairs
there leads, the row of the lead is copied to the others, and their results are summed into it. A
source knows the row of each of its pairs on any rank from the counts of all ranks
(``place_pairs``), so nobody sorts what arrives. Rows are pushed there, results are pulled back; in
backward gradients of results are pushed, those of rows pulled. ``peer_buffers.py`` says when a
buffer may be written: rows there and rows back have their own, so that each movement takes one
barrier. They hold ``2 (B + 1)`` rows on each rank, once for a model; packed tokens have a third.
"""

from dataclasses import dataclass
from typing import Any, override

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.layout import PairCounts, PairPlaces, place_pairs
from megatron_echo.dispatch.permute import take_rows
from megatron_echo.dispatch.transports.base import Delivery, TokenTransport
from megatron_echo.dispatch.transports.peer_buffers import PeerBuffers


@dataclass(frozen=True)
class _Leads:
    """Which pairs of this rank's tokens travel for others, and what rows came to it. Of B rows.

    Attributes:
        place: int32 ``[T, K]``, of the pairs that lead; row B of this rank for the others.
        lead: int32 ``[B]``, of each row here the one that it is a copy of, B if it is empty.
        sums: int32 ``[B, K]``, of each row that leads those that it is the sum of; B for none.
        used: int32 ``[1]``, rows in use here.
    """

    place: Tensor
    lead: Tensor
    sums: Tensor
    used: Tensor


def _leads(place: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The pairs that lead, and what their ranks must know.

    Args:
        place: int32 ``[T, K]``, of ``PairPlaces``.
        num_rows: B.

    Returns:
        Bool ``[T, K]``; and for each pair, int64 ``[T * K, 1 + K]``, the row of its lead, and if
        it leads the rows of all pairs of its token on that rank, B for none.
    """
    topk, wide = place.shape[1], place.to(torch.int64)
    rank, row = wide // (num_rows + 1), wide % (num_rows + 1)
    together = (rank[:, :, None] == rank[:, None]) & (row < num_rows)[:, None]
    number = torch.arange(topk, device=place.device)
    first = number.expand(together.shape).masked_fill(~together, topk - 1).amin(2)
    is_lead = (row < num_rows) & (first == number)
    rows = row[:, None].expand(together.shape)
    rows = rows.masked_fill(~(together & is_lead[:, :, None]), num_rows)
    told = torch.cat((row.gather(1, first)[:, :, None], rows), dim=2)
    return is_lead, told.flatten(0, 1)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probs: Tensor, places: PairPlaces, buffers: PeerBuffers
    ) -> tuple[Tensor, ...]:
        place, received, used = places.place, places.received, places.ends[-1:]
        is_lead, told = _leads(place, len(received))
        nowhere = buffers.group.rank() * (len(received) + 1) + len(received)
        leads = place.masked_fill(~is_lead, nowhere)
        each = place.reshape(-1, 1)
        moved = [(hidden, leads), (probs.reshape(-1, 1), each), (told, each)]
        rows, row_probs, told = buffers.push("there", moved, len(received))
        empty = (received == len(received))[:, None]
        # Where ranks bring unequal numbers of tokens, which the end of the step refuses, it may be
        # anything.
        told = told.masked_fill(empty, len(received)).clamp_(0, len(received)).int()
        lead, sums = told[:, 0].contiguous(), told[:, 1:].contiguous()
        ctx.save_for_backward(place, leads, sums)
        ctx.buffers, ctx.dtypes = buffers, (hidden.dtype, probs.dtype)
        row_probs = take_rows(row_probs, received, used).squeeze(1)
        rows = take_rows(rows, lead, used)
        ctx.has_gradient = rows.is_floating_point()
        ctx.mark_non_differentiable(leads, lead, sums, *([] if ctx.has_gradient else [rows]))
        ctx.set_materialize_grads(ctx.has_gradient)
        return rows, row_probs, leads, lead, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, probs: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        place, leads, sums = ctx.saved_tensors
        hidden_dtype, probs_dtype = ctx.dtypes
        moved, to_hidden = [(probs.unsqueeze(1), place.reshape(-1, 1))], None
        if ctx.has_gradient:
            moved = [(rows, leads), *moved]
            to_hidden, to_probs = ctx.buffers.pull("back", moved, sums)
            to_hidden = to_hidden.to(hidden_dtype)
        else:
            (to_probs,) = ctx.buffers.pull("back", moved)
        return to_hidden, to_probs.view(place.shape).to(probs_dtype), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, leads: _Leads, buffers: PeerBuffers) -> Tensor:
        ctx.save_for_backward(leads.place, leads.lead, leads.used)
        ctx.buffers, ctx.dtype = buffers, rows.dtype
        (total,) = buffers.pull("back", [(rows, leads.place)], leads.sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        place, lead, used = ctx.saved_tensors
        (rows,) = ctx.buffers.push("there", [(grad.to(ctx.dtype), place)], len(lead))
        return take_rows(rows, lead, used), None, None


class SymmetricMemoryTransport(TokenTransport):
    """Pushes rows and probabilities there, pulls results back.

    Sums are wide: over the pairs of a token on a rank, rounded to the rows' dtype, and over ranks.
    """

    needs_counts = True

    def __init__(self, buffers: PeerBuffers, experts_per_rank: int, alignment: int = 1) -> None:
        """Set the sizes; ``buffers`` are the model's, the others as in :class:`TokenTransport`."""
        super().__init__(buffers.group, experts_per_rank, alignment)
        self._buffers = buffers

    @override
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int,
        is_limited: bool = True, counts: PairCounts | None = None,
    ) -> Delivery:  # fmt: skip
        assert counts is not None
        places = place_pairs(experts, counts, self._group.rank(), num_rows, self._alignment)
        arrived = _Dispatch.apply(hidden, probs, places, self._buffers)
        rows, row_probs, leads, lead, sums = arrived
        receipt = _Leads(leads, lead, sums, used=places.ends[-1:])
        return Delivery(rows, row_probs, places.ends, places.need, places.dropped, receipt=receipt)

    @override
    def combine(self, rows: Tensor, receipt: _Leads) -> Tensor:
        return _Combine.apply(rows, receipt, self._buffers)
