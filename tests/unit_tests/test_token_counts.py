"""Ranks that bring different numbers of tokens, and padding, by their worker's checks."""

from pathlib import Path

import launch

WORKER = Path(__file__).resolve().parent / "workers" / "token_counts.py"


@launch.thinned_on_ranks(2, slow=(3, 4))
def test_different_numbers(ranks: int, every: int) -> None:
    checks = ["dense", "padding", "bounds"]
    launch.run(checks, ranks, script=WORKER, env={"EVERY": str(every)}).check()
