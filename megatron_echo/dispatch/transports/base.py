"""The interface of token transports: how tokens reach the ranks that compute them, and return."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Delivery:
    """What a rank holds after the tokens have arrived. N rows, the same number on every rank.

    Attributes:
        hidden: ``[N, H]``; rows of one source rank are consecutive, ``N / R`` each.
        experts: int32 ``[N, K]``, physical expert ids; those of other ranks may be among them.
        probs: ``[N, K]``.
        receipt: what the same transport needs to send the results back.
        limit: where the wire has one, two int64 scalars: the most tokens for one peer, and the
            pairs of this rank's tokens that were cut off.
    """

    hidden: Tensor
    experts: Tensor
    probs: Tensor
    receipt: Any = None
    limit: tuple[Tensor, Tensor] | None = None


class TokenTransport(ABC):
    """Moves tokens with static shapes. One object serves all calls and keeps no state of them."""

    @abstractmethod
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, is_limited: bool = True
    ) -> Delivery:
        """Bring each token to every rank that computes one of its experts.

        Args:
            hidden: ``[T, H]``, this rank's tokens.
            experts: int32 ``[T, K]``, physical expert ids: rank ``p // G`` computes ``p``, and
                ``R * G`` stands for no expert.
            probs: ``[T, K]``.
            is_limited: False, in evaluation, where nothing may be cut off.
        """

    @abstractmethod
    def combine(self, partial: Tensor, receipt: Any) -> Tensor:
        """Bring partial sums back to the tokens' ranks and add them up.

        Args:
            partial: ``[N, H]`` in the wide dtype: for each delivered row the sum over the experts
                of this rank.
            receipt: the one of the ``Delivery``.

        Returns:
            ``[T, H]`` in the wide dtype.
        """


@dataclass(frozen=True)
class RowDelivery:
    """Rows that this rank computes, where ``dispatch/layout.py`` puts them. B rows, G groups.

    Attributes:
        rows: ``[B, H]``, zeros in the empty rows of groups; anything behind the last end.
        probs: ``[B]``, likewise.
        ends: int32 ``[G]``, end offset of each padded group, not above B.
        need: int64 scalar, rows that would hold everything.
        dropped: int64 scalar, pairs without a row.
        receipt: what the same transport needs to send the results back.
    """

    rows: Tensor
    probs: Tensor
    ends: Tensor
    need: Tensor
    dropped: Tensor
    receipt: Any


class RowTransport(ABC):
    """Moves each token-expert pair straight into its row, with static shapes, and back."""

    @abstractmethod
    def dispatch(
        self, hidden: Tensor, experts: Tensor, probs: Tensor, num_rows: int
    ) -> RowDelivery:
        """Bring each pair to its row on the rank that computes it.

        Args:
            hidden: ``[T, H]``, this rank's tokens.
            experts: int32 ``[T, K]``, physical expert ids, as for :class:`TokenTransport`.
            probs: ``[T, K]``.
            num_rows: B, the same on every rank; what does not fit is dropped.
        """

    @abstractmethod
    def combine(self, rows: Tensor, receipt: Any) -> Tensor:
        """Sum the results of each token, wherever they were computed, in the order of k.

        Args:
            rows: ``[B, H]``; empty rows may hold anything.
            receipt: the one of the ``RowDelivery``.

        Returns:
            ``[T, H]`` in the wide dtype.
        """
