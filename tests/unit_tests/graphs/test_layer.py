"""The MoE layer is safe to capture, and a replay of it has the bits of an eager pass."""

from pathlib import Path

import launch
import pytest

WORKER = Path(__file__).resolve().parent.parent / "workers" / "layer_graph.py"
SLOW = pytest.mark.slow


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=SLOW), 2, pytest.param(3, marks=SLOW)])
def test_every_combination_of_settings(ranks: int) -> None:
    """All combinations of what a graph accepts, over balanced, hot, empty and padded routings."""
    result = launch.run([], ranks, script=WORKER).check()
    assert "COMBINATIONS=28" in result.output
