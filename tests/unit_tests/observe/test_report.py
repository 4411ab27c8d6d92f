"""What the report says of a run, against the run's files; what it says of bad ones."""

import html
import json
import pickle
import re
import shutil
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_echo.observe import report, report_data
from megatron_echo.observe.report_data import read_run
from megatron_echo.observe.report_memory import ReportError
from megatron_echo.planner import plan_clones
from megatron_echo.planner.bound import balance_bound
from megatron_echo.record.trace import RoutingTrace

RANKS, EXPERTS, SLOTS, STEPS, MICROBATCHES = 4, 8, 2, 6, 3
TOLERANCE = 0.1


def write_traces(folder: Path) -> None:
    """Two pipeline stages with the layers 1 and 2, 3 and 4."""
    generator = torch.Generator().manual_seed(0)
    for stage, layers in enumerate(((1, 2), (3, 4))):
        trace = RoutingTrace(str(folder), every=1)
        for step in range(STEPS):
            for layer in layers * MICROBATCHES:
                counts = torch.randint(0, 100, (RANKS, EXPERTS), generator=generator)
                counts[:, :2] *= 5
                trace.record(layer, stage, plan_clones(counts, SLOTS, tolerance=TOLERANCE))
            trace.end_step(iteration=step + 1)


def write_ledger(path: Path) -> dict[str, int]:
    """Two experts and a norm whose storages overlap; the bytes by module at the peak."""
    fields = {"layer": "decoder.layers.0", "microbatch": 0, "dtype": "bfloat16", "shape": [8, 2]}
    lives = [
        ("mlp.experts.0", "activation", 100, 0, 7), ("mlp.experts.1", "activation", 50, 1, 3),
        ("norm", "index", 30, 2, None), ("norm", "weight", 999, 4, None),
        ("norm", "activation", 40, 5, 6),
    ]  # fmt: skip
    entries = [
        {**fields, "module": m, "kind": k, "nbytes": n, "saved_at": at, "freed_at": end}
        for m, k, n, at, end in lives
    ]
    entries.append({**entries[-1], "nbytes": 7, "saved_at": 8, "freed_at": None, "taken": True})
    path.write_text(json.dumps({"events": 9, "entries": entries}))
    return {"mlp.experts.*": 150, "norm": 30}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    flags = {
        "moe_enable_echo": True, "moe_echo_tolerance": TOLERANCE, "seq_length": 64,
        "moe_echo_trace_dir": None, "moe_received_token_capacity": None, "lr": float("inf"),
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({"flags": flags, "command": ["train.py"]}))
    lines = [
        {
            "iteration": n, "lm loss": 5 - n / 3, "iteration-time": 1 + (n * 7 % 5) / 7,
            "batch-size": 8, "moe_echo/clones": n / 7, "moe_echo/overload_placed_max": 1 + n / 100,
            "moe_echo/seconds_saved": n / 1000,
            "offload/bytes": 1000 * n, "offload/exposed_bytes": n, "offload/hidden_bytes": 10,
            "forward-backward-time": 0.7 + n / 70, "forward-compute-time": 0.3,
            "batch-generator-time": 0.125, "backward-compute-time": 0.25 + n / 100,
            "forward-recv-time": 0.03, "optimizer-time": 0.2, "params-all-gather-time": 0.05,
        }
        for n in range(1, STEPS + 1)
    ]  # fmt: skip
    lines[2] |= {"lm loss": "nan", "offload/bytes": float("nan")}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_traces(folder / "traces")
    for name in ("ledger.json", "ledger-stage1.json"):
        write_ledger(folder / name)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def figures(rows: list[dict]) -> dict:
    return {row["label"]: row["value"] for row in rows}


