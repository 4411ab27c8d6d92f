"""Megatron's wrappers of NCCL EP with their signatures, over the stand-in for HybridEP.

Rows that hold nothing are NaN, there and in gradients; an overflow ends the process, as there. It
takes any dtype.
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from hybrid_ep_stand_in import HybridEPBuffer
from megatron.core.transformer.moe import fused_a2a
from torch import Tensor

bootstrapped: list[SimpleNamespace] = []


def install() -> None:
    """From now on Megatron has NCCL EP, and NCCL is new enough."""
    for function in (
        ensure_nccl_ep_bootstrapped, new_nccl_ep_buffer, nccl_ep_dispatch, nccl_ep_combine,
    ):  # fmt: skip
        setattr(fused_a2a, function.__name__, function)
    torch.cuda.nccl.version = lambda: (2, 30, 7)


def ensure_nccl_ep_bootstrapped(
    ep_group: dist.ProcessGroup, num_experts: int, max_tokens_per_rank: int,
    recv_capacity_per_rank: int, hidden_dim: int, num_sms: int = 0, zero_copy: bool = False,
) -> None:  # fmt: skip
    """Once a process."""
    assert max_tokens_per_rank % 64 == 0
    assert recv_capacity_per_rank >= max_tokens_per_rank
    assert num_experts % ep_group.size() == 0
    if not bootstrapped:
        bootstrapped.append(
            SimpleNamespace(
                group=ep_group, experts=num_experts, tokens=max_tokens_per_rank,
                rows=recv_capacity_per_rank, hidden=hidden_dim,
            )
        )  # fmt: skip


def new_nccl_ep_buffer(
    top_k: int, max_tokens_per_rank: int, recv_capacity_per_rank: int, hidden_dim: int,
    num_local_experts: int, alignment: int = 0,
) -> SimpleNamespace:  # fmt: skip
    """Of one dispatch and combine."""
    (made,) = bootstrapped
    assert max_tokens_per_rank <= made.tokens
    assert recv_capacity_per_rank <= made.rows
    assert hidden_dim == made.hidden
    assert num_local_experts * made.group.size() == made.experts
    assert alignment & (alignment - 1) == 0
    wire = HybridEPBuffer(made.group, hidden_dim, max_tokens_per_rank, num_local_experts)
    return SimpleNamespace(
        wire=wire, topk=top_k, rows=recv_capacity_per_rank, alignment=max(alignment, 1)
    )


def nccl_ep_dispatch(
    buffer: Any, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor,
    recv_tokens: Tensor | None = None, recv_topk_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Rows, rows of each expert, and weights; -1 in ``topk_idx`` stands for no expert."""
    assert topk_idx.dtype == torch.int64
    assert topk_weights.dtype == torch.float32
    assert topk_idx.shape == topk_weights.shape == (len(tokens), buffer.topk)
    wire = buffer.wire
    width = wire.group.size() * wire.experts
    index = topk_idx.masked_fill(topk_idx < 0, width)
    chosen = torch.zeros(len(tokens), width + 1, dtype=torch.bool).scatter_(1, index, True)
    buffer.handle = wire._plan(chosen[:, :-1].contiguous(), buffer.rows, buffer.alignment)
    source, expert, counts, _, overflow = buffer.handle
    if overflow.any():
        raise SystemExit("the device stops: more rows than the buffer has")
    source[source < 0] = expert[expert < 0] = -2
    rows, probs = _Dispatch.apply(tokens, topk_weights, index, buffer)
    return rows, counts.int(), probs


def nccl_ep_combine(
    buffer: Any, expert_out: Tensor, num_local_tokens: int | None = None,
    grad_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sums ``[T, H]``."""
    assert len(expert_out) == buffer.rows
    assert num_local_tokens == buffer.handle[3]
    return _Combine.apply(expert_out, buffer)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, weights: Tensor, index: Tensor, buffer: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.buffer, ctx.index = buffer, index
        wire, (source, expert, *_) = buffer.wire, buffer.handle
        dense = weights.new_zeros(len(weights), wire.group.size() * wire.experts + 1)
        dense = dense.scatter_(1, index, weights)[:, :-1].contiguous()
        rows = wire._fill(wire._gather(tokens.contiguous()), source)
        return rows, wire._fill(wire._gather(dense).flatten()[:, None], expert)[:, 0]

    @staticmethod
    def backward(ctx: Any, rows: Tensor, probs: Tensor) -> tuple[Tensor | None, ...]:
        wire, (source, expert, _, tokens, _) = ctx.buffer.wire, ctx.buffer.handle
        everyone, width = tokens * wire.group.size(), wire.group.size() * wire.experts
        to_tokens = wire._scatter(wire._sums(rows, source, everyone))
        dense = wire._sums(probs[:, None], expert, everyone * width).view(everyone, width)
        dense = torch.cat((wire._scatter(dense), dense.new_zeros(tokens, 1)), dim=1)
        return to_tokens, dense.gather(1, ctx.index), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, buffer: Any) -> Tensor:
        ctx.buffer = buffer
        source, _, _, tokens, _ = buffer.handle
        sums = buffer.wire._sums(rows, source, tokens * buffer.wire.group.size())
        return buffer.wire._scatter(sums)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        wire = ctx.buffer.wire
        return wire._fill(wire._gather(grad.contiguous()), ctx.buffer.handle[0]), None
