import json
from pathlib import Path

import pytest
import torch

from megatron_echo.record.metrics import MetricsWriter, heard, read_metrics


class Clock:
    """Seconds of training, moved by the test; a third of them in the optimizer."""

    def __init__(self, has_parts: bool = False) -> None:
        self.seconds = 0.0
        self.has_parts = has_parts

    def __call__(self) -> dict[str, float]:
        parts = {"optimizer-time": self.seconds / 3} if self.has_parts else {}
        return {"iteration-time": self.seconds, **parts}


def write_iterations(writer: MetricsWriter, clock: Clock, *iterations: int) -> None:
    for iteration in iterations:
        clock.seconds += 0.5 + iteration
        writer.add_scalar("lm loss", torch.tensor(1 / 3, dtype=torch.float64), iteration)
        writer.add_scalar("lm loss vs samples", 9.0, iteration * 8)
        writer.add_scalar("iteration-time", 123.0, iteration)
        writer.add_scalar("grad-norm", 0.1, iteration)


def test_a_line_an_iteration_with_full_precision(tmp_path: Path) -> None:
    clock = Clock()
    writer = MetricsWriter(tmp_path, clock)
    write_iterations(writer, clock, 1, 2)
    assert read_metrics(tmp_path) == [
        {"iteration": 1, "iteration-time": 1.5, "lm loss": 1 / 3, "grad-norm": 0.1},
        {"iteration": 2, "iteration-time": 2.5, "lm loss": 1 / 3, "grad-norm": 0.1},
    ]


def test_validation_joins_the_line_of_its_iteration(tmp_path: Path) -> None:
    clock = Clock()
    writer = MetricsWriter(tmp_path, clock)
    write_iterations(writer, clock, 1)
    writer.add_scalar("lm loss validation", 2.5, 1)
    write_iterations(writer, clock, 2)
    first, second = read_metrics(tmp_path)
    assert first["lm loss validation"] == 2.5
    assert "lm loss validation" not in second