def test_ten_figures_from_the_files(run: Path) -> None:
    """Each is worked out again from ``metrics.jsonl``, ``run.json`` and the ``.npz`` files."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = [np.load(path) for path in sorted((run / "traces").glob("*.npz"))]
    seconds = [line["iteration-time"] for line in lines]
    data = read_run(run, 10**6)
    summary, limits = figures(data["summary"]), figures(data["limits"])
    assert summary["iterations"] == STEPS
    assert summary["last training loss"] == lines[-1]["lm loss"]
    assert summary["median step time"] == statistics.median(seconds)
    assert summary["longest step"] == max(seconds)
    assert summary["tokens a second"] == 8 * 64 / statistics.median(seconds)
    assert summary["clones of a layer call"] == pytest.approx(
        sum(line["moe_echo/clones"] for line in lines) / STEPS
    )
    assert summary["a layer call saves by prediction"] == pytest.approx(0.0035)
    assert summary["offloaded in a step"] == 4000  # the median of those that are numbers
    assert summary["came back late"] == 21 / (21 + 10 * STEPS)
    assert limits["highest load of a rank over the mean"] == 1.06
    assert limits["layer calls"] == sum(len(file["layer"]) for file in files)
    within = 0
    for file in files:
        for counts, after in zip(file["counts"], file["load_after"], strict=True):
            within += after.max() <= balance_bound(int(counts.sum()), RANKS, TOLERANCE)
    assert limits["of them within the tolerance"] == within > 0
    assert limits["clone slots of a rank"] == SLOTS
    assert all(row["source"] for row in data["summary"] + data["limits"])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"moe_echo_tolerance": 0.1}, (0.1, None)),
        ({"moe_echo_tolerance": None}, (0.25, None)),
        ({"moe_echo_tolerance": None, "moe_received_token_capacity": 1.5}, (0.5, None)),
        ({"moe_echo_clones_within_node": True, "moe_echo_ranks_per_node": 2}, (0.0, 2)),
        ({"moe_echo_clones_within_node": False, "moe_echo_ranks_per_node": 2}, (0.0, None)),
    ],
)
@pytest.mark.parametrize("is_decided", [False, True], ids=["given", "decided by auto"])
def test_the_bound_of_a_run(
    flags: dict, expected: tuple[float, int | None], is_decided: bool, run: Path, tmp_path: Path
) -> None:
    """Of ``auto``, what the buffer holds; within nodes, that of the fullest."""
    shutil.copytree(run, tmp_path / "other")
    record = json.loads((run / "run.json").read_text())
    if is_decided:
        nodes = ("moe_echo_clones_within_node", "moe_echo_ranks_per_node")
        record["decided"] = {name: flags[name] for name in nodes if name in flags}
        flags = {**flags, **dict.fromkeys(record["decided"])}
    kept = {name: record["flags"][name] for name in ("moe_enable_echo", "moe_echo_trace_dir")}
    (tmp_path / "other" / "run.json").write_text(json.dumps({**record, "flags": {**kept, **flags}}))
    data = read_run(tmp_path / "other", 10**6)
    tolerance, domain = expected
    layer = data["trace"]["steps"][0]["layers"][0]
    size = domain or RANKS
    fullest = max(sum(layer["before"][at : at + size]) for at in range(0, RANKS, size))
    assert layer["bound"] == balance_bound(fullest, size, tolerance)


def test_metrics_as_columns(run: Path) -> None:
    metrics = read_run(run, 10**6)["metrics"]
    assert metrics["iteration"] == list(range(1, STEPS + 1))
    assert metrics["values"]["lm loss"][1:4] == [5 - 2 / 3, "nan", 5 - 4 / 3]
    assert (metrics["every"], metrics["lines"]) == (1, STEPS)


def test_layers_of_a_step_are_those_of_the_trace(run: Path) -> None:
    """All stages' layers, every number by plain loops over the microbatches."""
    step = read_run(run, 10**6)["trace"]["steps"][3]
    assert step["iteration"] == 4
    assert [layer["layer"] for layer in step["layers"]] == [1, 2, 3, 4]
    for layer in step["layers"]:
        stage = (layer["layer"] - 1) // 2
        file = np.load(run / "traces" / f"step-00000004-stage-{stage:03d}.npz")
        loads, routed, placed, clones = np.zeros(EXPERTS, int), [], [], {}
        befores = {}
        for at in np.flatnonzero(file["layer"] == layer["layer"]):
            counts, after = file["counts"][at], file["load_after"][at]
            before = [counts[:, 2 * rank : 2 * rank + 2].sum() for rank in range(RANKS)]
            loads += counts.sum(0)
            routed.append(max(before) * RANKS / counts.sum())
            placed.append(after.max() * RANKS / counts.sum())
            befores[int(file["microbatch"][at])] = (routed[-1], before, after.tolist())
            for rank, slots in enumerate(file["slot_expert"][at]):
                for expert in slots[slots >= 0]:
                    key = (int(expert), rank)
                    clones[key] = clones.get(key, 0) + 1
        assert layer["load"] == loads.tolist()
        assert layer["routed"] == pytest.approx([statistics.fmean(routed), max(routed)])
        assert layer["placed"] == pytest.approx([statistics.fmean(placed), max(placed)])
        assert layer["calls"] == MICROBATCHES
        highest, before, after = befores[layer["fullest"]]
        assert highest == max(routed)
        assert (layer["before"], layer["after"]) == (before, after)
        assert layer["bound"] == balance_bound(int(sum(before)), RANKS, TOLERANCE)
        assert {(e, rank): n for e, rank, n in layer["clones"]} == clones


