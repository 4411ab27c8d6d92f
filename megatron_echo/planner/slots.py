"""How many clone slots a rank gets where nobody said."""

SLOTS = {
    4: {8: 3, 16: 4, 32: 8, 64: 12, 128: 24},
    8: {8: 2, 16: 3, 32: 6, 64: 12},
    16: {8: 2, 16: 3, 32: 6},
    32: {4: 1, 8: 2, 16: 3},
    64: {2: 1, 4: 1, 8: 2},
}
"""Slots a rank, by ranks R and by experts on a rank E / R, made by ``benchmarks/planner_slots.py``:
with them the highest load stays within 1.03 of the mean (99 % of all: 1.02) on its loads."""

FEW_RANKS, LEAST_OF_FEW, LEAST = 32, 4, 2
"""Below so many ranks at least four slots, from there on two: room that costs little."""


def auto_slots(ranks: int, experts: int) -> int:
    """Clone slots S of a rank, for R > 1 ranks and E experts.

    The table's entry for the next smaller R and the next larger m, which need no fewer slots; m
    where it has none or more. With m slots balance is promised for every routing
    (:func:`~megatron_echo.planner.plan_clones`), with fewer it is what the planner reached on the
    loads of the table's benchmark.
    """
    per_rank = experts // ranks
    rows = [row for known, row in SLOTS.items() if known <= ranks]
    fits = [slots for known, slots in rows[-1].items() if known >= per_rank] if rows else []
    least = LEAST_OF_FEW if ranks < FEW_RANKS else LEAST
    return min(per_rank, max(fits[0], least)) if fits else per_rank
