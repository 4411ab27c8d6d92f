"""Stopping and starting again: bit for bit the same run, whatever interrupts it."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import launch
import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_echo.record.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("single_rank")  # Megatron's checkpoint reader wants a group
SLOW_SAVE = Path(__file__).resolve().parent / "slow_save.py"
TIME_KEYS = ("iteration-time",)


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIME_KEYS} for line in lines]


def checkpoint_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, model and optimizer."""
    content = dist_checkpointing.load_plain_tensors(str(folder / f"iter_{iteration:07d}"))
    return {name: value for name, value in content.items() if torch.is_tensor(value)}


@pytest.fixture(scope="module")
def flags_of_20_steps(text_flags: dict) -> dict:
    return {**text_flags, "expert_model_parallel_size": 2, "train_iters": 20}


@pytest.fixture(scope="module")
def straight(flags_of_20_steps: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    flags = {**flags_of_20_steps, "save_interval": 10, "save": folder / "ckpt", "run_dir": folder}
    launch.run(launch.tiny_model(**flags), 2).check()
    return folder


def test_resume_is_bit_for_bit_the_straight_run(
    tmp_path: Path, straight: Path, flags_of_20_steps: dict
) -> None:
    """20 steps against 10, save, ``kill -9``, load, 10: losses, norms, weights, Adam's moments.

    Each iteration's line was on disk before the save of it, once, and none is set aside.
    """
    flags = {**flags_of_20_steps, "save_interval": 10, "save": tmp_path / "ckpt"}
    half = launch.tiny_model(**flags, run_dir=tmp_path)
    killed = launch.run(half, 2, SLOW_SAVE, {"KILL_AFTER": "10"})
    assert killed.codes == (-signal.SIGKILL, -signal.SIGKILL), killed.output[-3000:]
    result = launch.run([*half, "--load", tmp_path / "ckpt"], 2).check()
    assert re.search(r"successfully loaded checkpoint .* at iteration 10\b", result.output)

    lines = without_times(read_metrics(tmp_path))
    assert [line["iteration"] for line in lines] == list(range(1, 21))
    assert lines == without_times(read_metrics(straight))
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]
    expected = checkpoint_tensors(straight / "ckpt", 20)
    actual = checkpoint_tensors(tmp_path / "ckpt", 20)
    assert actual.keys() == expected.keys()
    assert any("exp_avg" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_kill_during_a_save_keeps_the_previous_checkpoint(
    tmp_path: Path, straight: Path, flags_of_20_steps: dict
) -> None:
    """``kill -9`` of a rank while iteration 4 is written; then resume from iteration 2."""
    checkpoints = tmp_path / "ckpt"
    flags = {**flags_of_20_steps, "exit_interval": 6, "save_interval": 2, "save": checkpoints}
    words = launch.tiny_model(**flags, run_dir=tmp_path)
    killed = launch.run(words, 2, SLOW_SAVE, {"KILL_AT": "iter_0000004"})
    assert killed.codes[0] != 0
    assert killed.codes[1] == -signal.SIGKILL
    assert any((checkpoints / "iter_0000004").iterdir())
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    before = checkpoint_tensors(checkpoints, 2)

    result = launch.run([*words, "--load", checkpoints], 2).check()
    assert re.search(r"successfully loaded checkpoint .* at iteration 2\b", result.output)
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "6"
    after = checkpoint_tensors(checkpoints, 2)
    assert all(torch.equal(before[name], after[name]) for name in before)

    lines = without_times(read_metrics(tmp_path))
    assert lines == without_times(read_metrics(straight))[:6]
    aside = [json.loads(line) for line in (tmp_path / "metrics.1.jsonl").read_text().splitlines()]
    assert without_times(aside) == lines[2:4]


def test_no_space_while_saving(tmp_path: Path) -> None:
    """An error that says so, and the checkpoint before is kept."""
    checkpoints = tmp_path / "ckpt"
    words = launch.tiny_model(train_iters=4, save=checkpoints, save_interval=2)
    full = launch.run(words, 1, SLOW_SAVE, {"FULL_AT": "iter_0000004"})
    assert full.codes == (1,), full.output[-3000:]
    assert f"The disk of {checkpoints} is full" in full.output
    assert "iter_0000002 is complete and untouched" in full.output
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "2"
    launch.run([*words, "--load", checkpoints]).check()
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "4"


FULL_DISK = """
mount -t tmpfs -o size={size}k tmpfs "$1" || exit 99
shift
echo free before: $(df --output=avail -k {folder} | tail -1)
"$@"
echo first exit code: $?
cat {folder}/ckpt/latest_checkpointed_iteration.txt; echo " is the latest checkpoint"
mount -o remount,size=100m {folder}
"$@" --load {folder}/ckpt
echo second exit code: $?
cat {folder}/ckpt/latest_checkpointed_iteration.txt; echo " is the latest checkpoint"
"""


def mount_namespace() -> list[str] | None:
    """A prefix that runs a command where it may mount; None where the kernel refuses."""
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        prefix = ["unshare", *options]
        if shutil.which("unshare") is None:
            return None
        probe = [*prefix, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
        if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
            return prefix
    return None


@pytest.mark.slow
def test_full_disk_while_saving(tmp_path: Path) -> None:
    """A disk with room for one checkpoint: an error that says so, and the first one is kept."""
    prefix = mount_namespace()
    if prefix is None:
        pytest.skip("this kernel lets nobody mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    flags = launch.tiny_model(train_iters=4, save=folder / "ckpt", save_interval=2)
    command = launch.torchrun_command(flags)
    script = FULL_DISK.format(size=5 * 1024, folder=folder)
    finished = subprocess.run(
        [*prefix, "sh", "-c", script, "sh", str(folder), *command],
        env={**os.environ, **launch._ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    output = finished.stdout + finished.stderr
    assert "first exit code: 1" in output, output[-3000:]
    assert f"The disk of {folder / 'ckpt'} is full" in output
    assert "iter_0000002 is complete and untouched" in output
    assert output.index("2 is the latest") < output.index("second exit code: 0")
    assert "4 is the latest checkpoint" in output


def test_experts_differ_from_each_other_after_initialisation(tmp_path: Path) -> None:
    """All E experts of a layer, over both expert-parallel ranks, are different."""
    argv = launch.tiny_model(
        expert_model_parallel_size=2,
        train_iters=1,
        lr=1e-30,
        weight_decay=0,
        save=tmp_path,
        save_interval=1,
    )
    launch.run(argv, 2).check()
    tensors = checkpoint_tensors(tmp_path, 1)
    for name in ("linear_fc1", "linear_fc2"):
        weight = tensors[f"decoder.layers.mlp.experts.experts.{name}.weight"]
        layers, experts = weight.shape[:2]
        flat = weight.reshape(layers * experts, -1)
        assert experts == 8
        distances = torch.cdist(flat, flat) + torch.eye(layers * experts)
        assert distances.min() > 0.1, name
