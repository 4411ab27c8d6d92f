"""``pretrain_gpt_moe.py`` that prints the operators of its last step which no graph holds.

A line for each part of the step: ``OUTSIDE <part> {"operator": times}``. Parts are ``optimizer``,
``end`` (of our step: checks and statistics) and ``rest`` (data, zeroed gradients, losses).
"""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from megatron.training import training
from torch.utils._python_dispatch import TorchDispatchMode

import pretrain_gpt_moe
from megatron_echo.cpu_backend.recorded_graph import RecordedGraph
from megatron_echo.step.step_end import StepEnd

PARTS = ["rest"]
FOUND: dict[str, Counter[str]] = {}


class Count(TorchDispatchMode):
    """Counts operators but views in the part that runs now."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if not func.is_view:
            FOUND.setdefault(PARTS[-1], Counter())[str(func)] += 1
        return func(*args, **(kwargs or {}))


def in_part(name: str, function: Callable) -> Callable:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        PARTS.append(name)
        try:
            return function(*args, **kwargs)
        finally:
            PARTS.pop()

    return wrapped


step = training.train_step


def counted(forward: Any, data: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
    optimizer.step = in_part("optimizer", type(optimizer).step.__get__(optimizer))
    FOUND.clear()
    with Count(), torch.autograd.set_multithreading_enabled(False):
        return step(forward, data, model, optimizer, *args, **kwargs)


if __name__ == "__main__":
    RecordedGraph.replay = in_part("graph", RecordedGraph.replay)  # type: ignore[method-assign]
    StepEnd.end_step = in_part("end", StepEnd.end_step)  # type: ignore[method-assign]
    training.train_step = counted
    pretrain_gpt_moe.main()
    FOUND.pop("graph", None)
    for part, operators in FOUND.items():
        print(f"OUTSIDE {part} {json.dumps(operators)}\n", end="", flush=True)
