"""Whose tokens go to which copy of an expert: as few as possible leave their rank and node."""

import torch
from torch import Tensor


def _starts(lengths: Tensor, dim: int) -> Tensor:
    """Where each interval begins when intervals of these lengths are laid end to end."""
    return lengths.cumsum(dim) - lengths


def _below(reach: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """How much of an interval is below ``reach``, elementwise."""
    return (torch.minimum(reach, start + length) - start).clamp_(min=0)


def check_ranks_per_node(ranks: int, ranks_per_node: int | None) -> None:
    """Raise a ``ValueError`` unless nodes of this size divide the ranks."""
    if ranks_per_node is not None and (ranks_per_node < 1 or ranks % ranks_per_node):
        raise ValueError(
            f"ranks_per_node {ranks_per_node} does not divide {ranks} ranks. Use a divisor or None."
        )


def split_up_to(
    counts: Tensor, allocation: Tensor, rank: int, ranks_per_node: int | None = None
) -> Tensor:
    """Split the tokens of source ranks over the ranks that compute their experts.

    Three passes, each over what the pass before left: own rank, own node (with
    ``ranks_per_node``), everywhere. In a pass an expert's sources and destinations are laid on two
    number lines in rank order and matched where they overlap, so that a pass matches ``min(supply,
    demand)``: as many tokens stay on their rank and in their node as the allocation allows. Since
    sources lie in rank order, those up to a rank fill a line up to one point.

    Returns:
        int64 ``[2, E, R]``: of all ranks below ``rank``, and of those and ``rank``. For the
        last rank the latter is ``allocation``.
    """
    ranks, experts = counts.shape
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} is not one of {ranks} ranks. Use 0 to {ranks - 1}.")
    check_ranks_per_node(ranks, ranks_per_node)
    supply = counts.t()
    own = torch.minimum(supply, allocation)
    end = torch.arange(rank, rank + 2, device=counts.device)[:, None, None]
    is_counted = torch.arange(ranks, device=counts.device) < end
    result = own * is_counted
    supply, demand = supply - own, allocation - own
    if ranks_per_node is not None:
        nodes = (experts, ranks // ranks_per_node, ranks_per_node)
        by_node, wanted = supply.reshape(nodes), demand.reshape(nodes)
        starts, ends = _starts(by_node, 2), _starts(wanted, 2)
        reach = (supply * is_counted).view(2, *nodes).sum(3, keepdim=True)
        result += _below(reach, ends, wanted).view(result.shape)
        matched = torch.minimum(by_node.sum(2), wanted.sum(2)).unsqueeze(2)
        supply = (by_node - (matched - starts).clamp(min=0).minimum(by_node)).reshape(supply.shape)
        demand = (wanted - (matched - ends).clamp(min=0).minimum(wanted)).reshape(demand.shape)
    reach = (supply * is_counted).sum(2, keepdim=True)
    return result.add_(_below(reach, _starts(demand, 1), demand))
