"""Stopping and starting again: bit for bit the same run, whatever interrupts it."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import launch
import psutil
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


def test_resume_is_bit_for_bit_the_straight_run(tmp_path: Path, text_flags: dict) -> None:
    """20 steps against 10, save, ``kill -9``, load, 10: losses, norms, weights, Adam's moments.

    Each iteration's line was on disk before the save of it, once, and none is set aside.
    """
    flags = {**text_flags, "expert_model_parallel_size": 2, "train_iters": 20, "save_interval": 10}
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    first = launch.tiny_model(**flags, save=straight / "ckpt", run_dir=straight)
    launch.run(first, 2).check()
    half = launch.tiny_model(**flags, save=halves / "ckpt", run_dir=halves)
    killed = launch.run(half, 2, SLOW_SAVE, {"KILL_AFTER": "10"})
    assert killed.codes == (-signal.SIGKILL, -signal.SIGKILL), killed.output[-3000:]
    result = launch.run([*half, "--load", halves / "ckpt"], 2).check()
    assert re.search(r"successfully loaded checkpoint .* at iteration 10\b", result.output)

    lines = without_times(read_metrics(halves))
    assert [line["iteration"] for line in lines] == list(range(1, 21))
    assert lines == without_times(read_metrics(straight))
    assert [path.name for path in halves.glob("metrics*")] == ["metrics.jsonl"]
    expected = checkpoint_tensors(straight / "ckpt", 20)
    actual = checkpoint_tensors(halves / "ckpt", 20)
    assert actual.keys() == expected.keys()
    assert any("exp_avg" in name for name in expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the run ended before it began to save"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_kill_during_a_save_keeps_the_previous_checkpoint(tmp_path: Path, text_flags: dict) -> None:
    """``kill -9`` of a rank while iteration 4 is written; then resume from iteration 2."""
    flags = {
        **text_flags,
        "expert_model_parallel_size": 2,
        "train_iters": 6,
        "save": tmp_path / "ckpt",
        "save_interval": 2,
        "run_dir": tmp_path,
    }
    environment = {**os.environ, **launch._ENVIRONMENT, "SLOW_SAVE_AT": "iter_0000004"}
    process = subprocess.Popen(
        launch.torchrun_command(launch.tiny_model(**flags), 2, SLOW_SAVE),
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "ckpt" / "iter_0000004" / "slow", process)
    ranks = [
        p for p in psutil.Process(process.pid).children() if "slow_save.py" in str(p.cmdline())
    ]
    ranks[1].send_signal(signal.SIGKILL)
    assert process.wait(120) != 0
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "2"
    before = checkpoint_tensors(tmp_path / "ckpt", 2)

    resumed = launch.tiny_model(**flags, load=tmp_path / "ckpt")
    result = launch.run(resumed, 2).check()
    assert re.search(r"successfully loaded checkpoint .* at iteration 2\b", result.output)
    assert (tmp_path / "ckpt" / "latest_checkpointed_iteration.txt").read_text() == "6"
    after = checkpoint_tensors(tmp_path / "ckpt", 2)
    assert all(torch.equal(before[name], after[name]) for name in before)

    whole = {**flags, "save": None, "save_interval": None, "run_dir": tmp_path / "whole"}
    launch.run(launch.tiny_model(**whole), 2).check()
    lines = without_times(read_metrics(tmp_path))
    assert lines == without_times(read_metrics(tmp_path / "whole"))
    aside = [json.loads(line) for line in (tmp_path / "metrics.1.jsonl").read_text().splitlines()]
    assert without_times(aside) == lines[2:4]


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
