"""``run.json``: what was run, with which versions, in which layout."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_echo import environment
from megatron_echo.record.metrics import free_name

RUN_FILE = "run.json"
_LAYOUT = {
    "world": "world_size",
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual_pipeline": "virtual_pipeline_model_parallel_size",
    "context": "context_parallel_size",
    "data": "data_parallel_size",
    "expert": "expert_model_parallel_size",
    "expert_tensor": "expert_tensor_parallel_size",
}
"""Sizes of the parallel groups, under the short names that people use."""

_VARIABLES = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "SLURM_JOB_ID", "TORCHDYNAMO_DISABLE",
)  # fmt: skip


def _git_commit() -> str | None:
    """The commit of the source tree that this file is in, None outside of one."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write_run_record(
    run_dir: str | os.PathLike, args: Namespace, command: Sequence[str] = ()
) -> Path:
    """Write ``run.json`` into a folder, made if missing; an earlier one becomes ``run.N.json``.

    Args:
        run_dir: the folder.
        args: Megatron's namespace after validation.
        command: the command line as the user gave it.
    """
    path = Path(run_dir) / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(free_name(path))
    record = {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command),
        "versions": environment.versions(),
        "python": sys.version.split()[0],
        "git_commit": _git_commit(),
        "device": environment.device_name(),
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "layout": {name: getattr(args, size) for name, size in _LAYOUT.items()},
        "flags": vars(args),
    }
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")
    return path


def add_decisions(run_dir: str | os.PathLike, decided: dict[str, Any]) -> None:
    """Add to ``run.json`` what flags that said ``auto`` became, as ``decided``.

    Args:
        run_dir: the folder.
        decided: values by the names of the flags.
    """
    path = Path(run_dir) / RUN_FILE
    record = json.loads(path.read_text()) | {"decided": decided}
    path.write_text(json.dumps(record, indent=2) + "\n")
