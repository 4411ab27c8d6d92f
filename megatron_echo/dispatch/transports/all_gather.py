"""Every rank gets every token: all-gather there, partial sums back. Any backend, no limit."""

from typing import Any, override

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.collectives import Group, all_gather, exchange, gather, reduce_scatter
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.dispatch.transports.base import Arrival, WholeTokenTransport


class _SumOverRanks(torch.autograd.Function):
    """Parts travel as they are, narrow, and are added in the wide dtype, rank after rank.

    A reduce-scatter would round after each of its additions.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.dtype = group, partial.dtype
        received = exchange(partial, group).unflatten(0, (group.size(), -1))
        return received.sum(0, dtype=wide_dtype(partial.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather(grad.to(ctx.dtype), ctx.group), None


class AllGatherTransport(WholeTokenTransport):
    """``N = R * T`` tokens. Parts in the wide dtype are added by a reduce-scatter."""

    @override
    def send(self, hidden: Tensor, experts: Tensor, probs: Tensor, is_limited: bool) -> Arrival:
        return Arrival(
            hidden=all_gather(hidden, self._group),
            experts=all_gather(experts, self._group),
            probs=all_gather(probs, self._group),
        )

    @override
    def send_back(self, partial: Tensor, receipt: Any) -> Tensor:
        if partial.dtype == wide_dtype(partial.dtype):
            return reduce_scatter(partial, self._group)
        return _SumOverRanks.apply(partial, self._group)
