"""What the planner promises, what it can take, and the numbers that its kernel shares with it."""

import torch
from torch import Tensor

MAX_RANKS = 256
MAX_EXPERTS = 1024
MAX_TOLERANCE = 100
INTRA_NODE_COST, INTER_NODE_COST = 1, 3
"""What a clone inside the node and one across nodes cost, where plans are chosen by cost."""

INTRA_NODE_WEIGHT, INTER_NODE_WEIGHT = 5, 4
"""What a receiver inside the node is worth to a node that must send some of its excess out. With
more of the first, weights travel less between nodes and tokens more."""

NUM_TARGETS = 16
"""Targets of the greedy: ``i * i / 5`` % of the way from the bound to the load before planning, for
``i`` from 0. Most near the bound; up to 45 %, where few slots serve a deep hole."""

NUM_BOUNDS = 8
"""Bounds at which the exact planner looks for the shortest time, the first of them the load before
planning. Twice as many bring 0.4 % less, half as many cost 2 % more."""

FAR = 1 << 51
"""Above any weighted hole: a hole is at most the bound, which is below 2^48 with counts of 2^31."""

MILLION = 10**6


def balance_scale(tolerance: float) -> int:
    """``1 + tolerance`` in millionths: the only place where the tolerance is rounded."""
    return MILLION + round(MILLION * tolerance)


def balance_bound[Number: (int, Tensor)](
    total: Number, num_ranks: int, tolerance: float = 0.0
) -> Number:
    """The load that no rank may exceed: ``ceil(mean)``, or ``(1 + tolerance) * mean`` if higher.

    The one place where the bound is computed, in integers: the tolerance is rounded to millionths
    once, ``max(ceil(total / R), floor((10^6 + round(10^6 tolerance)) total / (10^6 R)))``. It also
    sizes the receive buffer, from the token budget ``T * K`` of a rank times R. ``total`` are the
    tokens over all ranks, up to 2^49.
    """
    return bound_at(total, num_ranks, balance_scale(tolerance))


def bound_at[Number: (int, Tensor)](total: Number, num_ranks: int, scale: int) -> Number:
    """:func:`balance_bound` for a tolerance given as :func:`balance_scale`."""
    unit = MILLION * num_ranks
    whole, rest = total // unit, total % unit  # the product scale * total may pass 2^63
    relaxed = scale * whole + scale * rest // unit
    exact = -(-total // num_ranks)
    if isinstance(total, Tensor):
        return torch.maximum(relaxed, exact)
    return max(relaxed, exact)


def domain(ranks: int, ranks_per_node: int | None, within_node: bool) -> tuple[int, int]:
    """How many consecutive ranks clones may be made among, and how often there are as many."""
    size = ranks_per_node if within_node and ranks_per_node is not None else ranks
    return size, ranks // size
