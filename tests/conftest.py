"""Shared by all tests: the CPU backend is on before anything imports Megatron."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

from megatron_echo import cpu_backend  # noqa: E402

cpu_backend.enable(verbose=False)
