"""Shared by all tests: the CPU backend is on before anything imports Megatron.

Only a run that asks for the tests marked ``gpu`` (``-m gpu``) sees a GPU; the others are the same
everywhere, and Triton's kernels run in its interpreter.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("markexpr", "") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"
        if config.getoption("numprocesses", None):  # this process runs no test
            import launch

            launch.start_server()
            return
        import triton_interpreter

        triton_interpreter.patch_once()
    from megatron_echo import cpu_backend

    cpu_backend.enable(verbose=False)


@pytest.fixture
def single_rank() -> Iterator[None]:
    """Megatron's parallel state of a run with one process."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
