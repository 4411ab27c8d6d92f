"""Ranks that bring different numbers of tokens, and padding, by their worker's checks."""

from pathlib import Path

import launch

WORKER = Path(__file__).resolve().parent / "workers" / "token_counts.py"


@launch.on_ranks(2, slow=(3, 4))
def test_different_numbers(ranks: int) -> None:
    launch.run(["dense", "padding", "bounds"], ranks, script=WORKER).check()
