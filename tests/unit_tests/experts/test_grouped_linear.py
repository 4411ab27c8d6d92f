"""Grouped products against a loop over the groups, on torch's kernel and on the reference."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_echo.experts import grouped_linear as module
from megatron_echo.experts.grouped_linear import grouped_linear

ENDS = {
    "full": [4, 9, 16, 24],
    "tail": [4, 9, 16, 20],
    "empty first": [0, 9, 16, 20],
    "empty middle": [4, 4, 4, 20],
    "empty last": [4, 9, 20, 20],
    "one group": [0, 0, 24, 24],
    "nothing": [0, 0, 0, 0],
}
ROWS = 24
# Worst error as a part of the largest value; sums have up to 32 terms.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
# Whether both widths make rows of a multiple of 16 bytes, and so whether torch's kernel takes them.
WIDTHS = {
    torch.float64: [((8, 16), False), ((5, 3), False)],
    torch.float32: [((8, 16), True), ((32, 4), True), ((6, 16), False), ((8, 5), False)],
    torch.bfloat16: [((8, 16), True), ((12, 8), False), ((8, 1), False)],
}
CASES = [
    pytest.param(dtype, widths, kernel, id=f"{str(dtype)[6:]}-{widths[0]}x{widths[1]}")
    for dtype, choices in WIDTHS.items()
    for widths, kernel in choices
]


@pytest.fixture
def kernel_calls() -> Iterator[mock.Mock]:
    """Counts the calls of torch's kernel."""
    with mock.patch.object(module, "grouped_mm", wraps=module.grouped_mm) as spy:
        yield spy


def inputs(dtype: torch.dtype, widths: tuple[int, int], ends: list[int]) -> list[Tensor]:
    """Rows, weights and a gradient of the output; NaN in what lies behind the last group."""
    generator = torch.Generator().manual_seed(0)
    taken, made = widths
    shapes = (ROWS, taken), (len(ends), made, taken), (ROWS, made)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    tensors[0][ends[-1] :] = tensors[2][ends[-1] :] = float("nan")
    return tensors


def loop(rows: Tensor, weights: Tensor, grad: Tensor, ends: list[int]) -> list[Tensor]:
    """Output, and gradients of rows and weights, in fp64."""
    rows, weights = (t.double().requires_grad_() for t in (rows, weights))
    starts = [0, *ends[:-1]]
    output = torch.cat(
        [rows[a:b] @ weight.T for a, b, weight in zip(starts, ends, weights, strict=True)]
    )
    grads = torch.autograd.grad(output, (rows, weights), grad[: ends[-1]].double())
    return [output.detach(), *grads]


def close(actual: Tensor, expected: Tensor) -> None:
    """Both finite, and within the dtype's tolerance of the largest value."""
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if expected.numel():
        error = (actual.double() - expected).abs().max()
        assert error <= TOLERANCE[actual.dtype] * expected.abs().max(), float(error)


