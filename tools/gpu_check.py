"""The check on a GPU: tests marked ``gpu``, then ``benchmarks/gpu/run.py``, in under ten minutes.

Needs torch and the pure-Python packages only; nothing is installed::

    make gpu-check PYTHON=python3 [ARGS="--output FILE.json"]
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from processes import run_limited  # noqa: E402

SECONDS = 570
TEST_SECONDS = 160
BENCHMARK_SECONDS = 470
WORKERS = "4"  # test processes that share the GPU: most of their time they start and compile


def pytest_command() -> list[str]:
    """The tests marked ``gpu``, side by side where pytest-xdist is there."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
    words += ["--override-ini", "timeout=120"]
    if importlib.util.find_spec("xdist") is not None:
        words += ["-n", WORKERS, "--dist", "worksteal"]
    return words


def run_tests() -> tuple[bool, str]:
    """Run them and show what they print; whether all passed, and the line that sums up."""
    with tempfile.TemporaryFile("w+") as output:
        files = {"stdout": output, "stderr": subprocess.STDOUT}
        code = run_limited(pytest_command(), TEST_SECONDS, cwd=ROOT, **files)
        output.seek(0)
        text = output.read()
    print(text, flush=True)
    last = [line.strip("= ") for line in text.splitlines() if line.strip()][-1:]
    stopped = f"stopped after {TEST_SECONDS} s; " if code is None else ""
    return code == 0, stopped + "".join(last)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Other flags are those of benchmarks/gpu/run.py.",
    )
    _, others = parser.parse_known_args()
    started = time.monotonic()
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    )
    question = "import torch; raise SystemExit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", question], check=False).returncode:
        raise SystemExit(
            "gpu-check needs a CUDA device and there is none. `make test` needs no GPU."
        )
    is_passed, tests = run_tests()
    seconds = min(BENCHMARK_SECONDS, SECONDS - (time.monotonic() - started))
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu" / "run.py")]
    command += ["--seconds", f"{seconds:.0f}", "--tests", tests, *others]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    print(f"tests: {tests}", flush=True)
    raise SystemExit(0 if is_passed and code == 0 else 1)


if __name__ == "__main__":
    main()
