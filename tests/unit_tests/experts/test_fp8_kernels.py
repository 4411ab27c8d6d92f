"""The kernels that quantise against their references, bit for bit, in Triton's interpreter."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import triton_interpreter
from moe_cases import layer_config
from torch import Tensor

from megatron_echo.experts import fp8, kernels
from megatron_echo.experts.fp8 import FP8, Quantised
from megatron_echo.experts.fp8_linear import Fp8Weights, fp8_linear

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((1, 16), (37, 48), (130, 80), (16, 528))
SPECIAL = (0.0, -0.0, 448.0, -448.1, 1e-30, torch.inf, -torch.inf, torch.nan)


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with triton_interpreter.mended(), mock.patch.object(fp8, "on_gpu", return_value=True):
        yield


def drawn(dtype: torch.dtype, *shape: int, special: bool = True) -> Tensor:
    """Of many magnitudes, rows of zeros among them, and with the special values here and there."""
    generator = torch.Generator().manual_seed(sum(shape))
    values, size = torch.randn(2, *shape, generator=generator)
    values *= torch.exp(2 * size)
    values[..., 3::8, :] = 0
    if special:
        at = torch.randperm(values.numel(), generator=generator)[: len(SPECIAL)]
        values.view(-1)[at] = torch.tensor(SPECIAL[: len(at)])
    return values.to(dtype)


def same(found: Quantised, expected: Quantised) -> None:
    """The same scales and, but for the sign of NaN, the same bits."""
    assert torch.equal(found.scales, expected.scales)
    bits = [operand.values.contiguous().view(torch.uint8) for operand in (found, expected)]
    is_nan = [(each & 0x7F) == 0x7F for each in bits]
    assert torch.equal(*is_nan)
    assert torch.equal(*(each.masked_fill(is_nan[0], 0) for each in bits))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows = drawn(dtype, *shape)
    last = shape[0] - shape[0] // 4
    found = fp8.quantise_rows(rows, torch.tensor([0, last], dtype=torch.int32))
    expected = fp8.quantise_rows_reference(rows[:last])
    same(Quantised(found.values[:last], found.scales[:last]), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_columns(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Groups of several blocks, small and empty ones; the last end is before the last row.

    Of rows, and of rows that are quantised.
    """
    rows, last = drawn(dtype, *shape), shape[0] - shape[0] // 8
    for ends in ([last // 3, last // 3, last], [0, last], [0, 0], [last, last]):
        on_device = torch.tensor(ends, dtype=torch.int32)
        packed = fp8.quantise_rows_reference(rows)
        packed.scales[last:] = torch.nan
        for given in (rows, packed):
            found = fp8.quantise_columns(given, on_device)
            expected = fp8.quantise_columns_reference(given, on_device)
            part = slice(ends[-1])
            same(
                Quantised(found.values[:, part], found.scales),
                Quantised(expected.values[:, part], expected.scales),
            )


@pytest.mark.parametrize("is_transposed", [False, True])
def test_matrices_of_a_stack_with_gaps(is_transposed: bool) -> None:
    """What lies between two matrices, their scales as a rule, is not touched."""
    weights = drawn(torch.bfloat16, 3, 48, 80)
    shape = (3, 80, 48) if is_transposed else (3, 48, 80)
    memory = torch.full((3, 48 * 80 + 64), 7, dtype=torch.uint8)
    values = memory[:, :-64].view(FP8).unflatten(1, shape[1:])
    into = Quantised(values, torch.empty(3, 2 * shape[1])[:, : shape[1]])
    fp8.quantise_matrices(weights, into, is_transposed=is_transposed)
    same(into, fp8.quantise_rows_reference(weights.mT if is_transposed else weights))
    assert (memory[:, -64:] == 7).all()


def blocks(weights: Tensor, apart: int) -> tuple[Tensor, Tensor, Quantised]:
    """Experts as words, values and then scales, of which the last ``apart`` lie elsewhere."""
    experts, out, width = weights.shape
    words = torch.empty(experts, 1, out * (width + 4) // 4, dtype=torch.int32)
    values, scales = words.squeeze(1).split((out * width // 4, out), dim=1)
    into = Quantised(values.view(FP8).unflatten(1, (out, width)), scales.view(torch.float32))
    fp8.quantise_matrices(weights, into, is_transposed=False)
    return words[:-apart], words[-apart:].clone(), into


@pytest.mark.parametrize("ends", [[32, 32, 144, 160], [0, 0, 0, 0]])
@pytest.mark.parametrize("is_exact", [True, False])
def test_products_take_home_experts_and_clones_where_they_lie(
    ends: list[int], is_exact: bool
) -> None:
    """The reference's bits where sums are exact, scales of many sizes; else to fp32 rounding.

    NaN behind the last end reaches nothing, and padding with a scale of NaN its own row.
    """
    rows, width, out = 176, 144, 48
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        values = torch.randint(-8, 9, shape, generator=generator).float()
        if not is_exact:
            return values * torch.randn(shape, generator=generator).exp()
        values[..., 0] = 8  # so that a line has the scale of its size
        return values * 2.0 ** torch.randint(-9, 9, (*shape[:-1], 1), generator=generator)

    given, weights, on_device = draw(rows, width), draw(4, out, width), torch.tensor(ends).int()
    given[ends[-1] :] = torch.nan
    home, slots, operand = blocks(weights, 1)
    packed = fp8.pack_rows(given)
    with mock.patch.object(fp8, "on_gpu", return_value=False):
        expected = fp8.scaled_product(fp8.unpacked(packed), operand, on_device, torch.float32)
    found = kernels.scaled_product(packed, home, slots, on_device, out, torch.float32)
    limit = 0 if is_exact else 1e-6
    near(found[: ends[-1]], expected[: ends[-1]], limit)
    fp8.unpacked(packed).scales[1] = torch.nan
    broken = kernels.scaled_product(packed, home, slots, on_device, out, torch.float32)
    others = [row for row in range(ends[-1]) if row != 1]
    assert torch.equal(broken[others], found[others])
    assert broken[1].isnan().all() or ends[-1] == 0

    grad = torch.randint(-8, 9, (rows, out), generator=generator).float()
    left, right = (fp8.quantise_columns(each, on_device) for each in (grad, given))
    for operand in (left, right):
        operand.values[:, ends[-1] :] = torch.nan
    both = (left.values, left.scales), (right.values, right.scales)
    outer = kernels.scaled_outer(*both, on_device, torch.float32)
    with mock.patch.object(fp8, "on_gpu", return_value=False):
        for operand in (left, right):
            operand.values[:, ends[-1] :] = 0
        wanted = fp8.scaled_outer(left, right, on_device, torch.float32)
    near(outer, wanted, 1e-6)


def near(found: Tensor, expected: Tensor, limit: float) -> None:
    """To a part of the largest value; 0 for the same bits."""
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= limit * expected.abs().max()


def test_the_linear_by_kernels() -> None:
    """Output and both gradients of torch's way."""
    config = layer_config(1, 2, torch.float32)
    ends, generator = torch.tensor([16, 48]).int(), torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=generator) for shape in ((48, 32), (2, 16, 32))]
    grad = torch.randn(48, 16, generator=generator)
    results = []
    for by_kernel in (False, True):
        weights, leaves = Fp8Weights(config), [t.clone().requires_grad_() for t in given]
        weights.by_kernel = by_kernel
        output = fp8_linear(*leaves, ends, None, weights, trains=True)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    for expected, found in zip(*results, strict=True):
        near(found, expected, 1e-6)
