"""The check on a GPU, run dry on the CPU: each row is there, and its checks can fail."""

import ast
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import launch
import pytest
import torch

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
sys.path.insert(0, str(launch.ROOT / "benchmarks" / "gpu"))

import capture_safety
import compile_kernels
import fp8_checks
import fp8_products
import gpu_check
import grouped_gemm
import kernel_checks
import layers
import moe_layer
import offloading
import passes
import planner_kernel
import processes
import ranks
import row_copies
import training_step
from record import Case, Recorder, Row, SkippedError, as_markdown, is_reached, read_rows
from unit_tests.dispatch.test_kernels import run_script

from megatron_echo.experts import fp8, pointer_gemm

MACHINE = {"device": "d", "driver": None, "versions": {"torch": "2"}, "date": "1", "dry_run": True}
PROFILED = [f"dry run: {variant}" for variant in passes.VARIANTS]
ROWS = {
    1: [
        "imports, stage 1", "copy on the device", "dense bf16 product", "kernels compiled before",
        *(check.name for check in kernel_checks.kernel_checks(dry=True)),
        "more than 2^31 elements",
        *(case.name for case in capture_safety.cases(dry=True)),
        "the same gradients", "the same gradients in a graph", *gpu_check.SHARING,
        *training_step.SMALL,
        "kernels, stage 1",
    ],
    2: [
        "imports, stage 2", "dry run: bare grouped products", *PROFILED, "two ranks",
        *training_step.SPEED, *PROFILED, "kernels, stage 2",
    ],
    3: [
        "imports, stage 3",
        *(f"{w}, S={s}" for w in planner_kernel.WORKLOADS for s in planner_kernel.TARGETS),
        "copies beside products, CUDA_DEVICE_MAX_CONNECTIONS=1",
        *(f"dry run, {direction}" for direction in grouped_gemm.DIRECTIONS),
        *(f"dry run in FP8, {direction}" for direction in fp8_products.DIRECTIONS),
        *training_step.MEMORY,
        *(f"dry run, {o} {d}" for o in row_copies.OPERATIONS for d in row_copies.DIRECTIONS),
        "dry run, layout", "kernels, stage 3",
    ],
}  # fmt: skip
ON_A_GPU = {
    "kernels compiled before", "more than 2^31 elements", "stock TE", "ours on TE, captured",
    "stock TE, captured parts", "ours on TE, captured layers",
    "dry run: stock TE", "copies beside products, CUDA_DEVICE_MAX_CONNECTIONS=1",
}  # fmt: skip


class ForkedRanks:
    """In place of ``WaitingRanks``: forked, with everything imported."""

    def __init__(self, script: Path, argv: list[str], nprocs: int = 1, env: Any = None) -> None:
        self._job = argv, nprocs, script, dict(env or {})

    def run(self, seconds: float) -> str:
        return launch.run(*self._job).check().output


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ranks, training_step):
        monkeypatch.setattr(module, "WaitingRanks", ForkedRanks)
    monkeypatch.setattr(pointer_gemm, "runs_triton", lambda _: False)  # no interpreter


def check_rows(output: Path, stage: int) -> dict[tuple[str, str], Row]:
    """Each row once, in order, in the file and in the table; nothing failed."""
    rows = read_rows(output)
    assert [row.name for row in rows] == ROWS[stage]
    for row in rows:
        assert row.stage == stage
        assert row.status == ("skipped" if row.name in ON_A_GPU else "measured"), row
        assert (row.status == "measured") == bool(row.figures)
        assert all(isinstance(value, int | float) for value in row.figures.values())
        assert row.reached is None
        assert row.machine["dry_run"]
        assert row.machine["date"]
        assert row.machine["device"]
        assert row.machine["versions"]["torch"] in torch.__version__
        assert row.machine["versions"]["megatron-core"]
    table = as_markdown(rows)
    assert all(f"\n| {row.name} |" in table for row in rows)
    assert all(f"## {row.part}\n" in table for row in rows)
    return {(row.part, row.name): row for row in rows}


def dry_stage(stage: int, output: Path) -> dict[tuple[str, str], Row]:
    assert gpu_check.work(stage, output, time.monotonic() + 1e3, dry=True) == 0
    return check_rows(output, stage)


