"""The GPU benchmarks, run dry on the CPU: each row is there, and their checks can fail."""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import launch
import pytest
import torch

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
sys.path.insert(0, str(launch.ROOT / "benchmarks" / "gpu"))

import capture_safety
import gpu_check
import grouped_gemm
import layers
import moe_layer
import passes
import planner_kernel
import processes
import row_copies
import run
import training_step
from record import Recorder, Row, SkippedError, as_markdown, is_reached, read_rows

from megatron_echo.experts import pointer_gemm

REPORT = {
    "device": str, "driver": str | None, "cuda": str | None, "versions": dict, "date": str,
    "dry_run": bool, "tests": str | None, "seconds": float, "rows": list,
}  # fmt: skip
ROW = {
    "part": str, "name": str, "status": str, "figures": dict, "targets": list,
    "reached": bool | None, "note": str,
}  # fmt: skip
CASES = [f"{model}, {tokens} tokens, {routing}" for model, tokens, routing in layers.DRY_CASES]
ROWS = {
    "ceilings": ["copy on the device", "dense bf16 product"],
    "planner": [f"{w}, S={s}" for w in planner_kernel.WORKLOADS for s in planner_kernel.SLOTS],
    "capture": [
        f"dry run, {check}"
        for check in (capture_safety.NO_WAIT, capture_safety.REPLAY, capture_safety.CONTROL)
    ],
    "rows": [
        *(f"dry run, {o} {d}" for o in row_copies.OPERATIONS for d in row_copies.DIRECTIONS),
        "dry run, layout",
    ],
    "layers": [f"{case}: {variant}" for case in [*CASES, "profile"] for variant in passes.VARIANTS],
    "gemm": [f"dry run, {direction}" for direction in grouped_gemm.DIRECTIONS],
    "training": list(training_step.VARIANTS),
}


def check_report(output: Path, parts: list[str]) -> list[Row]:
    """The schema, each row once, in the JSON and in the table; nothing failed."""
    report = json.loads(output.read_text())
    assert report.keys() == REPORT.keys()
    assert all(isinstance(report[name], kind) for name, kind in REPORT.items())
    assert report["versions"]["torch"] in torch.__version__
    assert report["versions"]["triton"]
    assert report["dry_run"]
    table = output.with_suffix(".md").read_text()
    for row in report["rows"]:
        assert row.keys() == ROW.keys()
        assert all(isinstance(row[name], kind) for name, kind in ROW.items())
        assert all(isinstance(value, int | float) for value in row["figures"].values())
        assert (row["status"] == "measured") == bool(row["figures"])
        assert row["status"] in ("measured", "skipped"), row
        assert row["reached"] is None
        assert f"\n| {row['name']} |" in table
    names = [(row["part"], row["name"]) for row in report["rows"]]
    assert sorted(names) == sorted((part, name) for part in parts for name in ROWS[part])
    assert all(f"## {run.PARTS[part].title}\n" in table for part in parts)
    return [Row(**row) for row in report["rows"]]


def recorder(tmp_path: Path, seconds: float = 1e3, dry: bool = False) -> Recorder:
    return Recorder("part", tmp_path / "rows.jsonl", time.monotonic() + seconds, dry)


