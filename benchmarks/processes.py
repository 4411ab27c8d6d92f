"""What benchmarks of training share: the main job, starting its ranks, and the results file."""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_LEFT_OUT = ("--save", "--save-interval", "--tensorboard-dir", "--eval-iters", "--log-interval")


def main_job_corpus() -> Path:
    """The main job's data, built where it is missing."""
    from build_corpus import build_corpus  # in tools/, which not every benchmark has on its path

    corpus = ROOT / "runs" / "corpus"
    build_corpus(corpus, Path(sysconfig.get_path("stdlib")))
    return corpus


def results_parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A command line with ``--output``, by default ``benchmarks/results/NAME``.

    Its folder is made when the line is parsed, before minutes of work.

    Args:
        doc: of the benchmark; its first paragraph is the description.
        name: of the results.
    """

    def path(word: str) -> Path:
        Path(word).parent.mkdir(parents=True, exist_ok=True)
        return Path(word)

    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    default = str(ROOT / "benchmarks" / "results" / name)
    parser.add_argument("--output", type=path, default=default, help="without an extension")
    return parser


def write_results(output: Path, results: Any) -> None:
    """Write ``output`` with the suffix ``.json``: the results, and where they are from."""
    from megatron_echo import environment  # imports torch, which few of this file's users need here

    record = {
        "machine": environment.device_name(),
        "versions": environment.versions(),
        "results": results,
    }
    output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def run_limited(command: Sequence[str], seconds: float, **options: Any) -> int | None:
    """Run a command in a session of its own; after so many seconds kill it and what it started.

    Args:
        command: program and arguments.
        seconds: it may take.
        options: of ``subprocess.Popen``.

    Returns:
        Its exit code, None if it was killed.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def as_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> str:
    """Rows as Markdown; a missing cell is a dash. ``columns``: all that there are by default."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [_as_cell(row.get(column, "-")) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _as_cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def lean_main_job(corpus: Path, folder: Path, steps: int) -> list[str]:
    """The main job's flags without evaluation and saving, with each step logged.

    Args:
        corpus: from :func:`main_job_corpus`.
        folder: the run directory.
        steps: training iterations.
    """
    from main_job import training_flags  # as above

    words = training_flags(corpus, folder, 10**9)
    for name in _LEFT_OUT:
        at = words.index(name)
        del words[at : at + 2]
    return [*words, "--eval-iters", "0", "--log-interval", "1", "--train-iters", str(steps)]


def torchrun(
    script: Path, ranks: int, words: Sequence[str], settings: Mapping[str, str] | None = None
) -> None:
    """Run a script on this machine's ranks, one thread each, and wait for it.

    Args:
        script: the script.
        ranks: processes.
        words: its command line.
        settings: environment variables.

    Raises:
        RuntimeError: it failed; the end of its output is in the message.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(script), *words]
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment = {**os.environ, **fixed, **(settings or {})}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-4000:]}")
