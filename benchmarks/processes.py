"""Starts the ranks of a benchmark."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


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
