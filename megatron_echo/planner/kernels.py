"""The planner in one Triton launch, bit-identical to the torch reference in ``balance.py``.

One program holds the ranks in registers: the reference's loops, step for step, but leaving each
one as soon as nothing moves. Tokens and plans pass through global scratch where a step needs them
in another layout; ``tl.debug_barrier`` orders those accesses within the program.

Arithmetic is int64 throughout: tokens of an expert may pass 2^31.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_echo.planner.bound import (
    FAR,
    INTER_NODE_COST,
    INTER_NODE_WEIGHT,
    INTRA_NODE_COST,
    INTRA_NODE_WEIGHT,
    NUM_TARGETS,
    balance_scale,
)

_BITS = tl.constexpr(10)
_MASK = tl.constexpr((1 << 10) - 1)
_FAR = tl.constexpr(FAR)
_INTRA = tl.constexpr(INTRA_NODE_WEIGHT)
_INTER = tl.constexpr(INTER_NODE_WEIGHT)
_INTRA_COST = tl.constexpr(INTRA_NODE_COST)
_INTER_COST = tl.constexpr(INTER_NODE_COST)


@triton.jit
def _first_max(values, index, axis: tl.constexpr):
    """The largest value along an axis and the first index that has it."""
    top = tl.max((values << _BITS) + (index ^ _MASK), axis=axis)  # x ^ mask is mask - x
    return top >> _BITS, (top & _MASK) ^ _MASK


@triton.jit
def _pick(values, index, wanted, axis: tl.constexpr):
    """``values`` at the index ``wanted`` along an axis."""
    return tl.sum(tl.where(index == wanted, values, 0), axis=axis)


@triton.jit
def _sum_counts(
    counts, tokens, R: tl.constexpr, E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr
):
    """``tokens[e] = counts[:, e].sum()``."""
    rank = tl.arange(0, BLOCK_R)[:, None]
    for start in range(0, E, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        inside = (rank < R) & (expert < E)[None, :]
        tile = tl.load(counts + rank * E + expert[None, :], mask=inside, other=0)
        tl.store(tokens + expert, tl.sum(tile, axis=0), mask=expert < E)
    tl.debug_barrier()


@triton.jit
def _weight(rank, donor, node_size, BY_NODE: tl.constexpr):
    """What each receiver is worth to a donor: more inside its node."""
    inside = rank // node_size == donor // node_size
    return tl.where(inside, _INTRA, _INTER) if BY_NODE else tl.where(inside, 1, 1)


@triton.jit
def _cost(home, receiver, node_size, BY_NODE: tl.constexpr):
    """The cost of a clone: more across nodes."""
    inside = home // node_size == receiver // node_size
    return tl.where(inside | (not BY_NODE), _INTRA_COST, _INTER_COST)


@triton.jit
def _first_to_serve(excess, rank, node_size, BLOCK_R: tl.constexpr):
    """``FAR`` for ranks whose node can hold all of its load, else 0."""
    other = tl.arange(0, BLOCK_R)[:, None]
    same = other // node_size == rank[None, :] // node_size
    of_node = tl.sum(tl.where(same, tl.expand_dims(excess, 1), 0), axis=0)
    return tl.where(of_node <= 0, _FAR, 0)


@triton.jit
def _alias_table(
    quota, excess, node_size, R: tl.constexpr, BY_NODE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """``quota[home, receiver]`` with one home rank for each receiver."""
    rank = tl.arange(0, BLOCK_R)
    is_open = rank < R
    first = excess * 0
    if BY_NODE:
        first = _first_to_serve(excess, rank, node_size, BLOCK_R)
    step = 0
    while step < R - 1:
        donor_excess, donor = _first_max(excess + tl.where(excess > 0, first, 0), rank, 0)
        need = tl.maximum(tl.where(is_open, -excess, 0), 0)
        if BY_NODE:
            inside = rank // node_size == donor // node_size
            alone = _pick(first, rank, donor, 0) > 0
            worth = need * _weight(rank, donor, node_size, BY_NODE)
            worth = tl.where(alone, tl.where(inside & (need > 0), _FAR - need, 0), worth)
            _, receiver = _first_max(worth, rank, 0)
            most = _pick(need, rank, receiver, 0)
        else:
            most, receiver = _first_max(need, rank, 0)
        given = tl.where(donor_excess > 0, most, 0)
        tl.store(quota + donor * R + receiver, given, mask=given > 0)
        is_open = is_open & ((rank != receiver) | (given == 0))
        excess += tl.where(rank == receiver, given, 0) - tl.where(rank == donor, given, 0)
        step = tl.where(given > 0, step + 1, R)
    tl.debug_barrier()


@triton.jit
def _closest_fits(
    quota, excess, node_size, R: tl.constexpr, BY_NODE: tl.constexpr, BLOCK_R: tl.constexpr
):
    """``quota[home, receiver]`` for few clones: the smallest donors first, each where it fits."""
    rank = tl.arange(0, BLOCK_R)
    first = excess * 0
    if BY_NODE:
        first = _first_to_serve(excess, rank, node_size, BLOCK_R)
    hole = tl.maximum(-excess, 0)
    excess = tl.maximum(excess, 0)
    step = 0
    while step < R:
        urgency = tl.where(excess > 0, first - excess, -_FAR)
        most_urgent, donor = _first_max(urgency, rank, 0)
        if BY_NODE:
            wanted = _pick(excess, rank, donor, 0)
            inside = rank // node_size == donor // node_size
            fit = tl.where(inside, 2 * _FAR, _FAR) - hole
            weighted = hole * _weight(rank, donor, node_size, BY_NODE)
            score = tl.where(hole > 0, tl.where(hole >= wanted, fit, weighted), 0)
            alone = _pick(first, rank, donor, 0) > 0
            _, receiver = _first_max(tl.where(alone & (inside == 0), 0, score), rank, 0)
            most = _pick(hole, rank, receiver, 0)
        else:
            wanted = tl.where(most_urgent > -_FAR, -most_urgent, 0)
            score = tl.where(hole >= wanted, _FAR - hole, hole)  # one that fits is above all others
            most, receiver = _first_max(tl.where(hole > 0, score, 0), rank, 0)
        given = tl.minimum(wanted, most)
        tl.store(quota + donor * R + receiver, given, mask=given > 0)
        excess -= tl.where(rank == donor, given, 0)
        hole -= tl.where(rank == receiver, given, 0)
        step = tl.where(given > 0, step + 1, R)
    tl.debug_barrier()


@triton.jit
def _serve_quotas(
    moved, quota, tokens, node_size, R: tl.constexpr, M: tl.constexpr, BY_NODE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Deal each home rank's quotas over its experts; returns cost, and most clones on one rank."""
    rank = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_M)
    received = tl.zeros((BLOCK_R,), tl.int32)
    cost = tl.zeros((BLOCK_R,), tl.int32)
    for first in range(0, R, BLOCK_Q):
        home = first + tl.arange(0, BLOCK_Q)
        is_home = (home < R)[:, None]
        held = tl.load(
            tokens + home[:, None] * M + column[None, :],
            mask=is_home & (column < M)[None, :],
            other=0,
        )
        open_quota = tl.load(
            quota + home[:, None] * R + rank[None, :], mask=is_home & (rank < R)[None, :], other=0
        )
        clones = tl.zeros((BLOCK_Q, BLOCK_R), tl.int32)
        busy = tl.max(tl.max(open_quota, axis=1), axis=0) > 0
        while busy:
            wanted, receiver = _first_max(open_quota, rank[None, :], 1)
            most, expert = _first_max(held, column[None, :], 1)
            piece = tl.minimum(wanted, most)
            tl.store(moved + (home * M + expert) * R + receiver, piece, mask=piece > 0)
            here = (rank[None, :] == receiver[:, None]) & (piece > 0)[:, None]
            clones += here.to(tl.int32)
            open_quota -= tl.where(here, piece[:, None], 0)
            held -= tl.where(column[None, :] == expert[:, None], piece[:, None], 0)
            busy = tl.max(piece, axis=0) > 0
        received += tl.sum(clones, axis=0)
        cost += tl.sum(clones * _cost(home[:, None], rank[None, :], node_size, BY_NODE), axis=0)
    tl.debug_barrier()
    return tl.sum(cost, axis=0), tl.max(received, axis=0)


