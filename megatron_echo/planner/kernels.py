"""The planner in Triton, bit-identical to the torch reference in ``balance.py``.

One program makes one plan of a domain of ranks (``step_kernels.py``): the plans for several bounds
are made side by side, and a second launch takes the best. Where there is one plan only, its program
ends it, in one launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_echo.planner.bound import NUM_BOUNDS, NUM_TARGETS, balance_scale, domain
from megatron_echo.planner.price import ClonePrice
from megatron_echo.planner.step_kernels import (
    _FAR,
    _alias_table,
    _closest_fits,
    _first_max,
    _greedy,
    _pick,
    _serve_quotas,
)

_RELAXED_BOUNDS = 4


@triton.jit
def _sum_counts(
    counts, tokens, ALL: tl.constexpr, N: tl.constexpr, E: tl.constexpr,
    BLOCK_ALL: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """``tokens[e]`` of a domain's experts, over all source ranks; N domains are a row of counts."""
    rank = tl.arange(0, BLOCK_ALL)[:, None]
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        inside = (rank < ALL) & (expert < E)[None, :]
        tile = tl.load(counts + rank * (N * E) + expert[None, :], mask=inside, other=0)
        tl.store(tokens + expert, tl.sum(tile, axis=0), mask=expert < E)
    tl.debug_barrier()


