"""Rows written straight to their place on the rank that computes them, and summed from there.

Over NVLink travel only tokens that are needed, each once to a rank, which copies it into the rows
of all its experts there; and results, a row for each pair, which are summed where they are pulled.
A source knows the row of each of its pairs on any rank from the counts of all ranks
(``place_pairs``), so nobody sorts what arrives. In backward gradients of results are pushed, those
of rows pulled. ``peer_buffers.py`` says when a buffer may be written: rows there and rows back have
their own, so that each movement takes one barrier. They hold ``2 (B + 1)`` rows on each rank, once
for a model.
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


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probs: Tensor, places: PairPlaces, buffers: PeerBuffers
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(places.place)
        ctx.buffers, ctx.dtypes = buffers, (hidden.dtype, probs.dtype)
        pair = places.place.reshape(-1, 1)
        moved = [
            (hidden, places.first), (probs.reshape(-1, 1), pair), (places.lead.reshape(-1, 1), pair)
        ]  # fmt: skip
        rows, row_probs, lead = buffers.push("there", moved, len(places.received))
        is_empty = places.received == len(rows)
        token_row = lead.squeeze(1).masked_fill(is_empty, len(rows))
        ctx.mark_non_differentiable(token_row)
        used = places.ends[-1:]
        row_probs = take_rows(row_probs, places.received, used)
        return take_rows(rows, token_row, used), row_probs.squeeze(1), token_row

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, probs: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        moved = [(rows, place), (probs.unsqueeze(1), place.reshape(-1, 1))]
        to_hidden, to_probs = ctx.buffers.pull("back", moved)
        hidden_dtype, probs_dtype = ctx.dtypes
        to_probs = to_probs.view(place.shape).to(probs_dtype)
        return to_hidden.to(hidden_dtype), to_probs, None, None


@dataclass(frozen=True)
class _Receipt:
    """How rows came: where this rank sent its pairs, and where a row's token lies in the buffer."""

    place: Tensor
    first: Tensor
    token_row: Tensor
    used: Tensor


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, receipt: _Receipt, buffers: PeerBuffers) -> Tensor:
        ctx.save_for_backward(receipt.first, receipt.token_row, receipt.used)
        ctx.buffers, ctx.dtype = buffers, rows.dtype
        (total,) = buffers.pull("back", [(rows, receipt.place)])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, token_row, used = ctx.saved_tensors
        moved = [(grad.to(ctx.dtype), first)]
        (rows,) = ctx.buffers.push("there", moved, len(token_row))
        return take_rows(rows, token_row, used), None, None


class SymmetricMemoryTransport(TokenTransport):
    """Pushes rows and probabilities there, pulls results back; sums in the wide dtype, over k."""

    needs_counts = True

    def __init__(self, buffers: PeerBuffers, experts_per_rank: int, alignment: int = 1) -> None:
        """Set the sizes.

        Args:
            buffers: the model's.
            experts_per_rank: G, physical experts on each rank.
            alignment: rows of each group are padded to a multiple of this.
        """
        self._buffers, self._groups, self._alignment = buffers, experts_per_rank, alignment

    @override
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int,
        is_limited: bool = True, counts: PairCounts | None = None,
    ) -> Delivery:  # fmt: skip
        assert counts is not None
        rank = self._buffers.group.rank()
        places = place_pairs(experts, counts, rank, num_rows, self._alignment)
        rows, row_probs, token_row = _Dispatch.apply(hidden, probs, places, self._buffers)
        receipt = _Receipt(places.place, places.first, token_row, places.ends[-1:])
        return Delivery(rows, row_probs, places.ends, places.need, places.dropped, receipt=receipt)

    @override
    def combine(self, rows: Tensor, receipt: _Receipt) -> Tensor:
        return _Combine.apply(rows, receipt, self._buffers)
