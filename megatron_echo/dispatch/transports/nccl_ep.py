"""An adapter for NCCL EP, by Megatron's wrappers of Transformer Engine; it has not run yet.

Its kernels bring tokens to rows that are grouped by expert, and sum results in their own order. A
process has one context of it, whose sizes are those of the first call. Beyond the number of rows it
stops the device; so pairs without a row are not sent, which the counts say before. It exchanges the
routing by itself.
"""

from typing import Any, override

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.dispatch.layout import PairCounts, place_pairs, wide_dtype
from megatron_echo.dispatch.transports.base import Delivery, TokenTransport
from megatron_echo.environment import find_nccl_ep
from megatron_echo.per_model import PerModel

_CHUNK = 64  # tokens; the kernels take multiples


class NcclEPContext(PerModel):
    """The context of a model's expert-parallel group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._made: tuple[int, int, int, int] | None = None

    def buffer(
        self, tokens: int, rows: int, hidden: int, topk: int, experts_per_rank: int, alignment: int
    ) -> Any:
        """What one dispatch and its combine share. The first call waits for the host.

        Args:
            tokens: T.
            rows: B.
            hidden: H.
            topk: K.
            experts_per_rank: G.
            alignment: rows of each group are padded to a multiple of this.

        Raises:
            ValueError: the sizes do not fit those of the first call.
        """
        engine = find_nccl_ep()
        assert engine is not None, "refused with the configuration"
        most = -(-tokens // _CHUNK) * _CHUNK
        if self._made is None:
            self._made = experts_per_rank, hidden, most, rows
            engine.ensure_nccl_ep_bootstrapped(
                self.group,
                num_experts=experts_per_rank * self.group.size(),
                max_tokens_per_rank=most,
                recv_capacity_per_rank=max(rows, most),
                hidden_dim=hidden,
            )
        if self._made[:2] != (experts_per_rank, hidden) or most > self._made[2]:
            raise ValueError(
                f"--moe-echo-token-transport nccl_ep has one size in a process, that of its first "
                f"layer and pass, and {tokens} tokens of width {hidden} do not fit. Use hybrid_ep "
                "or all_to_all."
            )
        if rows > self._made[3]:
            raise ValueError(
                f"--moe-echo-token-transport nccl_ep was made for {self._made[3]} rows in the first"
                f" pass, and this one needs {rows}. Use hybrid_ep or all_to_all."
            )
        return engine.new_nccl_ep_buffer(
            top_k=topk,
            max_tokens_per_rank=self._made[2],
            recv_capacity_per_rank=rows,
            hidden_dim=hidden,
            num_local_experts=experts_per_rank,
            alignment=alignment if alignment > 1 else 0,
        )


class NcclEPTransport(TokenTransport):
    """Dispatch and combine by NCCL EP's kernels, over NVLink and between nodes."""

    needs_counts = True
    moves_any_bits = False

    def __init__(self, context: NcclEPContext, experts_per_rank: int, alignment: int = 1) -> None:
        """Set the sizes; ``context`` is the model's, the others as in :class:`TokenTransport`."""
        super().__init__(context.group, experts_per_rank, alignment)
        self._context = context

    @override
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int,
        is_limited: bool = True, counts: PairCounts | None = None,
    ) -> Delivery:  # fmt: skip
        assert counts is not None
        places = place_pairs(experts, counts, self._group.rank(), num_rows, self._alignment)
        has_no_row = places.place % (num_rows + 1) == num_rows
        buffer = self._context.buffer(
            *(len(hidden), num_rows, hidden.shape[1], experts.shape[1]),
            *(self._groups, self._alignment),
        )
        rows, _, row_probs = _engine().nccl_ep_dispatch(
            buffer, hidden, experts.to(torch.int64).masked_fill_(has_no_row, -1), probs.float()
        )
        is_empty = (places.received == num_rows)[:, None]
        return Delivery(
            rows=self._emptied(rows, is_empty),
            probs=self._emptied(row_probs[:, None], is_empty).squeeze(1).to(probs.dtype),
            ends=places.ends,
            need=places.need,
            dropped=places.dropped,
            receipt=(buffer, len(hidden), is_empty),
        )

    @override
    def combine(self, rows: Tensor, receipt: tuple[Any, int, Tensor]) -> Tensor:
        buffer, tokens, is_empty = receipt
        rows = self._emptied(rows, is_empty)  # and so are their gradients
        combined = _engine().nccl_ep_combine(buffer, rows, num_local_tokens=tokens)
        return combined.to(wide_dtype(rows.dtype))

    def _emptied(self, rows: Tensor, is_empty: Tensor) -> Tensor:
        """Zeros in the rows that pad a group; nothing reads those behind the last group."""
        return rows if self._alignment == 1 else torch.where(is_empty, 0, rows)


def _engine() -> Any:
    return find_nccl_ep()
