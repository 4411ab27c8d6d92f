"""Training with Megatron-FSDP, beside Megatron's layer."""

from pathlib import Path
from typing import Any

import launch
import pytest

from megatron_echo.record.metrics import read_metrics

STAND_INS = Path(__file__).resolve().parent / "kernel_stand_ins.py"
BASE = {
    "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall",
    "use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor",
}  # fmt: skip
SLOTS = {"moe_enable_echo": True, "moe_num_echo_experts": 8}
WAYS = ("collective", "p2p", "symmetric_memory")
HIDDEN = {
    **SLOTS, "moe_echo_expert_dispatcher_type": "symmetric_memory",
    "moe_echo_token_transport": "symmetric_memory",
}  # fmt: skip


def curve(folder: Path, ranks: int, **flags: Any) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    words = launch.tiny_model(**{**BASE, **flags, "run_dir": folder})
    launch.run(words, ranks, script=STAND_INS).check()
    return [(step["lm loss"], step["grad-norm"]) for step in read_metrics(folder)]


def check(tmp_path: Path, ranks: int, ours: dict[str, Any], **flags: Any) -> None:
    theirs = curve(tmp_path / "theirs", ranks, **flags)
    found = curve(tmp_path / "ours", ranks, **flags, **ours)
    assert len(found) == flags["train_iters"]
    for step, other in zip(found, theirs, strict=True):
        assert step == pytest.approx(other, rel=1e-5)


def test_clones_follow_megatrons_layer(tmp_path: Path) -> None:
    """Where hooks of gradients are on every module; parameters are whole there."""
    flags = {"data_parallel_sharding_strategy": "optim_grads", "train_iters": 2}
    check(tmp_path, 2, HIDDEN, **flags)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", ["optim", "optim_grads", "optim_grads_params"])
def test_each_strategy_and_way(tmp_path: Path, strategy: str, way: str) -> None:
    """On four ranks, two of which hold the same experts."""
    ours = {**SLOTS, "moe_echo_expert_dispatcher_type": way}
    check(tmp_path, 4, ours, data_parallel_sharding_strategy=strategy, train_iters=10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {"fsdp_double_buffer": True},
        {"recompute_granularity": "full", "recompute_method": "uniform",
         "recompute_num_layers": 1},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True,
         "moe_token_dispatcher_type": "allgather"},
        {"mtp_num_layers": 1},
    ],
    ids=lambda flags: next(iter(flags)),
)  # fmt: skip
def test_sharded_parameters_that_move(tmp_path: Path, flags: dict[str, Any]) -> None:
    strategy = {"data_parallel_sharding_strategy": "optim_grads_params", "train_iters": 4}
    check(tmp_path, 4, HIDDEN, **strategy, **flags)
