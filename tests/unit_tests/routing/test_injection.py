"""The node that injects the losses: against an explicit loss, and compiled without a break."""

import functools
from collections.abc import Callable
from pathlib import Path

import launch
import pytest
import torch
import torch._dynamo.config
from torch import Tensor

from megatron_echo import cpu_backend
from megatron_echo.routing import aux_loss
from megatron_echo.routing.injection import attach_losses, register

S, B, E = 5, 2, 4
ATTACH: dict[str, Callable] = {
    "logits": attach_losses,
    "scores": functools.partial(attach_losses, to_scores=True),
}


class FixedLosses:
    """Rows that are set from outside, up to the moment of the backward pass."""

    def __init__(self, score_function: str, dtype: torch.dtype = torch.float64) -> None:
        self.score_function, self.score_dtype = score_function, dtype
        self.has_balance_loss = self.has_z_loss = True
        generator = torch.Generator().manual_seed(1)
        self.rows = torch.rand(B, E, generator=generator, dtype=dtype)
        self.coefficient = torch.tensor(0.3, dtype=dtype)
        self.asked: list[int] = []
        self.key = register(self)

    def weigh(self, sums: Tensor, squares: Tensor, call: int) -> tuple[Tensor, Tensor]:
        self.asked.append(call)
        return self.rows.clone(), self.coefficient.clone()


def draw(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(S, B, E, generator=generator, dtype=torch.float64)
    return logits.requires_grad_()


def main_loss(output: Tensor) -> Tensor:
    return (output * torch.arange(output.numel()).view_as(output)).square().sum()


def explicit(kind: str, losses: FixedLosses, valid: Tensor | None) -> Tensor:
    logits = draw()
    scores = aux_loss.router_scores(logits, losses.score_function)
    sums = aux_loss.score_sums(scores, losses.score_function, valid)
    added = aux_loss.balance_loss(sums, losses.rows) + losses.coefficient * aux_loss.z_sum(
        logits, valid
    )
    (main_loss(scores if kind == "scores" else logits) + added).backward()
    return logits.grad


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("function", aux_loss.SCORE_FUNCTIONS)
@pytest.mark.parametrize("kind", ATTACH)
def test_explicit(kind: str, function: str, padded: bool) -> None:
    losses, logits = FixedLosses(function), draw()
    valid = torch.arange(S)[:, None] < torch.tensor([S, 2]) if padded else None
    output = ATTACH[kind](logits, valid, losses, 3)
    expected_output = logits if kind == "logits" else aux_loss.router_scores(logits, function)
    assert torch.equal(output, expected_output)
    main_loss(output).backward()
    assert losses.asked == [3]
    expected = explicit(kind, losses, valid)
    assert (logits.grad - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("kind", ATTACH)
def test_weights_may_come_late(kind: str) -> None:
    losses, logits = FixedLosses("sigmoid"), draw()
    output = ATTACH[kind](logits, None, losses, 0)
    losses.rows *= 3
    main_loss(output).backward()
    torch.testing.assert_close(logits.grad, explicit(kind, losses, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("balance", "z"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("kind", ATTACH)
def test_only_some_losses(kind: str, balance: bool, z: bool) -> None:
    losses, logits = FixedLosses("softmax"), draw()
    losses.has_balance_loss, losses.has_z_loss = balance, z
    main_loss(ATTACH[kind](logits, None, losses, 0)).backward()
    losses.rows *= balance
    losses.coefficient *= z
    torch.testing.assert_close(logits.grad, explicit(kind, losses, None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ATTACH)
def test_dtype_of_the_logits(kind: str) -> None:
    losses = FixedLosses("softmax", torch.float32)
    logits = draw().detach().bfloat16().requires_grad_()
    output = ATTACH[kind](logits, None, losses, 0)
    assert output.dtype == (torch.bfloat16 if kind == "logits" else torch.float32)
    main_loss(output).backward()
    assert logits.grad.dtype == torch.bfloat16


def compiled() -> None:
    """Runs in a process of its own, where the CPU backend has not switched the compiler off."""
    for kind in ATTACH:
        losses = FixedLosses("softmax")
        compiled_once: list[int] = []

        def backend(
            graph: torch.fx.GraphModule, inputs: list, seen: list = compiled_once
        ) -> Callable:
            from torch._dynamo.backends.debugging import aot_eager

            seen.append(1)
            return aot_eager(graph, inputs)

        def step(logits: Tensor, call: int, kind: str = kind, losses=losses) -> Tensor:
            return main_loss(ATTACH[kind](logits.sin().asin(), None, losses, call))

        fast = torch.compile(step, fullgraph=True, backend=backend)
        for call in range(4):
            logits = draw().detach().mul_(0.3).requires_grad_()
            loss = fast(logits, call)
            losses.rows.add_(call)  # after the forward pass, also of a graph that exists already
            loss.backward()
            assert losses.asked == list(range(call + 1)), losses.asked
            again = draw().detach().mul_(0.3).requires_grad_()
            step(again, call).backward()
            losses.asked.pop()
            torch.testing.assert_close(logits.grad, again.grad, rtol=1e-12, atol=1e-12)
        assert 1 <= len(compiled_once) <= 2, "never compiled, or by each call again"


def test_compiles_without_a_break() -> None:
    """``fullgraph=True``: the same gradients, and late weights, from a graph compiled before."""
    launch.run([], script=Path(__file__), env={"TORCHDYNAMO_DISABLE": "0"}).check()


if __name__ == "__main__":
    cpu_backend.disable()
    torch._dynamo.config.disable = False  # set as torch was imported
    compiled()
