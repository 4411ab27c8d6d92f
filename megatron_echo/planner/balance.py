"""Who clones what: exact balance where the slots allow it, with few clones.

Tokens are moved from ranks above the bound ("donors", by their home experts) to ranks below it
("receivers"). Two algorithms, both in integers and with trip counts that depend on shapes only:

* at least ``E // R`` slots: an alias table over the *ranks*, then each donor's tokens over its
  experts. Exact for every input (:func:`_alias_table`). With a tolerance, also the closest fits,
  for fewer clones (:func:`_closest_fits`).
* fewer slots: a greedy over *experts*, run for several targets at once; the best result wins
  (:func:`_greedy`).

Ties go to the lower index everywhere, so the same counts give the same bits on every device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_echo.environment import on_gpu
from megatron_echo.planner.bound import (
    _MILLION,
    FAR,
    INTER_NODE_COST,
    INTER_NODE_WEIGHT,
    INTRA_NODE_COST,
    INTRA_NODE_WEIGHT,
    MAX_EXPERTS,
    MAX_RANKS,
    MAX_TOLERANCE,
    NUM_TARGETS,
    _bound_at,
    balance_bound,
    balance_scale,
)
from megatron_echo.planner.plan import ClonePlan
from megatron_echo.planner.split import check_ranks_per_node

_INDEX_BITS = 10
_INDEX_MASK = (1 << _INDEX_BITS) - 1


def plan_clones(
    counts: Tensor,
    num_slots: int,
    tolerance: float = 0.0,
    min_tokens_per_clone: int = 0,
    ranks_per_node: int | None = None,
) -> ClonePlan:
    """Plan the clones of one layer and microbatch.

    With ``num_slots >= E // R`` no rank's load exceeds :func:`balance_bound`, whatever the counts:
    every receiver is filled from one home rank and so needs at most that rank's ``E // R``
    experts. (The alias-table construction: give the emptiest receiver its whole deficit from a
    donor, close it, repeat. A donor has more than the bound, a deficit is at most the bound, so
    one donor always suffices; the sum of excesses never exceeds that of deficits, so when R - 1
    ranks are closed the last one is within the bound too.) With fewer slots the plan is the best
    of several greedy ones; ``load_after`` certifies what was reached, never worse than before.

    Args:
        counts: int64 ``[R, E]``, tokens that source rank ``r`` routes to expert ``e``.
        num_slots: S, clone slots on each rank.
        tolerance: stop once the highest load is within ``balance_bound(total, R, tolerance)``.
            More tolerance, fewer clones, as a rule: with few slots a bound that comes into reach
            is also paid for with clones.
        min_tokens_per_clone: clones with fewer tokens are given up where their home rank can
            keep the tokens within the bound; the bound always wins.
        ranks_per_node: ranks that share a node (consecutive ranks). With ``E // R`` slots a node
            whose own ranks can hold all of its load then sends no clone out; the other nodes, and
            any node with fewer slots, prefer receivers inside. That saves weight traffic between
            nodes, not token traffic: a clone in another node keeps that node's tokens there. None
            if all links are alike.

    Raises:
        ValueError: shapes or settings that do not fit together.
    """
    _check(counts, num_slots, tolerance, min_tokens_per_clone, ranks_per_node)
    if on_gpu(counts) and num_slots > 0 and counts.shape[0] > 1:
        from megatron_echo.planner.kernels import plan_tensors

        tensors = plan_tensors(counts, num_slots, tolerance, min_tokens_per_clone, ranks_per_node)
        return ClonePlan(counts=counts, ranks_per_node=ranks_per_node, **tensors)
    return plan_clones_reference(counts, num_slots, tolerance, min_tokens_per_clone, ranks_per_node)


def planner_backend(name: str) -> Callable[..., ClonePlan]:
    """``plan_clones`` with a fixed implementation: ``torch``, ``triton``, or ``auto`` by device."""
    if name == "auto":
        return plan_clones
    if name == "torch":
        return plan_clones_reference

    def plan(counts: Tensor, *settings: Any) -> ClonePlan:
        if not counts.is_cuda:
            raise ValueError(
                f"--moe-echo-planner-backend {name} needs a GPU, and the counts are on "
                f"{counts.device}. Use auto or torch."
            )
        return plan_clones(counts, *settings)

    return plan


def plan_clones_reference(
    counts: Tensor,
    num_slots: int,
    tolerance: float = 0.0,
    min_tokens_per_clone: int = 0,
    ranks_per_node: int | None = None,
) -> ClonePlan:
    """The planner in torch operations, on any device; ``plan_clones`` without the checks."""
    ranks, experts = counts.shape
    per_rank = experts // ranks
    tokens = counts.sum(0)
    load_before = tokens.reshape(ranks, per_rank).sum(1)
    bound = balance_bound(load_before.sum(), ranks, tolerance)
    if num_slots == 0 or ranks == 1:
        moved = tokens.new_zeros(experts, ranks)
    elif num_slots >= per_rank:
        moved = _exact(tokens, load_before, tolerance, num_slots, ranks_per_node)
    else:
        moved = _greedy(tokens, load_before, bound, num_slots, ranks_per_node)
    if min_tokens_per_clone > 0:
        moved = _give_up_small_clones(moved, load_before, bound, min_tokens_per_clone)
    home = torch.arange(experts, device=counts.device) // per_rank
    is_home = home[:, None] == torch.arange(ranks, device=counts.device)
    stay = tokens - moved.sum(1)
    return ClonePlan(
        counts=counts,
        slot_expert=_slots(moved, num_slots),
        allocation=torch.where(is_home, stay[:, None], moved),
        load_before=load_before,
        load_after=stay.reshape(ranks, per_rank).sum(1) + moved.sum(0),
        num_clones=(moved > 0).sum(),
        ranks_per_node=ranks_per_node,
    )


def _check(
    counts: Tensor,
    num_slots: int,
    tolerance: float,
    min_tokens_per_clone: int,
    ranks_per_node: int | None,
) -> None:
    if counts.dtype != torch.int64 or counts.dim() != 2:
        raise ValueError(
            f"counts is {counts.dtype} {tuple(counts.shape)}. Give an int64 tensor [R, E]."
        )
    ranks, experts = counts.shape
    if ranks == 0 or experts == 0 or experts % ranks:
        raise ValueError(f"{experts} experts do not fit {ranks} ranks. Use a positive multiple.")
    if ranks > MAX_RANKS or experts > MAX_EXPERTS:
        raise ValueError(
            f"counts is {ranks} x {experts}. At most {MAX_RANKS} ranks and {MAX_EXPERTS} experts."
        )
    if not 0 <= tolerance <= MAX_TOLERANCE:
        raise ValueError(f"tolerance {tolerance} is not between 0 and {MAX_TOLERANCE}.")
    if num_slots < 0 or min_tokens_per_clone < 0:
        raise ValueError(
            f"num_slots {num_slots} and min_tokens_per_clone {min_tokens_per_clone} must not be "
            "negative."
        )
    check_ranks_per_node(ranks, ranks_per_node)


def _keys(values: Tensor) -> Tensor:
    """Values with their (reversed) index in the low bits: a maximum then names its first place."""
    last = torch.arange(values.shape[-1], device=values.device).neg_().add_(_INDEX_MASK)
    return (values << _INDEX_BITS) + last


def _first_max(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value in the last dimension of ``_keys`` and the first index that has it."""
    top = keys.amax(-1, keepdim=True)
    return top >> _INDEX_BITS, _INDEX_MASK - (top & _INDEX_MASK)


