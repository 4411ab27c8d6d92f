"""What watches a run with clones: checks, traces, metrics; and what happens when a rank fails."""

import re
import time
from pathlib import Path

import launch
import numpy as np
import pytest
import torch

from megatron_echo.record.metrics import read_metrics
from megatron_echo.record.routing_capture import read_captures
from megatron_echo.record.trace import read_traces

CLONES = {"expert_model_parallel_size": 2, "moe_enable_echo": True, "moe_echo_force_skew": 1.0}
LOADS = ("overload_routed", "overload_placed", "clones", "layer_calls")
FAILING = """
import pretrain_gpt_moe
import torch
from megatron_echo.experts import EchoGroupedMLP

forward, calls = EchoGroupedMLP.forward, 0

def failing(self, *args, **kwargs):
    global calls
    calls += 1
    if calls == 11 and torch.distributed.get_rank() == 1:
        raise ArithmeticError("this rank is broken")
    return forward(self, *args, **kwargs)

if __name__ == "__main__":
    EchoGroupedMLP.forward = failing
    pretrain_gpt_moe.main()
"""


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """The same losses with everything on; traces, metrics and the console say the same."""
    losses, outputs = [], []
    for name, extra in (
        ("plain", {}),
        ("watched", {"moe_echo_check_every": 3, "moe_echo_trace_dir": tmp_path / "traces",
                     "moe_echo_trace_every": 2}),
    ):  # fmt: skip
        flags = {**CLONES, **extra, "pipeline_model_parallel_size": 2, "run_dir": tmp_path / name}
        outputs.append(launch.run(launch.tiny_model(**flags), 4).check().output)
        losses.append([line["lm loss"] for line in read_metrics(tmp_path / name)])
    assert losses[0] == losses[1]
    lines = read_metrics(tmp_path / "watched")
    assert ["moe_echo/check_error" in line for line in lines] == [True, False, False, True]
    assert all(line.get("moe_echo/check_error", 0) <= 1e-5 for line in lines)
    assert [line.get("moe_echo/check_ranks") for line in lines] == [4, None, None, 4]

    traces = read_traces(tmp_path / "traces")
    assert [(trace.iteration, trace.stage) for trace in traces] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    for first, second in zip(traces[::2], traces[1::2], strict=True):
        microbatches = len(first.layer)
        assert first.microbatch.tolist() == list(range(microbatches))
        assert (set(first.layer), set(second.layer)) == ({1}, {2})
        before = np.concatenate([first.load_before, second.load_before])
        after = np.concatenate([first.load_after, second.load_after])
        assert (before.sum(1) == 2 * 2 * 64 * 2).all()  # ranks, batch, sequence, top-k
        assert (after.sum(1) == before.sum(1)).all()
        line = lines[first.iteration - 1]
        for name, loads in (("routed", before), ("placed", after)):
            overload = loads.max(1) / loads.mean(1)
            assert overload.mean() == pytest.approx(line[f"moe_echo/overload_{name}"])
            assert overload.max() == pytest.approx(line[f"moe_echo/overload_{name}_max"])
        assert line["moe_echo/layer_calls"] == 2 * microbatches
        assert 0 < line["moe_echo/tokens_moved"] < 0.5
        used = np.concatenate([first.slot_expert, second.slot_expert]) >= 0
        assert used.sum() / len(used) == pytest.approx(line["moe_echo/clones"])
        console = f"iteration {first.iteration:8d} | max/mean load of ranks: routed "
        assert f"{console}{line['moe_echo/overload_routed']:.3f}" in outputs[1]


def test_kept_clones_are_announced(tmp_path: Path) -> None:
    """The bytes of clones that are not brought again, before anything is built."""
    flags = {**CLONES, "no_moe_echo_recompute_expert_dispatch": True, "run_dir": tmp_path}
    output = launch.run(launch.tiny_model(**flags), 2).check().output
    # 4 slots x 2 layers x 1 microbatch x three matrices of 64 x 64 in fp32
    assert f"up to {4 * 2 * 3 * 64 * 64 * 4 / 2**20:.1f} MiB of clones" in output


def test_one_rank_fails(tmp_path: Path) -> None:
    """The other one ends as well, by itself and with an error."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    result = launch.run(launch.tiny_model(**CLONES, train_iters=50), 2, script=script)
    assert result.codes == (1, 1), result.output[-3000:]
    assert "this rank is broken" in result.output


@pytest.mark.slow
@pytest.mark.parametrize("way", ["collective", "p2p"])
def test_torchrun_says_which_rank_fails(way: str, tmp_path: Path) -> None:
    """Every process ends, with an error."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    flags = {**CLONES, "train_iters": 50, "moe_echo_expert_dispatcher_type": way}
    begin = time.monotonic()
    result = launch.torchrun(launch.tiny_model(**flags), 2, script=script, timeout=150)
    assert result.codes != (0,)
    assert "this rank is broken" in result.output
    summary = result.output[result.output.index("Root Cause (first observed failure)") :]
    assert re.search(r"rank +: 1 ", summary), summary
    assert time.monotonic() - begin < 120


def test_a_changed_number_of_microbatches(tmp_path: Path) -> None:
    """The global batch grows: the same losses and loads as without clones, measured there too."""
    tokens = 2 * 8 * 64  # of the first two steps
    schedule = f"0:8 {tokens}:16"
    flags = {**CLONES, "global_batch_size": None, "step_batch_size_schedule": [schedule]}
    curves, measured = [], []
    for name, slots in (("off", 0), ("on", None)):
        folder = tmp_path / name
        extra = {"moe_num_echo_experts": slots, "run_dir": folder}
        launch.run(launch.tiny_model(**flags, **extra), 2).check()
        lines = read_metrics(folder)
        curves.append([line["lm loss"] for line in lines])
        assert [line["batch-size"] for line in lines] == [8, 8, 16, 16]
        measured.append([[line[f"moe_echo/{key}"] for key in LOADS] for line in lines])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    without, with_clones = np.array(measured)
    assert (without[:, 1] == without[:, 0]).all()  # placed is routed
    assert (without[:, 2] == 0).all()
    assert (without[:, 0] > 1.1).all()
    assert without[:, [0, 3]] == pytest.approx(with_clones[:, [0, 3]], rel=1e-3)


def test_captured_routing_is_the_traced_one(tmp_path: Path) -> None:
    """Ids and weights of every token, recomputed or not, count up to what the planner saw."""
    flags = {**CLONES, "moe_echo_capture_routing": tmp_path / "routing", "train_iters": 2,
             "moe_echo_trace_dir": tmp_path / "traces", "moe_echo_capture_slots": 3,
             "recompute_granularity": "full", "recompute_method": "uniform",
             "recompute_num_layers": 1}  # fmt: skip
    launch.run(launch.tiny_model(**flags), 2).check()
    traces = read_traces(tmp_path / "traces")
    for rank in range(2):
        captures = list(read_captures(tmp_path / "routing", rank))
        assert [capture.iteration for capture in captures] == [1, 2]
        for capture, trace in zip(captures, traces, strict=True):
            assert len(capture.calls) == len(trace.layer)
            for layer, microbatch, counts in zip(
                trace.layer, trace.microbatch, trace.counts, strict=True
            ):
                routing = capture.calls[int(layer), int(microbatch)]
                assert routing.ids.shape == (2 * 64, 2)
                found = torch.bincount(routing.ids.flatten().long(), minlength=8)
                assert found.tolist() == counts[rank].tolist()
                assert (routing.weights > 0).all()
