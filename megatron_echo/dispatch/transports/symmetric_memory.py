"""Rows written straight to their place on the rank that computes them, and summed from there.

Only rows that are needed travel, each once, over NVLink. A source knows the row of each of its
pairs on any rank from the counts of all ranks (``place_pairs``), so nobody sorts what arrives. Rows
are pushed there, results are pulled back; in backward gradients of results are pushed, those of
rows pulled. ``peer_buffers.py`` says when a buffer may be written: rows there and rows back have
their own, so that each movement takes one barrier. They hold ``2 (B + 1)`` rows on each rank, once
for a model.
"""

from typing import Any, override

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.layout import PairCounts, place_pairs
from megatron_echo.dispatch.permute import take_rows
from megatron_echo.dispatch.transports.base import Delivery, TokenTransport
from megatron_echo.dispatch.transports.peer_buffers import PeerBuffers


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probs: Tensor, place: Tensor, received: Tensor, used: Tensor,
        buffers: PeerBuffers,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(place)
        ctx.buffers, ctx.dtypes = buffers, (hidden.dtype, probs.dtype)
        moved = [(hidden, place), (probs.reshape(-1, 1), place.reshape(-1, 1))]
        rows, row_probs = buffers.push("there", moved, len(received))
        row_probs = take_rows(row_probs, received, used)
        return take_rows(rows, received, used), row_probs.squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, probs: Tensor) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        moved = [(rows, place), (probs.unsqueeze(1), place.reshape(-1, 1))]
        to_hidden, to_probs = ctx.buffers.pull("back", moved)
        hidden_dtype, probs_dtype = ctx.dtypes
        to_probs = to_probs.view(place.shape).to(probs_dtype)
        return to_hidden.to(hidden_dtype), to_probs, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, place: Tensor, received: Tensor, used: Tensor, buffers: PeerBuffers
    ) -> Tensor:
        ctx.save_for_backward(place, received, used)
        ctx.buffers, ctx.dtype = buffers, rows.dtype
        (total,) = buffers.pull("back", [(rows, place)])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        place, received, used = ctx.saved_tensors
        moved = [(grad.to(ctx.dtype), place)]
        (rows,) = ctx.buffers.push("there", moved, len(received))
        return take_rows(rows, received, used), None, None, None, None


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
        receipt = places.place, places.received, places.ends[-1:]
        rows, row_probs = _Dispatch.apply(hidden, probs, *receipt, self._buffers)
        return Delivery(rows, row_probs, places.ends, places.need, places.dropped, receipt=receipt)

    @override
    def combine(self, rows: Tensor, receipt: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return _Combine.apply(rows, *receipt, self._buffers)
