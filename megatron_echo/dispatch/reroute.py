"""From logical to physical experts: which copy of an expert computes each token."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_echo.dispatch.layout import PairCounts
from megatron_echo.dispatch.transports.weights import WeightTransport
from megatron_echo.planner import ClonePlan


@dataclass(frozen=True)
class Clones:
    """The clones of one layer call: which experts sit in which slots.

    Attributes:
        slot_expert: int64 ``[R, S]``, the expert in each slot of each rank, -1 if unused.
        experts_per_rank: m; expert e lives on rank ``e // m``.
        transport: how weights get into the slots.
        announced: what the transport keeps of the plan.
        is_frozen: nobody trains what is cloned: no gradient of it is computed or travels.
    """

    slot_expert: Tensor
    experts_per_rank: int
    transport: WeightTransport
    announced: Any = None
    is_frozen: bool = False

    @property
    def slots(self) -> int:
        """S."""
        return self.slot_expert.shape[1]


def home_experts(experts: Tensor, per_rank: int, num_slots: int) -> Tensor:
    """Physical ids of the experts themselves: expert ``e`` is group ``e % m`` of rank ``e // m``.

    Args:
        experts: integer, logical ids; E stands for no expert and becomes ``R * (m + S)``.
        per_rank: m.
        num_slots: S.
    """
    return experts + experts // per_rank * num_slots


def pair_counts(plan: ClonePlan, below: Tensor, own: Tensor) -> PairCounts:
    """What a plan sends to each physical expert.

    Args:
        plan: of R ranks.
        below: int64 ``[E, R]``, the split of the ranks below this one; see ``split_up_to``.
        own: likewise, that of this rank.
    """
    ranks, num_experts = plan.counts.shape
    home = torch.arange(num_experts, device=own.device).view(ranks, -1)
    expert = torch.cat((home, plan.slot_expert), dim=1)  # [R, G], -1 in unused slots
    cell = expert.clamp(min=0) * ranks + torch.arange(ranks, device=own.device)[:, None]
    parts = torch.stack((plan.allocation, below, own)).flatten(1).index_select(1, cell.reshape(-1))
    return PairCounts(*parts.view(3, *cell.shape).masked_fill_(expert < 0, 0))


def physical_experts(experts: Tensor, plan: ClonePlan, split: Tensor) -> Tensor:
    """Send each pair to its expert's home or to one of its clones, as the plan splits them.

    An expert's pairs are counted in the order of (token, k); the first go to the lowest rank that
    gets some, and so on. Probabilities stay where they are.

    Args:
        experts: int32 ``[T, K]``, logical ids in ``[0, E]``; E stands for no expert. Their
            histogram is ``plan.counts[rank]``.
        plan: the plan made from it.
        split: int64 ``[E, R]``, ``plan.split_for(rank)`` of this source rank.

    Returns:
        int32 ``[T, K]``, ``rank * (m + S) + group``; ``R * (m + S)`` for no expert.
    """
    ranks, num_experts = plan.counts.shape
    slots = plan.slot_expert.shape[1]
    per_rank = num_experts // ranks
    groups = per_rank + slots
    # Physical id of expert e on rank r: its home there, or its slot.
    expert = plan.slot_expert.masked_fill(plan.slot_expert < 0, num_experts)
    slot = torch.arange(per_rank, groups, device=expert.device).expand(ranks, slots)
    group = expert.new_zeros(ranks, num_experts + 1).scatter_(1, expert, slot)[:, :num_experts]
    ids = torch.arange(num_experts, device=expert.device)
    owner = torch.arange(ranks, device=expert.device)[:, None]
    home = home_experts(ids, per_rank, slots)
    cell_id = torch.where(ids // per_rank == owner, home, owner * groups + group)
    cell_id = cell_id.t().reshape(-1)
    cell_id = torch.cat((cell_id, cell_id.new_full((1,), ranks * groups)))
    # Pairs in the order of experts fall into the cells [E, R] of the split, one after the other.
    ends = split.reshape(-1).cumsum(0)
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    cell = torch.searchsorted(ends, torch.arange(flat.numel(), device=flat.device), right=True)
    physical = torch.empty_like(order).scatter_(0, order, cell_id.index_select(0, cell))
    return physical.view(experts.shape).int()