@pytest.mark.usefixtures("forked")
def test_the_checks_of_kernels(tmp_path: Path) -> None:
    """The first stage without its training."""
    record = recorder(tmp_path, dry=True)
    for case in kernel_checks.cases(dry=True):
        record.measure(case)
    assert {
        row.name for row in read_rows(tmp_path / "rows.jsonl") if row.status != "measured"
    } <= ON_A_GPU


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_first_stage(tmp_path: Path) -> None:
    rows = dry_stage(1, tmp_path / "rows.jsonl")
    assert rows["Offloading", "the same gradients"].figures["bytes"] > 0
    captured = rows[training_step.SMALL_PART, "ours captured"].figures
    assert captured["loss_from_ours"] <= training_step.LOSS_LIMIT


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_the_second_stage(tmp_path: Path) -> None:
    rows = dry_stage(2, tmp_path / "rows.jsonl")
    captured = rows[layers.PART, "dry run: ours captured"].figures
    assert captured.keys() == {"ms", "host_ms", "over_stock", "over_products"}
    products = rows[layers.PART, "dry run: bare grouped products"].figures
    assert captured["over_products"] == captured["ms"] / products["ms"]
    assert rows[layers.PROFILE_PART, "dry run: ours"].figures["waits"] == 0
    assert len(list(tmp_path.glob("rows.dry-run-*.json.gz"))) == 3  # traces
    steps = {name: row.figures for (part, name), row in rows.items() if part == training_step.PART}
    assert steps["ours captured"]["over_stock_local"] > 0
    assert rows["Clones beside compute", "two ranks"].figures["ms"] > 0
    assert steps["stock local"]["loss_from_ours"] <= training_step.LOSS_LIMIT


