"""Whose tokens go to which copy of an expert: as few as possible leave their rank and node."""

import torch
from torch import Tensor


def _starts(lengths: Tensor, dim: int) -> Tensor:
    """Where each interval begins when intervals of these lengths are laid end to end."""
    return lengths.cumsum(dim) - lengths


def _overlap(start_a: Tensor, length_a: Tensor, start_b: Tensor, length_b: Tensor) -> Tensor:
    """Length of the common part of two intervals, elementwise."""
    end = torch.minimum(start_a + length_a, start_b + length_b)
    return (end - torch.maximum(start_a, start_b)).clamp_(min=0)


def check_ranks_per_node(ranks: int, ranks_per_node: int | None) -> None:
    """Raise a ``ValueError`` unless nodes of this size divide the ranks."""
    if ranks_per_node is not None and (ranks_per_node < 1 or ranks % ranks_per_node):
        raise ValueError(
            f"ranks_per_node {ranks_per_node} does not divide {ranks} ranks. Use a divisor or None."
        )


def split_for(
    counts: Tensor, allocation: Tensor, rank: int, ranks_per_node: int | None = None
) -> Tensor:
    """Split one source rank's tokens over the ranks that compute their experts.

    Three passes, each over what the pass before left: own rank, own node, everywhere. In a pass
    an expert's sources and destinations are laid on two number lines in rank order and matched
    where they overlap, so that a pass matches ``min(supply, demand)``. Both the tokens that stay
    on their rank and those that stay in their node are therefore as many as the allocation
    allows: for each expert and node it is the smaller of the two sums, which no split exceeds.

    Args:
        counts: int64 ``[R, E]``, tokens of each source rank for each expert.
        allocation: int64 ``[E, R]``, tokens of each expert computed on each rank.
        rank: the source rank.
        ranks_per_node: ranks of a node, consecutive; None leaves the second pass out.

    Returns:
        int64 ``[E, R]``; row sums are ``counts[rank]``, and the sum over all sources is
        ``allocation``.

    Raises:
        ValueError: ``rank`` or ``ranks_per_node`` does not fit the number of ranks.
    """
    ranks, experts = counts.shape
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of {ranks} ranks. Use 0 to {ranks - 1}.")
    check_ranks_per_node(ranks, ranks_per_node)
    supply = counts.t()
    own = torch.minimum(supply, allocation)
    result = torch.zeros_like(allocation)
    result[:, rank] = own[:, rank]
    supply, demand = supply - own, allocation - own
    if ranks_per_node is not None:
        nodes = (experts, ranks // ranks_per_node, ranks_per_node)
        node, local = divmod(rank, ranks_per_node)
        by_node, wanted = supply.reshape(nodes), demand.reshape(nodes)
        starts, ends = _starts(by_node, 2), _starts(wanted, 2)
        matched = torch.minimum(by_node.sum(2), wanted.sum(2)).unsqueeze(2)
        columns = slice(node * ranks_per_node, (node + 1) * ranks_per_node)
        result[:, columns] += _overlap(
            starts[:, node, local, None],
            by_node[:, node, local, None],
            ends[:, node],
            wanted[:, node],
        )
        supply = (by_node - (matched - starts).clamp(min=0).minimum(by_node)).reshape(supply.shape)
        demand = (wanted - (matched - ends).clamp(min=0).minimum(wanted)).reshape(demand.shape)
    result += _overlap(
        _starts(supply, 1)[:, rank, None], supply[:, rank, None], _starts(demand, 1), demand
    )
    return result
