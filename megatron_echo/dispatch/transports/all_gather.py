"""Every rank gets every token: all-gather there, reduce-scatter back. Any backend, no limit."""

from typing import Any, override

from torch import Tensor

from megatron_echo.collectives import all_gather, reduce_scatter
from megatron_echo.dispatch.transports.base import Arrival, WholeTokenTransport


class AllGatherTransport(WholeTokenTransport):
    """``N = R * T`` tokens; the sum over ranks is the reduce-scatter's, in the wide dtype."""

    @override
    def send(self, hidden: Tensor, experts: Tensor, probs: Tensor, is_limited: bool) -> Arrival:
        return Arrival(
            hidden=all_gather(hidden, self._group),
            experts=all_gather(experts, self._group),
            probs=all_gather(probs, self._group),
        )

    @override
    def send_back(self, partial: Tensor, receipt: Any) -> Tensor:
        return reduce_scatter(partial, self._group)
