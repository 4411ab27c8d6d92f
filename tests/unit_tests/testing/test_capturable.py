"""Each reason that keeps a function from being captured is found, and nothing else is."""

import inspect
from collections.abc import Callable
from itertools import count

import pytest
import torch
from moe_cases import HIDDEN, ROUTINGS, experts_for, router_probs, routing_map
from torch import Tensor
from unit_tests import test_moe_layer_shapes as shapes
from unit_tests.test_clones_shapes import build
from unit_tests.test_moe_layer_shapes import Stages, groups_of, transports

from megatron_echo.testing import NotCapturableError, assert_capturable

ranks = shapes.ranks  # the fixture
Step = Callable[[Tensor], object]
ONE = torch.tensor([1.0, 2.0, 3.0, 1.0])
TWO = torch.tensor([5.0, -2.0, 0.5, -1.0])


class Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * grad.sum().item()


def reads_in_backward(x: Tensor) -> None:
    Reading.apply(x.detach().requires_grad_()).sum().backward()


def branch(x: Tensor) -> Tensor:
    return x.exp() if x.sum() > 3 else x.log()


def counting() -> Step:
    calls = count()
    return lambda x: x * next(calls)


def alternating(*steps: Step) -> Step:
    calls = count()
    return lambda x: steps[next(calls) % len(steps)](x)


def growing() -> Step:
    calls = count(1)
    return lambda x: x.new_zeros(next(calls))


def repeating() -> Step:
    calls = count(1)
    return lambda x: [x + 1 for _ in range(next(calls))]


def replacing() -> Step:
    state = {"total": torch.zeros(4)}

    def step(x: Tensor) -> None:
        state["total"] = state["total"] + x

    return step


def two_buffers() -> Step:
    buffers = torch.zeros(4), torch.zeros(4)
    return alternating(lambda x: buffers[0].add_(x), lambda x: buffers[1].add_(x))


# Name -> what makes the function, and the kind that is reported first.
FAULTS: dict[str, tuple[Callable[[], Step], str]] = {
    "item": (lambda: lambda x: x * x.sum().item(), "host read"),
    "a branch": (lambda: branch, "host read"),
    "in backward": (lambda: reads_in_backward, "host read"),
    "store by a mask": (lambda: lambda x: x.clone().__setitem__(x > 0, x[0]), "host read"),
    "a wait": (lambda: lambda x: torch.cuda.synchronize(), "host read"),
    "a mask": (lambda: lambda x: x[x > 0], "data-dependent shape"),
    "nonzero": (lambda: lambda x: x.nonzero(), "data-dependent shape"),
    "unique": (lambda: lambda x: x.unique(), "data-dependent shape"),
    "Python numbers": (lambda: lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0]), "host copy"),
    "a Python number": (lambda: lambda x: x.new_tensor(2.0), "host copy"),
    "counter": (counting, "constants"),
    "dtype": (lambda: alternating(lambda x: x.double(), lambda x: x.half()), "constants"),
    "another operator": (lambda: alternating(torch.exp, torch.log), "operators"),
    "more operators": (repeating, "operators"),
    "no operators": (lambda: alternating(torch.exp, lambda x: x), "operators"),
    "a larger tensor": (growing, "constants"),
    "strides": (
        lambda: alternating(lambda x: x.view(2, 2).t() + 1, lambda x: x.view(2, 2) + 1),
        "operators",
    ),
    "other operands": (lambda: alternating(lambda x: x - x.exp(), lambda x: x.exp() - x), "wiring"),
    "replaced state": (replacing, "memory"),
    "two buffers": (two_buffers, "wiring"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found(name: str) -> None:
    make, kind = FAULTS[name]
    with pytest.raises(NotCapturableError) as error:
        assert_capturable(make(), ONE, TWO)
    violations = error.value.violations
    assert violations[0].kind == kind
    assert all(violation.where.startswith(f"{__file__}:") for violation in violations)
    assert all(violation.what in str(error.value) for violation in violations)


def test_another_size_is_another_allocation() -> None:
    """Of memory from outside, under an operator with no number in it."""
    buffers = torch.zeros(4), torch.zeros(5)
    step = alternating(lambda x: buffers[0].exp(), lambda x: buffers[1].exp())
    with pytest.raises(NotCapturableError) as error:
        assert_capturable(step, ONE, TWO)
    assert [violation.kind for violation in error.value.violations] == ["allocations"]


def test_what_a_report_says() -> None:
    def step(x: Tensor) -> Tensor:
        y = x + 1
        return y.exp() if bool(y.sum() > 8) else y.log()

    with pytest.raises(NotCapturableError) as error:
        assert_capturable(step, ONE, TWO)
    line = inspect.getsourcelines(step)[1] + 2
    read, difference = error.value.violations
    assert read == ("host read", "Tensor.__bool__ needs a device value on the host",
                    f"{__file__}:{line}")  # fmt: skip
    assert difference.where == f"{__file__}:{line}"
    assert difference.kind == "operators"
    made = "float32[4] (made 0)"
    assert f"aten.exp.default({made}) -> float32[4] (made 3) with input 0" in difference.what
    assert f"aten.log.default({made}) -> float32[4] (made 3) with input 1" in difference.what


def test_a_fault_that_the_last_of_many_inputs_shows() -> None:
    def step(x: Tensor) -> Tensor:
        return x.exp() if torch.signbit(x).any().item() else x.log()

    allow = ["test_capturable.py:step"]
    assert_capturable(step, ONE, ONE + 1, ONE + 2, allow=allow)
    with pytest.raises(NotCapturableError, match="with input 3") as error:
        assert_capturable(step, ONE, ONE + 1, ONE + 2, TWO, allow=allow)
    assert [violation.kind for violation in error.value.violations] == ["operators"]


def workspace() -> Step:
    made: dict[str, Tensor] = {}

    def step(x: Tensor) -> Tensor:
        if "space" not in made:
            made["space"] = torch.empty_like(x)
        return made["space"].copy_(x) * 2

    return step


def in_place() -> Step:
    state = torch.zeros(4)
    return lambda x: state.add_(x)


def training(is_set_to_none: bool) -> Step:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))

    def step(x: Tensor) -> None:
        model.zero_grad(set_to_none=is_set_to_none)
        model(x).sum().backward()

    return step


