"""Who clones what: exact balance where the slots allow it, with few clones.

Tokens are moved from ranks above the bound ("donors", by their home experts) to ranks below it
("receivers"). Two algorithms, both in integers and with trip counts that depend on shapes only:

* at least ``m = E // R`` slots (:func:`.steps.exact`): an alias table over the *ranks*, then each
  donor's tokens over its experts. With a tolerance, also the closest fits, for fewer clones.
* fewer slots (:func:`.steps.greedy`): a greedy over *experts*, for several targets at once.

With the price of a clone both end with the plan of the shortest predicted time, which may be that
without clones. Ties go to the lower index everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_echo.environment import on_gpu
from megatron_echo.planner.bound import (
    MAX_EXPERTS,
    MAX_RANKS,
    MAX_TOLERANCE,
    balance_bound,
    domain,
)
from megatron_echo.planner.plan import ClonePlan
from megatron_echo.planner.price import ClonePrice
from megatron_echo.planner.split import check_ranks_per_node
from megatron_echo.planner.steps import Goal, exact, greedy


def plan_clones(
    counts: Tensor,
    num_slots: int,
    tolerance: float = 0.0,
    min_tokens_per_clone: int = 0,
    ranks_per_node: int | None = None,
    within_node: bool = False,
    price: ClonePrice | None = None,
) -> ClonePlan:
    """Plan the clones of one layer and microbatch.

    With at least ``m`` slots no rank's load exceeds :func:`balance_bound`, whatever the counts:
    every receiver is filled from one home rank and so needs at most that rank's ``m`` experts.
    (The alias-table construction: give the emptiest receiver its whole deficit from a donor, close
    it, repeat. A donor has more than the bound, a deficit is at most the bound, so one donor always
    suffices; the sum of excesses never exceeds that of deficits, so when R - 1 ranks are closed the
    last one is within the bound too.) With fewer slots the plan is the best of several greedy
    ones; ``load_after`` certifies what was reached, never worse than before.

    Args:
        counts: int64 ``[R, E]``, tokens that source rank ``r`` routes to expert ``e``.
        num_slots: S, clone slots on each rank.
        tolerance: stop once the highest load is within ``balance_bound(total, R, tolerance)``.
            More tolerance, fewer clones, as a rule: with few slots a bound that comes into reach
            is also paid for with clones.
        min_tokens_per_clone: clones with fewer tokens are given up where their home rank can
            keep the tokens within the bound; the bound always wins.
        ranks_per_node: consecutive ranks that share a node; None if all links are alike. With ``m``
            slots a node whose own ranks can hold all of its load then sends no clone out; the other
            nodes, and any node with fewer slots, prefer receivers inside. That saves weight traffic
            between nodes, not token traffic.
        within_node: each node is balanced by itself, and no clone leaves its home's node. The bound
            is then that of the fullest node, for whose ranks the others wait.
        price: of a clone. Of the plans within the bound, the lowest load where none is, the one
            with the shortest predicted time is taken; without clones where they do not pay.

    Raises:
        ValueError: shapes or settings that do not fit together.
    """
    _check(counts, num_slots, tolerance, min_tokens_per_clone, ranks_per_node, within_node)
    settings = num_slots, tolerance, min_tokens_per_clone, ranks_per_node, within_node, price
    if on_gpu(counts) and num_slots > 0 and counts.shape[0] > 1:
        from megatron_echo.planner.kernels import plan_tensors

        tensors = plan_tensors(counts, *settings)
        return ClonePlan(counts=counts, ranks_per_node=ranks_per_node, price=price, **tensors)
    return plan_clones_reference(counts, *settings)


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
    counts: Tensor, num_slots: int, tolerance: float = 0.0, min_tokens_per_clone: int = 0,
    ranks_per_node: int | None = None, within_node: bool = False, price: ClonePrice | None = None,
) -> ClonePlan:  # fmt: skip
    """The planner in torch operations, on any device; ``plan_clones`` without the checks."""
    ranks, experts = counts.shape
    per_rank = experts // ranks
    tokens = counts.sum(0)
    load_before = tokens.reshape(ranks, per_rank).sum(1)
    size, nodes = domain(ranks, ranks_per_node, within_node)
    of_domain = tokens.reshape(nodes, -1)
    fullest, inner_nodes = of_domain.sum(1).amax(), None if within_node else ranks_per_node
    goal = Goal(fullest, num_slots, tolerance, inner_nodes, price)
    parts = [_moves(part, size, goal, min_tokens_per_clone) for part in of_domain.unbind()]
    moved = parts[0]
    if nodes > 1:
        node = torch.arange(nodes, device=counts.device)
        same = (node[:, None] == node)[:, None, :, None]
        moved = torch.where(same, torch.stack(parts).unsqueeze(2), 0).reshape(experts, ranks)
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
        price=price,
    )


def _moves(tokens: Tensor, ranks: int, goal: Goal, minimum: int) -> Tensor:
    """Tokens moved within one domain, ``[E, R]`` of its experts ``[E]`` and ranks."""
    load = tokens.reshape(ranks, -1).sum(1)
    if goal.num_slots == 0 or ranks == 1:
        return tokens.new_zeros(len(tokens), ranks)
    has_slots_for_all = goal.num_slots >= len(tokens) // ranks
    moved = exact(tokens, load, goal) if has_slots_for_all else greedy(tokens, load, goal)
    if minimum > 0:
        moved = _give_up_small_clones(moved, load, goal, minimum)
    return moved


def _check(
    counts: Tensor, num_slots: int, tolerance: float, min_tokens_per_clone: int,
    ranks_per_node: int | None, within_node: bool,
) -> None:  # fmt: skip
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
    if within_node and ranks_per_node is None:
        raise ValueError("within_node needs nodes. Give ranks_per_node.")


def _give_up_small_clones(moved: Tensor, load: Tensor, goal: Goal, minimum: int) -> Tensor:
    """Return clones of fewer than ``minimum`` tokens to home ranks with room for them.

    On each home rank the smallest go first, for as long as their sum fits under the bound; with a
    price, under the load that the plan has reached.
    """
    experts, ranks = moved.shape
    by_home = moved.reshape(ranks, -1)
    after = load - by_home.sum(1) + moved.sum(0)
    bound = goal.bound(ranks)
    if goal.price is not None:
        bound = torch.maximum(after.amax(), balance_bound(goal.total, ranks))
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
