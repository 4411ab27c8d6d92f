"""From logical to physical experts: which copy of an expert computes each token."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.layout import PairCounts
from megatron_echo.planner import ClonePlan


class _CompactProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probs: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.num_experts = probs.shape[1]
        padded = torch.cat((probs, probs.new_zeros(probs.shape[0], 1)), dim=1)
        return padded.gather(1, experts.to(torch.int64))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (experts,) = ctx.saved_tensors
        dense = grad.new_zeros(grad.shape[0], ctx.num_experts + 1)
        dense = dense.scatter_(1, experts.to(torch.int64), grad)
        return dense[:, : ctx.num_experts], None


def compact_probs(probs: Tensor, experts: Tensor) -> Tensor:
    """Those of the chosen experts.

    Args:
        probs: ``[T, E]``.
        experts: of :func:`compact_routing`.

    Returns:
        ``[T, K]``; 0 where a choice is missing.
    """
    return _CompactProbs.apply(probs, experts)


def compact_routing(routing_map: Tensor, topk: int) -> Tensor:
    """The chosen experts of each token, in ascending order.

    Taken from the map, because a chosen expert may have the probability 0.

    Args:
        routing_map: bool ``[T, E]`` with at most K True in a row.
        topk: K.

    Returns:
        int32 ``[T, K]``; E where a token has fewer choices (a padding token has none).
    """
    tokens, experts = routing_map.shape
    place = routing_map.cumsum(1).mul_(routing_map).clamp_(max=topk + 1)  # 0 for those not chosen
    expert = torch.arange(experts, device=routing_map.device).expand(tokens, experts)
    chosen = torch.full((tokens, topk + 2), experts, device=routing_map.device)
    return chosen.scatter_(1, place, expert)[:, 1 : topk + 1].int()


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