@pytest.mark.usefixtures("forked")
def test_the_third_stage(tmp_path: Path) -> None:
    rows = dry_stage(3, tmp_path / "rows.jsonl")
    offloading = rows[training_step.PART, "ours, offloading"].figures
    assert offloading["offloaded_gib"] > 0
    assert offloading["over_full_recomputation"] > 0
    assert rows["Grouped products", "dry run, forward"].figures["difference"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_whole_command(stage: int, tmp_path: Path) -> None:
    """Its processes and all."""
    output = tmp_path / "rows.jsonl"
    command = [sys.executable, gpu_check.__file__, "--dry-run", "--output", str(output)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*command, "--stage", str(stage)], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    check_rows(output, stage)
    assert output.with_suffix(".md").exists()


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        gpu_check.work(1, tmp_path / "rows.jsonl", 0.0)
    assert not list(tmp_path.iterdir())


def recorder(folder: Path, seconds: float = 1e3, dry: bool = False) -> Recorder:
    return Recorder(1, folder / "rows.jsonl", time.monotonic() + seconds, MACHINE, dry)


def fails() -> dict[str, float]:
    raise ValueError("a | b\nc")


def skips() -> dict[str, float]:
    raise SkippedError("not here")


def test_a_row_that_fails_or_is_late_does_not_stop_the_others(tmp_path: Path) -> None:
    record = recorder(tmp_path)
    assert not record.measure(Case("part", "bad", fails, ("us <= 1",)))
    assert record.measure(Case("part", "absent", skips))
    assert record.measure(Case("part", "good", lambda: {"us": 2.0}, ("us <= 1",)))
    assert recorder(tmp_path, seconds=-1).measure(Case("part", "late", fails))
    rows = read_rows(tmp_path / "rows.jsonl")
    outcomes = [(row.name, row.status, row.reached) for row in rows]
    assert outcomes == [
        ("bad", "failed", None), ("absent", "skipped", None), ("good", "measured", False),
        ("late", "skipped", None),
    ]  # fmt: skip
    table = as_markdown(rows)
    assert "| bad | - | us <= 1 | failed: ValueError: a / b c |" in table
    assert "| good | 2 | us <= 1: missed | - |" in table
    assert record.figures("part", "good") == {"us": 2.0}
    assert record.figures("part", "bad") == record.figures("other", "good") == {}
    another_day = Recorder(1, tmp_path / "rows.jsonl", 0, {**MACHINE, "date": "2"})
    assert another_day.figures("part", "good") == {}


@pytest.mark.parametrize(
    ("target", "reached"),
    [("us <= 60", True), ("us <= 59", False), ("us >= 60", True), ("us >= 61", False),
     ("other <= 60", False)],
)  # fmt: skip
def test_targets(target: str, reached: bool) -> None:
    assert is_reached(target, {"us": 60.0}) is reached


def test_a_dry_run_reaches_no_target(tmp_path: Path) -> None:
    recorder(tmp_path, dry=True).measure(Case("part", "row", lambda: {"us": 1.0}, ("us <= 60",)))
    assert read_rows(tmp_path / "rows.jsonl")[0].reached is None


WORKER = """
import sys, time, types
sys.modules["timing"] = types.SimpleNamespace(synchronize=lambda: None)  # imports torch
sys.path[:0] = {folders}
from pathlib import Path
import gpu_check, json
from record import Case, Recorder
first = int(sys.argv[sys.argv.index("--first") + 1])
file = Path(sys.argv[sys.argv.index("--output") + 1])
recorder = Recorder(1, file, time.monotonic() + 60, {machine})
for number, (name, code) in enumerate({cases}):
    if number >= first:
        file.with_suffix(".now").write_text(json.dumps([number, "part", name]))
        if code == "sleep":
            time.sleep(60)
        elif code == "hang":
            recorder.measure(Case("part", name, lambda: time.sleep(60), seconds=0.2))
        elif code == gpu_check.BROKEN:
            recorder.fail(Case("part", name, dict), "CUDA error")
            raise SystemExit(code)
        elif code:
            raise SystemExit(code)
        recorder.measure(Case("part", name, lambda: {{"us": 1.0}}))
"""


@pytest.mark.parametrize(
    ("cases", "statuses", "has_passed"),
    [
        ([("a", 0), ("b", 0)], ["measured", "measured"], True),
        ([("a", 0), ("b", 75), ("c", 0)], ["measured", "failed", "measured"], False),
        ([("a", 11), ("b", 0)], ["failed", "measured"], False),
        ([("a", "hang"), ("b", 0)], ["failed", "measured"], False),
        ([("a", 75), ("b", 75)], ["failed", "failed"], False),
        ([("a", 0), ("b", "sleep"), ("c", 0)], ["measured", "failed"], False),
    ],
    ids=[
        "all well",
        "a broken context",
        "a process that dies",
        "a case that hangs",
        "all broken",
        "out of time",
    ],
)
def test_a_stage_goes_on_behind_what_ends_its_process(
    cases: list, statuses: list[str], has_passed: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    script = tmp_path / "worker.py"
    folders = [*gpu_check.FOLDERS, str(launch.ROOT / "tools")]
    script.write_text(WORKER.format(folders=folders, machine=MACHINE, cases=cases))
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    monkeypatch.setattr(gpu_check, "SECONDS", 6.0 if "sleep" in dict(cases).values() else 60.0)
    monkeypatch.setattr(gpu_check, "machine", lambda dry: MACHINE)
    output = tmp_path / "rows.jsonl"
    assert gpu_check.run_stage(1, output, False) is has_passed
    rows = read_rows(output)
    assert [row.status for row in rows] == statuses
    assert [row.name for row in rows] == [name for name, _ in cases][: len(rows)]
    assert not output.with_suffix(".now").exists()
    assert output.with_suffix(".md").exists()


def test_what_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "late"
    script = f"(sleep 2; touch {mark}) & sleep 60"
    started = time.monotonic()
    assert processes.run_limited(["bash", "-c", script], 0.5) is None
    assert time.monotonic() - started < 5
    time.sleep(2)
    assert not mark.exists()
    assert processes.run_limited(["bash", "-c", "exit 3"], 20) == 3


def test_ranks_wait_and_their_failures_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranks, "_WAIT", ranks._WAIT.replace("import pretrain_gpt_moe", ""))
    script, mark = tmp_path / "script.py", tmp_path / "mark"
    script.write_text(
        "import os, sys, pathlib, time\n"
        "name = sys.argv[1] + os.environ['RANK'] + os.environ['MORE']\n"
        "pathlib.Path(name).touch()\n"
        "if sys.argv[2] == 'late': time.sleep(60)\n"
        "if os.environ['RANK'] == sys.argv[2]: sys.exit('ValueError: rank ' + sys.argv[2])\n"
    )
    waiting = ranks.WaitingRanks(script, [str(mark), "none"], 2, {"MORE": "x"})
    time.sleep(0.5)
    assert not list(tmp_path.glob("mark*"))
    waiting.run(30)
    assert {path.name for path in tmp_path.glob("mark*")} == {"mark0x", "mark1x"}
    with pytest.raises(RuntimeError, match="ValueError: rank 1"):
        ranks.WaitingRanks(script, [str(mark), "1"], 2, {"MORE": ""}).run(30)
    with pytest.raises(RuntimeError, match="took over 2 s"):
        ranks.WaitingRanks(script, [str(mark), "late"], 2, {"MORE": ""}).run(2)


def test_children_keep_the_paths_that_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packages that a machine carries; with an empty one there is no entry for it."""
    script = "import sys; print(sys.path)"
    for given, expected in (("/carried", [str(launch.ROOT), "/carried"]), ("", [str(launch.ROOT)])):
        monkeypatch.setenv("PYTHONPATH", given)
        importlib.reload(launch)
        environment = {**os.environ, **launch._ENVIRONMENT}
        found = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
        assert json.loads(found.replace("'", '"'))[1 : 1 + len(expected)] == expected
        gpu_check.prepare(dry=False)
        assert os.environ["PYTHONPATH"].split(os.pathsep) == expected
    monkeypatch.undo()
    importlib.reload(launch)


COMPILE = """
import multiprocessing, sys
from pathlib import Path
sys.path[:0] = {folders}
import compile_kernels as tool
here, there = Path({folder!r}) / "here", Path({folder!r}) / "there"
tool.prepare(here)
tool.record(90)
kernels = list({{launch.name: launch.kernel for launch in tool._recorded}}.values())
def key(number):
    return kernels[number].cache_key
def keys(numbers):
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return sorted(pool.map(key, numbers))
in_order, turned = keys(range(len(kernels))), keys(range(len(kernels))[::-1])
tool._recorded[:] = [l for l in tool._recorded if "activation_kernels" in l.name][-{most}:]
first = tool.compile_all(2)
here.rename(there)
tool.prepare(there)
print([in_order == turned, first, tool.compile_all(2), tool.compile_all(2)])
"""


@pytest.mark.parametrize("most", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_kernels_are_compiled_once_wherever_their_folder_lies(most: int, tmp_path: Path) -> None:
    """Each time by processes that have compiled nothing before, in whatever order."""
    folders = [*compile_kernels.FOLDERS, str(launch.ROOT / "tools")]
    script = COMPILE.format(folders=folders, folder=str(tmp_path), most=most)
    output = run_script(script, tmp_path)
    is_same, first, *others = ast.literal_eval(output.splitlines()[-1])
    assert is_same, "the keys of kernels depend on the order in which they are compiled"
    compiled = [kernel for kernel, is_hit, _ in first if not is_hit]
    assert len(compiled) == len(first) >= min(most, 6)
    for again in others:
        assert [(kernel, is_hit) for kernel, is_hit, _ in again] == [(k, True) for k in compiled]


@pytest.fixture
def layer() -> passes.Pass:
    with passes.single_rank():
        yield passes.Pass(passes.DRY_SHAPE, "ours")


def test_routings_are_what_their_names_say(layer: passes.Pass) -> None:
    shape = passes.DRY_SHAPE
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
        capture_safety.check_replays(passes.DRY_SHAPE)


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
        capture_safety.check_replays(passes.DRY_SHAPE)
    assert "even 0" not in str(caught.value)


def test_allocations_in_a_replay_are_noticed(
    layer: passes.Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter(range(100))
    monkeypatch.setattr(capture_safety, "num_allocations", lambda: next(counts))
    with pytest.raises(AssertionError, match="6 allocations"):
        capture_safety.check_replays(passes.DRY_SHAPE)


def test_the_control_must_wait(layer: passes.Pass, monkeypatch: pytest.MonkeyPatch) -> None:
    build = moe_layer.build
    monkeypatch.setattr(moe_layer, "build", lambda s, d, ours, c, **kw: build(s, d, True, c, **kw))
    with pytest.raises(AssertionError, match="must fail"):
        capture_safety.check_control(passes.DRY_SHAPE)


def test_wrong_results_of_a_layer_are_noticed(
    layer: passes.Pass, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = capture_safety.dense_layer
    monkeypatch.setattr(capture_safety, "dense_layer", lambda *given: 1.05 * dense(*given))
    with pytest.raises(AssertionError, match="errors against a dense loop"):
        capture_safety.check_results(passes.DRY_SHAPE)


def test_products_that_differ_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_gemm, "pointer_product", lambda rows, *a, **k: 2 * rows[:, :16])
    with pytest.raises(ValueError, match="differ"):
        grouped_gemm.measure("forward", grouped_gemm.DRY_SHAPES["dry run"])


def test_fp8_that_is_off_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales of another row, say: the error is no longer that of the format."""
    shape = fp8_products.DRY_SHAPES["dry run in FP8"]
    assert 0.03 < fp8_products.measure("wgrad", shape)["error"] < 0.045
    product = fp8_products.scaled_product
    monkeypatch.setattr(fp8_products, "scaled_product", lambda *given: 1.05 * product(*given))
    with pytest.raises(ValueError, match="the error is"):
        fp8_products.measure("forward", shape)


@pytest.mark.parametrize(
    ("results", "limit", "words"),
    [
        ([1.0, 1.0, 1.0], 0.0, None),
        ([1.0, 1.0, 1.25], 0.0, "other bits in a repetition"),
        ([1.25, 1.25, 1.25], 0.0, "not the bits of the reference"),
        ([1.25, 1.25, 1.25], 0.1, r"errors of \[0.25\]"),
        ([float("nan")] * 3, 0.1, r"errors of \[nan\]"),
    ],
)
def test_wrong_results_of_a_kernel_are_noticed(
    results: list[float], limit: float, words: str | None
) -> None:
    values = iter(results)
    check = kernel_checks.KernelCheck(
        "kernel", tuple, lambda: [torch.full((5,), next(values))], lambda: [torch.ones(4)], limit
    )
    if words is None:
        assert check() == {"results": 1, "error": 0.0}
        return
    with pytest.raises(AssertionError, match=words):
        check()


def error_of_tensor_cores(chain: int) -> float:
    """Of a product in e4m3 where ``chain`` numbers are summed as sm_90 does, 13 bits kept."""
    torch.manual_seed(0)
    drawn = fp8_checks._draw(torch.float32, 2, 16, 4096)
    left, right = fp8.quantise_reference(drawn, fp8_checks.ROWWISE).values.double()
    terms, total = left[:, None] * right, torch.zeros(16, 16, dtype=torch.float64)
    for first in range(0, 4096, chain):
        part = torch.zeros_like(total)
        for step in range(first, first + chain, 32):
            given = torch.cat((terms[..., step : step + 32], part[..., None]), -1)
            unit = given.abs().amax(-1, keepdim=True).log2().floor().sub(13).exp2()
            part = given.div(unit).trunc().mul(unit).sum(-1)
        total += part
    return ((total - terms.sum(-1)).norm() / terms.sum(-1).norm()).item()


def test_fp8_products_have_a_limit_that_a_right_kernel_keeps() -> None:
    """Sums of 128 as the kernels' are within it, and sums that nobody adds in fp32 are not."""
    assert 1e-4 < error_of_tensor_cores(128) < fp8_checks.PRODUCT_LIMIT
    assert error_of_tensor_cores(4096) > fp8_checks.PRODUCT_LIMIT


def test_other_gradients_with_offloading_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    with pytest.raises(AssertionError, match="other gradients"):
        offloading.check_bits(32, 16)


def test_a_layer_that_waits_is_noticed(
    layer: passes.Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "WAITS", {"aten::mm"})
    with pytest.raises(AssertionError, match="the host waits"):
        layers.profile(recorder(tmp_path), "dry run", "ours")


@pytest.mark.parametrize("variant", training_step.VARIANTS)
def test_flags_are_known(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.training.arguments import parse_args

    from pretrain_gpt_moe import extra_args_provider

    flags = training_step.VARIANTS[variant].split()
    model = training_step.Model()
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moe.py", *model.flags(tmp_path), *flags])
    args = parse_args(extra_args_provider)
    assert args.moe_enable_echo == variant.startswith("ours")
    impl = "transformer_engine" if "TE, captured" in variant else "local"
    impl = impl if "layers" in variant or "parts" in variant else "full_iteration"
    assert args.cuda_graph_impl == (impl if "captured" in variant else "none")
    assert (args.transformer_impl == "transformer_engine") == ("TE" in variant)
    assert args.te_rng_tracker == ("captured" in variant)
    assert model.tokens == args.seq_length * args.global_batch_size


def test_the_flops_of_a_token_are_those_of_its_parameters() -> None:
    """Twice forward, four times backward; Megatron's count, which has no router, is 0.1 % less."""
    attention, expert = 2 * 2048 * 128 * (16 + 4), 3 * 2048 * 768
    per_layer = attention + 8 * expert + 32 * 2048
    expected = 6 * (8 * per_layer + 2048 * 32000) + 8 * 6 * (16 * 128 * 1024)
    assert training_step.Model().flops_per_token == expected
