"""Each token is sent once to each rank that computes one of its experts, in equal parts.

The parts have a fixed number of places, ``C``, for each peer. With ``C = T``, the default, they
can never be over-full, and the wire carries what the all-gather carries; a smaller ``C`` carries
less, and tokens beyond it are cut off and counted.
"""

from typing import override

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.collectives import all_to_all
from megatron_echo.dispatch.layout import RowMap, share_of
from megatron_echo.dispatch.permute import rows_to_tokens, tokens_to_rows
from megatron_echo.dispatch.transports.base import Arrival, WholeTokenTransport


class AllToAllTransport(WholeTokenTransport):
    """``N = R * C`` tokens. Results travel in the tokens' dtype and are added in the wide one."""

    def __init__(
        self, group: dist.ProcessGroup, experts_per_rank: int, alignment: int = 1,
        peer_capacity: float = 1.0,
    ) -> None:  # fmt: skip
        """Set the sizes; see :class:`WholeTokenTransport`.

        Args:
            group: the expert-parallel group, R ranks.
            experts_per_rank: G.
            alignment: of groups of rows.
            peer_capacity: C as a part of T, in (0, 1].
        """
        super().__init__(group, experts_per_rank, alignment)
        self._peer_capacity = peer_capacity

    def places(self, tokens: int) -> int:
        """C for T tokens."""
        return min(tokens, max(1, share_of(self._peer_capacity, tokens)))

    @override
    def send(self, hidden: Tensor, experts: Tensor, probs: Tensor, is_limited: bool) -> Arrival:
        tokens, ranks = hidden.shape[0], self._group.size()
        places = self.places(tokens) if is_limited else tokens
        none = ranks * self._groups
        owner = (experts // self._groups).to(torch.int64)  # R where there is no expert
        wanted = owner.new_zeros(tokens, ranks + 1).scatter_(1, owner, 1)[:, :ranks]
        place = wanted.cumsum(0) - 1
        first = torch.arange(ranks, device=owner.device) * places
        row_of = (first + place).masked_fill_((wanted <= 0) | (place >= places), ranks * places)
        token = torch.arange(tokens, device=owner.device)[:, None].expand(tokens, ranks)
        row_src = owner.new_full((ranks * places + 1,), tokens)
        row_src = row_src.scatter_(0, row_of.reshape(-1), token.reshape(-1))[:-1]
        send = RowMap(row_src.int(), row_of.int(), pairs_per_token=1)

        padded = torch.cat((experts, experts.new_full((1, experts.shape[1]), none)))
        sent_experts = padded.index_select(0, send.row_src)
        at = torch.cat((row_of, row_of.new_zeros(tokens, 1)), dim=1).gather(1, owner)
        return Arrival(
            hidden=all_to_all(tokens_to_rows(hidden, send), self._group),
            experts=all_to_all(sent_experts, self._group),
            probs=all_to_all(tokens_to_rows(probs, send), self._group),
            receipt=send,
            limit=(wanted.sum(0).max(), (at == ranks * places).sum()),
        )

    @override
    def send_back(self, partial: Tensor, receipt: RowMap) -> Tensor:
        return rows_to_tokens(all_to_all(partial, self._group), receipt)