def _exact(
    tokens: Tensor, load: Tensor, tolerance: float, num_slots: int, ranks_per_node: int | None
) -> Tensor:
    """Tokens moved, ``[E, R]``, with no rank above the bound; needs ``E // R`` slots.

    With a tolerance there is slack to save clones with: the closest fits are tried as well, both
    at the bound and, because a tighter one sometimes suits the experts' sizes better, at those of
    a half, a quarter and none of the tolerance. The plan with the fewest clones (the lowest cost,
    between nodes) wins in which no rank needs more slots than it has, the earlier in a tie.
    """
    ranks = load.shape[0]
    extra = balance_scale(tolerance) - _MILLION
    extras = (extra, extra // 2, extra // 4, 0) if extra > 0 else (0,)
    total = load.sum()
    bounds = torch.stack([_bound_at(total, ranks, _MILLION + part) for part in extras])
    excess = load - bounds[:, None]
    table = _alias_table(excess, ranks_per_node)
    experts = tokens.reshape(ranks, -1)
    if extra == 0:
        return _serve_quotas(table, experts)[0]
    fits = _closest_fits(excess, ranks_per_node)
    quota = torch.stack((table, fits), dim=1).flatten(0, 1)
    plans = _serve_quotas(quota, experts)
    used = plans > 0
    fit_the_slots = used.sum(1).amax(1) <= num_slots
    home = torch.arange(ranks, device=load.device).repeat_interleave(experts.shape[1])
    cost = (used * _cost(home, ranks, ranks_per_node)).flatten(1).sum(1)
    cost = torch.where(fit_the_slots, cost, INTER_NODE_COST * tokens.shape[0] * ranks + 1)
    _, best = _first_max(_keys(-cost))
    return plans.index_select(0, best).squeeze(0)


def _alias_table(excess: Tensor, ranks_per_node: int | None) -> Tensor:
    """Quotas ``[V, home, receiver]`` with one home rank for each receiver.

    R - 1 times, the fullest donor fills the emptiest open receiver up to the bound; the donor may
    fall below it and become a receiver. Nodes that can serve themselves do so first, the smallest
    hole first, so that few and large ones are left to the others.

    Args:
        excess: int64 ``[V, R]``, load minus bound, for V bounds at once.
        ranks_per_node: as for ``plan_clones``.
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
    Nodes that can serve themselves do so first here too. The arguments are those of
    :func:`_alias_table`.
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
    """:data:`FAR` for ranks whose node can hold all of its load, else 0: ``[V, R]``.

    None where nodes do not matter.
    """
    if ranks_per_node is None:
        return None
    by_node = excess.unflatten(-1, (-1, ranks_per_node))
    alone = (by_node.sum(-1, keepdim=True) <= 0).expand_as(by_node).flatten(-2)
    return torch.where(alone, FAR, 0)


def _raise(values: Tensor, first: Tensor, excess: Tensor | None = None) -> Tensor:
    """Donors' values, those of the ranks to serve first above all others."""
    excess = values if excess is None else excess
    return values + torch.where(excess > 0, first, 0)


def _cost(home: Tensor, ranks: int, ranks_per_node: int | None) -> Tensor | int:
    """The cost of a clone of each home rank's experts on each rank: ``[..., R]``."""
    if ranks_per_node is None:
        return INTRA_NODE_COST
    inside = _inside(home.unsqueeze(-1), ranks, ranks_per_node)
    return torch.where(inside, INTRA_NODE_COST, INTER_NODE_COST)


def _serve_quotas(quota: Tensor, experts: Tensor) -> Tensor:
    """Deal each home rank's quotas ``[V, R, R]`` over its experts' tokens: ``[V, E, R]``.

    For all home ranks at once, the largest open quota takes from the largest remaining expert. A
    round ends a quota or an expert, so ``R - 2 + E // R`` rounds serve all.

    Args:
        quota: int64, ``[V, home, receiver]``.
        experts: int64 ``[R, E // R]``, tokens of each home rank's experts.
    """
    ranks, per_rank = experts.shape
    variants = quota.shape[0]
    moved = quota.new_zeros(variants, ranks, per_rank * ranks)
    quota_keys = _keys(quota)
    expert_keys = _keys(experts).expand(variants, ranks, per_rank).clone()
    for _ in range(ranks - 2 + per_rank):
        wanted, receiver = _first_max(quota_keys)
        held, expert = _first_max(expert_keys)
        piece = torch.minimum(wanted, held)
        moved.scatter_add_(-1, expert * ranks + receiver, piece)
        taken = piece << _INDEX_BITS
        quota_keys.scatter_add_(-1, receiver, -taken)
        expert_keys.scatter_add_(-1, expert, -taken)
    return moved.view(variants, ranks * per_rank, ranks)


def _greedy(
    tokens: Tensor, load: Tensor, bound: Tensor, num_slots: int, ranks_per_node: int | None
) -> Tensor:
    """Tokens moved, ``[E, R]``, with at most ``num_slots`` experts to a receiver.

    ``R * S`` times: the emptiest receiver with a free slot takes the largest expert of a donor, or
    as much of it as it needs. Where experts are large enough, the fullest donor gives, one in the
    receiver's node before others; where none is, the one with the largest, as a slot is what is
    scarce. A donor may fall below the target and become a receiver. Several targets are tried at
    once (dimension V), because a bound that the slots cannot reach is a bad target; the plan with
    the lowest maximum wins, then the one with fewer clones (the lower cost, between nodes), then
    the earlier one.
    """
    ranks = load.shape[0]
    per_rank = tokens.shape[0] // ranks
    variant = torch.arange(NUM_TARGETS, device=load.device)[:, None]  # made there: no copy, no wait
    targets = bound + (load.max() - bound).clamp(min=0) * (variant * variant) // 500
    excess = load - targets
    free = torch.full_like(excess, num_slots)
    cost = torch.zeros_like(targets)
    left = tokens.reshape(1, ranks, per_rank).repeat(NUM_TARGETS, 1, 1)
    largest = left.amax(2)  # [V, R]: of the experts' tokens that are still at home
    moved = left.new_zeros(NUM_TARGETS, ranks * ranks * per_rank)  # [V, receiver * expert]
    left = left.flatten(1)
    columns = torch.arange(per_rank, device=load.device)
    for _ in range(ranks * num_slots):
        need, receiver = _first_max(_keys(torch.where(free > 0, -excess, 0).clamp_(min=0)))
        inside = _inside(receiver, ranks, ranks_per_node)
        fit = torch.where(inside, 2 * FAR, FAR) + excess
        part = largest * torch.where(inside, INTRA_NODE_WEIGHT, INTER_NODE_WEIGHT)
        worth = torch.where(largest >= need, fit, part)
        best, donor = _first_max(_keys(torch.where((excess > 0) & (need > 0), worth, 0)))
        price = torch.where(inside.gather(1, donor), INTRA_NODE_COST, INTER_NODE_COST)
        rest = left.gather(1, donor * per_rank + columns)
        held, expert = _first_max(_keys(rest))
        piece = torch.where(best > 0, torch.minimum(need, held), 0)
        home = donor * per_rank + expert
        moved.scatter_add_(1, receiver * (ranks * per_rank) + home, piece)
        left.scatter_add_(1, home, -piece)
        rest = rest.scatter_add(1, expert, -piece)
        largest.scatter_(1, donor, rest.amax(1, keepdim=True))
        excess.scatter_add_(1, donor, -piece).scatter_add_(1, receiver, piece)
        given = piece > 0
        cost += given * price
        free.scatter_add_(1, receiver, -given.long())
    highest = (excess + targets).amax(1)
    reached = torch.maximum(highest, bound)
    others = torch.where(reached == reached.amin(), 0, INTER_NODE_COST * ranks * num_slots + 1)
    _, best = _first_max(_keys(-(cost.squeeze(1) + others)))
    return moved.index_select(0, best).view(ranks, -1).t().contiguous()


def _give_up_small_clones(moved: Tensor, load: Tensor, bound: Tensor, minimum: int) -> Tensor:
    """Return clones of fewer than ``minimum`` tokens to home ranks with room for them.

    On each home rank the smallest go first, for as long as their sum fits under the bound.
    """
    experts, ranks = moved.shape
    by_home = moved.reshape(ranks, -1)
    after = load - by_home.sum(1) + moved.sum(0)
    small = torch.where((by_home > 0) & (by_home < minimum), by_home, torch.iinfo(torch.int64).max)
    size, order = small.sort(dim=1, stable=True)
    size = torch.where(size == torch.iinfo(torch.int64).max, 0, size)
    fits = size.cumsum(1) <= (bound - after)[:, None]
    dropped = torch.zeros_like(by_home).scatter_(1, order, torch.where(fits, size, 0))
    return (by_home - dropped).view(experts, ranks)


def _slots(moved: Tensor, num_slots: int) -> Tensor:
    """The experts cloned on each rank, ascending, ``[R, S]``; -1 where a slot is unused."""
    experts, ranks = moved.shape
    used = (moved > 0).t()
    position = torch.where(used, used.cumsum(1) - 1, num_slots)  # the last column is thrown away
    slots = moved.new_full((ranks, num_slots + 1), -1)
    index = torch.arange(experts, device=moved.device).expand(ranks, experts)
    return slots.scatter_(1, position, index)[:, :num_slots].contiguous()
