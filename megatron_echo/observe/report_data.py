"""What the report says about a run, as plain JSON: read from the run's files, nothing assumed."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_echo.observe.report_memory import ReportError, read_ledgers
from megatron_echo.observe.report_time import step_parts
from megatron_echo.progress import track
from megatron_echo.record.metrics import METRICS_FILE, read_metrics
from megatron_echo.record.run_record import RUN_FILE
from megatron_echo.record.trace import StepTrace, TraceError, trace_files
from megatron_echo.record.trace import read_trace as load_trace

MAX_POINTS = 1000
"""Iterations in a chart; of longer runs each n-th is shown, and the page says so."""

_RECORD_KEYS = ("started", "command", "versions", "git_commit", "device", "layout", "flags")

Json = dict[str, Any]


def read_run(folder: Path, trace_numbers: int) -> Json:
    """Everything that the page shows of a run, with about ``trace_numbers`` numbers of its traces.

    Returns:
        ``name``, the entries of ``run.json``, ``metrics`` (columns by name), ``summary`` and
        ``limits`` (rows with ``label``, ``value``, ``unit``, ``source``), ``parts`` of the steps
        (:func:`.step_parts`), ``ledgers`` (:func:`.read_ledgers`), ``trace`` (:func:`read_trace`)
        or None, and ``trace_missing``, why there is none.

    Raises:
        ReportError: the folder is no run, or one of its files is damaged.
    """
    record = _read_record(folder)
    lines = _read_lines(folder)
    trace, trace_missing = None, None
    paths = _trace_files(folder, record["flags"])
    if paths:
        try:
            trace = read_trace(paths, *_rules(record["flags"]), trace_numbers)
        except TraceError as error:
            raise ReportError(str(error)) from None
    else:
        trace_missing = _how_to_trace(record["flags"])
    metrics = _columns(lines)
    run = {
        "name": folder.resolve().name,
        **{key: record.get(key) for key in _RECORD_KEYS},
        "metrics": metrics,
        "summary": summarise(lines, record["flags"]),
        "limits": _limits(lines, record["flags"], trace),
        "parts": step_parts(metrics),
        "ledgers": read_ledgers(folder, record["flags"].get("memory_ledger")),
        "trace": trace,
        "trace_missing": trace_missing,
    }
    return json.loads(json.dumps(run), parse_constant=str)  # JSON has no nan, a page neither


# ------------------------------------------------------------------------------- run.json


def _read_record(folder: Path) -> Json:
    path = folder / RUN_FILE
    if not folder.is_dir():
        raise ReportError(f"{folder} is no folder. Give what was given as --run-dir.")
    if not path.is_file():
        raise ReportError(f"{path} does not exist. Give a folder that was given as --run-dir.")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ReportError(f"{path} is no JSON ({error}). Start the run again.") from None
    if not isinstance(record, dict) or not isinstance(record.get("flags"), dict):
        raise ReportError(f"{path} has no flags. Give a folder that was given as --run-dir.")
    record["flags"] |= record.get("decided", {})
    return record


# ------------------------------------------------------------------------------- metrics.jsonl


def _read_lines(folder: Path) -> list[Json]:
    path = folder / METRICS_FILE
    try:
        lines = read_metrics(folder)
    except FileNotFoundError as error:
        raise ReportError(str(error)) from None
    except json.JSONDecodeError as error:
        raise ReportError(
            f"{path} has a damaged line, {error.doc[:40]!r}. Remove that line."
        ) from None
    except UnicodeDecodeError:
        raise ReportError(f"{path} is no text. Give a folder of a training run.") from None
    if not all(isinstance(line, dict) and "iteration" in line for line in lines):
        raise ReportError(f"{path} has a line without an iteration. Remove that line.")
    return lines


def _numbers(lines: Iterable[Json], name: str) -> list[float]:
    """The finite values of a metric, oldest first."""
    values = (line.get(name) for line in lines)
    return [v for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def _columns(lines: list[Json]) -> Json:
    every = max(1, math.ceil(len(lines) / MAX_POINTS))
    shown = lines[::every]
    names = sorted({name for line in shown for name in line} - {"iteration"})
    return {
        "every": every,
        "lines": len(lines),
        "iteration": [line["iteration"] for line in shown],
        "values": {name: [line.get(name) for line in shown] for name in names},
    }


def _row(label: str, value: Any, unit: str, source: str) -> Json:
    return {"label": label, "value": value, "unit": unit, "source": source}


def summarise(lines: list[Json], flags: Json) -> list[Json]:
    """The figures at the top of the page, without those that have no data."""

    def last(values: Sequence[float]) -> float:
        return values[-1]

    wanted = (
        ("iterations", "iteration", last, ""),
        ("last training loss", "lm loss", last, ""),
        ("last validation loss", "lm loss validation", last, ""),
        ("median step time", "iteration-time", statistics.median, "s"),
        ("longest step", "iteration-time", max, "s"),
        ("ranks' max / mean load, routed", "moe_echo/overload_routed", statistics.fmean, ""),
        ("ranks' max / mean load, placed", "moe_echo/overload_placed", statistics.fmean, ""),
        ("the highest, placed", "moe_echo/overload_placed_max", max, ""),
        ("clones of a layer call", "moe_echo/clones", statistics.fmean, ""),
        ("pairs computed by clones", "moe_echo/tokens_moved", statistics.fmean, "%"),
        ("a layer call saves by prediction", "moe_echo/seconds_saved", statistics.fmean, "s"),
        ("experts' max / mean load", "moe_echo/expert_overload", statistics.fmean, ""),
        ("experts without a token", "moe_echo/dead_experts", statistics.fmean, ""),
        ("offloaded in a step", "offload/bytes", statistics.median, "bytes"),
        ("most on the device, saved storages", "offload/peak_device_bytes", max, "bytes"),
    )
    words = {last: "last", max: "highest", statistics.median: "median", statistics.fmean: "mean"}
    rows = [
        _row(label, reduce(values), unit, f"{METRICS_FILE}: {words[reduce]} {name}")
        for label, name, reduce, unit in wanted
        if (values := _numbers(lines, name))
    ]
    seconds, batches = (_numbers(lines, name) for name in ("iteration-time", "batch-size"))
    if seconds and batches and flags.get("seq_length"):
        rate = statistics.median(batches) * flags["seq_length"] / statistics.median(seconds)
        source = f"{METRICS_FILE}: medians of batch-size and iteration-time; {RUN_FILE}: seq_length"
        rows.append(_row("tokens a second", rate, "", source))
    late, early = (sum(_numbers(lines, f"offload/{n}_bytes")) for n in ("exposed", "hidden"))
    if late + early:
        source = f"{METRICS_FILE}: offload/exposed_bytes of it and offload/hidden_bytes, sums"
        rows.append(_row("came back late", late / (late + early), "%", source))
    return rows


def _limits(lines: list[Json], flags: Json, trace: Json | None) -> list[Json]:
    """How full ranks may be, and how full they were."""
    wanted = (
        ("load that a rank may have above the mean", "moe_echo_tolerance", "%"),
        ("receive buffer, of a rank's token-expert pairs", "moe_received_token_capacity", ""),
        ("where it is too small", "moe_echo_overflow", ""),
        ("pairs a clone must have", "moe_echo_min_tokens_per_clone", ""),
    )
    rows = [
        _row(label, "auto" if flags[name] is None else flags[name], unit, f"{RUN_FILE}: {name}")
        for label, name, unit in wanted
        if flags.get("moe_enable_echo") and name in flags
    ]
    if values := _numbers(lines, "moe_echo/overload_placed_max"):
        source = f"{METRICS_FILE}: highest moe_echo/overload_placed_max"
        rows.append(_row("highest load of a rank over the mean", max(values), "", source))
    if flags.get("moe_enable_echo") and flags.get("moe_echo_overflow") == "drop":
        source = f"{METRICS_FILE}: last moe_echo/dropped; without one, none"
        dropped = _numbers(lines, "moe_echo/dropped")
        rows.append(_row("pairs dropped since the start", max(dropped, default=0), "", source))
    if trace is not None:
        source = "traces: slot_expert"
        rows.append(_row("clone slots of a rank", trace["slots"], "", source))
        layers = [layer for step in trace["steps"] for layer in step["layers"]]
        for name, label in (("calls", "layer calls"), ("within", "of them within the tolerance")):
            source = f"traces on this page: {'load_after' if name == 'within' else 'layer'}"
            rows.append(_row(label, sum(layer[name] for layer in layers), "", source))
    return rows


# ------------------------------------------------------------------------------- traces


def _trace_files(folder: Path, flags: Json) -> list[Path]:
    """The traces, in the folder that the run was told or, if it was moved, in its own."""
    told = flags.get("moe_echo_trace_dir")
    for place in ([Path(told)] if told else []) + [folder / "traces"]:
        if paths := trace_files(place):
            return paths
    return []


def _how_to_trace(flags: Json) -> str:
    more = "" if flags.get("moe_enable_echo") else "--moe-enable-echo and "
    trace = f"{more}--moe-echo-trace-dir RUN_DIR/traces"
    return f"This run wrote no routing trace. Start it with {trace}."


def _rules(flags: Json) -> tuple[float, int | None]:
    """How far above the mean a rank's load may be, of how many ranks; None for all.

    With ``auto`` it is what the receive buffer holds.
    """
    from megatron_echo.plan_settings import AUTO_CAPACITY  # imports Megatron

    tolerance = flags.get("moe_echo_tolerance", 0.0)
    if tolerance is None:
        tolerance = max((flags.get("moe_received_token_capacity") or AUTO_CAPACITY) - 1, 0.0)
    is_within_node = flags.get("moe_echo_clones_within_node")
    return tolerance, flags["moe_echo_ranks_per_node"] if is_within_node else None


def read_trace(paths: Sequence[Path], tolerance: float, domain: int | None, numbers: int) -> Json:
    """The traced steps of a run, each n-th so that about so many ``numbers`` are kept.

    ``paths`` are by step, one for each pipeline stage. ``domain`` is how many ranks are balanced
    among themselves, None for all; ``tolerance`` is ``--moe-echo-tolerance``.

    Returns:
        ``ranks``, ``experts``, ``slots`` (of a rank), ``traced`` (how many steps), ``every`` (n)
        and ``steps``: ``iteration`` and ``layers``, see :func:`_layer_of`.

    Raises:
        ReportError: a file cannot be read, is no trace, or is of another run.
    """
    by_step: dict[str, list[Path]] = {}
    for path in paths:
        by_step.setdefault(path.name.split("-stage-")[0], []).append(path)
    groups = list(by_step.values())
    shape = load_trace(paths[0])
    ranks, experts, slots = *shape.counts.shape[1:], shape.slot_expert.shape[2]

    def read_step(group: list[Path]) -> Json:
        layers = []
        for path in group:
            trace = load_trace(path)
            if (*trace.counts.shape[1:], trace.slot_expert.shape[2]) != (ranks, experts, slots):
                raise ReportError(f"{path} is of another run than {paths[0]}. Take one away.")
            chosen = np.unique(trace.layer)
            layers += [_layer_of(trace, int(n), tolerance, domain) for n in chosen]
        layers.sort(key=lambda layer: layer["layer"])
        return {"iteration": trace.iteration, "layers": layers}

    first = read_step(groups[0])
    size = sum(experts + 2 * ranks + 10 + 3 * len(layer["clones"]) for layer in first["layers"])
    every = max(1, math.ceil(len(groups) * size / numbers))
    return {
        "ranks": ranks,
        "experts": experts,
        "slots": slots,
        "traced": len(groups),
        "every": every,
        "steps": [first, *map(read_step, track(groups[every::every], "Traces"))],
    }


def _layer_of(trace: StepTrace, number: int, tolerance: float, domain: int | None) -> Json:
    """One layer in one step.

    Returns:
        ``load`` ``[E]``, pairs of each expert over ranks and microbatches; ``routed`` and
        ``placed``, max / mean load of ranks as ``[mean, highest]`` over microbatches; ``calls``,
        the microbatches, and ``within``, those with no rank above the bound; of the microbatch
        ``fullest`` (highest as routed): ``before`` and ``after`` ``[R]`` and the ``bound``;
        ``clones``, rows of expert, rank and in how many microbatches.
    """
    from megatron_echo.planner.bound import balance_bound

    here = trace.layer == number
    before, after = trace.load_before[here].astype(np.int64), trace.load_after[here]
    ranks = before.shape[1]
    totals = before.sum(1)
    size = domain or ranks
    fullest_domains = before.reshape(len(before), -1, size).sum(2).max(1)
    bounds = np.array([balance_bound(int(n), size, tolerance) for n in fullest_domains])
    mean = np.maximum(totals, 1) / ranks
    routed, placed = before.max(1) / mean, after.max(1) / mean
    fullest = int(routed.argmax())
    slots = trace.slot_expert[here]
    hosts = np.broadcast_to(np.arange(ranks)[:, None], slots.shape)
    pairs = np.stack((slots, hosts), -1)[slots >= 0]
    clones, calls = np.unique(pairs, axis=0, return_counts=True)
    return {
        "layer": number,
        "load": trace.counts[here].sum((0, 1)).tolist(),
        "routed": [routed.mean(), routed.max()],
        "placed": [placed.mean(), placed.max()],
        "calls": len(totals),
        "within": int((after.max(1) <= bounds).sum()),
        "fullest": int(trace.microbatch[here][fullest]),
        "before": before[fullest].tolist(),
        "after": after[fullest].tolist(),
        "bound": int(bounds[fullest]),
        "clones": np.column_stack((clones, calls)).tolist(),
    }
