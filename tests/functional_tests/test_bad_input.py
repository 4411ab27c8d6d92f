"""Bad input ends in one clear sentence and an exit code that is not 0."""

from pathlib import Path

import launch
import pytest


def error_of(result: launch.Result) -> str:
    """The one line that the script reports."""
    assert any(result.codes), "the run should have failed"
    lines = [line for line in result.output.splitlines() if ": error: " in line]
    assert len(lines) == 1, result.output[-3000:]
    assert "Traceback" not in result.output
    return lines[0].split(": error: ", 1)[1]


@pytest.mark.parametrize(
    ("flags", "nprocs", "message"),
    [
        ({"mock_data": None, "data_path": "nowhere/text"}, 1, "nowhere/text.bin does not exist"),
        ({"mock_data": None}, 1, "No data was given"),
        (
            {"num_experts": 7, "expert_model_parallel_size": 2},
            2,
            "Number of experts should be a multiple of expert model parallel_size.",
        ),
        (
            {"pipeline_model_parallel_size": 2},
            1,
            "world size (1) is not divisible by total_model_size (total_model_size=2)",
        ),
        ({"moe_enable_ecko": True}, 1, "unrecognized arguments: --moe-enable-ecko"),
        (
            {"moe_enable_echo": True, "moe_num_echo_experts": 3, "expert_model_parallel_size": 2},
            2,
            "--moe-num-echo-experts 3 is not divisible by the expert-parallel size 2. Use 2 or 4.",
        ),
        (
            {"heterogeneous_layers_config_path": "layers.json"},
            1,
            "--heterogeneous-layers-config-path",
        ),
        ({"distributed_backend": "nccl"}, 1, "--distributed-backend nccl needs a CUDA device"),
    ],
)
def test_bad_flags(flags: dict, nprocs: int, message: str) -> None:
    assert message in error_of(launch.run(launch.tiny_model(**flags), nprocs))


@pytest.mark.parametrize("extension", [".bin", ".idx"])
def test_truncated_dataset(extension: str, tiny_corpus: Path, tmp_path: Path) -> None:
    for part in (".bin", ".idx"):
        content = Path(f"{tiny_corpus}{part}").read_bytes()
        size = len(content) - 100 if part == extension else len(content)
        (tmp_path / f"text{part}").write_bytes(content[:size])
    flags = launch.tiny_model(mock_data=None, data_path=tmp_path / "text", vocab_size=257)
    assert f"text{extension} is truncated" in error_of(launch.run(flags))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    launch.run(launch.tiny_model(train_iters=1, save=folder, save_interval=1)).check()
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden_size": 128}, "--hidden-size is 64 there and 128 here"),
        ({"num_experts": 4}, "--num-experts is 8 there and 4 here"),
        ({"num_layers": 3}, "--num-layers is 2 there and 3 here"),
        ({"vocab_size": 1000}, "--vocab-size is 128 there and 1000 here"),
    ],
)
def test_checkpoint_of_another_shape(flags: dict, message: str, checkpoint: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}
    error = error_of(launch.run(launch.tiny_model(**flags, load=checkpoint)))
    assert message in error
    assert "holds a model of another shape" in error
    assert files == {path: path.stat().st_mtime_ns for path in checkpoint.rglob("*")}


def test_dist_optimizer_is_refused_at_the_start_not_at_load(checkpoint: Path) -> None:
    flags = launch.tiny_model(use_distributed_optimizer=True, load=checkpoint)
    assert "--use-distributed-optimizer cannot resume" in error_of(launch.run(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pipeline_model_parallel_size": 2, "num_layers": 3}, "Number of layers should be divisi"),
        ({"expert_model_parallel_size": 4}, "world_size (2) is not divisible by"),
        ({"moe_ecko": 1}, "unrecognized arguments: --moe-ecko 1. See --help."),
        ({"run_dir": "/proc/nope"}, "--run-dir /proc/nope cannot be made"),  # looked at on rank 0
    ],
)
def test_both_ranks_end_with_code_2(flags: dict, message: str) -> None:
    """Whether both find the fault, in whatever phase, or one alone; without anybody's help."""
    result = launch.run(launch.tiny_model(**flags), 2)
    assert message in error_of(result)
    assert result.codes == (2, 2)


def test_a_rank_that_comes_late_hears_of_the_fault() -> None:
    """Rank 0 serves the store, so it may not leave before the others have met it there."""
    script = Path(__file__).with_name("late_rank.py")
    result = launch.run(launch.tiny_model(pipeline_model_parallel_size=2, num_layers=3), 2, script)
    assert "Number of layers should be divisible" in error_of(result)
    assert result.codes == (2, 2)


def test_another_schedule_than_in_the_checkpoint(checkpoint: Path) -> None:
    """Found when the checkpoint is read, by both ranks."""
    result = launch.run(launch.tiny_model(train_iters=3, load=checkpoint), 2)
    assert "Add --override-opt-param-scheduler" in error_of(result)
    assert result.codes == (2, 2)


def test_a_loss_that_is_no_number_without_save() -> None:
    result = launch.run(launch.tiny_model(moe_z_loss_coeff=1e300), 2)
    assert error_of(result).startswith("The loss is NaN or infinite")
    assert result.codes == (1, 1)
