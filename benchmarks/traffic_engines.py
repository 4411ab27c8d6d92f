"""Engines of others on fake tensors, by what they state that they send; see ``traffic_counter.py``.

Both bring a token once to each other node that wants it, to the rank of its source's number there,
and from there over NVLink; results come back the same way, summed on it. With it go the
probabilities of all experts of the node, in fp32. The routing is gathered from all ranks, a byte
for each expert. NCCL EP says so in arXiv 2603.13606 (its mode for high throughput gathers in nodes,
then sends between them), and has HybridEP's kernels (``contrib/nccl_ep/device/hybrid_ep.cuh`` of
NVIDIA/nccl). Inside a node HybridEP writes a token once to a rank. NCCL EP, whose rows come grouped
by expert, writes it once for each of its experts there.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from traffic_counter import Counter


class _Engine:
    """Counts what moves."""

    def __init__(self, counter: Counter, group: dist.ProcessGroup | None = None) -> None:
        self._counter, self._group, self._experts = counter, group, 0

    def _gather_routing(self, routing: Tensor) -> None:
        assert self._group is not None
        whole = routing.new_empty(self._group.size() * len(routing), routing.shape[1])
        dist.all_gather_into_tensor(whole, routing, group=self._group)
        self._counter.kernel(whole.nbytes)

    def _move(self, tokens: Tensor, has_probs: bool, *, by_pair: bool = False) -> None:
        assert self._group is not None
        facts, row = self._counter.facts, tokens.shape[1] * tokens.itemsize
        node = min(facts.node, self._group.size())
        sent = row + has_probs * node * self._experts * 4
        inside = facts.visits - facts.far_visits + facts.forwarded
        landed = facts.leads
        if by_pair:
            inside = facts.away - facts.far_away + facts.forwarded_pairs
            landed = facts.pairs
        self._counter.count.collectives += 1  # ranks wait for each other once
        link = (inside + facts.node_visits) * sent
        moved = len(tokens) + facts.node_visits + landed  # sent, landed, on its ranks
        self._counter.kernel(2 * moved * row, link, facts.node_visits * sent)
        if not by_pair:
            self._counter.kernel((landed + facts.pairs) * row)  # into rows, or from them


class HybridEP(_Engine):
    """DeepEP's buffer of this name."""

    def __init__(
        self, counter: Counter, group: dist.ProcessGroup, num_local_experts: int, **_: Any
    ) -> None:
        super().__init__(counter, group)
        self._experts = num_local_experts

    def dispatch_with_permute(
        self, *, hidden: Tensor, probs: Tensor | None, routing_map: Tensor | None, handle: Any,
        num_permuted_tokens: int, **_: Any,
    ) -> tuple[Tensor, Tensor | None, None, Tensor, Any]:  # fmt: skip
        """Rows, probabilities, no scales, rows of each expert, and the handle."""
        if routing_map is not None:
            self._gather_routing(routing_map)
            counts = hidden.new_empty(self._experts, dtype=torch.int64)
            handle = len(hidden), counts, hidden.new_empty(1, dtype=torch.int32)
        rows = hidden.new_empty(num_permuted_tokens, hidden.shape[1])
        self._move(hidden, probs is not None)
        row_probs = None if probs is None else probs.new_empty(num_permuted_tokens)
        return rows, row_probs, None, handle[1], handle

    def combine_with_unpermute(
        self, *, hidden: Tensor, probs: Tensor | None, handle: Any, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of the rows of each token, and the probabilities of all experts."""
        assert self._group is not None
        tokens = hidden.new_empty(handle[0], hidden.shape[1])
        self._move(tokens, probs is not None)
        if probs is not None:
            probs = probs.new_empty(handle[0], self._group.size() * self._experts)
        return tokens, probs


class NcclEP(_Engine):
    """Megatron's functions over NCCL EP, with rows for each expert and source rank."""

    def ensure_nccl_ep_bootstrapped(
        self, group: dist.ProcessGroup, num_experts: int, **_: Any
    ) -> None:
        """Note the sizes."""
        self._group, self._experts = group, num_experts // group.size()

    def new_nccl_ep_buffer(self, *, recv_capacity_per_rank: int, **_: Any) -> int:
        """Its number of rows."""
        return recv_capacity_per_rank

    def nccl_ep_dispatch(
        self, buffer: int, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor
    ) -> tuple[Tensor, None, Tensor]:
        """Rows, no counts, and a probability for each."""
        assert self._group is not None
        experts = self._group.size() * self._experts
        self._gather_routing(tokens.new_empty(len(tokens), experts, dtype=torch.bool))
        rows, probs = _Dispatch.apply(self, buffer, tokens, topk_weights)
        return rows, None, probs

    def nccl_ep_combine(self, buffer: int, expert_out: Tensor, num_local_tokens: int) -> Tensor:
        """Sums of the rows of each token."""
        return _Combine.apply(self, expert_out, num_local_tokens)

    def move(self, tokens: Tensor, has_probs: bool) -> None:
        """Count these ``[T, H]`` on their way to rows, or back."""
        self._move(tokens, has_probs, by_pair=True)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, engine: NcclEP, rows: int, tokens: Tensor, probs: Tensor) -> Any:
        ctx.engine, ctx.shapes = engine, (tokens.shape, probs.shape)
        engine.move(tokens, True)
        return tokens.new_empty(rows, tokens.shape[1]), probs.new_empty(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, probs: Tensor) -> Any:
        tokens = grad.new_empty(ctx.shapes[0])
        ctx.engine.move(tokens, True)
        return None, None, tokens, probs.new_empty(ctx.shapes[1])


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, engine: NcclEP, rows: Tensor, tokens: int) -> Tensor:
        ctx.engine, ctx.rows = engine, len(rows)
        output = rows.new_empty(tokens, rows.shape[1])
        engine.move(output, False)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.engine.move(grad, False)
        return None, grad.new_empty(ctx.rows, grad.shape[1]), None