@triton.jit
def _greedy(
    moved, left, trial, tokens, load, bound, node_size, R: tl.constexpr, E: tl.constexpr,
    S: tl.constexpr, M: tl.constexpr, BY_NODE: tl.constexpr, TARGETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """The greedy for all targets at once, then the best of their plans into ``moved``."""
    rank = tl.arange(0, BLOCK_R)
    variant = tl.arange(0, TARGETS)
    column = tl.arange(0, BLOCK_M)
    is_rank = (rank < R)[None, :]
    gap = tl.maximum(tl.max(load, axis=0) - bound, 0)
    target = bound + gap * (variant * variant) // 500
    excess = tl.where(is_rank, load[None, :] - target[:, None], 0)
    free = tl.where(is_rank, S, tl.zeros((TARGETS, BLOCK_R), tl.int32))
    cost = tl.zeros((TARGETS,), tl.int32)
    expert_at = rank[:, None] * M + column[None, :]
    inside = (rank < R)[:, None] & (column < M)[None, :]
    share = tl.load(tokens + expert_at, mask=inside, other=0)
    largest = tl.broadcast_to(tl.max(share, axis=1)[None, :], (TARGETS, BLOCK_R))
    for v in range(TARGETS):
        tl.store(left + v * E + expert_at, share, mask=inside)
    tl.debug_barrier()
    step = 0
    while step < R * S:
        hole = tl.maximum(tl.where(free > 0, -excess, 0), 0)
        need, receiver = _first_max(hole, rank[None, :], 1)
        fit, weight = _FAR + excess, _weight(rank[None, :], receiver[:, None], node_size, BY_NODE)
        if BY_NODE:
            fit += tl.where(weight == _INTRA, _FAR, 0)
        worth = tl.where(largest >= need[:, None], fit, largest * weight)
        worth = tl.where((excess > 0) & (need > 0)[:, None], worth, 0)
        best, donor = _first_max(worth, rank[None, :], 1)
        cell = variant * E + donor * M
        row = left + cell[:, None] + column[None, :]
        rest = tl.load(row, mask=(donor < R)[:, None] & (column < M)[None, :], other=0)
        held, expert = _first_max(rest, column[None, :], 1)
        piece = tl.where(best > 0, tl.minimum(need, held), 0)
        given = piece > 0
        rest -= tl.where(column[None, :] == expert[:, None], piece[:, None], 0)
        tl.debug_barrier()  # every warp has read its copy of this step's cells
        tl.store(trial + (variant * R + receiver) * E + donor * M + expert, piece, mask=given)
        tl.store(left + cell + expert, held - piece, mask=given)
        tl.debug_barrier()
        cost += tl.where(given, _cost(donor, receiver, node_size, BY_NODE), 0)
        is_receiver = rank[None, :] == receiver[:, None]
        is_donor = rank[None, :] == donor[:, None]
        largest = tl.where(is_donor, tl.max(rest, axis=1)[:, None], largest)
        excess += tl.where(is_receiver, piece[:, None], 0) - tl.where(is_donor, piece[:, None], 0)
        free -= tl.where(is_receiver & given[:, None], 1, 0)
        step = tl.where(tl.max(piece, axis=0) > 0, step + 1, R * S)
    highest = tl.max(tl.where(is_rank, excess + target[:, None], 0), axis=1)
    reached = tl.maximum(highest, bound)
    ahead = reached == tl.min(reached, axis=0)
    cost = tl.where(ahead, cost, _INTER_COST * R * S + 1).to(tl.int64)
    _, chosen = _first_max(-cost, variant, 0)
    cells = tl.arange(0, BLOCK_X)
    for start in range(0, R * E, BLOCK_X):
        at = start + cells
        value = tl.load(trial + chosen * R * E + at, mask=at < R * E, other=0)
        tl.store(moved + (at % E) * R + at // E, value, mask=at < R * E)


@triton.jit
def _give_up_small_clones(
    moved,
    load,
    bound,
    minimum,
    R: tl.constexpr,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
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
    moved, tokens, allocation, slot_expert, load_after, num_clones, load,
    R: tl.constexpr, E: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Slots, allocation and loads from the tokens moved."""
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
        tl.store(allocation + cell, tl.where(is_home, stay[None, :], piece), mask=inside)
        gone = tl.where(is_home, tl.sum(piece, axis=0)[None, :], 0)
        after += tl.sum(piece, axis=1) - tl.sum(gone, axis=1)
        used = (piece > 0).to(tl.int32)
        slot = used_so_far[:, None] + tl.cumsum(used, axis=1) - 1
        names = tl.broadcast_to(expert[None, :].to(tl.int64), (BLOCK_R, BLOCK_E))
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
def _plan_kernel(
    counts, slot_expert, allocation, load_before, load_after, num_clones,
    tokens, moved, quota, left, trial, scale, minimum, node_size,
    R: tl.constexpr, E: tl.constexpr, S: tl.constexpr, M: tl.constexpr,
    EXACT: tl.constexpr, RELAXED: tl.constexpr, BY_NODE: tl.constexpr, TARGETS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    _sum_counts(counts, tokens, R, E, BLOCK_R, BLOCK_E)
    rank = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_M)
    inside = (rank < R)[:, None] & (column < M)[None, :]
    share = tl.load(tokens + rank[:, None] * M + column[None, :], mask=inside, other=0)
    load = tl.sum(share, axis=1)
    tl.store(load_before + rank, load, mask=rank < R)
    total = tl.sum(load, axis=0)
    bound = _bound_at(total, R, scale)
    if EXACT and not RELAXED:
        excess = tl.where(rank < R, load - bound, 0)
        _alias_table(quota, excess, node_size, R, BY_NODE, BLOCK_R)
        _serve_quotas(moved, quota, tokens, node_size, R, M, BY_NODE, BLOCK_R, BLOCK_M, BLOCK_Q)
    elif EXACT:
        best, lowest = 0, _INTER_COST * E * R + 1
        for part in range(4):
            extra = tl.where(part < 3, (scale - 1000000) >> part, 0)
            excess = tl.where(rank < R, load - _bound_at(total, R, 1000000 + extra), 0)
            for kind in tl.static_range(2):
                chosen = 2 * part + kind
                here = quota + chosen * R * R
                if kind == 0:
                    _alias_table(here, excess, node_size, R, BY_NODE, BLOCK_R)
                else:
                    _closest_fits(here, excess, node_size, R, BY_NODE, BLOCK_R)
                cost, most = _serve_quotas(
                    trial + chosen * R * E, here, tokens, node_size,
                    R, M, BY_NODE, BLOCK_R, BLOCK_M, BLOCK_Q,
                )  # fmt: skip
                better = (most <= S) & (cost < lowest)
                best = tl.where(better, chosen, best)
                lowest = tl.where(better, cost, lowest)
        cell = tl.arange(0, BLOCK_E)
        for start in range(0, R * E, BLOCK_E):
            inside_plan = start + cell < R * E
            value = tl.load(trial + best * R * E + start + cell, mask=inside_plan, other=0)
            tl.store(moved + start + cell, value, mask=inside_plan)
    else:
        _greedy(
            moved, left, trial, tokens, load, bound, node_size, R, E, S,
            M, BY_NODE, TARGETS, BLOCK_R, BLOCK_M, BLOCK_E,
        )  # fmt: skip
    tl.debug_barrier()
    if minimum > 0:
        _give_up_small_clones(moved, load, bound, minimum, R, M, BLOCK_R, BLOCK_H)
    _write_plan(
        moved, tokens, allocation, slot_expert, load_after, num_clones, load, R, E, S,
        M, BLOCK_R, BLOCK_E,
    )  # fmt: skip


def constants(
    ranks: int, experts: int, num_slots: int, relaxed: bool, by_node: bool
) -> dict[str, int | bool]:
    """The kernel's compile-time arguments; one compilation a configuration."""
    per_rank = experts // ranks
    block_ranks = triton.next_power_of_2(ranks)
    is_exact = num_slots >= per_rank
    # The greedy's experts lie in registers as its ranks do: each row in the lanes of a warp.
    columns = max(min(32, block_ranks), triton.next_power_of_2(per_rank))
    tile = 16384  # int64 cells of a two-dimensional tile: 128 KiB of the SM's shared memory
    return {
        "R": ranks,
        "E": experts,
        "S": num_slots,
        "M": per_rank,
        "EXACT": is_exact,
        "RELAXED": relaxed,
        "BY_NODE": by_node,
        "TARGETS": NUM_TARGETS,
        "BLOCK_R": block_ranks,
        "BLOCK_M": triton.next_power_of_2(per_rank) if is_exact else columns,
        "BLOCK_E": min(256, tile // block_ranks),
        "BLOCK_H": triton.next_power_of_2(per_rank * ranks),
        "BLOCK_Q": min(block_ranks, tile // block_ranks),
    }


def plan_tensors(
    counts: Tensor,
    num_slots: int,
    tolerance: float,
    min_tokens_per_clone: int,
    ranks_per_node: int | None,
) -> dict[str, Tensor]:
    """The tensors of a :class:`~megatron_echo.planner.plan.ClonePlan`, planned by one launch.

    Args:
        counts: int64 ``[R, E]`` on a CUDA device (or on the CPU in Triton's interpreter), with
            R > 1; the other arguments are those of ``plan_clones``, checked by it, with
            ``num_slots`` above 0.

    Returns:
        ``slot_expert``, ``allocation``, ``load_before``, ``load_after``, ``num_clones``.
    """
    ranks, experts = counts.shape
    is_exact = num_slots >= experts // ranks
    is_relaxed = balance_scale(tolerance) > balance_scale(0.0)
    quotas = (8 if is_relaxed else 1) if is_exact else 0
    trials = (8 if is_relaxed else 0) if is_exact else NUM_TARGETS
    plan = {
        "slot_expert": counts.new_full((ranks, num_slots), -1),
        "allocation": counts.new_empty(experts, ranks),
        "load_before": counts.new_empty(ranks),
        "load_after": counts.new_empty(ranks),
        "num_clones": counts.new_empty(()),
    }
    with torch.cuda.device_of(counts):
        _plan_kernel[(1,)](
            counts.contiguous(),
            *plan.values(),
            counts.new_empty(experts),
            counts.new_zeros(experts, ranks),
            counts.new_zeros(quotas, ranks, ranks),
            counts.new_empty(trials, experts),
            counts.new_zeros(trials, ranks, experts),
            balance_scale(tolerance),
            min_tokens_per_clone,
            ranks_per_node or ranks,
            **constants(ranks, experts, num_slots, is_relaxed, ranks_per_node is not None),
            num_warps=8,
        )
    return plan
