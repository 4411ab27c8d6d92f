"""Every row of ``docs/flags.md``, run."""

from pathlib import Path

import flag_table
import launch
import pytest

from megatron_echo.record.metrics import read_metrics

BASE = {"expert_model_parallel_size": 2, "train_iters": 2, "moe_enable_echo": True}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] if row.is_elsewhere else [], id=row.setting)
        for row in flag_table.ROWS
    ],
)
def test_row(row: flag_table.Row, tmp_path: Path) -> None:
    """It trains, or it is refused in the words of the table before anything starts."""
    flags = {**BASE, **row.flags, "run_dir": tmp_path / "run"}
    flags |= {name: tmp_path / name for name, value in flags.items() if value == "{folder}"}
    if row.refusal is None:
        launch.run(launch.tiny_model(**flags), row.ranks).check()
        assert len(read_metrics(tmp_path / "run")) == 2
    else:
        words = launch.tiny_model(**flags)
        result = launch.run(words, 1, timeout=60, world_size=row.ranks)
        assert result.codes == (2,), result.output[-3000:]
        assert row.refusal in result.output
        assert "Traceback" not in result.output


def test_the_page_is_up_to_date() -> None:
    assert flag_table.PAGE.read_text() == flag_table.render()
