"""The report of a real run in a real browser: it loads, answers, and shows the files' numbers.

Chromium is spoken to through its ``--remote-debugging-pipe``; tests are skipped without it.
"""

import json
import os
import select
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest

from megatron_echo.observe import report
from megatron_echo.record.metrics import read_metrics
from megatron_echo.record.trace import read_traces

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")

NOTHING = "\N{EN DASH}"
PHONE, DESK = (360, 740), (1200, 900)
SWITCHES = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One tab of a headless Chromium.

    Attributes:
        problems: console errors, exceptions and requests that were refused, as they came.
    """

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._number = 0
        self._session: dict[str, str] = {}
        self._events: list[str] = []
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._answers], [], [], 60)[0], "the browser does not answer"
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has gone"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        answer = json.loads(message)
        method, about = answer.get("method", ""), json.dumps(answer.get("params", {}))
        self._events.append(method)
        is_error = method == "Log.entryAdded" and '"level": "error"' in about
        is_error |= method == "Runtime.consoleAPICalled" and '"type": "error"' in about
        if is_error or method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
            self.problems.append(about)
        if method == "Network.requestWillBeSent":
            url = answer["params"]["request"]["url"]
            self.problems += [] if url.startswith(("file:", "data:")) else [url]
        return answer

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A command of the DevTools protocol and its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params, **self._session}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, size: tuple[int, int] = DESK) -> float:
        """Load a file; the seconds until everything on it was drawn."""
        width, height = size
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        self.problems.clear()
        self._events.clear()
        started = time.monotonic()
        self.call("Page.navigate", url=path.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive()
        self.run("new Promise((drawn) => requestAnimationFrame(() => setTimeout(drawn)))")
        return time.monotonic() - started

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        answer = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, times: int = 1) -> None:
        """Press a key on the keyboard."""
        code = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}[key]
        for _ in range(times):
            for kind in ("rawKeyDown", "keyUp"):
                self.call(
                    "Input.dispatchKeyEvent", type=kind, key=key, code=key,
                    windowsVirtualKeyCode=code,
                )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser; it reads commands from its descriptor 3 and answers on 4."""
    profile = tmp_path_factory.mktemp("profile")
    to_browser, from_browser = os.pipe(), os.pipe()
    ends = to_browser[0], from_browser[1]
    words = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
    command = ["bash", "-c", words, str(BROWSER), *SWITCHES, f"--user-data-dir={profile}"]
    process = subprocess.Popen(command, pass_fds=ends, stderr=subprocess.DEVNULL)
    for end in ends:
        os.close(end)
    try:
        yield Page(to_browser[1], from_browser[0])
    finally:
        process.kill()
        process.wait()
        for end in (to_browser[1], from_browser[0]):
            os.close(end)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short runs: ``clones`` with traces, offloading, timers and ledger, ``plain`` without."""
    folder = tmp_path_factory.mktemp("runs")
    skew = {"expert_model_parallel_size": 2, "moe_echo_force_skew": 1.0}
    clones = {
        "moe_enable_echo": True, "moe_echo_trace_dir": folder / "clones" / "traces",
        "fine_grained_activation_offloading": True, "offload_modules": ["moe_act", "attn_norm"],
        "min_offloaded_tensor_size": 16, "timing_log_level": 2,
        "memory_ledger": folder / "clones" / "ledger.json",
    }  # fmt: skip
    for name, flags in (("clones", {**skew, **clones}), ("plain", skew)):
        launch.run(launch.tiny_model(run_dir=folder / name, **flags), 2).check()
    return folder


@pytest.fixture(scope="module")
def one(runs: Path) -> Path:
    report.main([str(runs / "clones"), "-o", str(runs / "one.html")])
    return runs / "one.html"


@pytest.fixture(scope="module")
def both(runs: Path) -> Path:
    report.main(
        [str(runs / "clones"), "-o", str(runs / "both.html"), "--against", str(runs / "plain")]
    )
    return runs / "both.html"


SECTIONS = """
[...document.querySelectorAll("main section")].filter(
  (one) => !one.querySelector("svg, canvas, table, .card")).map((one) => one.id)
