"""The estimate of a command line against the allocator's events in a real run of it."""

import json
from pathlib import Path

import launch
import pytest

from megatron_echo.memory.estimate import estimate, main

MEASURE = Path(__file__).with_name("measured_peak.py")
CASES = {
    "one rank": (1, {"moe_enable_echo": True}),
    "clones, sharded optimizer": (
        2,
        {
            "moe_enable_echo": True, "expert_model_parallel_size": 2, "bf16": True,
            "use_distributed_optimizer": True,
        },
    ),
    "pipeline, recompute": (
        2,
        {
            "moe_enable_echo": True, "pipeline_model_parallel_size": 2, "num_layers": 4,
            "recompute_granularity": "full", "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n == "one rank" else []) for n in CASES],
)
def test_peak_of_a_real_run(name, tmp_path):
    ranks, flags = CASES[name]
    flags = launch.tiny_model(**flags, train_iters=2)
    estimates = estimate(flags, ranks)
    launch.run(flags, ranks, MEASURE, env={"PEAK": str(tmp_path / "peak")}).check()
    measured = [int((tmp_path / f"peak.{rank}").read_text()) for rank in range(ranks)]
    for one in estimates:
        stage = measured[one.rank * ranks // len(estimates)]
        assert one.peak == pytest.approx(stage, rel=0.05)
        assert one.weights + one.gradients + one.optimizer < one.peak


def test_command_line(tmp_path, capsys):
    flags = launch.tiny_model(moe_enable_echo=True, num_layers=1, global_batch_size=2)
    main(["--ranks", "1", "--json", str(tmp_path / "peak.json"), "--", *flags])
    (row,) = json.loads((tmp_path / "peak.json").read_text())
    assert row["peak"] == max(row["forward_backward"], row["step"])
    assert "optimizer" in capsys.readouterr().out


def test_a_command_line_that_does_not_run(capsys):
    flags = launch.tiny_model(moe_enable_echo=True, num_experts=7, expert_model_parallel_size=2)
    with pytest.raises(SystemExit):
        main(["--ranks", "2", "--", *flags])
    assert "cannot be estimated" in capsys.readouterr().err