ALLOWED: dict[str, Callable[[], Step]] = {
    "arithmetic": lambda: lambda x: (x * 2 + x.sum()).softmax(0),
    "where": lambda: lambda x: torch.where(x > 0, x, 0.0).cumsum(0),
    "store of a number by a mask": lambda: lambda x: x.clone().__setitem__(x > 0, 0.0),
    "sort": lambda: lambda x: x.gather(0, x.argsort(stable=True)),
    "full": lambda: lambda x: x + torch.full((), 2.0),
    "random": lambda: lambda x: x + torch.rand(4),
    "a workspace from the warm-up": workspace,
    "state in place": in_place,
    "new gradients": lambda: training(True),
    "gradients that stay": lambda: training(False),
    "reads only shapes": lambda: lambda x: x.view(x.numel() // 2, 2).sum(0),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_no_fault_is_imagined(name: str) -> None:
    operators = assert_capturable(ALLOWED[name](), ONE, TWO, ONE * 7)
    assert len(operators) > 0


def test_gradients_of_the_inputs_add_up_in_one_place() -> None:
    leaves = [value.clone().requires_grad_() for value in (ONE, TWO, ONE)]
    assert_capturable(lambda x: x.square().sum().backward(), *leaves)
    assert all(leaf.grad is None for leaf in leaves)  # buffers stood for them


def test_arguments_are_tuples_of_anything() -> None:
    def step(pair: dict[str, Tensor], scale: float) -> Tensor:
        return pair["a"] * scale + pair["b"]

    inputs = [({"a": a, "b": b}, 2.0) for a, b in ((ONE, TWO), (TWO, ONE))]
    names = [operator.name for operator in assert_capturable(step, *inputs)]
    assert names == ["aten.mul.Tensor", "aten.add.Tensor"]


def test_without_a_warm_up_a_workspace_is_a_fault() -> None:
    with pytest.raises(NotCapturableError):
        assert_capturable(workspace(), ONE, TWO, warmup=0)


@pytest.mark.parametrize(
    "inputs",
    [(), (ONE,), (ONE, TWO[:3]), (ONE, TWO.double()), ((ONE, 1), (TWO, 2)), (ONE, (TWO, TWO))],
    ids=["none", "one", "shape", "dtype", "number", "structure"],
)
def test_inputs_that_show_nothing(inputs: tuple) -> None:
    with pytest.raises(ValueError, match="differ"):
        assert_capturable(torch.exp, *inputs)


@transports
@pytest.mark.parametrize(
    ("ranks", "slots"), [(1, 0), (4, 0), (4, 1), (4, None)], indirect=["ranks"]
)
@pytest.mark.parametrize("again", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_layer(ranks: int, wire: str, slots: int | None, again: bool) -> None:
    """Forward and backward behind the router, gradients of weights included."""
    fields = {"moe_echo_recompute_expert_dispatch": again, "moe_echo_row_alignment": 4}
    stages = Stages(build(ranks, wire, torch.bfloat16, slots, **fields))

    def step(hidden: Tensor, probs: Tensor, chosen: Tensor) -> None:
        stages(hidden, probs, chosen).square().mean().backward()

    inputs = []
    for seed, kind in enumerate((*ROUTINGS, "no tokens")):
        chosen = routing_map(kind, shapes.TOKENS, experts_for(ranks), shapes.TOPK, seed)
        shape = (shapes.SEQUENCE, shapes.BATCH, HIDDEN)
        hidden = torch.randn(shape, dtype=torch.bfloat16).requires_grad_()
        inputs.append((hidden, router_probs(chosen, torch.float32).requires_grad_(), chosen))
    operators = assert_capturable(step, *inputs)
    assert len(operators) > 100
    collectives = [operator for operator in operators if operator.name.startswith("c10d")]
    assert (len(collectives) >= 5) == (ranks > 1)


@groups_of(1, 4)
def test_the_layer_with_its_router(ranks: int) -> None:
    """What Megatron's own router does is capturable too."""
    layer = build(ranks, "all_to_all", torch.bfloat16, 1 if ranks > 1 else 0)
    shape = (shapes.SEQUENCE, shapes.BATCH, HIDDEN)
    inputs = [torch.randn(shape, dtype=torch.bfloat16) * scale for scale in (0, 1, 30)]
    assert_capturable(lambda hidden: layer(hidden)[0].sum().backward(), *inputs)