def test_all_parts_but_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_this_process(name: str, file: Path, seconds: float, dry: bool) -> None:
        run.run_here(name, file, time.monotonic() + seconds, dry)

    monkeypatch.setattr(run, "run_part", in_this_process)
    monkeypatch.setattr(pointer_gemm, "runs_triton", lambda tensor: False)  # no interpreter
    parts = [part for part in run.DEFAULT if part != "training"]
    output = tmp_path / "results" / "report.json"
    args = argparse.Namespace(output=output, seconds=1e3, dry_run=True, tests="3 passed")
    assert run.run_all(parts, args) == 0
    rows = {row.name: row for row in check_report(output, parts)}
    assert json.loads(output.read_text())["tests"] == "3 passed"
    assert rows["dry run, forward"].figures["difference"] == 0
    assert rows["profile: ours"].note == "needs a GPU"
    captured = rows["dry run, 32 tokens, zipf: ours captured"]
    assert captured.figures.keys() == {"ms", "host_ms", "over_stock"}


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    command = [sys.executable, run.__file__, "--dry-run", "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(output) in result.stdout.splitlines()[-1]
    rows = {row.name: row for row in check_report(output, run.DEFAULT)}
    for variant in training_step.DRY_VARIANTS:
        assert rows[variant].figures["ms"] > 0
    assert rows["ours"].figures["last_loss"] == pytest.approx(
        rows["stock local"].figures["last_loss"], rel=1e-2
    )


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "--dry-run" in capsys.readouterr().err


def test_a_row_that_fails_or_is_late_does_not_stop_the_others(tmp_path: Path) -> None:
    def fails() -> dict[str, float]:
        raise ValueError("a | b\nc")

    def skips() -> dict[str, float]:
        raise SkippedError("not here")

    record = recorder(tmp_path)
    assert record.measure("bad", fails, ["us <= 1"]) is None
    assert record.measure("absent", skips) is None
    assert record.measure("good", lambda: {"us": 2.0}, ["us <= 1"]) == {"us": 2.0}
    assert recorder(tmp_path, seconds=-1).measure("late", fails) is None
    rows = read_rows(tmp_path / "rows.jsonl")
    outcomes = [(row.name, row.status, row.reached) for row in rows]
    assert outcomes == [
        ("bad", "failed", None), ("absent", "skipped", None), ("good", "measured", False),
        ("late", "skipped", None),
    ]  # fmt: skip
    table = as_markdown(rows, {"part": "Title", "other": "Nothing"})
    assert "| bad | - | us <= 1 | failed: ValueError: a / b c |" in table
    assert "| good | 2 | us <= 1: missed | - |" in table
    assert "Nothing" not in table
    assert [row.name for row in record.measured("part")] == ["good"]


@pytest.mark.parametrize(
    ("target", "reached"),
    [("us <= 60", True), ("us <= 59", False), ("us >= 60", True), ("us >= 61", False),
     ("other <= 60", False)],
)  # fmt: skip
def test_targets(target: str, reached: bool) -> None:
    assert is_reached(target, {"us": 60.0}) is reached


def test_a_dry_run_reaches_no_target(tmp_path: Path) -> None:
    recorder(tmp_path, dry=True).measure("row", lambda: {"us": 1.0}, ["us <= 60"])
    assert read_rows(tmp_path / "rows.jsonl")[0].reached is None


@pytest.mark.parametrize(("code", "words"), [(None, "stopped"), (-11, "exit code -11")])
def test_a_part_that_dies_is_a_failure(
    code: int | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "run_limited", lambda *args, **kwargs: code)
    output = tmp_path / "report.json"
    args = argparse.Namespace(output=output, seconds=60, dry_run=True, tests=None)
    assert run.run_all(["gemm"], args) == 1
    (row,) = json.loads(output.read_text())["rows"]
    assert row["status"] == "failed"
    assert words in row["note"]


def test_what_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "late"
    script = f"(sleep 2; touch {mark}) & sleep 60"
    started = time.monotonic()
    assert processes.run_limited(["bash", "-c", script], 0.5) is None
    assert time.monotonic() - started < 5
    time.sleep(2)
    assert not mark.exists()
    assert processes.run_limited(["bash", "-c", "exit 3"], 20) == 3


@pytest.mark.parametrize(
    ("script", "is_passed", "summary"),
    [
        ("print('=== 2 passed in 1s ===')", True, "2 passed in 1s"),
        ("print('1 failed, 2 passed'); raise SystemExit(1)", False, "1 failed, 2 passed"),
        ("import time; time.sleep(60)", False, "stopped after 2 s; "),
    ],
)
def test_tests_before_the_benchmarks(
    script: str, is_passed: bool, summary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "pytest_command", lambda: [sys.executable, "-Sc", script])
    monkeypatch.setattr(gpu_check, "TEST_SECONDS", 2)
    assert gpu_check.run_tests() == (is_passed, summary)


@pytest.fixture
def layer() -> passes.Pass:
    with passes.single_rank():
        yield passes.Pass(layers.DRY_SHAPE, "ours")


def test_routings_are_what_their_names_say(layer: passes.Pass) -> None:
    shape = layers.DRY_SHAPE
    loads = {}
    for routing in ("even", "zipf", "hot", "holes"):
        layer.route(routing)
        _, chosen = layer.layer.route(layer.hidden)
        loads[routing] = chosen.sum(0)
    assert loads["hot"].tolist() == [shape.tokens] * shape.topk + [0] * (shape.experts - shape.topk)
    assert not loads["holes"][1::2].any()
    assert loads["zipf"].max() > loads["even"].max()
    layer.route("even", seed=3)
    assert not torch.equal(layer.layer.route(layer.hidden)[1].sum(0), loads["even"])


def test_a_replay_that_does_nothing_is_noticed(
    layer: passes.Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes.CapturedPass, "__call__", lambda self: None)
    with pytest.raises(AssertionError, match="output of even 0, replay"):
        capture_safety.check_replays(layers.DRY_SHAPE)


def test_a_replay_with_the_first_routing_is_noticed(
    layer: passes.Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph does that froze a value at capture."""
    original = passes.CapturedPass.__call__
    monkeypatch.setattr(
        passes.CapturedPass,
        "__call__",
        lambda self: (self._eager.route("even"), original(self))[1],
    )
    with pytest.raises(AssertionError, match="hot 0, replay") as caught:
        capture_safety.check_replays(layers.DRY_SHAPE)
    assert "even 0" not in str(caught.value)


def test_allocations_in_a_replay_are_noticed(
    layer: passes.Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(range(100))
    monkeypatch.setattr(capture_safety, "num_allocations", lambda: next(counts))
    with pytest.raises(AssertionError, match="6 allocations"):
        capture_safety.check_replays(layers.DRY_SHAPE)


def test_the_control_must_wait(layer: passes.Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    build = moe_layer.build
    monkeypatch.setattr(moe_layer, "build", lambda s, d, ours, c, **kw: build(s, d, True, c, **kw))
    with pytest.raises(AssertionError, match="must fail"):
        capture_safety.check_control(layers.DRY_SHAPE)


def test_products_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_gemm, "pointer_product", lambda rows, *a, **k: 2 * rows[:, :16])
    with pytest.raises(ValueError, match="differ"):
        grouped_gemm.measure("forward", grouped_gemm.DRY_SHAPES["dry run"])


@pytest.mark.parametrize("variant", training_step.VARIANTS)
def test_flags_are_known(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    from pretrain_gpt_moe import extra_args_provider

    flags = training_step.VARIANTS[variant].split()
    model = training_step.Model()
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moe.py", *model.flags(tmp_path), *flags])
    args = parse_args(extra_args_provider)
    assert args.moe_enable_echo == variant.startswith("ours")
    assert (args.cuda_graph_impl == "full_iteration") == ("captured" in variant)
    assert (args.transformer_impl == "transformer_engine") == ("TE" in variant)
    assert args.te_rng_tracker == ("captured" in variant)
    assert model.tokens == args.seq_length * args.global_batch_size


def test_the_flops_of_a_token_are_those_of_its_parameters() -> None:
    """Twice forward, four times backward; Megatron's count, which has no router, is 0.1 % less."""
    attention, expert = 2 * 2048 * 128 * (16 + 4), 3 * 2048 * 768
    per_layer = attention + 8 * expert + 32 * 2048
    expected = 6 * (8 * per_layer + 2048 * 32000) + 8 * 6 * (16 * 128 * 1024)
    assert training_step.Model().flops_per_token == expected