def test_parts_of_a_step_add_up(run: Path) -> None:
    data = read_run(run, 10**6)
    parts = {part["label"]: part["values"] for part in data["parts"]}
    for row, whole in enumerate(data["metrics"]["values"]["iteration-time"]):
        assert sum(values[row] for values in parts.values()) == pytest.approx(whole)
    number = np.arange(1, STEPS + 1)
    assert parts["data"] == [0.125] * STEPS
    assert parts["forward"] == pytest.approx([0.175] * STEPS)
    assert parts["optimizer"] == pytest.approx([0.15] * STEPS)
    rest = 0.7 + number / 70 - 0.3 - 0.25 - number / 100 - 0.03
    assert parts["rest of the passes"] == pytest.approx(rest)
    assert data["parts"][2]["median"] == pytest.approx(0.25 + 3.5 / 100)
    assert all(part["source"] for part in data["parts"])


def test_parts_without_timers_or_with_few(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]

    def rewrite(*names: str) -> list[str]:
        kept = [{n: line[n] for n in ("iteration", "iteration-time", *names)} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        return [part["label"] for part in read_run(run, 10**6)["parts"]]

    assert rewrite() == []
    labels = rewrite("forward-backward-time", "optimizer-time")
    assert labels == ["forward and backward", "optimizer", "rest of the step"]


def test_memory_by_module(run: Path, tmp_path: Path) -> None:
    first, second = read_run(run, 10**6)["ledgers"]
    assert (first["file"], second["file"]) == ("ledger.json", "ledger-stage1.json")
    at_peak = write_ledger(tmp_path / "again.json")
    assert {name: peak for name, peak, *_ in first["modules"]} == at_peak
    assert first["peak"] == sum(at_peak.values())
    assert first["modules"][1] == ["norm", 30, 70, 2]
    assert first["taken"] == 7
    kept = zip(*first["curves"].values(), strict=True)
    assert dict(zip(first["events"], map(sum, kept), strict=True))[5] == 100 + 30 + 40


@settings(max_examples=20, deadline=None)
@given(lines=st.integers(1, 5000))
def test_long_runs_are_thinned_evenly(lines: int) -> None:
    columns = report_data._columns([{"iteration": n, "lm loss": n} for n in range(lines)])
    shown = columns["iteration"]
    assert len(shown) <= report_data.MAX_POINTS
    assert shown == list(range(0, lines, columns["every"]))
    assert columns["every"] == 1 or lines > report_data.MAX_POINTS


def test_traces_are_thinned_to_their_share(run: Path) -> None:
    whole, part = read_run(run, 10**6)["trace"], read_run(run, 600)["trace"]
    assert (whole["every"], whole["traced"], len(whole["steps"])) == (1, STEPS, STEPS)
    assert part["traced"] == STEPS
    assert 1 < part["every"] < STEPS / 2
    assert part["steps"] == whole["steps"][:: part["every"]]


def test_traces_where_the_flag_says(run: Path, tmp_path: Path) -> None:
    (run / "traces").rename(tmp_path / "elsewhere")
    assert read_run(run, 10**6)["trace"] is None
    record = json.loads((run / "run.json").read_text())
    record["flags"]["moe_echo_trace_dir"] = str(tmp_path / "elsewhere")
    (run / "run.json").write_text(json.dumps(record))
    assert len(read_run(run, 10**6)["trace"]["steps"]) == STEPS


@pytest.mark.parametrize("echo", [True, False])
def test_a_run_without_traces_says_how_to_get_them(run: Path, echo: bool) -> None:
    for path in (run / "traces").iterdir():
        path.unlink()
    (run / "run.json").write_text(json.dumps({"flags": {"moe_enable_echo": echo}}))
    data = read_run(run, 10**6)
    assert data["trace"] is None
    assert "--moe-echo-trace-dir" in data["trace_missing"]
    assert ("--moe-enable-echo" in data["trace_missing"]) == (not echo)


# ------------------------------------------------------------------------------- the page


def test_the_page_holds_its_data_and_needs_no_network(run: Path) -> None:
    page = report.build_report([run])
    found = re.search(r'<script type="application/json" id="report-data">(.*?)</script>', page)
    data = json.loads(found[1], parse_constant=lambda name: pytest.fail(name))
    assert data == [read_run(run, report.TRACE_NUMBERS)]
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|@import|url\(""", page)
    assert not re.search("@[A-Z]+@", page)


def test_names_and_flags_cannot_break_the_page(run: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>@DATA@"
    renamed = run.rename(run.parent / "<b>@STYLE@")
    (renamed / "run.json").write_text(json.dumps({"flags": {"x": evil}, "command": [evil]}))
    page = report.build_report([renamed])
    assert "<img" not in page
    assert f"<title>{html.escape('<b>@STYLE@')}</title>" in page


def test_two_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "two.html"
    report.main([str(run), "-o", str(output), "--against", str(run)])
    assert "<title>run against run</title>" in output.read_text()
    assert capsys.readouterr().out.startswith(str(output))


# ------------------------------------------------------------------------------- bad input


def change(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def trace_file(run: Path) -> Path:
    return run / "traces" / "step-00000002-stage-000.npz"


def cut_trace(run: Path) -> None:
    trace_file(run).write_bytes(trace_file(run).read_bytes()[:400])


def flip_trace(run: Path) -> None:
    content = bytearray(trace_file(run).read_bytes())
    content[100:400] = bytes(300)
    trace_file(run).write_bytes(content)


def save_trace(**changes: object) -> Callable[[Path], None]:
    """A trace with some arrays replaced, or left out (None)."""

    def save(run: Path) -> None:
        with np.load(trace_file(run)) as file:
            arrays = {**{name: file[name] for name in file.files}, **changes}
        arrays = {name: array for name, array in arrays.items() if array is not None}
        np.savez(trace_file(run), **arrays)

    return save


def plain_array(run: Path) -> None:
    with open(trace_file(run), "wb") as file:
        np.save(file, np.zeros(3))


class Pickled:
    """Leaves a mark where it is unpickled."""

    def __reduce__(self) -> tuple:
        return (pytest.fail, ("a pickle was loaded",))


CALLS = 2 * MICROBATCHES


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: run.rename(run.parent / "gone"), r"run is no folder\. Give"),
        (lambda run: (run / "run.json").unlink(), r"run\.json does not exist\. Give"),
        (change("run.json", '{"flags": '), r"run\.json is no JSON .*\. Start"),
        (change("run.json", "[]"), r"run\.json has no flags\. Give"),
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl does not exist\. Start"),
        (change("metrics.jsonl", '{"iteration": 1}\n{"itera'), r"line, '{\"itera'\. Remove"),
        (change("metrics.jsonl", "[1]\n"), r"a line without an iteration\. Remove"),
        (lambda run: (run / "metrics.jsonl").write_bytes(b"\xff\xfe"), r"is no text\. Give"),
        (cut_trace, r"step-00000002-stage-000\.npz is cut short or no \.npz .*\. Take"),
        (flip_trace, r"stage-000\.npz is cut short or no \.npz .*\. Take"),
        (lambda run: trace_file(run).write_bytes(b""), r"is cut short or no \.npz"),
        (lambda run: trace_file(run).write_text("hello"), r"is cut short or no \.npz"),
        (plain_array, r"is cut short or no \.npz"),
        (save_trace(counts=np.array([Pickled()])), r"is cut short or no \.npz file of numbers"),
        (save_trace(counts=None), r"is no routing trace: .*counts.*\. Take"),
        (save_trace(counts=np.zeros((CALLS, RANKS, 7), int)), r"its arrays do not fit\. Take"),
        (save_trace(load_after=np.zeros((CALLS, RANKS))), r"its arrays do not fit"),
        (save_trace(layer=np.zeros((0,), int)), r"its arrays do not fit"),
        (save_trace(iteration=np.zeros(2, int)), r"its arrays do not fit"),
        (save_trace(counts=np.zeros((CALLS, RANKS, 16), int)), r"of another run than .*\. Take"),
        (change("ledger.json", "{"), r"ledger\.json is no memory ledger\. Take"),
        (change("ledger.json", '{"events": 1, "entries": [{}]}'), r"is no memory ledger"),
        (change("ledger.json", "[1]"), r"is no memory ledger"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_one_message(
    damage: Callable[[Path], object], message: str, run: Path, tmp_path: Path
) -> None:
    damage(run)
    with pytest.raises(ReportError, match=message) as raised:
        read_run(run, 10**6)
    with pytest.raises(SystemExit) as ended:
        report.main([str(run), "-o", str(tmp_path / "never.html")])
    assert ended.value.code == str(raised.value)
    assert "\n" not in ended.value.code
    assert not (tmp_path / "never.html").exists()


def test_no_pickle_is_loaded_from_a_run(run: Path, tmp_path: Path) -> None:
    """Python itself tells of every name that a pickle asks for."""
    asked: list[str] = []
    is_watched = True
    sys.addaudithook(
        lambda event, about: (
            asked.append(event) if is_watched and event.startswith("pickle.") else None
        )
    )
    content = pickle.dumps(Pickled())
    for name in ("ledger.pkl", "metrics.pt", "traces/step-00000001-stage-009.npy", "routing.npz"):
        (run / name).write_bytes(content)
    report.main([str(run), "-o", str(tmp_path / "page.html")])
    for name in ("run.json", "metrics.jsonl", "ledger.json", trace_file(run).relative_to(run)):
        kept = (run / name).read_bytes()
        (run / name).write_bytes(content)
        with pytest.raises(SystemExit):
            report.main([str(run), "-o", str(tmp_path / "page.html")])
        (run / name).write_bytes(kept)
    save_trace(counts=np.array([Pickled()]))(run)
    with pytest.raises(SystemExit):
        report.main([str(run), "-o", str(tmp_path / "page.html")])
    is_watched = False
    assert asked == []


def test_an_output_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Give a file that can be written with -o\."):
        report.main([str(run), "-o", str(tmp_path / "no" / "such" / "folder.html")])
