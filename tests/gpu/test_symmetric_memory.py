"""Rows written to and read from the memory of another process on the same GPU."""

from pathlib import Path

import launch
import pytest

WORKER = Path(__file__).resolve().parent / "workers" / "symmetric_memory.py"


@pytest.mark.gpu
def test_two_processes_on_one_gpu() -> None:
    allow = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}
    launch.torchrun([], 2, script=WORKER, env=allow).check()
