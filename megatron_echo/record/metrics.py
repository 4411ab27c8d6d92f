"""``metrics.jsonl``: one line an iteration, full-precision floats under Megatron's own names."""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"
_FIRST_TAGS = ("learning-rate", "batch-size", "lm loss")
"""What Megatron's log of an iteration can begin with."""

TIMERS = {
    1: (
        "forward-backward", "all-grads-sync", "embedding-grads-all-reduce", "params-all-gather",
        "optimizer",
    ),
    2: (
        "batch-generator", "forward-compute", "backward-compute", "forward-recv", "forward-send",
        "backward-recv", "backward-send", "forward-send-forward-recv", "forward-send-backward-recv",
        "backward-send-forward-recv", "backward-send-backward-recv",
        "forward-backward-send-forward-backward-recv",
    ),
}  # fmt: skip
"""Megatron's timers by the ``--timing-log-level`` from which they run."""

_TIMED = {"iteration-time", *(f"{name}-time" for names in TIMERS.values() for name in names)}


def _as_json(value: Any) -> float | int | str:
    """A scalar, or a tensor of one element, as JSON; a float that JSON lacks becomes its name."""
    number = value.item() if hasattr(value, "item") else value
    return number if math.isfinite(number) else str(number)


def free_name(path: Path) -> Path:
    """The first ``NAME.N.SUFFIX`` beside ``path`` that is free."""
    number = 1
    while (name := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    return name


def _parse(line: str) -> dict[str, Any] | None:
    """A line of the file, None where it was cut short or damaged."""
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        return None
    is_whole = line.endswith("\n") and isinstance(entry, dict) and "iteration" in entry
    return entry if is_whole else None


class MetricsWriter:
    """Records the scalars that Megatron hands to its TensorBoard writer, one line an iteration.

    That is each ``--tensorboard-log-interval``-th iteration (every one by default), its own
    values, on the last rank. This object takes the writer's place where there is none, and
    hears from it where there is one (:func:`heard`). Validation losses join the line of their
    iteration; after the last one Megatron evaluates the test set under the same name, and the
    line keeps that.

    Each scalar is in the file before ``add_scalar`` returns, so that a process which is killed
    leaves every iteration that it saved. Lines of iterations that are run again after a restart
    are moved to ``metrics.N.jsonl``. A disk that refuses the file ends the recording with one
    warning.

    ``seconds()`` gives the seconds so far by scalar, ``iteration-time`` (training without
    evaluation and checkpoints) and parts of it, on this rank: a line has its iteration's own.
    What Megatron writes of them (means over ``--log-interval``, of the slowest rank) goes to
    TensorBoard alone.
    """

    def __init__(self, run_dir: Path, seconds: Callable[[], Mapping[str, float]]) -> None:
        self.path = run_dir / METRICS_FILE
        self._seconds = seconds
        self._last: tuple[int | None, Mapping[str, float]] = (None, {})
        self._line: dict[str, Any] = {}
        self._early: dict[str, tuple[int, Any]] = {}
        self._file: int | None = None
        self._line_start = 0
        self._line_bytes = 0
        self._broken = False

    def add_scalar(self, tag: str, scalar_value: Any, global_step: int, **kwargs: Any) -> None:
        """Record one scalar of iteration ``global_step``."""
        if self._broken or tag.endswith(" vs samples") or tag in _TIMED:
            return
        try:
            if self._line.get("iteration") != global_step:
                if tag.startswith(("moe_echo/", "offload/")):  # written before the optimizer step
                    self._early[tag] = (global_step, _as_json(scalar_value))
                    return
                if tag not in _FIRST_TAGS and " validation" not in tag:
                    return  # the MoE losses pass in iterations that are not logged as well
                self._begin_line(global_step, is_validation=" validation" in tag)
            self._line[tag] = _as_json(scalar_value)
            self._write_line()
        except OSError as error:
            self._broken = True
            print(f"WARNING: {self.path} cannot be written ({error}): no more metrics.", flush=True)

    def _begin_line(self, iteration: int, is_validation: bool) -> None:
        early = {tag: value for tag, (step, value) in self._early.items() if step == iteration}
        is_first = not self._line
        self._line = {"iteration": iteration, **early}
        if is_first:
            self._resume_file(iteration, is_validation)
        else:
            self._open_file()
        if not is_validation:
            before, seconds_before = self._last
            seconds = self._seconds()
            passed = iteration - before if before is not None else 1
            for tag, value in seconds.items():
                self._line[tag] = (value - seconds_before.get(tag, 0.0)) / passed
            self._last = (iteration, seconds)

    def _resume_file(self, iteration: int, is_validation: bool) -> None:
        """Keep an earlier start's lines before ``iteration``, set the others aside.

        A start that only evaluates, because its training is done, joins the last line.
        """
        text = self.path.read_text() if self.path.exists() else ""
        kept, aside, joined = "", "", ""
        for line in text.splitlines(keepends=True):
            entry = _parse(line)
            if entry is not None and entry["iteration"] < iteration:
                kept += line
            elif entry is not None and is_validation and entry["iteration"] == iteration:
                self._line, joined = entry, line
            else:
                aside += line
        if aside:
            free_name(self.path).write_text(aside)
            whole = self.path.with_suffix(".tmp")
            whole.write_text(kept + joined)
            whole.replace(self.path)  # killed at any moment, every line is in one of the files
        self._open_file()
        self._line_start = len(kept.encode())
        self._line_bytes = len(joined.encode())

    def _open_file(self) -> None:
        """Let the current line begin at the end of the file.

        Opened again for each line: closing sends the one before to a network's file server.
        """
        if self._file is not None:
            os.close(self._file)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        self._line_start = os.fstat(self._file).st_size
        self._line_bytes = 0

    def _write_line(self) -> None:
        """Bring the current line in the file up to date, by one write: it is never half there."""
        assert self._file is not None
        line = json.dumps(self._line).encode().ljust(self._line_bytes - 1) + b"\n"
        os.pwrite(self._file, line, self._line_start)
        self._line_bytes = len(line)

    def __getattr__(self, name: str) -> Any:
        """Every other call of a TensorBoard writer goes nowhere."""
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def heard(board: Any, metrics: MetricsWriter) -> Any:
    """A TensorBoard writer like ``board``, with its files, whose scalars are recorded too."""

    class Heard(type(board)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__ = vars(board)

        def add_scalar(
            self, tag: str, scalar_value: Any, global_step: int, *args: Any, **kwargs: Any
        ) -> None:
            super().add_scalar(tag, scalar_value, global_step, *args, **kwargs)
            metrics.add_scalar(tag, scalar_value, global_step)

    return Heard()


def install_metrics_writer(run_dir: str | os.PathLike) -> MetricsWriter | None:
    """Record the metrics of the run that starts in this process, in ``metrics.jsonl`` of a folder.

    Call it after Megatron's global variables are set and before ``pretrain()``: the module
    variable of its TensorBoard writer is the one thing that is set here. Gives the writer on
    the last rank, None on the others.
    """
    from megatron.training import get_args, get_timers, global_vars

    args = get_args()
    if args.rank != args.world_size - 1:
        return None

    def seconds() -> dict[str, float]:
        timers, level = get_timers(), args.timing_log_level
        training = timers("interval-time")
        training.elapsed(reset=False)  # brings the active time up to now
        parts = {
            f"{name}-time": timers(name, log_level=at).active_time()
            for at, names in TIMERS.items()
            if at <= level
            for name in names
        }
        return {"iteration-time": training.active_time()} | {
            tag: value for tag, value in parts.items() if value > 0
        }

    Path(run_dir).mkdir(parents=True, exist_ok=True)
    metrics, board = MetricsWriter(Path(run_dir), seconds), global_vars.get_tensorboard_writer()
    global_vars._GLOBAL_TENSORBOARD_WRITER = metrics if board is None else heard(board, metrics)
    return metrics


def publish(values: Mapping[str, float], iteration: int) -> None:
    """Hand an iteration's scalars to Megatron's TensorBoard and wandb writers, if it has some."""
    from megatron.training import global_vars

    if (board := global_vars.get_tensorboard_writer()) is not None:
        for name, value in values.items():
            board.add_scalar(name, value, iteration)
    if (wandb := global_vars.get_wandb_writer()) is not None:
        wandb.log(dict(values), iteration)


def read_metrics(run_dir: str | os.PathLike) -> list[dict[str, Any]]:
    """A run's ``metrics.jsonl``, oldest line first; ``FileNotFoundError`` where there is none."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Start the run with --run-dir {run_dir} to record its metrics."
        )
    return [json.loads(line) for line in path.read_text().splitlines()]