"""
FIRST_MAP = """document.querySelector("#experts canvas")"""


@pytest.mark.parametrize("size", [DESK, PHONE])
@pytest.mark.parametrize("name", ["one", "both"])
def test_loads_without_an_error_and_fits(
    page: Page, name: str, size: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    """Every section has something to see, nothing is wider than the window, nothing is fetched."""
    page.open(request.getfixturevalue(name), size)
    assert page.problems == []
    assert page.run(SECTIONS) == []
    assert page.run("document.documentElement.scrollWidth") <= size[0]
    page.run("scrollTo(0, document.body.scrollHeight)")
    assert page.problems == []


def test_the_slider_changes_the_heatmap(page: Page, one: Path) -> None:
    """With the keyboard, there and back."""
    page.open(one)
    page.run("document.getElementById('step').focus()")
    pictures, names = [], []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.press(key)
        pictures.append(page.run(f"{FIRST_MAP}.toDataURL()"))
        names.append(page.run("document.getElementById('step-name').textContent"))
    assert names == ["iteration 2", "iteration 3", "iteration 2"]
    assert pictures[0] == pictures[2] != pictures[1]


def test_cells_are_those_of_the_trace(page: Page, runs: Path, one: Path) -> None:
    """Every expert of the last layer, step by step, by arrow keys alone."""
    page.open(one, PHONE)
    traces = read_traces(runs / "clones" / "traces")
    assert len(traces) == 4
    for at, trace in enumerate(traces):
        page.run("document.getElementById('step').focus()")
        page.press("ArrowRight", min(at, 1))
        page.run(f"{FIRST_MAP}.focus()")
        page.press("ArrowDown", 2)
        page.press("ArrowLeft", 8)
        loads = trace.counts[trace.layer == 2].sum((0, 1))
        for expert, load in enumerate(loads):
            text = page.run("document.querySelector('#experts .readout').textContent")
            start = f"step {trace.iteration}, layer 2, expert {expert} (home rank {expert // 4}): "
            assert text.startswith(start)
            share = load / loads.mean()
            pairs, _, rest = text.removeprefix(start).partition(" pairs, ")
            assert int(pairs.replace(",", "")) == load
            assert float(rest.split()[0]) == pytest.approx(share, rel=1e-4)
            page.press("ArrowRight")
    assert page.run("document.getElementById('layer').value") == "2"


def test_ranks_and_clones_are_those_of_the_trace(page: Page, runs: Path, one: Path) -> None:
    page.open(one)
    trace = read_traces(runs / "clones" / "traces")[0]
    here = trace.layer == 1
    overload = trace.load_before[here].max(1) / trace.load_before[here].mean(1)
    fullest = overload.argmax()
    rows = page.run(
        "[...document.querySelectorAll('#ranks tbody tr')].map("
        "(row) => [...row.children].map((cell) => cell.textContent))"
    )
    bars = page.run("[...document.querySelectorAll('#ranks rect')].map((r) => +r.dataset.value)")
    assert (
        bars == np.stack((trace.load_before, trace.load_after), -1)[here][fullest].ravel().tolist()
    )
    for rank, row in enumerate(rows):
        before, after = trace.load_before[here][fullest], trace.load_after[here][fullest]
        experts, times = np.unique(trace.slot_expert[here][:, rank], return_counts=True)
        clones = [(e, n) for e, n in zip(experts, times, strict=True) if e >= 0]
        assert row[:4] == [str(rank), str(before[rank]), str(after[rank]), str(len(clones))]
        wording = (f"{e} (from rank {e // 4}, {n} of {here.sum()})" for e, n in clones)
        assert row[4] == (", ".join(wording) or NOTHING)
    assert sum(int(row[3]) for row in rows) > 0


def test_figures_are_those_of_the_metrics(page: Page, runs: Path, both: Path) -> None:
    page.open(both)
    cards = page.run(
        "Object.fromEntries([...document.querySelectorAll('.card b')]"
        ".map((b) => [b.dataset.label, b.textContent.slice(2)]))"
    )
    for letter, name in (("A", "clones"), ("B", "plain")):
        lines = read_metrics(runs / name)
        loss, seconds = lines[-1]["lm loss"], max(line["iteration-time"] for line in lines)
        assert float(cards[f"{letter} last training loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(cards[f"{letter} longest step"][:-2]) == pytest.approx(seconds, rel=1e-4)
    assert cards["B clones of a layer call"] == NOTHING
    text = page.run("document.querySelector('main').innerText")
    assert "--moe-echo-trace-dir" in text, "how to get what the second run lacks"
    assert "moe_enable_echo" in page.run("document.querySelector('#flags .scroll').innerText")


ROWS = """
[...document.querySelectorAll("%s tbody tr")].map(
  (row) => [...row.children].map((cell) => cell.textContent))
