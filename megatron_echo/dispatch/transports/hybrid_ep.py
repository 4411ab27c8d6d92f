"""An adapter for DeepEP's HybridEP, which brings tokens straight to the rows of their experts.

See https://github.com/deepseek-ai/DeepEP, branch ``hybrid-ep``. Its kernels order the rows as
``dispatch/layout.py`` does, and sum results in their own order: in each rank over its experts, then
over ranks, rounded to the tokens' dtype after each. It moves tokens in 16 bits and probabilities in
fp32. It is told the number of rows and asked not to block, and so nothing is read on the host.
"""

from dataclasses import dataclass
from typing import Any, override

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.layout import PairCounts, place_groups, wide_dtype
from megatron_echo.dispatch.transports.base import Delivery, TokenTransport
from megatron_echo.environment import find_hybrid_ep
from megatron_echo.per_model import PerModel


class HybridEPBuffers(PerModel):
    """The ``HybridEPBuffer`` of a model, one for each width."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._buffers: dict[tuple[int, int], Any] = {}

    def get(self, hidden: int, tokens: int, experts_per_rank: int) -> Any:
        """The buffer for tokens of width H; with more tokens it grows by itself.

        The first call for a width waits for the host, and all ranks make it together.
        """
        key = hidden, experts_per_rank
        if key not in self._buffers:
            make = find_hybrid_ep()
            assert make is not None, "refused with the configuration"
            self._buffers[key] = make(
                group=self.group,
                hidden_dim=hidden,
                max_num_of_tokens_per_rank=tokens,
                num_local_experts=experts_per_rank,
                use_fp8=False,
            )
        return self._buffers[key]


@dataclass(frozen=True)
class _Wire:
    """HybridEP's two functions with all their words but the tensors."""

    buffer: Any
    experts_per_rank: int
    num_rows: int
    alignment: int

    def dispatch(
        self, hidden: Tensor, handle: Any = None, probs: Tensor | None = None,
        chosen: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Any]:  # fmt: skip
        """Rows, their probabilities, the padded rows of each group, and a handle."""
        rows, row_probs, _, counts, handle = self.buffer.dispatch_with_permute(
            hidden=hidden.contiguous(),
            probs=probs,
            routing_map=chosen,
            handle=handle,
            num_of_experts_per_rank=self.experts_per_rank,
            num_permuted_tokens=self.num_rows,
            pad_multiple=self._pad_multiple,
            non_blocking=True,
        )
        return rows, row_probs, counts, handle

    def combine(
        self, rows: Tensor, handle: Any, probs: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums ``[T, H]``, and the probabilities as ``[T, R * G]``."""
        return self.buffer.combine_with_unpermute(
            hidden=rows.contiguous(), probs=probs, handle=handle, pad_multiple=self._pad_multiple
        )

    @property
    def _pad_multiple(self) -> int | None:
        return self.alignment if self.alignment > 1 else None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probs: Tensor, chosen: Tensor, wire: _Wire
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        rows, row_probs, counts, handle = wire.dispatch(hidden, None, probs, chosen)
        ctx.wire, ctx.handle = wire, handle
        ctx.mark_non_differentiable(counts)
        return rows, row_probs, counts, handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, rows: Tensor, probs: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *ctx.wire.combine(rows, ctx.handle, probs.contiguous()), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, wire: _Wire, handle: Any) -> Tensor:
        ctx.wire, ctx.handle = wire, handle
        return wire.combine(rows, handle)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.wire.dispatch(grad, ctx.handle)[0], None, None


class HybridEPTransport(TokenTransport):
    """Dispatch and combine by HybridEP's kernels, over NVLink and between nodes."""

    needs_counts = True
    moves_any_bits = False

    def __init__(self, buffers: HybridEPBuffers, experts_per_rank: int, alignment: int = 1) -> None:
        """Set the sizes; ``buffers`` are the model's, the others as in :class:`TokenTransport`."""
        super().__init__(buffers.group, experts_per_rank, alignment)
        self._buffers = buffers

    @override
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int,
        is_limited: bool = True, counts: PairCounts | None = None,
    ) -> Delivery:  # fmt: skip
        assert counts is not None
        physical = self._group.size() * self._groups
        index = experts.to(torch.int64)
        dense = probs.new_zeros(len(probs), physical + 1).scatter(1, index, probs)
        chosen = torch.zeros_like(dense, dtype=torch.bool).scatter_(1, index, True)
        dense, chosen = dense[:, :-1].float().contiguous(), chosen[:, :-1].contiguous()
        buffer = self._buffers.get(hidden.shape[1], len(hidden), self._groups)
        wire = _Wire(buffer, self._groups, num_rows, self._alignment)
        rows, row_probs, padded, handle = _Dispatch.apply(hidden, dense, chosen, wire)
        size = counts.total[self._group.rank()]
        _, ends, behind = place_groups(size, num_rows, self._alignment)
        has_dropped = (handle[-1] != 0).sum()  # its own flag: nothing is dropped silently
        return Delivery(
            rows=rows,
            probs=row_probs.to(probs.dtype),
            ends=padded.cumsum(0).clamp(max=num_rows).int(),
            need=ends[-1],
            dropped=torch.maximum(behind.sum(), has_dropped),
            receipt=(wire, handle),
        )

    @override
    def combine(self, rows: Tensor, receipt: tuple[_Wire, Any]) -> Tensor:
        return _Combine.apply(rows, *receipt).to(wide_dtype(rows.dtype))
