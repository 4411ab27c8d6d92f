"""The interface of token transports: how tokens reach the ranks that compute them, and return."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, override

import torch.distributed as dist
from torch import Tensor

from megatron_echo.dispatch.layout import PairCounts, build_layout
from megatron_echo.dispatch.permute import pairs_to_rows, rows_to_tokens, tokens_to_rows


@dataclass(frozen=True)
class Delivery:
    """Rows that this rank computes, where ``dispatch/layout.py`` puts them. B rows, G groups.

    Attributes:
        rows: ``[B, H]``, zeros in the empty rows of groups; anything behind the last end.
        probs: ``[B]``, likewise.
        ends: int32 ``[G]``, end offset of each padded group, not above B.
        need: int64 scalar, rows that would hold everything.
        dropped: int64 scalar, pairs without a row.
        receipt: what the same transport needs to send the results back.
        limit: where the wire has one, two int64 scalars: the most tokens for one peer, and the
            pairs of this rank's tokens that were cut off.
    """

    rows: Tensor
    probs: Tensor
    ends: Tensor
    need: Tensor
    dropped: Tensor
    receipt: Any
    limit: tuple[Tensor, Tensor] | None = None


class TokenTransport(ABC):
    """Brings each token-expert pair into its row, with static shapes, and the results back.

    One object serves all calls of a layer and keeps no state of them.

    Attributes:
        needs_counts: whether :meth:`dispatch` must be told what arrives.
        moves_any_bits: whether :meth:`dispatch` takes integers too, which have no gradients.
    """

    needs_counts = False
    moves_any_bits = True

    def __init__(self, group: dist.ProcessGroup, experts_per_rank: int, alignment: int = 1) -> None:
        """Set the sizes.

        Args:
            group: the expert-parallel group, R ranks.
            experts_per_rank: G, physical experts on each rank.
            alignment: rows of each group are padded to a multiple of this.
        """
        self._group, self._groups, self._alignment = group, experts_per_rank, alignment

    @abstractmethod
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int,
        is_limited: bool = True, counts: PairCounts | None = None,
    ) -> Delivery:  # fmt: skip
        """Bring each pair to its row on the rank that computes it.

        Args:
            hidden: ``[T, H]``, this rank's tokens, or int32 of any width in their place.
            experts: int32 ``[T, K]``, physical expert ids: rank ``p // G`` computes ``p``, and
                ``R * G`` stands for no expert.
            probs: ``[T, K]``.
            num_rows: B, the same on every rank; what does not fit is dropped.
            is_limited: False, in evaluation, where the wire may cut nothing off.
            counts: of this call, where the transport ``needs_counts``.
        """

    @abstractmethod
    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Sum the results of each token, wherever they were computed, in the order of k.

        Args:
            rows: ``[B, H]``; empty rows may hold anything.
            receipt: the one of the ``Delivery``.

        Returns:
            ``[T, H]`` in the wide dtype.
        """


@dataclass(frozen=True)
class Arrival:
    """Whole tokens on a rank. N of them, the same number on every rank.

    Attributes:
        hidden: ``[N, H]``; those of one source rank are consecutive, ``N / R`` each.
        experts: int32 ``[N, K]``, physical expert ids; those of other ranks may be among them.
        probs: ``[N, K]``.
        receipt: what the same transport needs to send sums back.
        limit: as in :class:`Delivery`.
    """

    hidden: Tensor
    experts: Tensor
    probs: Tensor
    receipt: Any = None
    limit: tuple[Tensor, Tensor] | None = None


class WholeTokenTransport(TokenTransport):
    """Tokens travel whole, once to a rank; there they are sorted into rows, and summed again."""

    def __init__(
        self, group: dist.ProcessGroup, experts_per_rank: int, alignment: int = 1,
        sends_wide_sums: bool = False,
    ) -> None:  # fmt: skip
        """Set the sizes, as in :class:`TokenTransport`.

        Args:
            group: the expert-parallel group, R ranks.
            experts_per_rank: G.
            alignment: of each group's rows.
            sends_wide_sums: partial sums travel in the wide dtype, not in that of the rows.
        """
        super().__init__(group, experts_per_rank, alignment)
        self._sends_wide_sums = sends_wide_sums

    @abstractmethod
    def send(self, hidden: Tensor, experts: Tensor, probs: Tensor, is_limited: bool) -> Arrival:
        """Bring each token to every rank that computes one of its experts; see ``dispatch``."""

    @abstractmethod
    def send_back(self, partial: Tensor, receipt: Any) -> Tensor:
        """Bring partial sums back to the tokens' ranks and add them up.

        Args:
            partial: ``[N, H]`` in the dtype in which it travels: for each token that arrived the
                sum over the experts of this rank.
            receipt: the one of the ``Arrival``.

        Returns:
            ``[T, H]`` in the wide dtype.
        """

    @override
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int,
        is_limited: bool = True, counts: PairCounts | None = None,
    ) -> Delivery:  # fmt: skip
        arrival = self.send(hidden, experts, probs, is_limited)
        # Those of ranks before this one wrap round, behind those of ranks after it.
        first, everywhere = self._group.rank() * self._groups, self._group.size() * self._groups + 1
        groups = (arrival.experts - first).remainder_(everywhere).clamp_(max=self._groups)
        layout = build_layout(groups, self._groups, num_rows, self._alignment)
        return Delivery(
            rows=tokens_to_rows(arrival.hidden, layout.rows),
            probs=pairs_to_rows(arrival.probs, layout.rows),
            ends=layout.ends,
            need=layout.need,
            dropped=layout.dropped,
            receipt=(layout.rows, arrival.receipt),
            limit=arrival.limit,
        )

    @override
    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        row_map, of_tokens = receipt
        dtype = None if self._sends_wide_sums else rows.dtype
        return self.send_back(rows_to_tokens(rows, row_map, dtype), of_tokens)