@pytest.mark.parametrize("kind", ENDS)
@pytest.mark.parametrize(("dtype", "widths", "kernel"), CASES)
def test_output_and_gradients_are_the_loops(
    dtype: torch.dtype, widths: tuple[int, int], kernel: bool, kind: str, kernel_calls: mock.Mock
) -> None:
    """Also: an empty group's gradient is zero, and NaN behind the last group stays there."""
    ends, last = ENDS[kind], ENDS[kind][-1]
    rows, weights, grad = inputs(dtype, widths, ends)
    expected = loop(rows, weights, grad, ends)
    rows.requires_grad_()
    weights.requires_grad_()
    output = grouped_linear(rows, weights, torch.tensor(ends, dtype=torch.int32))
    to_rows, to_weights = torch.autograd.grad(output, (rows, weights), grad)
    assert output.dtype == to_rows.dtype == to_weights.dtype == dtype
    assert output.shape == (ROWS, widths[1])
    close(output[:last], expected[0])
    close(to_rows[:last], expected[1][:last])
    close(to_weights, expected[2])
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            assert (to_weights[group] == 0).all()
    assert kernel_calls.call_count == (3 if kernel else 0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nan_weights_stay_in_their_group(dtype: torch.dtype) -> None:
    """Output and gradients of the other groups are the same bits as without them."""
    ends = ENDS["tail"]
    rows, weights, grad = inputs(dtype, (8, 16), ends)
    results = []
    for value in (1.0, float("nan")):
        leaves = [rows.clone().requires_grad_(), weights.clone()]
        leaves[1][1] = value
        leaves[1].requires_grad_()
        output = grouped_linear(leaves[0], leaves[1], torch.tensor(ends, dtype=torch.int32))
        grads = torch.autograd.grad(output, leaves, grad)
        results.append([output, *grads])
    outside = torch.tensor([*range(4), *range(9, 20)])
    for with_one, with_nan in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(with_nan[outside], with_one[outside])
        assert with_nan[4:9].isnan().all()
    assert torch.equal(results[0][2], results[1][2])


@pytest.mark.parametrize("widths", [(8, 16), (6, 5)])
def test_gradient_of_a_sum(widths: tuple[int, int]) -> None:
    """The gradient of a sum is one number with strides of zero."""
    ends = ENDS["full"]
    rows, weights, _ = inputs(torch.float32, widths, ends)
    expected = loop(rows, weights, torch.ones(ROWS, widths[1]), ends)
    rows.requires_grad_()
    weights.requires_grad_()
    grouped_linear(rows, weights, torch.tensor(ends, dtype=torch.int32)).sum().backward()
    assert rows.grad is not None
    assert weights.grad is not None
    close(rows.grad, expected[1])
    close(weights.grad, expected[2])


@pytest.mark.parametrize(("rows_need", "weights_need"), [(True, False), (False, True)])
def test_only_the_gradients_that_are_needed(
    rows_need: bool, weights_need: bool, kernel_calls: mock.Mock
) -> None:
    rows, weights, grad = inputs(torch.float32, (8, 16), ENDS["full"])
    rows.requires_grad_(rows_need)
    weights.requires_grad_(weights_need)
    ends = torch.tensor(ENDS["full"], dtype=torch.int32)
    grouped_linear(rows, weights, ends).backward(grad)
    assert (rows.grad is not None, weights.grad is not None) == (rows_need, weights_need)
    assert kernel_calls.call_count == 2


def test_gradcheck() -> None:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: grouped_linear(a, b, ends), (rows, weights))


@pytest.mark.parametrize("kind", ENDS)
def test_references_agree_with_the_kernel(kind: str) -> None:
    """Forward, input gradient and weight gradient; the reference's other rows are zero."""
    ends = torch.tensor(ENDS[kind], dtype=torch.int32)
    rows, weights, grad = inputs(torch.float32, (8, 16), ENDS[kind])
    last = ENDS[kind][-1]
    transposed = weights.transpose(1, 2)
    product = module.grouped_product_reference(rows, transposed, ends)
    kernel = torch.nn.functional.grouped_mm(rows, transposed, offs=ends)
    torch.testing.assert_close(product[:last], kernel[:last], rtol=1e-6, atol=1e-5)
    assert (product[last:] == 0).all()
    outer = module.grouped_outer_reference(grad, rows, ends)
    kernel = torch.nn.functional.grouped_mm(grad.t(), rows, offs=ends)
    torch.testing.assert_close(outer, kernel, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("widths", [(8, 16), (6, 5)])
def test_what_is_kept_for_backward(widths: tuple[int, int]) -> None:
    """Its three arguments, none of them a copy."""
    ends = torch.tensor(ENDS["tail"], dtype=torch.int32)
    rows, weights, grad = inputs(torch.float32, widths, ENDS["tail"])
    rows.requires_grad_()
    weights.requires_grad_()
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_linear(rows, weights, ends).backward(grad)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (rows, weights, ends)]


def test_frozen_weights() -> None:
    """No gradient for weights that want none; that of the rows is the same."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 8, generator=generator)
    weights = torch.randn(3, 4, 8, generator=generator)
    ends = torch.tensor([4, 4, 12], dtype=torch.int32)
    grads = []
    for is_frozen in (False, True):
        source = rows.clone().requires_grad_()
        stack = weights.clone().requires_grad_(not is_frozen)
        grouped_linear(source, stack, ends).square().sum().backward()
        assert (stack.grad is None) == is_frozen
        grads.append(source.grad)
    assert torch.equal(*grads)
