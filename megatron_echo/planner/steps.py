"""The two ways to balance a domain of ranks, in torch: what ``step_kernels.py`` does on a GPU.

Several plans are made at once, in a dimension V, for several bounds; one of them is taken. All in
integers, with trip counts that depend on shapes only. Ties go to the lower index everywhere.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_echo.planner.bound import (
    FAR,
    INTER_NODE_COST,
    INTER_NODE_WEIGHT,
    INTRA_NODE_COST,
    INTRA_NODE_WEIGHT,
    MILLION,
    NUM_BOUNDS,
    NUM_TARGETS,
    balance_bound,
    balance_scale,
    bound_at,
)
from megatron_echo.planner.price import ClonePrice, clone_time

_INDEX_BITS = 10
_INDEX_MASK = (1 << _INDEX_BITS) - 1


def _keys(values: Tensor) -> Tensor:
    """Values with their (reversed) index in the low bits: a maximum then names its first place."""
    last = torch.arange(values.shape[-1], device=values.device).neg_().add_(_INDEX_MASK)
    return (values << _INDEX_BITS) + last


def _first_max(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value in the last dimension of ``_keys`` and the first index that has it."""
    top = keys.amax(-1, keepdim=True)
    return top >> _INDEX_BITS, _INDEX_MASK - (top & _INDEX_MASK)


@dataclass(frozen=True)
class Goal:
    """What the plan of a domain is to reach."""

    total: Tensor  # scalar, tokens of the domain; of the fullest one, where others wait for it
    num_slots: int  # S
    tolerance: float  # no rank may be above the ``balance_bound`` where slots allow it
    ranks_per_node: int | None  # None if all links are alike
    price: ClonePrice | None  # of a clone; None: of the plans within the bound the fewest clones

    def bound(self, ranks: int) -> Tensor:
        """The highest load allowed."""
        return balance_bound(self.total, ranks, self.tolerance)

    def ladder(self, load: Tensor, number: int) -> Tensor:
        """Bounds from the load as it is, where no clone is made, down to balance: ``[V]``.

        The i-th is ``(1 - i / (V - 1)) ** 2`` of the way up from balance.
        """
        floor = balance_bound(self.total, load.shape[0])
        up = torch.arange(number, device=load.device).neg_().add_(number - 1).square_()
        return floor + (load.max() - floor).clamp(min=0) * up // (number - 1) ** 2


