"""The planner's result."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_echo.planner.price import ClonePrice, clone_time
from megatron_echo.planner.split import split_up_to


@dataclass(frozen=True)
class ClonePlan:
    """Where each expert's tokens are computed, for one layer and microbatch.

    R ranks, E experts, S slots a rank; expert ``e`` lives on rank ``e // (E // R)``. All tensors
    are int64 on the device of ``counts``.
    """

    counts: Tensor
    """``[R, E]``: tokens that source rank ``r`` routes to expert ``e``; what was planned for."""
    slot_expert: Tensor
    """``[R, S]``: the expert cloned in the slot, ascending on each rank; -1 where unused."""
    allocation: Tensor
    """``[E, R]``: tokens of ``e`` computed on rank ``r``, home's included; sums to ``counts``."""
    load_before: Tensor
    """``[R]``: tokens that each rank would compute without clones."""
    load_after: Tensor
    """``[R]``: tokens that each rank computes under the plan; certifies the balance reached."""
    num_clones: Tensor
    """Scalar: used slots over all ranks."""
    ranks_per_node: int | None = None
    """Ranks that share a node, for the split; None if all links are alike."""
    price: ClonePrice | None = None
    """Of a clone, where the plan is that of the shortest predicted time."""

    def rows_saved(self) -> Tensor:
        """What the clones save by prediction, in rows' time: int64 scalar, 0 without clones."""
        if self.price is None:
            raise ValueError("This plan knows no price of a clone. Give plan_clones one.")
        experts, ranks = self.allocation.shape
        rank = torch.arange(ranks, device=self.allocation.device)
        is_away = rank.repeat_interleave(experts // ranks)[:, None] != rank
        spent = clone_time((self.allocation > 0) & is_away, self.price, self.ranks_per_node)
        return self.load_before.max() - self.load_after.max() - spent

    def split_for(self, rank: int) -> Tensor:
        """Of source rank ``rank``'s tokens of ``e``, how many go to rank ``r``: ``[E, R]``.

        Locality first: a rank's own tokens stay on it where its share of the expert allows it,
        then tokens stay in the node, then the rest is dealt out in rank order. Summed over the
        sources it is ``allocation`` exactly, and ``split_for(rank).sum(1)`` is ``counts[rank]``.
        """
        below, up_to = self.split_up_to(rank)
        return up_to - below

    def split_up_to(self, rank: int) -> Tensor:
        """The same of all source ranks below ``rank``, and of those and ``rank``: ``[2, E, R]``."""
        return split_up_to(self.counts, self.allocation, rank, self.ranks_per_node)
