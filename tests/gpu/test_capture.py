"""The layer in a CUDA graph: the checks of ``benchmarks/gpu``, on a small layer."""

import sys
from collections.abc import Callable

import launch
import pytest

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
sys.path.insert(0, str(launch.ROOT / "benchmarks" / "gpu"))

import capture_safety
from moe_layer import Shape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_rank")]
SHAPE = Shape(hidden=256, ffn=512, experts=16, topk=4, tokens=512)


@pytest.mark.parametrize(
    "check",
    [capture_safety.check_no_wait, capture_safety.check_control, capture_safety.check_replays],
)
def test_a_graph_can_hold_the_layer(check: Callable[[Shape], dict[str, float]]) -> None:
    assert check(SHAPE)
