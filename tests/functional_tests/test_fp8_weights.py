"""Weights in FP8 over whole runs: quantised once a step, and never a step too late."""

from pathlib import Path

import launch
import pytest
from test_graphs import GRAPH

from megatron_echo.record.metrics import read_metrics

SCRIPT = """
import runpy
import sys

import launch
import torch.distributed as dist

from megatron_echo import cpu_backend

cpu_backend.enable(verbose=False)

from megatron_echo.experts import fp8_linear
from megatron_echo.step.step_end import StepEnd

fill, quantise, end = fp8_linear._Stack.fill, fp8_linear.quantise_matrices, StepEnd.end_step
way, calls = {way!r}, []


def filled(self, weight, slots, state):
    states = {{"kept": state, "made again": None, "never made again": state and ()}}
    fill(self, weight, slots, states[way])


def quantised(*args, **options):
    calls.append(1)
    quantise(*args, **options)


def ended(self):
    if dist.get_rank() == 0:
        print("\\nQUANTISED", len(calls), flush=True)
    calls.clear()
    end(self)


fp8_linear._Stack.fill, fp8_linear.quantise_matrices, StepEnd.end_step = filled, quantised, ended
runpy.run_path(str(launch.SCRIPT), run_name="__main__")
"""
FLAGS = {
    "moe_enable_echo": True, "expert_model_parallel_size": 2, "moe_ffn_hidden_size": 64,
    "moe_echo_expert_precision": "fp8-rowwise", "moe_echo_force_skew": 1.0, "seq_length": 32,
    "max_position_embeddings": 32, "use_distributed_optimizer": True, "train_iters": 4,
    "eval_interval": 2, "eval_iters": 1,
}  # fmt: skip
FULL = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
}  # fmt: skip
LAYERS, MICROBATCHES = 2, 2
OF_A_STEP = LAYERS * 2 * 2  # two projections, in two directions
OF_EVALUATION = LAYERS * 2 * MICROBATCHES  # forward only, and kept for nothing


def train(folder: Path, way: str, **changes: object) -> tuple[list[tuple], list[int]]:
    """Losses and gradient norms of each step, and how often rank 0 quantised a stack until then."""
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT.format(way=way))
    words = launch.tiny_model(**{**FLAGS, **changes}, run_dir=folder / "run")
    output = launch.run(words, 2, script=script).check().output
    names = ("lm loss", "grad-norm", "lm loss validation")
    curve = [tuple(map(step.get, names)) for step in read_metrics(folder / "run")]
    counts = [int(line.split()[1]) for line in output.splitlines() if line.startswith("QUANTISED")]
    return curve, counts


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        (FULL, [OF_A_STEP, OF_A_STEP, OF_A_STEP + OF_EVALUATION, OF_A_STEP]),
        # Python counts what is captured, in the second step, and nothing of replays.
        pytest.param(GRAPH, [OF_A_STEP, OF_A_STEP, OF_EVALUATION, 0], marks=pytest.mark.slow),
    ],
    ids=["recomputed", "whole-step graph"],
)
def test_once_a_step_and_never_too_late(changes: dict, counts: list, tmp_path: Path) -> None:
    """Two microbatches share what the first one makes, an evaluation between them and the next.

    Every number has the bits of a run that quantises before each product. One that keeps its first
    weights would be seen.
    """
    curve, found = train(tmp_path / "kept", "kept", **changes)
    expected, _ = train(tmp_path / "made", "made again", **changes)
    assert found == counts
    assert curve == expected
    assert len(curve) == 4
    if changes is FULL:
        stale, _ = train(tmp_path / "stale", "never made again", **changes)
        assert stale[0] == expected[0]
        assert stale[1] != expected[1]
