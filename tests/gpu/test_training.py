"""``pretrain_gpt_moe.py`` on a GPU: no CPU backend, NCCL, bf16."""

import json
from pathlib import Path

import launch
import pytest
import torch

from megatron_echo import cpu_backend
from megatron_echo.record.metrics import read_metrics

pytestmark = pytest.mark.gpu


def train(folder: Path, nprocs: int = 1, expect: str = "", **flags: object) -> list[dict]:
    argv = launch.tiny_model(train_iters=20, bf16=True, run_dir=folder, **flags)
    environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    result = launch.torchrun(argv, nprocs, env=environment).check()
    assert expect in result.output
    assert "CUDA entry points now run on the CPU" not in result.output
    return read_metrics(folder)


def test_the_cpu_backend_stays_off() -> None:
    assert torch.cuda.is_available()
    assert not cpu_backend.is_enabled()
    assert cpu_backend.changes() == ()


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_one_gpu_in_bf16(dispatcher: str, tmp_path: Path) -> None:
    lines = train(tmp_path, moe_token_dispatcher_type=dispatcher)
    assert lines[-1]["lm loss"] < lines[0]["lm loss"] - 0.3
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["device"] == torch.cuda.get_device_name()
    assert record["flags"]["distributed_backend"] == "nccl"


def test_our_layer_on_one_gpu(tmp_path: Path) -> None:
    """The same curve as Megatron's layer, within what bf16 allows."""
    stock = train(tmp_path / "stock", moe_token_dispatcher_type="allgather")
    ours = train(tmp_path / "ours", moe_enable_echo=True)
    expected = [line["lm loss"] for line in stock]
    assert [line["lm loss"] for line in ours] == pytest.approx(expected, rel=1e-2)


def test_two_gpus_with_nccl(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    lines = train(tmp_path, nprocs=2, expert_model_parallel_size=2)
    assert lines[-1]["lm loss"] < lines[0]["lm loss"] - 0.3


def test_resume_is_the_straight_run(tmp_path: Path) -> None:
    """The same GPU, bf16, plain optimizer: losses after a resume equal the straight run's."""
    straight = train(tmp_path / "straight")
    saving = {"save": tmp_path / "ckpt", "save_interval": 10}
    train(tmp_path / "halves", **saving, exit_interval=10)
    loaded = f"successfully loaded checkpoint from {tmp_path / 'ckpt'}"
    halves = train(tmp_path / "halves", expect=loaded, **saving, load=tmp_path / "ckpt")
    assert (tmp_path / "halves" / "run.1.json").exists()
    losses = [line["lm loss"] for line in halves]
    assert losses == pytest.approx([line["lm loss"] for line in straight], rel=1e-3)