def exact(tokens: Tensor, load: Tensor, goal: Goal) -> Tensor:
    """Tokens moved, ``[E, R]``, with no rank above the bound; needs ``m`` slots.

    With a tolerance there is slack to save clones with: the closest fits are tried as well, both
    at the bound and, because a tighter one sometimes suits the experts' sizes better, at those of
    a half, a quarter and none of it. With a price both are tried at ``NUM_BOUNDS`` bounds.
    """
    ranks = load.shape[0]
    at_home = tokens.reshape(ranks, -1)
    extra = balance_scale(goal.tolerance) - MILLION
    if goal.price is not None:
        bounds = goal.ladder(load, NUM_BOUNDS)
    else:
        extras = (extra, extra // 2, extra // 4, 0) if extra > 0 else (0,)
        bounds = torch.stack([bound_at(goal.total, ranks, MILLION + part) for part in extras])
    excess = load - bounds[:, None]
    table = _alias_table(excess, goal.ranks_per_node)
    if goal.price is None and extra == 0:
        return _serve_quotas(table, at_home)[0]
    fits = _closest_fits(excess, goal.ranks_per_node)
    quota = torch.stack((table, fits), dim=1).flatten(0, 1)
    return _best(_serve_quotas(quota, at_home), load, goal)


def _best(plans: Tensor, load: Tensor, goal: Goal) -> Tensor:
    """One of the plans ``[V, E, R]``.

    Of those in which no rank needs more slots than it has: the lowest maximum above the bound;
    then the shortest predicted time, or without a price the fewest clones (the lowest cost,
    between nodes); then the earlier one.
    """
    ranks = load.shape[0]
    by_home = plans.unflatten(1, (ranks, -1))
    highest = (load - by_home.sum((2, 3)) + plans.sum(1)).amax(1)
    is_clone = plans > 0
    has_slots = is_clone.sum(1).amax(1) <= goal.num_slots
    reached = torch.where(has_slots, torch.maximum(highest, goal.bound(ranks)), FAR)
    if goal.price is None:
        home = torch.arange(ranks, device=load.device).repeat_interleave(by_home.shape[2])
        is_inside = _inside(home[:, None], ranks, goal.ranks_per_node)
        cost = (is_clone * torch.where(is_inside, INTRA_NODE_COST, INTER_NODE_COST)).sum((1, 2))
    else:
        cost = clone_time(is_clone, goal.price, goal.ranks_per_node)
        cost = cost + torch.maximum(highest, balance_bound(goal.total, ranks))
    cost = torch.where(reached == reached.amin(), cost, 2 * FAR)
    _, best = _first_max(_keys(-cost))
    return plans.index_select(0, best).squeeze(0)


def _alias_table(excess: Tensor, ranks_per_node: int | None) -> Tensor:
    """Quotas ``[V, home, receiver]`` with one home rank for each receiver.

    R - 1 times, the fullest donor fills the emptiest open receiver up to the bound; the donor may
    fall below it and become a receiver. Nodes that can serve themselves do so first, the smallest
    hole first, so that few and large ones are left to the others.
    ``excess`` is load minus bound, int64 ``[V, R]``, for V bounds at once.
    """
    variants, ranks = excess.shape
    is_open = torch.ones_like(excess, dtype=torch.bool)
    quota = excess.new_zeros(variants, ranks * ranks)
    first = _first_to_serve(excess, ranks_per_node)
    for _ in range(ranks - 1):
        _, donor = _first_max(_keys(excess if first is None else _raise(excess, first)))
        need = torch.where(is_open, -excess, 0).clamp_(min=0)
        worth = need
        if first is not None:
            inside, alone = _inside(donor, ranks, ranks_per_node), first.gather(1, donor) > 0
            worth = need * torch.where(inside, INTRA_NODE_WEIGHT, INTER_NODE_WEIGHT)
            worth = torch.where(alone, torch.where(inside & (need > 0), FAR - need, 0), worth)
        _, receiver = _first_max(_keys(worth))
        given = torch.where(excess.gather(1, donor) > 0, need.gather(1, receiver), 0)
        quota.scatter_add_(1, donor * ranks + receiver, given)
        excess = excess.scatter_add(1, donor, -given).scatter_add_(1, receiver, given)
        is_open = is_open.scatter(1, receiver, is_open.gather(1, receiver) & (given == 0))
    return quota.view(variants, ranks, ranks)


def _closest_fits(excess: Tensor, ranks_per_node: int | None) -> Tensor:
    """Quotas ``[V, home, receiver]`` for few clones where the bound leaves slack.

    The donor with the smallest excess goes first. It takes the smallest hole that holds all of
    its excess, in its node if there is one, or else as much as the largest hole takes. Every step
    ends a donor or fills a hole, so R steps serve all; the holes' sum is at least the excesses'.
    Arguments and first nodes are those of :func:`_alias_table`.
    """
    variants, ranks = excess.shape
    first = _first_to_serve(excess, ranks_per_node)
    hole = (-excess).clamp(min=0)
    excess = excess.clamp(min=0)
    quota = excess.new_zeros(variants, ranks * ranks)
    for _ in range(ranks):
        urgency = torch.where(excess > 0, -excess, -FAR)
        _, donor = _first_max(_keys(urgency if first is None else _raise(urgency, first, excess)))
        wanted = excess.gather(1, donor)
        if first is None:
            score = torch.where(hole >= wanted, FAR - hole, hole)
        else:
            inside, alone = _inside(donor, ranks, ranks_per_node), first.gather(1, donor) > 0
            weight = torch.where(inside, INTRA_NODE_WEIGHT, INTER_NODE_WEIGHT)
            fit = torch.where(inside, 2 * FAR, FAR) - hole
            score = torch.where(hole >= wanted, fit, hole * weight)
            score = torch.where(alone & ~inside, 0, score)
        _, receiver = _first_max(_keys(torch.where(hole > 0, score, 0)))
        given = torch.minimum(wanted, hole.gather(1, receiver))
        quota.scatter_add_(1, donor * ranks + receiver, given)
        excess = excess.scatter_add(1, donor, -given)
        hole = hole.scatter_add(1, receiver, -given)
    return quota.view(variants, ranks, ranks)


def _inside(donor: Tensor, ranks: int, ranks_per_node: int | None) -> Tensor:
    """Whether each rank is in the donor's node: donor ``[..., 1]`` gives ``[..., R]``."""
    size = ranks_per_node or ranks
    return torch.arange(ranks, device=donor.device) // size == donor // size


def _first_to_serve(excess: Tensor, ranks_per_node: int | None) -> Tensor | None:
    """``[V, R]``: ``FAR`` for ranks whose node can hold its load, else 0; None without nodes."""
    if ranks_per_node is None:
        return None
    by_node = excess.unflatten(-1, (-1, ranks_per_node))
    alone = (by_node.sum(-1, keepdim=True) <= 0).expand_as(by_node).flatten(-2)
    return torch.where(alone, FAR, 0)


def _raise(values: Tensor, first: Tensor, excess: Tensor | None = None) -> Tensor:
    """Donors' values, those of the ranks to serve first above all others."""
    excess = values if excess is None else excess
    return values + torch.where(excess > 0, first, 0)


def _serve_quotas(quota: Tensor, at_home: Tensor) -> Tensor:
    """Deal quotas ``[V, home, receiver]`` over the tokens ``[R, m]`` of home ranks: ``[V, E, R]``.

    For all home ranks at once, the largest open quota takes from the largest remaining expert. A
    round ends a quota or an expert, so ``R - 2 + m`` rounds serve all.
    """
    ranks, per_rank = at_home.shape
    variants = quota.shape[0]
    moved = quota.new_zeros(variants, ranks, per_rank * ranks)
    quota_keys = _keys(quota)
    expert_keys = _keys(at_home).expand(variants, ranks, per_rank).clone()
    for _ in range(ranks - 2 + per_rank):
        wanted, receiver = _first_max(quota_keys)
        held, expert = _first_max(expert_keys)
        piece = torch.minimum(wanted, held)
        moved.scatter_add_(-1, expert * ranks + receiver, piece)
        taken = piece << _INDEX_BITS
        quota_keys.scatter_add_(-1, receiver, -taken)
        expert_keys.scatter_add_(-1, expert, -taken)
    return moved.view(variants, ranks * per_rank, ranks)


def greedy(tokens: Tensor, load: Tensor, goal: Goal) -> Tensor:
    """Tokens moved, ``[E, R]``, with at most S experts to a receiver.

    ``R * S`` times: the emptiest receiver with a free slot takes the largest expert of a donor, or
    as much of it as it needs. Where experts are large enough, the fullest donor gives, one in the
    receiver's node before others; where none is, the one with the largest, as a slot is what is
    scarce. A donor may fall below the target and become a receiver. Several targets are tried at
    once, because a bound that the slots cannot reach is a bad target.
    """
    ranks, num_slots = load.shape[0], goal.num_slots
    per_rank = tokens.shape[0] // ranks
    if goal.price is not None:
        targets = goal.ladder(load, NUM_TARGETS)[:, None]
    else:
        bound = goal.bound(ranks)
        step = torch.arange(NUM_TARGETS, device=load.device)[:, None]  # made there: no copy
        targets = bound + (load.max() - bound).clamp(min=0) * (step * step) // 500
    excess = load - targets
    free = torch.full_like(excess, num_slots)
    left = tokens.reshape(1, ranks, per_rank).repeat(NUM_TARGETS, 1, 1)
    largest = left.amax(2)  # [V, R]: of the experts' tokens that are still at home
    moved = left.new_zeros(NUM_TARGETS, ranks * per_rank * ranks)  # [V, expert * receiver]
    left = left.flatten(1)
    columns = torch.arange(per_rank, device=load.device)
    for _ in range(ranks * num_slots):
        need, receiver = _first_max(_keys(torch.where(free > 0, -excess, 0).clamp_(min=0)))
        inside = _inside(receiver, ranks, goal.ranks_per_node)
        fit = torch.where(inside, 2 * FAR, FAR) + excess
        part = largest * torch.where(inside, INTRA_NODE_WEIGHT, INTER_NODE_WEIGHT)
        worth = torch.where(largest >= need, fit, part)
        best, donor = _first_max(_keys(torch.where((excess > 0) & (need > 0), worth, 0)))
        rest = left.gather(1, donor * per_rank + columns)
        held, expert = _first_max(_keys(rest))
        piece = torch.where(best > 0, torch.minimum(need, held), 0)
        home = donor * per_rank + expert
        moved.scatter_add_(1, home * ranks + receiver, piece)
        left.scatter_add_(1, home, -piece)
        rest = rest.scatter_add(1, expert, -piece)
        largest.scatter_(1, donor, rest.amax(1, keepdim=True))
        excess.scatter_add_(1, donor, -piece).scatter_add_(1, receiver, piece)
        free.scatter_add_(1, receiver, -(piece > 0).long())
    return _best(moved.view(NUM_TARGETS, -1, ranks), load, goal)
