"""How many clone slots a rank needs: the table of ``megatron_echo/planner/slots.py``.

    python benchmarks/planner_slots.py [--quick]

For each number of ranks R and of experts on a rank, the fewest slots with which the default
tolerance of 2 % is kept: the worst load of a rank at most 1.03 of the mean over all draws, the 99th
percentile at most 1.02. Prints the table as Python.

The loads: the repository's synthetic workloads but for the one whose first ranks get nothing at all
(which needs as many slots as experts; how far fewer fall short is printed last), published and
assumed overloads, and ranks that are hot or cold as a whole. Those need the most slots, because a
cold rank fills up from many middling experts; at 8 ranks they have a mean max/mean load of 2.4 and
a worst one of 3.9, about what is reported of DeepSeek-V3 while it prefills (2.1 and 3.7).
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

from megatron_echo.observe.simulation.workloads import (  # noqa: E402
    PUBLISHED,
    WORKLOADS,
    load_workload,
)
from megatron_echo.planner import plan_clones  # noqa: E402
from megatron_echo.progress import track  # noqa: E402

TOLERANCE, WORST, PERCENTILE = 0.02, 1.03, 1.02
TOKENS, TOPK = 1024, 8
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GRID = {4: (8, 16, 32, 64, 128), 8: (8, 16, 32, 64), 16: (8, 16, 32), 32: (4, 8, 16), 64: (2, 4, 8)}
EMPTY = "empty experts and ranks"
LOADS = (
    *(name for name in WORKLOADS if name not in (EMPTY, "zipf 1.2", "ragged sources")),
    *PUBLISHED,
    "overload 1.5",
    "overload 2",
    "overload 3",
)
SPREADS = ((0.5, 1.0), (0.7, 0.7))
"""Sigmas of lognormal factors: of a rank's experts together, and of each expert."""


def whole_ranks(
    ranks: int, experts: int, of_ranks: float, of_experts: float, draw: int
) -> torch.Tensor:
    """Counts int64 ``[R, E]`` where ranks are hot or cold as a whole."""
    generator = np.random.default_rng([draw, ranks, experts])
    popularity = generator.lognormal(0, of_ranks, ranks).repeat(experts // ranks)
    popularity *= generator.lognormal(0, of_experts, experts)
    counts = generator.multinomial(TOKENS * TOPK, popularity / popularity.sum(), size=ranks)
    return torch.from_numpy(counts)


def draws(ranks: int, experts: int, number: int) -> Iterator[torch.Tensor]:
    """All loads that the table is made from, those that need the most slots first."""
    for spread in SPREADS:
        for draw in range(4 * number):
            yield whole_ranks(ranks, experts, *spread, draw)
    for name in LOADS:
        for draw in range(number):
            try:
                counts = load_workload(name).counts(ranks, experts, TOPK, TOKENS, draw, 0)
            except ValueError:  # so few ranks cannot have this overload
                break
            yield torch.from_numpy(counts)


def reached(counts: torch.Tensor, slots: int) -> float:
    """The highest load of a rank over the mean, after planning."""
    loads = plan_clones(counts, slots, TOLERANCE).load_after
    return (loads.max() * len(loads) / loads.sum()).item()


def is_enough(loads: list[torch.Tensor], slots: int) -> bool:
    """Whether the bounds hold over all draws."""
    over = []
    for counts in loads:
        over.append(reached(counts, slots))
        if over[-1] > WORST:
            return False
    return float(np.quantile(over, 0.99)) <= PERCENTILE


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a corner of the grid, one draw")
    args = parser.parse_args()
    torch.set_num_threads(1)
    grid = {8: (4, 8)} if args.quick else GRID
    number = 1 if args.quick else 4
    cells = [(ranks, local) for ranks, row in grid.items() for local in row]
    table: dict[int, dict[int, int]] = {}
    for ranks, local in track(cells, "Slots"):
        loads = list(draws(ranks, ranks * local, number))
        fewer = (slots for slots in CANDIDATES if slots < local)
        enough = next((slots for slots in fewer if is_enough(loads, slots)), local)
        table.setdefault(ranks, {})[local] = enough
    print("".join(f"    {ranks}: {row},\n" for ranks, row in table.items()), end="")
    for ranks, row in table.items():
        for local, slots in row.items():
            counts = load_workload(EMPTY).counts(ranks, ranks * local, TOPK, TOKENS, 0, 0)
            over = reached(torch.from_numpy(counts), max(slots, 4))
            print(f"{EMPTY}, R = {ranks}, E/R = {local}: {over:.2f}")


if __name__ == "__main__":
    main()