@triton.jit
def _give_up_small_clones(
    moved, load, bound, minimum, R: tl.constexpr, M: tl.constexpr, PRICED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Home ranks with room take their smallest clones back, smallest first."""
    rank = tl.arange(0, BLOCK_R)
    cell = tl.arange(0, BLOCK_H)
    after = load
    for home in range(R):
        inside = cell < M * R
        piece = tl.load(moved + home * M * R + cell, mask=inside, other=0)
        sent = tl.sum(piece, axis=0)
        after -= tl.where(rank == home, sent, 0)
    for expert in range(R * M):
        after += tl.load(moved + expert * R + rank, mask=rank < R, other=0)
    if PRICED:
        bound = tl.maximum(bound, tl.max(after, axis=0))
    tl.debug_barrier()
    for home in range(R):
        inside = cell < M * R
        piece = tl.load(moved + home * M * R + cell, mask=inside, other=0)
        room = bound - _pick(after, rank, home, 0)
        busy = room > 0
        while busy:
            small = (piece > 0) & (piece < minimum)
            size = tl.min(tl.where(small, piece, 1 << 62), axis=0)
            first = tl.min(tl.where(small & (piece == size), cell, BLOCK_H), axis=0)
            busy = size <= room
            piece = tl.where((cell == first) & busy, 0, piece)
            room -= tl.where(busy, size, 0)
        tl.store(moved + home * M * R + cell, piece, mask=inside)
    tl.debug_barrier()


@triton.jit
def _write_plan(
    moved, tokens, allocation, slot_expert, load_after, num_clones, load, first_expert,
    R: tl.constexpr, E: tl.constexpr, S: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Slots, allocation, a row of which is WIDTH ranks, and loads from the tokens moved."""
    rank = tl.arange(0, BLOCK_R)
    used_so_far = tl.zeros((BLOCK_R,), tl.int32)
    after = load
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        inside = (rank < R)[:, None] & (expert < E)[None, :]
        cell = expert[None, :] * R + rank[:, None]
        piece = tl.load(moved + cell, mask=inside, other=0)
        stay = tl.load(tokens + expert, mask=expert < E, other=0) - tl.sum(piece, axis=0)
        is_home = (expert // M)[None, :] == rank[:, None]
        cell = expert[None, :] * WIDTH + rank[:, None]
        tl.store(allocation + cell, tl.where(is_home, stay[None, :], piece), mask=inside)
        gone = tl.where(is_home, tl.sum(piece, axis=0)[None, :], 0)
        after += tl.sum(piece, axis=1) - tl.sum(gone, axis=1)
        used = (piece > 0).to(tl.int32)
        slot = used_so_far[:, None] + tl.cumsum(used, axis=1) - 1
        names = tl.broadcast_to((first_expert + expert)[None, :].to(tl.int64), (BLOCK_R, BLOCK_E))
        tl.store(slot_expert + rank[:, None] * S + slot, names, mask=inside & (piece > 0))
        used_so_far += tl.sum(used, axis=1)
    tl.store(load_after + rank, after, mask=rank < R)
    tl.store(num_clones, tl.sum(used_so_far, axis=0).to(tl.int64))


@triton.jit
def _bound_at(total, R: tl.constexpr, scale):
    """``balance_bound`` for a tolerance given as ``balance_scale``."""
    unit = 1000000 * R
    relaxed = scale * (total // unit) + scale * (total % unit) // unit
    return tl.maximum(relaxed, (total + R - 1) // R)


@triton.jit
def _target(load, total, scale, trial, R: tl.constexpr, EXACT: tl.constexpr, PRICED: tl.constexpr,
            TRIALS: tl.constexpr):  # fmt: skip
    """The bound for which a program makes its plan."""
    bound = _bound_at(total, R, scale)
    top = tl.max(load, axis=0)
    if PRICED:
        last: tl.constexpr = (TRIALS // 2 if EXACT else TRIALS) - 1
        floor = _bound_at(total, R, 1000000)
        up = last - (trial // 2 if EXACT else trial)
        bound = floor + tl.maximum(top - floor, 0) * (up * up) // (last * last)
    elif EXACT:
        extra = tl.where(trial < TRIALS - 2, (scale - 1000000) >> (trial // 2), 0)
        bound = _bound_at(total, R, 1000000 + extra)
    else:
        bound += tl.maximum(top - bound, 0) * (trial * trial) // 500
    return bound


@triton.jit
def _load_of(tokens, R: tl.constexpr, M: tl.constexpr, BLOCK_R: tl.constexpr,
             BLOCK_M: tl.constexpr):  # fmt: skip
    """Tokens of each rank's experts."""
    rank = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_M)
    inside = (rank < R)[:, None] & (column < M)[None, :]
    return tl.sum(tl.load(tokens + rank[:, None] * M + column[None, :], mask=inside, other=0), 1)


@triton.jit
def _end(
    plan, tokens, load, bound, minimum, slot_expert, allocation, load_before, load_after,
    num_clones, domain,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    PRICED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What the planner gives, of the plan that was taken."""
    rank = tl.arange(0, BLOCK_R)
    if minimum > 0:
        _give_up_small_clones(plan, load, bound, minimum, R, M, PRICED, BLOCK_R, BLOCK_H)
    tl.store(load_before + domain * R + rank, load, mask=rank < R)
    _write_plan(
        plan, tokens, allocation + domain * (E * N * R + R), slot_expert + domain * R * S,
        load_after + domain * R, num_clones + domain, load, domain * E,
        R, E, S, M, N * R, BLOCK_R, BLOCK_E,
    )  # fmt: skip


@triton.jit
def _plan_kernel(
    counts, slot_expert, allocation, load_before, load_after, num_clones,
    fullest, tokens, moved, quota, left, scores, scale, minimum, node_size,
    price_inside, price_across,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    EXACT: tl.constexpr, PRICED: tl.constexpr, BY_NODE: tl.constexpr, TRIALS: tl.constexpr,
    BLOCK_ALL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """One plan of one domain; what it reaches and costs goes to ``scores [N, TRIALS, 2]``."""
    trial = tl.program_id(0)
    domain = tl.program_id(1)
    plan = domain * TRIALS + trial
    moved += plan * (E * R)
    tokens += domain * E  # programs of a domain write the same values there
    _sum_counts(counts + domain * E, tokens, N * R, N, E, BLOCK_ALL, BLOCK_E)
    rank = tl.arange(0, BLOCK_R)
    load = _load_of(tokens, R, M, BLOCK_R, BLOCK_M)
    total = tl.load(fullest) if N > 1 else tl.sum(load, axis=0)
    bound = _bound_at(total, R, scale)
    target = _target(load, total, scale, trial, R, EXACT, PRICED, TRIALS) if TRIALS > 1 else bound
    most = 0
    if EXACT:
        quota += plan * (R * R)
        over = tl.where(rank < R, load - target, 0)
        if TRIALS == 1 or trial % 2 == 0:
            over = _alias_table(quota, over, node_size, R, BY_NODE, BLOCK_R)
        else:
            over = _closest_fits(quota, over, node_size, R, BY_NODE, BLOCK_R)
        cost, most = _serve_quotas(
            moved, quota, tokens, node_size, price_inside, price_across, R, M, BY_NODE, PRICED,
            BLOCK_R, BLOCK_M, BLOCK_Q,
        )  # fmt: skip
    else:
        cost, over = _greedy(
            moved, left + plan * E, tokens, load, target, node_size, price_inside, price_across,
            R, S, M, BY_NODE, PRICED, BLOCK_R, BLOCK_M,
        )  # fmt: skip
    tl.debug_barrier()
    if TRIALS == 1:
        _end(
            moved, tokens, load, bound, minimum, slot_expert, allocation, load_before,
            load_after, num_clones, domain, R, N, E, S, M, PRICED, BLOCK_R, BLOCK_E, BLOCK_H,
        )  # fmt: skip
    else:
        highest = tl.max(tl.where(rank < R, over + target, 0), axis=0)
        if PRICED:
            cost += tl.maximum(highest, _bound_at(total, R, 1000000))
        tl.store(scores + 2 * plan, tl.where(most <= S, tl.maximum(highest, bound), _FAR))
        tl.store(scores + 2 * plan + 1, cost)


@triton.jit
def _best_kernel(
    slot_expert, allocation, load_before, load_after, num_clones,
    fullest, tokens, moved, scores, scale, minimum,
    R: tl.constexpr, N: tl.constexpr, E: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    PRICED: tl.constexpr, TRIALS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The best of a domain's plans: the lowest maximum above the bound, then the lowest cost."""
    domain = tl.program_id(0)
    trial = tl.arange(0, TRIALS)
    scores += 2 * (domain * TRIALS + trial)
    reached = tl.load(scores)
    cost = tl.where(reached == tl.min(reached, axis=0), tl.load(scores + 1), 2 * _FAR)
    _, best = _first_max(-cost, trial, 0)
    load = _load_of(tokens + domain * E, R, M, BLOCK_R, BLOCK_M)
    total = tl.load(fullest) if N > 1 else tl.sum(load, axis=0)
    _end(
        moved + (domain * TRIALS + best) * (E * R), tokens + domain * E, load,
        _bound_at(total, R, 1000000 if PRICED else scale), minimum,
        slot_expert, allocation, load_before, load_after, num_clones, domain,
        R, N, E, S, M, PRICED, BLOCK_R, BLOCK_E, BLOCK_H,
    )  # fmt: skip


def constants(
    ranks: int, experts: int, num_slots: int, relaxed: bool, by_node: bool,
    priced: bool = False, domains: int = 1,
) -> dict[str, int | bool]:  # fmt: skip
    """The kernels' compile-time arguments; one compilation a configuration.

    ``ranks`` and ``experts`` are those of a domain. ``relaxed``: with a tolerance; ``priced``: with
    a price; ``by_node``: nodes matter inside a domain.
    """
    per_rank = experts // ranks
    block_ranks = triton.next_power_of_2(ranks)
    is_exact = num_slots >= per_rank
    bounds = NUM_BOUNDS if priced else _RELAXED_BOUNDS
    # The greedy's experts lie in registers as its ranks do: each row in the lanes of a warp.
    columns = max(min(32, block_ranks), triton.next_power_of_2(per_rank))
    tile = 16384  # int64 cells of a two-dimensional tile: 128 KiB of the SM's shared memory
    block_all = triton.next_power_of_2(ranks * domains)
    return {
        "R": ranks,
        "N": domains,
        "E": experts,
        "S": num_slots,
        "M": per_rank,
        "EXACT": is_exact,
        "PRICED": priced,
        "BY_NODE": by_node,
        "TRIALS": (2 * bounds if priced or relaxed else 1) if is_exact else NUM_TARGETS,
        "BLOCK_ALL": block_all,
        "BLOCK_R": block_ranks,
        "BLOCK_M": triton.next_power_of_2(per_rank) if is_exact else columns,
        "BLOCK_E": min(256, tile // block_all),
        "BLOCK_H": triton.next_power_of_2(per_rank * ranks),
        "BLOCK_Q": min(block_ranks, tile // block_ranks),
    }


def plan_tensors(
    counts: Tensor, num_slots: int, tolerance: float, min_tokens_per_clone: int,
    ranks_per_node: int | None, within_node: bool = False, price: ClonePrice | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a :class:`~megatron_echo.planner.plan.ClonePlan`, planned by two launches.

    ``counts`` are on a CUDA device, or on the CPU in Triton's interpreter. The arguments are those
    of ``plan_clones``, checked by it, with R > 1 and ``num_slots`` above 0.
    """
    all_ranks, all_experts = counts.shape
    ranks, domains = domain(all_ranks, ranks_per_node, within_node)
    experts = all_experts // domains
    is_relaxed = balance_scale(tolerance) > balance_scale(0.0)
    by_node = ranks_per_node is not None and domains == 1
    fixed = constants(ranks, experts, num_slots, is_relaxed, by_node, price is not None, domains)
    trials = fixed["TRIALS"]
    counts = counts.contiguous()
    empty = counts.new_zeros if domains > 1 else counts.new_empty  # no program writes all of it
    plan = {
        "slot_expert": counts.new_full((all_ranks, num_slots), -1),
        "allocation": empty(all_experts, all_ranks),
        "load_before": counts.new_empty(all_ranks),
        "load_after": counts.new_empty(all_ranks),
        "num_clones": counts.new_empty(domains),
    }
    clones = fullest = plan["num_clones"]
    if domains > 1:
        fullest = counts.view(all_ranks, domains, experts).sum((0, 2)).amax()
    moved = counts.new_zeros(domains, trials, experts, ranks)
    shared = (*plan.values(), fullest, counts.new_empty(all_experts), moved)
    scores = counts.new_empty(domains, trials, 2)
    rules = balance_scale(tolerance), min_tokens_per_clone
    rows = (price.inside, price.across) if price is not None else (0, 0)
    with torch.cuda.device_of(counts):
        _plan_kernel[(trials, domains)](
            counts, *shared,
            counts.new_zeros(domains, trials * fixed["EXACT"], ranks, ranks),
            counts.new_empty(domains, trials * (not fixed["EXACT"]), experts),
            scores, *rules, ranks_per_node or ranks, *rows, **fixed, num_warps=8,
        )  # fmt: skip
        if trials > 1:
            others = ("BY_NODE", "EXACT", "BLOCK_ALL", "BLOCK_Q")
            fixed = {name: value for name, value in fixed.items() if name not in others}
            _best_kernel[(domains,)](*shared, scores, *rules, **fixed, num_warps=8)
    return {**plan, "num_clones": clones.sum() if domains > 1 else clones.view(())}
