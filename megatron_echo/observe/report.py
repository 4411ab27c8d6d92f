"""A run directory as one page of HTML that needs nothing else, for people who look at runs.

    python -m megatron_echo.observe.report RUN_DIR -o report.html [--against OTHER_RUN_DIR]

Read are ``run.json``, ``metrics.jsonl`` and, where the run wrote them, routing traces and memory
ledger. :mod:`.report_data` works the numbers out, as JSON in the page's element ``report-data``;
its scripts draw and format them. The page forbids itself every network access.
"""

import argparse
import html
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megatron_echo.observe.report_data import read_run
from megatron_echo.observe.report_memory import ReportError

TRACE_NUMBERS = 600_000
"""Numbers of traces on a page, at 4 to 6 bytes each; steps are left out evenly to stay below."""


def build_report(run_dirs: Sequence[str | os.PathLike]) -> str:
    """The page for one run, or for several side by side: HTML with styles, scripts and data inside.

    Raises:
        ReportError: a folder, given as ``--run-dir``, is no run, or one of its files is damaged.
    """
    runs = [read_run(Path(folder), TRACE_NUMBERS // len(run_dirs)) for folder in run_dirs]
    data = json.dumps(runs, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    folder = resources.files("megatron_echo.observe") / "report_page"
    style, page, *scripts = (
        (folder / name).read_text("utf-8")
        for name in ("page.css", "page.html", "charts.js", "costs.js", "page.js")
    )
    parts = {
        "TITLE": html.escape(" against ".join(run["name"] for run in runs)),
        "STYLE": style,
        "SCRIPT": "\n".join(scripts),
        "DATA": data,
    }
    return re.sub("@([A-Z]+)@", lambda mark: parts[mark[1]], page)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ends with a sentence where the report cannot be made."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_echo.observe.report", description="A run as one page of HTML."
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", help="what was given as --run-dir")
    parser.add_argument("-o", "--output", default="report.html", help="default: %(default)s")
    parser.add_argument("--against", metavar="OTHER_RUN_DIR", help="a second run, side by side")
    args = parser.parse_args(argv)
    try:
        page = build_report([args.run_dir, *([args.against] if args.against else [])])
    except ReportError as error:
        raise SystemExit(str(error)) from None
    try:
        Path(args.output).write_text(page, encoding="utf-8")
    except OSError as error:
        raise SystemExit(f"{error}. Give a file that can be written with -o.") from None
    print(f"{args.output}: {len(page.encode()) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
