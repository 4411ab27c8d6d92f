"""The steps of ``steps.py`` in Triton, bit for bit: one program makes one plan of a domain.

It holds the ranks in registers: the reference's loops, but leaving each one as soon as nothing
moves. Tokens and plans pass through global scratch where a step needs them in another layout;
``tl.debug_barrier`` orders those accesses within the program.

Arithmetic is int64 throughout: tokens of an expert may pass 2^31.
"""

import triton
import triton.language as tl

from megatron_echo.planner.bound import (
    FAR,
    INTER_NODE_COST,
    INTER_NODE_WEIGHT,
    INTRA_NODE_COST,
    INTRA_NODE_WEIGHT,
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
    """``quota[home, receiver]`` with one home rank for each receiver; returns what is left over."""
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
            worth = need * tl.where(inside, _INTRA, _INTER)
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
    return excess


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
            weighted = hole * tl.where(inside, _INTRA, _INTER)
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
    return excess - hole


@triton.jit
def _serve_quotas(
    moved, quota, tokens, node_size, price_inside, price_across, R: tl.constexpr, M: tl.constexpr,
    BY_NODE: tl.constexpr, PRICED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Deal each home rank's quotas over its experts; returns cost, and most clones on one rank."""
    rank = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_M)
    received = tl.zeros((BLOCK_R,), tl.int32)
    received_near = tl.zeros((BLOCK_R,), tl.int32)
    sent_near = tl.zeros((BLOCK_Q,), tl.int32)  # of the rank that sends most so far
    sent_far = tl.zeros((BLOCK_Q,), tl.int32)
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
        if PRICED:
            near = clones
            if BY_NODE:
                near = tl.where(home[:, None] // node_size == rank[None, :] // node_size, clones, 0)
            received_near += tl.sum(near, axis=0)
            sent_near = tl.maximum(sent_near, tl.sum(near, axis=1))
            sent_far = tl.maximum(sent_far, tl.sum(clones - near, axis=1))
        else:
            cost += tl.sum(clones * _cost(home[:, None], rank[None, :], node_size, BY_NODE), axis=0)
    tl.debug_barrier()
    if PRICED:
        inside = _busiest(sent_near, received_near) * price_inside
        across = _busiest(sent_far, received - received_near) * price_across
        total = tl.maximum(inside, across)  # links inside and across work together
    else:
        total = tl.sum(cost, axis=0).to(tl.int64)
    return total, tl.max(received, axis=0)


@triton.jit
def _busiest(sent, received):
    """The most clones that a rank sends or receives."""
    return tl.maximum(tl.max(sent, axis=0), tl.max(received, axis=0)).to(tl.int64)


@triton.jit
def _greedy(
    moved, left, tokens, load, target, node_size, price_inside, price_across,
    R: tl.constexpr, S: tl.constexpr, M: tl.constexpr, BY_NODE: tl.constexpr,
    PRICED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The greedy for one target; returns cost, and what each rank has above it."""
    rank = tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_M)
    excess = tl.where(rank < R, load - target, 0)
    free = tl.where(rank < R, S, 0)
    sent_near = tl.zeros((BLOCK_R,), tl.int32)
    sent_far = tl.zeros((BLOCK_R,), tl.int32)
    received_near = tl.zeros((BLOCK_R,), tl.int32)
    expert_at = rank[:, None] * M + column[None, :]
    inside = (rank < R)[:, None] & (column < M)[None, :]
    share = tl.load(tokens + expert_at, mask=inside, other=0)
    largest = tl.max(share, axis=1)
    tl.store(left + expert_at, share, mask=inside)
    tl.debug_barrier()
    cost = tl.full((), 0, tl.int32)
    step = 0
    while step < R * S:
        hole = tl.maximum(tl.where(free > 0, -excess, 0), 0)
        need, receiver = _first_max(hole, rank, 0)
        fit, part = _FAR + excess, largest
        if BY_NODE:
            near = rank // node_size == receiver // node_size
            fit += tl.where(near, _FAR, 0)
            part = largest * tl.where(near, _INTRA, _INTER)
        worth = tl.where(largest >= need, fit, part)
        worth = tl.where((excess > 0) & (need > 0), worth, 0)
        best, donor = _first_max(worth, rank, 0)
        row = left + donor * M
        rest = tl.load(row + column, mask=(column < M) & (donor < R), other=0)
        held, expert = _first_max(rest, column, 0)
        piece = tl.where(best > 0, tl.minimum(need, held), 0)
        given = piece > 0
        rest -= tl.where(column == expert, piece, 0)
        tl.debug_barrier()  # every warp has read its copy of this step's cells
        tl.store(moved + (donor * M + expert) * R + receiver, piece, mask=given)
        tl.store(row + expert, held - piece, mask=given)
        tl.debug_barrier()
        if PRICED:
            is_near = (donor // node_size == receiver // node_size) | (not BY_NODE)
            sent_near += tl.where((rank == donor) & given & is_near, 1, 0)
            sent_far += tl.where((rank == donor) & given & (is_near == 0), 1, 0)
            received_near += tl.where((rank == receiver) & given & is_near, 1, 0)
        else:
            cost += tl.where(given, _cost(donor, receiver, node_size, BY_NODE), 0)
        largest = tl.where(rank == donor, tl.max(rest, axis=0), largest)
        excess += tl.where(rank == receiver, piece, 0) - tl.where(rank == donor, piece, 0)
        free -= tl.where((rank == receiver) & given, 1, 0)
        step = tl.where(given, step + 1, R * S)
    if PRICED:
        received_far = tl.where(rank < R, S - free - received_near, 0)
        inside_time = _busiest(sent_near, received_near) * price_inside
        across_time = _busiest(sent_far, received_far) * price_across
        total = tl.maximum(inside_time, across_time)
    else:
        total = cost.to(tl.int64)
    return total, excess
