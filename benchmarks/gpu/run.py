"""Everything that only a GPU can tell, in one command and under eight minutes.

    python benchmarks/gpu/run.py [--only PART ...] [--output FILE.json] [--dry-run]

Kernels against what the device can do, a MoE layer and a training step against Megatron's, and
whether a CUDA graph may hold the layer. Each part is a process with a time limit; a row is written
as soon as it is measured, so that nothing takes other results with it. The results go to
``benchmarks/results/<device>-<date>.json`` and a table beside it. The exit code is 1 if a row
failed; a target that is missed is shown, and is no failure. ``--dry-run`` runs everything on the
CPU with tiny shapes; its times mean nothing.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
sys.path[:0] = [str(ROOT), str(FOLDER.parent), str(FOLDER)]

from processes import run_limited  # noqa: E402
from record import Recorder, Row, as_markdown, read_rows  # noqa: E402

SECONDS = 470
GRACE = 10  # seconds that a part may take to end after its time is over


@dataclass(frozen=True)
class Part:
    """A part of the benchmark.

    Attributes:
        title: of its table.
        seconds: it may take.
        module: what runs it.
        function: in the module; takes a ``Recorder`` and whether it is a dry run.
    """

    title: str
    seconds: float
    module: str
    function: str = "run"


PARTS = {
    "ceilings": Part("What the device can do", 30, "ceilings"),
    "planner": Part("Planner, 64 ranks and 256 experts", 40, "planner_kernel"),
    "capture": Part("What a CUDA graph needs of the layer", 50, "capture_safety"),
    "rows": Part("Copies of rows, and the activation", 50, "row_copies"),
    "layers": Part("One MoE layer, forward and backward", 90, "layers"),
    "gemm": Part("Grouped products", 80, "grouped_gemm"),
    "training": Part("A training step of 1.4 billion parameters", 300, "training_step"),
    "tiles": Part("Grouped products with other tiles", 300, "grouped_gemm", "run_tiles"),
}
"""In the order in which they run; ``training`` gets all the time that is left."""
DEFAULT = [name for name in PARTS if name != "tiles"]


def run_here(name: str, file: Path, deadline: float, dry: bool) -> None:
    """Run one part in this process, which is its own; see ``Recorder``."""
    from megatron_echo import cpu_backend

    cpu_backend.enable(verbose=False)
    module = importlib.import_module(PARTS[name].module)
    getattr(module, PARTS[name].function)(Recorder(name, file, deadline, dry), dry)


def run_part(name: str, file: Path, seconds: float, dry: bool) -> None:
    """Run one part as a process; what ends it becomes a row."""
    words = [sys.executable, str(FOLDER / "run.py"), "--part", name, "--rows", str(file)]
    words += ["--until", str(time.monotonic() + seconds), *(["--dry-run"] if dry else [])]
    code = run_limited(words, seconds + GRACE, cwd=ROOT, env=environment_of(dry))
    if code != 0:
        problem = f"ended with exit code {code}"
        if code is None:
            problem = f"was stopped {GRACE} s after its time of {seconds:.0f} s was over"
        Recorder(name, file, 0).fail(f"the part {name}", RuntimeError(problem))


def environment_of(dry: bool) -> dict[str, str]:
    """The environment of a part."""
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    settings = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    settings |= {"PYTHONWARNINGS": "ignore", **({"CUDA_VISIBLE_DEVICES": ""} if dry else {})}
    return {**os.environ, **settings}


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split("\n")[0].strip() or None


def machine(dry: bool) -> dict[str, Any]:
    """Device, driver and versions."""
    import torch

    from megatron_echo import environment

    return {
        "device": environment.device_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "versions": environment.versions(),
        "date": date.today().isoformat(),
        "dry_run": dry,
    }


def write(output: Path, report: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the JSON file and the table beside it."""
    report["rows"] = [asdict(row) for row in rows]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items() if v is not None)
    dry = " **A dry run: the times mean nothing.**" if report["dry_run"] else ""
    head = f"{report['device']}, driver {report['driver']}, {versions}, {report['date']}.{dry}"
    titles = {name: part.title for name, part in PARTS.items()}
    output.with_suffix(".md").write_text(f"{head}\n\n{as_markdown(rows, titles)}\n")


def default_output(report: dict[str, Any]) -> Path:
    """Where the results of this machine and day go; a dry run's are thrown away one day."""
    slug = re.sub(r"[^a-z0-9]+", "-", report["device"].lower()).strip("-")
    folder = ROOT / "runs" if report["dry_run"] else ROOT / "benchmarks" / "results"
    return folder / f"{slug}-{report['date']}.json"


def run_all(names: Sequence[str], args: argparse.Namespace) -> int:
    """Run the parts, write the results after each; returns the exit code."""
    started, seconds, dry = time.monotonic(), args.seconds, args.dry_run
    report = {**machine(dry), "tests": args.tests}
    output = default_output(report)
    if args.output is not None:
        output = args.output.resolve().with_suffix(".json")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        for name in names:
            left = started + seconds - time.monotonic() - GRACE
            print(f"-- {name}, {left:.0f} s left", flush=True)
            limit = min(PARTS[name].seconds, left)
            if limit > 0:
                run_part(name, file, limit, dry)
            else:
                Recorder(name, file, 0).skip(f"the part {name}", "no time was left")
            report["seconds"] = round(time.monotonic() - started, 1)
            rows = read_rows(file)
            write(output, report, rows)
    print(output.with_suffix(".md").read_text())
    failed = [f"{row.part}: {row.name}" for row in rows if row.status == "failed"]
    missed = [f"{row.part}: {row.name}" for row in rows if row.reached is False]
    for word, found in (("failed", failed), ("below target", missed)):
        print(f"{len(found)} {word}{': ' if found else ''}{'; '.join(found)}")
    print(f"{report['device']}, {report['seconds']:.0f} s, written to {output}", flush=True)
    return 1 if failed else 0


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", default=DEFAULT,
                        help=f"of {', '.join(PARTS)}; all but the last by default")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--tests", help="outcome of the tests, to be written beside the results")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_here(args.part, args.rows, args.until, args.dry_run)
        return
    if args.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("there is no CUDA device. Use --dry-run to try everything on the CPU.")
    raise SystemExit(run_all([name for name in PARTS if name in args.only], args))


if __name__ == "__main__":
    main()