def test_values_that_json_lacks_become_strings(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, Clock())
    for step, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        writer.add_scalar("lm loss", value, step)
    writer.flush()
    assert [line["lm loss"] for line in read_metrics(tmp_path)] == ["nan", "inf", "-inf"]
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_a_restart_sets_the_repeated_lines_aside(tmp_path: Path) -> None:
    clock = Clock()
    write_iterations(MetricsWriter(tmp_path, clock), clock, 1, 2, 3, 4)
    write_iterations(MetricsWriter(tmp_path, Clock()), Clock(), 3)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3]
    aside = (tmp_path / "metrics.1.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in aside] == [3, 4]
    write_iterations(MetricsWriter(tmp_path, Clock()), Clock(), 4)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.1.jsonl"}
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize("early", [[], ["moe_echo/check_error", "offload/host_bytes"]])
def test_a_restart_that_repeats_nothing_sets_nothing_aside(tmp_path: Path, early: list) -> None:
    """Also where scalars of the first iteration come before its line begins."""
    write_iterations(MetricsWriter(tmp_path, Clock()), Clock(), 1, 2)
    writer = MetricsWriter(tmp_path, Clock())
    for tag in early:
        writer.add_scalar(tag, 7.0, 3)
    write_iterations(writer, Clock(), 3)
    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    assert all(lines[2][tag] == 7.0 for tag in early)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_each_scalar_is_in_the_file_at_once(tmp_path: Path) -> None:
    """No call says that an iteration is over, and after any a save may begin."""
    expected: list[dict] = []
    writer = MetricsWriter(tmp_path, lambda: {})
    for iteration in (1, 2):
        expected.append({"iteration": iteration})
        for tag, value in (("learning-rate", 1e-3), ("lm loss", 2.0), ("z_loss", 1 / 3)):
            writer.add_scalar(tag, value, iteration)
            expected[-1][tag] = value
            assert read_metrics(tmp_path) == expected
    for loss in (1 / 3, 0.5):  # the test set's comes under the same name, and is shorter
        writer.add_scalar("lm loss validation", loss, 2)
        expected[-1]["lm loss validation"] = loss
        assert read_metrics(tmp_path) == expected


def test_a_line_cut_short_by_a_crash_does_not_stop_the_restart(tmp_path: Path) -> None:
    clock = Clock()
    write_iterations(MetricsWriter(tmp_path, clock), clock, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    write_iterations(MetricsWriter(tmp_path, Clock()), Clock(), 2)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2]


def test_a_start_that_only_evaluates_joins_the_last_line(tmp_path: Path) -> None:
    clock = Clock()
    write_iterations(MetricsWriter(tmp_path, clock), clock, 1, 2)
    again = MetricsWriter(tmp_path, Clock())
    again.add_scalar("lm loss validation", 2.0, 2)
    again.flush()
    first, last = read_metrics(tmp_path)
    assert "lm loss validation" not in first
    assert last == {
        "iteration": 2, "iteration-time": 2.5, "lm loss": 1 / 3, "grad-norm": 0.1,
        "lm loss validation": 2.0,
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_damaged_line_is_set_aside(tmp_path: Path) -> None:
    clock = Clock()
    write_iterations(MetricsWriter(tmp_path, clock), clock, 1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write("{broken}\n")
    write_iterations(MetricsWriter(tmp_path, Clock()), Clock(), 2)
    assert [line["iteration"] for line in read_metrics(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.1.jsonl").read_text() == "{broken}\n"


def test_a_disk_that_refuses_does_not_stop_the_training(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    writer = MetricsWriter(tmp_path / "run", Clock())
    (tmp_path / "run").rmdir()
    write_iterations(writer, Clock(), 1, 2, 3)
    assert capsys.readouterr().out.count("no more metrics") == 1


def test_only_logged_iterations_have_a_line(tmp_path: Path) -> None:
    """``--tensorboard-log-interval 3``: MoE losses pass every time, the loss each third time."""
    clock = Clock()
    writer = MetricsWriter(tmp_path, clock)
    for iteration in range(1, 7):
        clock.seconds += 2.0
        if iteration % 3 == 0:
            writer.add_scalar("lm loss", 1.0, iteration)
        writer.add_scalar("load_balancing_loss", 1.0, iteration)
    writer.flush()
    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [3, 6]
    assert lines[1]["iteration-time"] == 2.0


def test_parts_of_a_step_are_its_own(tmp_path: Path) -> None:
    """What Megatron writes under their names is a mean of many steps and is not recorded."""
    clock = Clock(has_parts=True)
    writer = MetricsWriter(tmp_path, clock)
    for iteration in (1, 2):
        clock.seconds += 3 * iteration
        writer.add_scalar("lm loss", 1.0, iteration)
        writer.add_scalar("optimizer-time", 99.0, iteration)
    writer.flush()
    assert [line["optimizer-time"] for line in read_metrics(tmp_path)] == [1.0, 2.0]


def test_a_tensorboard_writer_is_heard_and_writes_everything(tmp_path: Path) -> None:
    """Megatron's timers write to a ``SummaryWriter`` only, and nothing pretends to be one."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    board = SummaryWriter(str(tmp_path / "events"))
    writer = heard(board, MetricsWriter(tmp_path, Clock()))
    assert issubclass(type(writer), SummaryWriter)
    writer.add_scalar("lm loss", 1.0, 3)
    writer.add_scalar("optimizer-time", 2.0, global_step=3)
    writer.add_text("lr", "1e-3", global_step=0)
    writer.flush()
    assert read_metrics(tmp_path) == [{"iteration": 3, "iteration-time": 0.0, "lm loss": 1.0}]
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert set(events.Tags()["scalars"]) == {"lm loss", "optimizer-time"}
    assert events.Tags()["tensors"] == ["lr/text_summary"]
    assert len(list((tmp_path / "events").iterdir())) == 1
    alone = MetricsWriter(tmp_path, Clock())
    assert type(alone) is MetricsWriter
    assert alone.add_text("lr", "1") is None


def test_reading_a_run_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--run-dir"):
        read_metrics(tmp_path)
