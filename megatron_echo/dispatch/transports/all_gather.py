"""Every rank gets every token: all-gather there, reduce-scatter back. Any backend, no limit."""

from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_echo.collectives import all_gather, reduce_scatter
from megatron_echo.dispatch.transports.base import Delivery, TokenTransport


class AllGatherTransport(TokenTransport):
    """``N = R * T`` rows; the sum over ranks is the reduce-scatter's, in the wide dtype."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, is_limited: bool = True
    ) -> Delivery:
        """See :class:`TokenTransport`."""
        return Delivery(
            hidden=all_gather(hidden, self._group),
            experts=all_gather(experts, self._group),
            probs=all_gather(probs, self._group),
        )

    def combine(self, partial: Tensor, receipt: Any) -> Tensor:
        """See :class:`TokenTransport`."""
        return reduce_scatter(partial, self._group)
