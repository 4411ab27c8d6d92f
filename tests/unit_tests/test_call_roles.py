"""What a pass through a layer is, told by autograd's own state."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import checkpoint as megatron_checkpoint
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_echo.call_roles import Role, checkpoint_run_again, role_of_call

FIRST, AGAIN = Role.FIRST_PASS, Role.RECOMPUTED
Function = Callable[[Tensor], Tensor]


def reentrant(function: Function, x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=True)


def other(function: Function, x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


def megatrons(function: Function, x: Tensor) -> Tensor:
    return megatron_checkpoint(function, False, x)


class Layer:
    """Notes what each of its passes was, and which checkpoint ran it again."""

    def __init__(self) -> None:
        self.roles: list[Role] = []
        self.checkpoints: list[Any] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.roles.append(role_of_call())
        self.checkpoints.append(id(checkpoint_run_again()))
        return x.sin()


@pytest.mark.parametrize(
    ("ways", "expected"),
    [
        ((), [Role.RECORDED]),
        ((reentrant,), [FIRST, AGAIN]),
        ((other,), [Role.RECORDED, Role.REPEATED]),
        ((reentrant, reentrant), [FIRST, FIRST, AGAIN]),
        ((reentrant, other), [FIRST, AGAIN, Role.REPEATED]),
        ((other, reentrant), [FIRST, FIRST, AGAIN]),
        ((other, other), [Role.RECORDED, Role.REPEATED]),
    ],
)
def test_roles_in_training(ways: tuple, expected: list[Role]) -> None:
    """Checkpoints in checkpoints too, outermost first: exactly one pass counts."""
    layer = function = Layer()
    for way in reversed(ways):
        function = lambda x, way=way, inner=function: way(inner, x)  # noqa: E731
    function(torch.ones(3, requires_grad=True)).sum().backward()
    assert layer.roles == expected
    assert sum(role.counts for role in layer.roles) == 1


@pytest.mark.usefixtures("single_rank")
def test_megatrons_checkpoint() -> None:
    layer = Layer()
    megatrons(layer, torch.ones(3, requires_grad=True)).sum().backward()
    assert layer.roles == [FIRST, AGAIN]


def test_passes_that_train_nothing() -> None:
    layer, x = Layer(), torch.ones(3, requires_grad=True)
    with torch.no_grad():
        layer(x)
        other(layer, x)
    with torch.inference_mode():
        layer(x)
        reentrant(layer, x)
    assert layer.roles == [Role.UNRECORDED] * 4


def test_a_pass_without_gradients_in_a_recorded_one() -> None:
    """In forward and in backward: a teacher's pass beside the student's."""
    layer, x = Layer(), torch.ones(3, requires_grad=True)

    def with_teacher(hidden: Tensor) -> Tensor:
        with torch.no_grad():
            teacher(hidden)
        return layer(hidden)

    teacher = Layer()
    with_teacher(x).sum().backward()
    assert (teacher.roles, layer.roles) == ([Role.UNRECORDED], [Role.RECORDED])


def test_which_checkpoint_runs_again() -> None:
    """Backward passes in any order find their own."""
    layer, x = Layer(), torch.ones(3, requires_grad=True)
    outputs = [reentrant(layer, x) for _ in range(3)]
    nodes = [id(output.grad_fn) for output in outputs]
    for index in (1, 2, 0):
        outputs[index].sum().backward()
    assert layer.checkpoints[3:] == [nodes[1], nodes[2], nodes[0]]
