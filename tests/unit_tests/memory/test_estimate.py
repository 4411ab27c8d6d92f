"""The estimate of a command line against the allocator's events in a real run of it."""

import re
from pathlib import Path

import launch
import pytest
import torch

from megatron_echo.memory.estimate import estimate, main
from megatron_echo.memory.shapes_only import attend, no_plan
from megatron_echo.planner import plan_clones

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
    "experts in FP8": (
        2,
        {
            "moe_enable_echo": True, "expert_model_parallel_size": 2, "bf16": True,
            "moe_ffn_hidden_size": 64, "moe_echo_expert_precision": "fp8-rowwise",
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
    [pytest.param(n, marks=[pytest.mark.slow] if n != "one rank" else []) for n in CASES],
)
def test_peak_of_a_real_run(name, tmp_path):
    ranks, flags = CASES[name]
    on_a_cpu = {
        "moe_echo_token_transport": "all_gather", "moe_echo_expert_dispatcher_type": "collective",
    }  # fmt: skip
    flags = launch.tiny_model(**flags, **on_a_cpu, train_iters=2)
    estimates = estimate(flags, ranks)
    launch.run(flags, ranks, MEASURE, env={"PEAK": str(tmp_path / "peak")}).check()
    measured = [int((tmp_path / f"peak.{rank}").read_text()) for rank in range(ranks)]
    for one in estimates:
        stage = measured[one.rank * ranks // len(estimates)]
        assert one.peak == pytest.approx(stage, rel=0.05)
        assert one.weights + one.gradients + one.optimizer < one.peak


def test_command_line(capsys):
    """One stage of two, and attention that keeps less than the scores of a layer."""
    heads, rows = 4, 2048
    flags = launch.tiny_model(
        moe_enable_echo=True, num_attention_heads=heads, seq_length=rows, micro_batch_size=1,
        max_position_embeddings=rows, global_batch_size=2, pipeline_model_parallel_size=2,
    )  # fmt: skip
    main(["--ranks", "2", "--stages", "1", "--flash-attention", "--", *flags])
    head, row = capsys.readouterr().out.splitlines()
    assert "optimizer" in head
    rank, _, *kept, step, peak = map(float, row.replace(",", "").split())
    assert rank == 1
    assert peak == pytest.approx(max(sum(kept), step), abs=3e-4)
    assert sum(kept) < heads * rows * rows * 4 / 2**30


def estimated_on(node, capsys, *more):
    """Peak in GiB, and what is said of transports, on machines of so many GPUs."""
    flags = launch.tiny_model(
        moe_enable_echo=True, expert_model_parallel_size=4, num_experts=8, bf16=True,
        moe_num_echo_experts=4, seq_length=1024, max_position_embeddings=1024,
    )  # fmt: skip
    words = ["--ranks", "4", "--flash-attention", "--ranks-per-node", str(node)]
    main([*words, "--", *flags, *more])
    _, row, line = capsys.readouterr().out.splitlines()
    assert "weights of clones by symmetric_memory" in line
    return float(row.split()[-1]), line


def test_auto_is_decided_as_by_the_run(capsys):
    """Clones inside nodes where machines are smaller than EP is, with the buffers for that."""
    inside = ("--moe-echo-clones-within-node", "--moe-echo-ranks-per-node", "2")
    chosen, of_two = estimated_on(2, capsys)
    told, of_one = estimated_on(8, capsys, *inside)
    assert chosen == told
    for line, words in (
        (of_two, "the 2 ranks of a node"), (of_one, "auto: one machine whose GPUs reach"),
    ):  # fmt: skip
        assert ", inside nodes" in line
        assert words in line


@pytest.mark.slow
def test_clones_inside_nodes_take_larger_buffers(capsys):
    assert estimated_on(2, capsys)[0] > estimated_on(8, capsys)[0]


def test_a_machine_without_gpus(capsys):
    with pytest.raises(SystemExit):
        main(["--ranks", "2", "--ranks-per-node", "0", "--", *launch.tiny_model()])
    assert "--ranks-per-node 0 is below 1. Give" in capsys.readouterr().err


def test_flash_attention_keeps_no_scores():
    rows, batch, heads, groups, width, value_width = 32, 2, 4, 2, 8, 6
    query = torch.randn(rows, batch, heads, width, requires_grad=True)
    key = torch.randn(rows, batch, groups, width, requires_grad=True)
    value = torch.randn(rows, batch, groups, value_width, requires_grad=True)
    output = attend(None, query, key, value, None, attn_mask_type=None)
    assert output.shape == (rows, batch, heads * value_width)
    kept = [tensor.numel() for tensor in output.grad_fn.saved_tensors]
    parts = [query.numel(), key.numel(), value.numel(), output.numel(), batch * heads * rows]
    assert sorted(kept) == sorted(parts)
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad.shape == tensor.shape


def test_the_plan_of_an_estimate_has_a_plans_shapes():
    counts = torch.full((4, 8), 5)
    made, planned = no_plan(counts, 3, 0.02), plan_clones(counts, 3, 0.02)
    for name in ("counts", "slot_expert", "allocation", "load_before", "load_after", "num_clones"):
        ours, theirs = getattr(made, name), getattr(planned, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_experts": 7, "expert_model_parallel_size": 2}, "Error: "),
        pytest.param(
            {
                "pipeline_model_parallel_size": 2, "mtp_num_layers": 1,
                "pipeline_model_parallel_layout": "Et|t|m|L",
            },
            "Put m before L",
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_command_line_that_does_not_run(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(["--ranks", "2", "--", *launch.tiny_model(moe_enable_echo=True, **flags)])
    error = capsys.readouterr().err
    assert "cannot be estimated" in error
    assert re.search(message, error)
