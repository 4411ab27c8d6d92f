"""A step that is captured in a CUDA graph: what must hold before it, and what ends it.

A replay repeats the copies, waits and frees of the capture. So their order must be the final one,
and their host memory must be there.
"""

import gc
from typing import NoReturn

from megatron_echo.offload.host_arena import HostArena
from megatron_echo.offload.recorder import StepRecord
from megatron_echo.offload.schedule import Plan


def begin(plan: Plan | None, arena: HostArena, learning_steps: int) -> None:
    """Check that the order of the step is fixed and that no earlier one holds host memory.

    Raises:
        RuntimeError: one of the two does not hold, and what to do.
    """
    if plan is None:
        raise RuntimeError(
            "The step is captured in a CUDA graph before offloading has a plan. Let at least "
            f"{learning_steps} steps of the same schedule run before, with "
            "--cuda-graph-warmup-steps."
        )
    if arena.leased_bytes:
        gc.collect()  # what only cycles hold is not in use
    if arena.leased_bytes:
        raise RuntimeError(
            f"{arena.leased_bytes} offloaded bytes of an earlier step are still in use where a "
            "CUDA graph is captured. Let go of that step's losses and outputs before."
        )
    arena.begin_capture()


def check_complete(plan: Plan | None, record: StepRecord) -> None:
    """Check at the end of a captured step that it was the planned one.

    Raises:
        RuntimeError: it ended early.
    """
    if plan is None or len(record.marks) < len(plan.marks):
        refuse_departure(len(record.marks))


def refuse_departure(position: int) -> NoReturn:
    """Stop where a captured step leaves its plan, since every replay would.

    Args:
        position: of the mark that is not the planned one.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"The step that is captured in a CUDA graph departs from the plan of offloading at mark "
        f"{position}: the steps before it had another schedule. Capture a step like those."
    )
