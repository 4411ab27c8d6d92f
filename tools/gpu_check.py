"""The check on a GPU: tests marked ``gpu``, then the GPU benchmarks, in under eight minutes.

Needs torch and the pure-Python packages only; nothing is installed. Writes
``benchmarks/results/<gpu>-<date>.json`` and prints a table::

    make gpu-check PYTHON=python3
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_echo import environment  # noqa: E402

BENCHMARKS = ("gpu_planner.py", "gpu_permute.py", "moe_layer.py", "gpu_training_step.py")
TEST_SECONDS, BENCHMARK_SECONDS = 240, 220
SUMMARY = re.compile(r"(\d+) (passed|failed|skipped|errors?)")


def run_tests() -> dict[str, Any]:
    """Run the tests marked ``gpu``, show them, and count their outcomes."""
    started = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "tests/gpu",
        "-v",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=TEST_SECONDS,
    )
    print(run.stdout, flush=True)
    counts = {name: int(number) for number, name in SUMMARY.findall(run.stdout.splitlines()[-1])}
    return {"exit_code": run.returncode, "seconds": time.monotonic() - started, **counts}


def run_benchmark(name: str, limit: float) -> dict[str, Any]:
    """Run one benchmark script for at most ``limit`` seconds, show its lines, return its JSON."""
    with tempfile.NamedTemporaryFile(suffix=".json") as output:
        command = [sys.executable, str(ROOT / "benchmarks" / name), "--output", output.name]
        code = subprocess.run(command, cwd=ROOT, check=False, timeout=limit).returncode
        if code:
            return {"error": f"{name} ended with exit code {code}"}
        return json.loads(Path(output.name).read_text())


def as_table(benchmarks: dict[str, Any]) -> str:
    """A Markdown table with a row for each measurement and its figures."""
    lines = ["| benchmark | figures |", "|---|---|"]
    for name, figures in benchmarks.items():
        values = figures if isinstance(figures, dict) else {"": figures}
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in values.items()
        )
        lines.append(f"| {name} | {text} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "gpu-check needs a CUDA device and there is none. `make test` needs no GPU."
        )
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    started = time.monotonic()
    device = environment.device_name()
    report: dict[str, Any] = {
        "device": device,
        "date": date.today().isoformat(),
        "versions": environment.versions(),
        "tests": run_tests(),
        "benchmarks": {},
    }
    deadline = time.monotonic() + BENCHMARK_SECONDS
    for name in BENCHMARKS:
        print(f"-- {name}", flush=True)
        limit = max(1.0, deadline - time.monotonic())
        report["benchmarks"].update(run_benchmark(name, limit))
    report["seconds"] = time.monotonic() - started
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    target = ROOT / "benchmarks" / "results" / f"{slug}-{report['date']}.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    print(as_table(report["benchmarks"]))
    print(f"\n{device}, {report['seconds']:.0f} s, written to {target.relative_to(ROOT)}")
    failed = report["tests"]["exit_code"] != 0 or "error" in report["benchmarks"]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