"""


def test_parts_of_a_step_are_those_of_the_timers(page: Page, runs: Path, one: Path) -> None:
    page.open(one)
    parts = {row[0]: float(row[1]) / 1e3 for row in page.run(ROWS % "#time")}
    lines = read_metrics(runs / "clones")
    for part, timer in (
        ("data", "batch-generator"), ("backward", "backward-compute"), ("optimizer", "optimizer"),
    ):  # fmt: skip
        median = statistics.median(line[f"{timer}-time"] for line in lines)
        assert parts[part] == pytest.approx(median, rel=1e-3)
    assert min(parts.values()) >= 0
    for line in lines:
        assert line["forward-backward-time"] + line["optimizer-time"] < line["iteration-time"]


def test_memory_is_that_of_the_ledger(page: Page, runs: Path, one: Path) -> None:
    page.open(one)
    ledger = json.loads((runs / "clones" / "ledger.json").read_text())
    rows = page.run(ROWS % "#memory")
    peaks = [float(row[1].split()[0]) for row in rows]
    assert sum(peaks) == pytest.approx(ledger["peak_bytes"] / 2**20, rel=1e-3)
    saved = {row[0]: float(row[2].split()[0]) for row in rows}
    norms = [e for e in ledger["entries"] if e["module"] == "input_layernorm" and not e["taken"]]
    kept = sum(entry["nbytes"] for entry in norms if entry["kind"] in ("activation", "index"))
    assert saved.get("input_layernorm", 0) == pytest.approx(kept / 2**20, rel=1e-3)


def test_every_control_is_reached_with_the_tab_key(page: Page, one: Path) -> None:
    page.open(one)
    reached = set()
    for _ in range(25):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.tagName"))
    assert {"step", "layer", "metric", "CANVAS", "svg", "SUMMARY"} <= reached


@pytest.mark.parametrize(
    "lines", ["", '{"iteration": 1}\n', '{"iteration": 1, "lm loss": "nan"}\n']
)
def test_a_run_that_recorded_next_to_nothing(page: Page, lines: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"flags": {}}')
    (tmp_path / "metrics.jsonl").write_text(lines)
    report.main([str(tmp_path), "-o", str(tmp_path / "page.html")])
    page.open(tmp_path / "page.html")
    assert page.problems == []
    assert page.run("document.querySelectorAll('.missing').length") >= 5


def test_a_large_run_is_small_and_opens_fast(page: Page, tmp_path: Path) -> None:
    """100 steps of 60 layers, 256 experts and 64 ranks."""
    run = tmp_path / "large"
    (run / "traces").mkdir(parents=True)
    flags = {"moe_enable_echo": True, "moe_echo_tolerance": 0.02, "seq_length": 4096}
    (run / "run.json").write_text(json.dumps({"flags": flags, "command": ["x"] * 50}))
    line = {f"metric {n}": 1 / 3 + n for n in range(40)}
    with open(run / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps({"iteration": n + 1, **line}) + "\n" for n in range(100))
    random = np.random.default_rng(0)
    counts = random.integers(0, 99, (60, 64, 256), np.int32)
    slots = random.integers(-1, 256, (60, 64, 4), np.int32)
    arrays = {"counts": counts, "slot_expert": slots, "layer": np.arange(60, dtype=np.int32)}
    arrays |= {"microbatch": np.zeros(60, np.int32), "load_after": counts.sum(2)}
    first = run / "traces" / "step-00000001-stage-000.npz"
    np.savez_compressed(first, iteration=1, stage=0, **arrays)
    for step in range(2, 101):
        (run / "traces" / f"step-{step:08d}-stage-000.npz").symlink_to(first)
    report.main([str(run), "-o", str(tmp_path / "large.html")])
    assert (tmp_path / "large.html").stat().st_size < 5_000_000
    assert page.open(tmp_path / "large.html") < 2
    assert page.problems == []
