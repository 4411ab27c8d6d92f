"""Frozen parts of a layer, and adapters in its experts, by their worker's checks."""

from pathlib import Path
from types import SimpleNamespace

import launch
import pytest
import torch

from megatron_echo.experts import adapted

WORKER = Path(__file__).resolve().parents[1] / "workers" / "adapters.py"


@launch.on_ranks(2, slow=(3,))
def test_layer(ranks: int) -> None:
    """Against a dense loop with the adapters merged; the base of all ranks is frozen."""
    checks = ["dense", "no_gradient_of_the_base_travels", "frozen_parts"]
    print(launch.run(checks, ranks, script=WORKER).check().output)


@launch.on_ranks(2)
def test_model(ranks: int) -> None:
    """The recipe of the documentation, and adapters of a PEFT library around other modules."""
    launch.run(["recipe", "adapters_of_others"], ranks, script=WORKER).check()


def test_experts_that_are_cut_have_none() -> None:
    linear = torch.nn.Linear(2, 2)
    linear.config = SimpleNamespace(expert_tensor_parallel_size=2)
    with pytest.raises(ValueError, match=r"but --expert-tensor-parallel-size is 2. Use 1"):
        adapted(linear, 1, 1.0)  # type: ignore[arg-type]
