"""Rowwise FP8: the quantisation, the products, and the layer of experts that computes in it."""

from pathlib import Path

import launch
import pytest
import torch
from torch import Tensor

from megatron_echo.experts.fp8 import (
    FP8,
    Quantised,
    pack_rows,
    quantise_columns,
    quantise_rows,
    quantise_rows_reference,
    scaled_outer,
    scaled_product,
    scales_for,
    unpacked,
)
from megatron_echo.testing.capturable import assert_capturable

WORKER = Path(__file__).resolve().parents[1] / "workers" / "fp8.py"
ROWS, IN, OUT = 96, 48, 32
ENDS = ([16, 48, 48, 80], [0, 0, 96, 96], [0, 0, 0, 0], [32, 64, 80, 96])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Random values of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values, size = torch.randn(2, *shape, generator=generator)
    return values * torch.exp(2 * size)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: e4m3 holds each, and fp32 holds every sum of products."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def dequantised(operand: Quantised) -> Tensor:
    """Of :func:`quantise_rows`, in fp64."""
    return operand.values.double() * operand.scales.double().unsqueeze(-1)


def groups(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_scales_are_the_smallest_powers_of_two() -> None:
    """The largest value is at most 448, and above 224 unless it is tiny."""
    edges = torch.tensor([1.0, 448.0, 448.00003, 447.99997, 1.75, 1.7500001, 3e38, 1e-34])
    largest = torch.cat((edges, drawn(1000).abs()))
    scales = scales_for(largest)
    assert (scales.frexp().mantissa == 0.5).all()
    assert ((largest / scales > 224) & (largest / scales <= 448)).all()
    assert scales[1:3].tolist() == [1, 2]
    special = torch.tensor([0.0, 1e-45, torch.inf, torch.nan, -torch.nan])
    assert scales_for(special).tolist() == [2.0**-126] * 2 + [2.0**120] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_that_of_e4m3(dtype: torch.dtype) -> None:
    """To the nearest of 3 bits: half a step, 1 / 16 of a value, or 2^-10 of the scale at most."""
    tensor = drawn(4, ROWS, IN).to(dtype)
    operand = quantise_rows_reference(tensor)
    assert (operand.values.dtype, operand.values.shape) == (FP8, tensor.shape)
    assert (operand.scales.dtype, operand.scales.shape) == (torch.float32, tensor.shape[:-1])
    error = (dequantised(operand) - tensor.double()).abs()
    limit = torch.maximum(tensor.double().abs() / 16, operand.scales[..., None] * 2.0**-10)
    assert (error <= limit).all()
    assert torch.equal(
        dequantised(quantise_rows_reference(whole(ROWS, IN))), whole(ROWS, IN).double()
    )


def test_nan_and_infinity_are_seen_and_stay_where_they_are() -> None:
    tensor = drawn(ROWS, IN)
    clean = quantise_rows_reference(tensor)
    tensor[3, 5], tensor[7, 2] = torch.nan, -torch.inf
    operand = quantise_rows_reference(tensor)
    found = operand.values.float().isnan()
    assert found.nonzero().tolist() == [[3, 5], [7, 2]]
    others = torch.ones(ROWS, dtype=torch.bool)
    others[[3, 7]] = False
    assert torch.equal(dequantised(operand)[others], dequantised(clean)[others])
    columns = quantise_columns(tensor, torch.tensor([16, ROWS], dtype=torch.int32))
    assert columns.values.float().isnan().nonzero().tolist() == [[2, 7], [5, 3]]


@pytest.mark.parametrize("ends", ENDS)
def test_columns_are_the_rows_of_each_group_turned(ends: list[int]) -> None:
    """And zero behind the last end, where NaN may lie."""
    rows = drawn(ROWS, OUT)
    rows[ends[-1] :] = torch.nan
    operand = quantise_columns(rows, torch.tensor(ends, dtype=torch.int32))
    assert operand.values.is_contiguous()
    for number, group in enumerate(groups(ends)):
        if group.start == group.stop:
            continue
        expected = quantise_rows_reference(rows[group].t())
        assert torch.equal(operand.values[:, group].float(), expected.values.float())
        assert torch.equal(operand.scales[number], expected.scales)
    assert (operand.values[:, ends[-1] :].float() == 0).all()
    assert operand.scales.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_keep_their_scales_wherever_they_go(dtype: torch.dtype) -> None:
    """Rows of many magnitudes, moved: those of the reference, moved. A row is H + 16 bytes."""
    rows = drawn(ROWS, IN).to(dtype)
    at = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    packed = pack_rows(rows)
    assert packed.nbytes == ROWS * (IN + 16)
    moved, expected = unpacked(packed[at]), quantise_rows_reference(rows[at])
    assert torch.equal(moved.values.float(), expected.values.float())
    assert torch.equal(moved.scales, expected.scales)


@pytest.mark.parametrize("ends", ENDS)
def test_columns_of_packed_rows(ends: list[int]) -> None:
    """Rounded to the same numbers, unless below 2^-14 of the largest of the row or the column.

    Rows behind the last end may have scales of NaN.
    """
    rows, device_ends = drawn(ROWS, OUT), torch.tensor(ends, dtype=torch.int32)
    packed = unpacked(pack_rows(rows))
    packed.scales[ends[-1] :] = torch.nan
    once, twice = (quantise_columns(each, device_ends) for each in (rows, packed))
    for number, group in enumerate(groups(ends)):
        if group.start == group.stop:
            continue
        first, second = (
            each.values[:, group].double() * each.scales[number, :, None] for each in (once, twice)
        )
        part = rows[group].t().double().abs()
        small = part < 2.0**-14 * torch.maximum(part.amax(0), part.amax(1, keepdim=True))
        assert torch.equal(first[~small], second[~small])
        assert (first - second).norm() <= 1e-5 * first.norm()
    assert (twice.values[:, ends[-1] :].float() == 0).all()
    assert twice.scales.isfinite().all()


def products(ends: list[int], draw, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Both products of a linear layer beside fp64 loops over the groups, of quantised operands."""
    device_ends = torch.tensor(ends, dtype=torch.int32)
    rows, grad = draw(ROWS, IN, seed=1), draw(ROWS, OUT, seed=2)
    weights = draw(len(ends), OUT, IN, seed=3)
    rows[ends[-1] :] = grad[ends[-1] :] = torch.nan
    of_rows, of_weights = quantise_rows_reference(rows), quantise_rows_reference(weights)
    output = scaled_product(of_rows, of_weights, device_ends, dtype)
    left, right = quantise_columns(grad, device_ends), quantise_columns(rows, device_ends)
    outer = scaled_outer(left, right, device_ends, dtype)
    pairs = []
    for number, group in enumerate(groups(ends)):
        expected = dequantised(of_rows)[group] @ dequantised(of_weights)[number].T
        pairs.append((output[group], expected))
        lines = (
            operand.values[:, group].double() * operand.scales[number, :, None].double()
            for operand in (left, right)
        )
        first, second = lines
        pairs.append((outer[number], first @ second.T))
    return pairs


@pytest.mark.parametrize("ends", ENDS)
def test_products_are_those_of_the_quantised_values(ends: list[int]) -> None:
    """The same bits where sums are exact; to fp32 rounding elsewhere; zero for empty groups."""
    for dtype in (torch.float32, torch.bfloat16):
        for found, expected in products(ends, whole, dtype):
            assert torch.equal(found, expected.to(dtype))
    for found, expected in products(ends, drawn, torch.float32):
        if expected.numel():
            error = (found.double() - expected).abs().max()
            assert error <= 1e-6 * expected.abs().max()


def test_the_error_of_a_product() -> None:
    """Of random values: 2.6 % for each operand, 3.7 % of the result."""
    rows, weights = (
        torch.randn(512, 512, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    ends = torch.tensor([512], dtype=torch.int32)
    operands = quantise_rows_reference(rows), quantise_rows_reference(weights[None])
    for operand, given in zip(operands, (rows, weights[None]), strict=True):
        error = (dequantised(operand) - given).norm() / given.norm()
        assert 0.025 < error < 0.028
    exact = rows @ weights.T
    error = (scaled_product(*operands, ends, torch.float32) - exact).norm() / exact.norm()
    assert 0.035 < error < 0.039


def test_what_torch_wants_on_a_gpu() -> None:
    """Its shape rules, which know dtypes, strides and numbers of scales, take the operands."""
    ends = torch.zeros(4, dtype=torch.int32, device="meta")
    rows, grad = (torch.empty(ROWS, n, dtype=torch.bfloat16, device="meta") for n in (IN, OUT))
    weights = quantise_rows_reference(torch.empty(4, OUT, IN, dtype=torch.bfloat16, device="meta"))
    output = scaled_product(quantise_rows(rows, ends), weights, ends, torch.bfloat16)
    assert (output.shape, output.dtype) == ((ROWS, OUT), torch.bfloat16)
    columns = [quantise_columns(each, ends) for each in (grad, quantise_rows(rows, ends))]
    assert scaled_outer(*columns, ends, torch.bfloat16).shape == (4, OUT, IN)


def test_a_graph_can_hold_it() -> None:
    weights = quantise_rows_reference(drawn(4, OUT, IN))

    def step(rows: Tensor, grad: Tensor, ends: Tensor) -> None:
        packed = quantise_rows(rows, ends)
        scaled_product(packed, weights, ends, torch.float32)
        scaled_outer(quantise_columns(grad, ends), quantise_columns(packed, ends), ends, rows.dtype)

    assert_capturable(
        step,
        *((drawn(ROWS, IN), drawn(ROWS, OUT), torch.tensor(e, dtype=torch.int32)) for e in ENDS),
    )


def test_the_layer() -> None:
    """With and without clones, no host read, weights quantised once a step, tokens in FP8."""
    words = ["clones", "sync_and_shapes", "once_a_step", "travel", "biases_and_doubt"]
    print(launch.run(words, 3, script=WORKER).check().output)
