"""Training in Megatron's schedule of overlapped expert communication."""

from pathlib import Path
from typing import Any

import launch
import pytest

from megatron_echo.record.metrics import read_metrics

BASE = {
    "expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall", "bf16": True,
    # A tied weight has gradients from two stages, which are rounded one by one there.
    "untie_embeddings_and_output_weights": True,
}  # fmt: skip
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
BOTH = {**OVERLAP, "delay_wgrad_compute": True}
DISTRIBUTED = {
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}
IN_FP32 = Path(__file__).resolve().parent / "overlap_in_fp32.py"


def train(folder: Path, ranks: int, script: Path = launch.SCRIPT, **flags: Any) -> list[dict]:
    """The metrics of each step, but for times and memory."""
    run_dir = folder / "run"
    words = launch.tiny_model(**{**BASE, **flags, "run_dir": run_dir})
    launch.run(words, ranks, script=script).check()
    return [
        {name: value for name, value in step.items() if not name.endswith(("time", "throughput"))}
        for step in read_metrics(run_dir)
    ]


def same_bits(tmp_path: Path, ranks: int, **flags: Any) -> None:
    """Losses, gradient norms, the layer's metrics and its plans, step by step."""
    found = []
    for name, schedule in (("plain", {}), ("overlapped", BOTH)):
        folder = tmp_path / name
        more = {"moe_enable_echo": True, "moe_echo_trace_dir": folder / "trace"}
        metrics = train(folder, ranks, **more, **flags, **schedule)
        traces = sorted((folder / "trace").iterdir())
        found.append((metrics, [(trace.name, trace.read_bytes()) for trace in traces]))
    assert len(found[0][0]) == 4
    assert any(step["moe_echo/clones"] > 0 for step in found[0][0])
    assert found[0][1]
    assert found[1] == found[0]


def test_same_bits(tmp_path: Path) -> None:
    same_bits(tmp_path, 2, moe_shared_expert_intermediate_size=64, **DISTRIBUTED)


@pytest.mark.slow
def test_same_bits_in_an_interleaved_pipeline(tmp_path: Path) -> None:
    """The first pipeline rank has no MoE layer."""
    same_bits(
        tmp_path, 4, num_layers=4, moe_layer_freq="[0,1,0,1]", micro_batch_size=1,
        pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2, **DISTRIBUTED,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_it_follows_megatrons_layer(steps: int, tmp_path: Path) -> None:
    """In the same schedule, in fp32; Megatron delays the gradients of its own layers with TE only.

    A tied weight, one microbatch in flight more than ranks, and norms recomputed.
    """
    flags = {
        **OVERLAP, "train_iters": steps, "untie_embeddings_and_output_weights": None,
        "recompute_granularity": "selective", "recompute_modules": ["layernorm"],
    }  # fmt: skip
    ours = train(tmp_path / "ours", 2, IN_FP32, moe_enable_echo=True, **flags)
    theirs = train(tmp_path / "theirs", 2, IN_FP32, **flags)
    assert len(ours) == len(theirs) == steps
    for name in ("lm loss", "grad-norm"):
        found, wanted = ([step[name] for step in steps] for steps in (ours, theirs))
        assert found == pytest.approx(wanted, rel=1e-5), name
