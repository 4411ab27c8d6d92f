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
