"""The MoE layer is safe to capture, and a replay of it has the bits of an eager pass."""

from pathlib import Path

import launch
import pytest

WORKER = Path(__file__).resolve().parent / "workers" / "layer_graph.py"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "every", "count"),
    [
        (2, 13, 3),
        pytest.param(1, 1, 29, marks=SLOW),
        pytest.param(2, 1, 29, marks=SLOW),
        pytest.param(3, 1, 29, marks=SLOW),
    ],
)
def test_combinations_of_settings(ranks: int, every: int, count: int) -> None:
    """All combinations of what a graph accepts, over balanced, hot, empty and padded routings."""
    result = launch.run([every], ranks, script=WORKER).check()
    assert f"COMBINATIONS={count}" in result.output
