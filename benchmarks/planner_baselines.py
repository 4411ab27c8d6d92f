"""Published planning ideas, in our own words, for the planner's benchmark.

Each takes the tokens of every expert ``[E]``, the number of ranks and of slots, and returns the
tokens moved to clones ``[E, R]``. Expert ``e`` lives on rank ``e // (E // R)``. NumPy, written for
clarity; the papers' own code is not used.
"""

import numpy as np


def _loads(tokens: np.ndarray, ranks: int) -> np.ndarray:
    return tokens.reshape(ranks, -1).sum(1)


def _spill(tokens: np.ndarray, ranks: int, budget: int) -> np.ndarray:
    """Each expert's tokens over its rank's budget, the budget filled with small experts first."""
    by_rank = tokens.reshape(ranks, -1)
    order = np.argsort(by_rank, axis=1, kind="stable")
    over = np.maximum(np.take_along_axis(by_rank, order, 1).cumsum(1) - budget, 0)
    spill = np.zeros_like(by_rank)
    np.put_along_axis(spill, order, np.diff(over, axis=1, prepend=0), 1)
    return spill.ravel()


def interval_overlap(tokens: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Spills and holes laid on two lines, largest first, matched where they overlap (ECHO).

    A rank keeps the ``slots`` largest pieces that fall to it; the others stay at home.
    """
    budget = tokens.sum() // ranks
    spill = _spill(tokens, ranks, budget)
    hole = np.maximum(budget - _loads(tokens, ranks), 0)
    experts, receivers = np.argsort(-spill, kind="stable"), np.argsort(-hole, kind="stable")
    ends, hole_ends = spill[experts].cumsum(), hole[receivers].cumsum()
    low = np.maximum((ends - spill[experts])[:, None], (hole_ends - hole[receivers])[None])
    pieces = np.maximum(np.minimum(ends[:, None], hole_ends[None]) - low, 0)
    rank_of_piece = np.argsort(np.argsort(-pieces, axis=0, kind="stable"), axis=0)
    moved = np.zeros((len(tokens), ranks), dtype=np.int64)
    moved[np.ix_(experts, receivers)] = np.where(rank_of_piece < slots, pieces, 0)
    return moved


def bucketed_bin_packing(tokens: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """One expert to a rank, best fit through eight size classes served first in, first out (ECHO).

    Ranks are visited once each, the emptiest first; ``slots`` is ignored, one is used.
    """
    budget = int(tokens.sum() // ranks)
    spill = _spill(tokens, ranks, budget)
    step = max(budget // 7, 1)
    queues: list[list[tuple[int, int]]] = [[] for _ in range(8)]

    def queue_of(size: int) -> int:
        return 0 if size >= budget else min((budget - size) // step + 1, 7)

    for expert in np.argsort(-spill, kind="stable"):
        if spill[expert] > 0:
            queues[queue_of(int(spill[expert]))].append((int(expert), int(spill[expert])))
    moved = np.zeros((len(tokens), ranks), dtype=np.int64)
    hole = np.maximum(budget - _loads(tokens, ranks), 0)
    for rank in np.argsort(-hole, kind="stable"):
        queue = next((q for q in queues if q), None)
        if queue is None or hole[rank] == 0:
            break
        expert, size = queue.pop(0)
        placed = min(size, int(hole[rank]))
        moved[expert, rank] = placed
        if size > placed:
            queues[queue_of(size - placed)].append((expert, size - placed))
    return moved


def alias_table(tokens: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """The emptiest rank takes its whole deficit from the fullest, which may fall below (MoonEP).

    Exact with ``E / R`` slots; with fewer each rank keeps its largest pieces.
    """
    per_rank = len(tokens) // ranks
    excess = _loads(tokens, ranks) + (-tokens.sum() // ranks)
    is_open = np.ones(ranks, dtype=bool)
    quota = np.zeros((ranks, ranks), dtype=np.int64)
    for _ in range(ranks - 1):
        donor = int(excess.argmax())
        receiver = int(np.where(is_open, excess, np.iinfo(np.int64).max).argmin())
        given = -excess[receiver]
        if excess[donor] <= 0 or given <= 0:
            break
        quota[donor, receiver] = given
        excess[donor] -= given
        excess[receiver] = 0
        is_open[receiver] = False
    moved = np.zeros((len(tokens), ranks), dtype=np.int64)
    for home in range(ranks):
        left = tokens[home * per_rank : (home + 1) * per_rank].copy()
        while quota[home].max() > 0:
            receiver, expert = int(quota[home].argmax()), int(left.argmax())
            piece = min(quota[home, receiver], left[expert])
            moved[home * per_rank + expert, receiver] += piece
            quota[home, receiver] -= piece
            left[expert] -= piece
    keep = np.argsort(np.argsort(-moved, axis=0, kind="stable"), axis=0) < slots
    return np.where(keep, moved, 0)


def threshold_quota(tokens: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """The lowest threshold, by bisection, at which a greedy placement succeeds (UltraEP)."""
    loads = _loads(tokens, ranks)
    low, high = -(-int(tokens.sum()) // ranks), int(loads.max())
    best = np.zeros((len(tokens), ranks), dtype=np.int64)
    while low < high:
        middle = (low + high) // 2
        placed = _place_under(tokens, ranks, slots, middle)
        if placed is None:
            low = middle + 1
        else:
            best, high = placed, middle
    placed = _place_under(tokens, ranks, slots, high)
    return best if placed is None else placed


def _place_under(tokens: np.ndarray, ranks: int, slots: int, threshold: int) -> np.ndarray | None:
    """Spill everything over a threshold, largest expert first, to the emptiest ranks."""
    spill = _spill(tokens, ranks, threshold)
    room = np.maximum(threshold - _loads(tokens, ranks), 0)
    free = np.full(ranks, slots)
    moved = np.zeros((len(tokens), ranks), dtype=np.int64)
    for expert in np.argsort(-spill, kind="stable"):
        left = int(spill[expert])
        while left > 0:
            candidates = np.where((free > 0) & (moved[expert] == 0), room, 0)
            rank = int(candidates.argmax())
            piece = min(left, int(candidates[rank]))
            if piece == 0:
                return None
            moved[expert, rank] = piece
            room[rank] -= piece
            free[rank] -= 1
            left -= piece
    return moved


def least_loaded_spill(tokens: np.ndarray, ranks: int, slots: int) -> np.ndarray:
    """Experts in falling order of size spill what their rank cannot hold to the emptiest (LLEP).

    Chunks below 1/64 of the mean load stay at home, as small products are not worth a transfer.
    """
    capacity = -(-int(tokens.sum()) // ranks)
    smallest = capacity // 64
    home = np.arange(len(tokens)) // (len(tokens) // ranks)
    loads = _loads(tokens, ranks).copy()
    free = np.full(ranks, slots)
    moved = np.zeros((len(tokens), ranks), dtype=np.int64)
    for expert in np.argsort(-tokens, kind="stable"):
        left = min(int(loads[home[expert]]) - capacity, int(tokens[expert]))
        while left > smallest:
            blocked = (free == 0) | (moved[expert] > 0)
            rank = int(np.where(blocked, np.iinfo(np.int64).max, loads).argmin())
            piece = min(left, capacity - int(loads[rank])) if not blocked[rank] else 0
            if piece <= smallest:
                break
            moved[expert, rank] = piece
            loads[rank] += piece
            loads[home[expert]] -= piece
            free[rank] -= 1
            left -= piece
    return moved
