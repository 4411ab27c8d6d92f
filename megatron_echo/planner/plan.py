"""The planner's result."""

from dataclasses import dataclass

from torch import Tensor

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
    """``[E, R]``: tokens of ``e`` computed on rank ``r``, the home's share included. Row sums are
    ``counts.sum(0)``."""

    load_before: Tensor
    """``[R]``: tokens that each rank would compute without clones."""

    load_after: Tensor
    """``[R]``: tokens that each rank computes under the plan; certifies the balance reached."""

    num_clones: Tensor
    """Scalar: used slots over all ranks."""

    ranks_per_node: int | None = None
    """Ranks that share a node, for the split; None if all links are alike."""

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
