"""Biases of rows: the reference against plain autograd, and the kernels against the reference."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import triton_interpreter
from torch import Tensor

from megatron_echo.experts import biases
from megatron_echo.experts.biases import bias_stack, group_sums, row_groups, with_weighted_bias

ENDS = torch.tensor([3, 3, 20, 37], dtype=torch.int32)


def inputs(dtype: torch.dtype, rows: int = 40, width: int = 260) -> tuple[Tensor, ...]:
    """Rows, biases, probabilities and gradients; NaN beyond the last end."""
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, width), (len(ENDS), width), (rows,), (rows, width)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for tensor in (drawn[0], *drawn[2:]):
        tensor[int(ENDS[-1]) :] = torch.nan
    wide = torch.promote_types(dtype, torch.float32)
    return tuple(t.to(kind) for t, kind in zip(drawn, (dtype, wide, wide, dtype), strict=True))


def results(rows: Tensor, bias: Tensor, probs: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients; of rows, those in a group."""
    leaves = [t.clone().requires_grad_() for t in (rows, bias, probs)]
    output = with_weighted_bias(*leaves, ENDS)
    to_rows, to_bias, to_probs = torch.autograd.grad(output, leaves, grad)
    last = int(ENDS[-1])
    return [output[:last], to_rows[:last], to_bias, to_probs[:last]]


@pytest.fixture
def on_a_gpu() -> Iterator[None]:
    with triton_interpreter.mended(), mock.patch.object(biases, "on_gpu", return_value=True):
        yield


def test_row_groups() -> None:
    groups = row_groups(ENDS, 40)
    assert groups.dtype == torch.int32
    assert groups.tolist() == [0] * 3 + [2] * 17 + [3] * 17 + [4] * 3


def test_values_and_gradients() -> None:
    """An empty group's bias has the gradient 0, and rows of no group reach nothing."""
    rows, bias, probs, grad = inputs(torch.float64)
    found, last = results(rows, bias, probs, grad), int(ENDS[-1])
    leaves = [t.clone().requires_grad_() for t in (rows[:last], bias, probs[:last])]
    added = torch.cat([leaves[1][i].expand(n, -1) for i, n in enumerate((3, 0, 17, 17))])
    expected = leaves[0] + added * leaves[2][:, None]
    grads = torch.autograd.grad(expected, leaves, grad[:last])
    for ours, theirs in zip(found, (expected, *grads), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    assert not found[2][1].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_kernels(dtype: torch.dtype, on_a_gpu: None) -> None:
    """Within rounding of fp64; twice the same bits; fp64 itself by the kernel of sums alone."""
    given = inputs(dtype)
    found = results(*given)
    with mock.patch.object(biases, "on_gpu", return_value=False):
        exact = results(*(tensor.double() for tensor in given))
    for ours, again, theirs in zip(found, results(*given), exact, strict=True):
        assert torch.equal(ours, again)
        limit = 8 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=20 * limit)


def test_sums_without_weights(on_a_gpu: None) -> None:
    rows, bias, *_ = inputs(torch.float32)
    found = group_sums(rows, row_groups(ENDS, len(rows)), ENDS, bias)
    exact = torch.stack([part.sum(0) for part in rows[:37].double().split([3, 0, 17, 17])])
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


def test_nothing_to_launch(on_a_gpu: None) -> None:
    rows, bias = torch.zeros(0, 8, requires_grad=True), torch.ones(2, 8, requires_grad=True)
    output = with_weighted_bias(rows, bias, torch.ones(0), torch.zeros(2, dtype=torch.int32))
    output.sum().backward()
    assert output.shape == (0, 8)
    assert bias.grad is not None
    assert not bias.grad.any()


def test_a_stack_is_wide() -> None:
    assert bias_stack(torch.ones(2, 3, dtype=torch.bfloat16), None).dtype == torch.float32
