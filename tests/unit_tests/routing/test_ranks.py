"""Router losses over two to four ranks, by their worker's checks."""

from pathlib import Path

import launch
import pytest

WORKER = Path(__file__).resolve().parent.parent / "workers" / "aux_loss.py"


@pytest.mark.parametrize(
    ("check", "ranks"),
    [
        ("cuts", 2),
        pytest.param("cuts", 4, marks=pytest.mark.slow),
        ("cuts_with_padding", 2),
        pytest.param("cuts_with_padding", 4, marks=pytest.mark.slow),
        ("megatron_divides_by_data_parallel", 2),
        pytest.param("megatron_divides_by_data_parallel", 4, marks=pytest.mark.slow),
        ("z_with_padding", 2),
        pytest.param("z_with_padding", 4, marks=pytest.mark.slow),
        ("logged_values", 2),
        ("one_collective", 2),
        ("load_metrics", 2),
        ("virtual_stages", 2),
    ],
)
def test_ranks(check: str, ranks: int) -> None:
    launch.run([check], ranks, script=WORKER).check()
