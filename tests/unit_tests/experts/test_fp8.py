"""FP8 in each format: quantisation, products, and the layer of experts that computes in it."""

import itertools
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
    quantise_matrices,
    quantise_reference,
    quantise_rows,
    scaled_outer,
    scaled_product,
    scales_for,
    unpacked,
)
from megatron_echo.experts.mx_scales import tiles_of_columns, tiles_of_matrices, tiles_of_rows
from megatron_echo.precision import FORMATS, Fp8Format
from megatron_echo.testing.capturable import assert_capturable

WORKER = Path(__file__).resolve().parents[1] / "workers" / "fp8.py"
ROWWISE, MXFP8 = FORMATS["fp8-rowwise"], FORMATS["mxfp8"]
ROWS, IN, OUT = 96, 48, 32
ENDS = ([16, 48, 48, 80], [0, 0, 96, 96], [0, 0, 0, 0], [32, 64, 80, 96])
of_each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Random values of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    values, size = torch.randn(2, *shape, generator=generator)
    return values * torch.exp(2 * size)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: e4m3 holds each, and fp32 holds every sum of products."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


def in_units(form: Fp8Format, *sizes: int) -> list[int]:
    """Sizes for products of rows of 16, as large for a format's own."""
    return [size // ROWWISE.alignment * form.alignment for size in sizes]


def oracle(tensor: Tensor, lines: int, block: int) -> Tensor:
    """The numbers ``[n, k]`` that lines in blocks become, in fp64."""
    blocks = tensor.double().unfold(0, lines, lines).unfold(1, block, block)
    largest, scale = blocks.abs().amax((2, 3)), torch.tensor(2.0).double() ** -40
    while (largest > 448 * scale).any():
        scale = torch.where(largest > 448 * scale, 2 * scale, scale)
    scale = scale.expand_as(largest)[:, :, None, None]
    _, exponent = torch.frexp(blocks / scale)
    step = torch.ldexp(torch.ones_like(blocks), exponent.clamp(min=-5) - 4) * scale
    rounded = torch.round(blocks / step) * step
    return rounded.transpose(1, 2).reshape(tensor.shape)


def dequantised(operand: Quantised) -> Tensor:
    """Of :func:`quantise_rows`, in fp64, without the help of what is tested."""
    values, scales = operand.values.double(), operand.scales.double()
    if scales.dim() < values.dim():
        return values * scales.unsqueeze(-1)
    for dim in (-2, -1):
        scales = scales.repeat_interleave(values.shape[dim] // scales.shape[dim], dim)
    return values * scales


def groups(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@of_each_format
def test_numbers_are_those_of_an_oracle(form: Fp8Format) -> None:
    """Rows, columns of each group, weights and transposed weights: every bit, each along its own.

    A block that takes its scale from its neighbour, or lies along the other dimension, is seen.
    """
    rows, width, out = in_units(form, ROWS, IN, OUT)
    given, weights = drawn(rows, width), drawn(2, out, width, seed=1)
    ends = in_units(form, *ENDS[0])
    on_device = torch.tensor(ends, dtype=torch.int32)
    block = form.block or width
    assert torch.equal(dequantised(quantise_rows(given, on_device, form)), oracle(given, 1, block))
    columns = quantise_columns(given, on_device, form)
    for number, group in enumerate(groups(ends)):
        if group.start < group.stop:
            expected = oracle(given[group].t(), 1, form.block or group.stop - group.start)
            scales = (
                columns.scales[number]
                if form.block is None
                else (columns.scales[:, group.start // form.block : group.stop // form.block])
            )
            part = Quantised(columns.values[:, group], scales)
            assert torch.equal(dequantised(part), expected)
    for is_transposed in (False, True):
        lines = weights.mT if is_transposed else weights
        shape = lines.shape[1] // form.lines, lines.shape[2] // (form.block or lines.shape[2])
        scales = torch.empty(2, *shape) if form.block else torch.empty(2, shape[0])
        into = Quantised(torch.empty(lines.shape, dtype=FP8), scales.to(columns.scales.dtype))
        quantise_matrices(weights, into, form, is_transposed=is_transposed)
        for matrix, line in zip(dequantised(into), lines, strict=True):
            assert torch.equal(matrix, oracle(line, form.lines, form.block or line.shape[1]))
        assert torch.equal(into.dequantised(), dequantised(into).float())


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
    operand = quantise_reference(tensor, ROWWISE)
    assert (operand.values.dtype, operand.values.shape) == (FP8, tensor.shape)
    assert (operand.scales.dtype, operand.scales.shape) == (torch.float32, tensor.shape[:-1])
    error = (dequantised(operand) - tensor.double()).abs()
    limit = torch.maximum(tensor.double().abs() / 16, operand.scales[..., None] * 2.0**-10)
    assert (error <= limit).all()
    assert torch.equal(
        dequantised(quantise_reference(whole(ROWS, IN), ROWWISE)), whole(ROWS, IN).double()
    )


def test_nan_and_infinity_are_seen_and_stay_where_they_are() -> None:
    tensor = drawn(ROWS, IN)
    clean = quantise_reference(tensor, ROWWISE)
    tensor[3, 5], tensor[7, 2] = torch.nan, -torch.inf
    operand = quantise_reference(tensor, ROWWISE)
    found = operand.values.float().isnan()
    assert found.nonzero().tolist() == [[3, 5], [7, 2]]
    others = torch.ones(ROWS, dtype=torch.bool)
    others[[3, 7]] = False
    assert torch.equal(dequantised(operand)[others], dequantised(clean)[others])
    columns = quantise_columns(tensor, torch.tensor([16, ROWS], dtype=torch.int32), ROWWISE)
    assert columns.values.float().isnan().nonzero().tolist() == [[2, 7], [5, 3]]


@pytest.mark.parametrize("ends", ENDS)
def test_columns_are_the_rows_of_each_group_turned(ends: list[int]) -> None:
    """And zero behind the last end, where NaN may lie."""
    rows = drawn(ROWS, OUT)
    rows[ends[-1] :] = torch.nan
    operand = quantise_columns(rows, torch.tensor(ends, dtype=torch.int32), ROWWISE)
    assert operand.values.is_contiguous()
    for number, group in enumerate(groups(ends)):
        if group.start == group.stop:
            continue
        expected = quantise_reference(rows[group].t(), ROWWISE)
        assert torch.equal(operand.values[:, group].float(), expected.values.float())
        assert torch.equal(operand.scales[number], expected.scales)
    assert (operand.values[:, ends[-1] :].float() == 0).all()
    assert operand.scales.isfinite().all()


@of_each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_keep_their_scales_wherever_they_go(
    form: Fp8Format, dtype: torch.dtype
) -> None:
    """Rows of many magnitudes, moved: those of the reference, moved.

    A row is H bytes, and rowwise 16, in blocks of 32 H / 32 filled up to 16.
    """
    for units in (1, 3, 17):
        width = units * form.alignment
        rows = drawn(ROWS, width).to(dtype)
        at = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
        packed = pack_rows(rows, form)
        scales = 4 if form.block is None else units
        assert packed.nbytes == ROWS * (width + -(-scales // 16) * 16)
        moved, expected = unpacked(packed[at], form), quantise_reference(rows[at], form)
        assert torch.equal(moved.values.float(), expected.values.float())
        assert torch.equal(moved.scales.float(), expected.scales.float())


@of_each_format
@pytest.mark.parametrize("ends", ENDS)
def test_columns_of_packed_rows(form: Fp8Format, ends: list[int]) -> None:
    """Rounded to the same numbers, unless below 2^-13 of the largest of the row or the column.

    Rows behind the last end may have scales of NaN.
    """
    num_rows, width = in_units(form, ROWS, OUT)
    rows, ends = drawn(num_rows, width), in_units(form, *ends)
    device_ends = torch.tensor(ends, dtype=torch.int32)
    packed = unpacked(pack_rows(rows, form), form)
    packed.scales[ends[-1] :] = torch.nan
    once, twice = (quantise_columns(each, device_ends, form) for each in (rows, packed))
    for group in groups(ends):
        if group.start == group.stop:
            continue
        first, second = (of_group(each, ends, group, form) for each in (once, twice))
        part = rows[group].t().double().abs()
        both = [largest_beside(part, form), largest_beside(part.t(), form).t()]
        small = part < 2.0**-6 / 224 * torch.maximum(*both)
        assert torch.equal(first[~small], second[~small])
        limit = 1e-5 if form.block in (None, 32) else 2e-5  # more numbers, of more magnitudes
        assert (first - second).norm() <= limit * first.norm()
    assert (twice.values[:, ends[-1] :].float() == 0).all()
    assert twice.scales.float().isfinite().all()


def largest_beside(lines: Tensor, form: Fp8Format) -> Tensor:
    """The largest of those that share a scale, for each number."""
    blocks = lines.unflatten(1, (-1, form.block or lines.shape[1]))
    return blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(1)


def of_group(columns: Quantised, ends: list[int], group: slice, form: Fp8Format) -> Tensor:
    """The columns of a group in fp64."""
    if form.block:
        scales = columns.scales[:, group.start // form.block : group.stop // form.block]
    else:
        scales = columns.scales[ends.index(group.stop)]
    return dequantised(Quantised(columns.values[:, group], scales))


def products(
    ends: list[int], draw, dtype: torch.dtype, form: Fp8Format
) -> list[tuple[Tensor, Tensor]]:
    """Both products of a linear layer beside fp64 loops over the groups, of quantised operands."""
    num_rows, width, out = in_units(form, ROWS, IN, OUT)
    ends = in_units(form, *ends)
    device_ends = torch.tensor(ends, dtype=torch.int32)
    rows, grad = draw(num_rows, width, seed=1), draw(num_rows, out, seed=2)
    weights = draw(len(ends), out, width, seed=3)
    rows[ends[-1] :] = grad[ends[-1] :] = torch.nan
    of_rows = quantise_reference(rows, form)
    of_weights = quantise_reference(weights, form, form.lines)
    output = scaled_product(of_rows, of_weights, device_ends, dtype)
    left, right = (quantise_columns(each, device_ends, form) for each in (grad, rows))
    outer = scaled_outer(left, right, device_ends, dtype)
    pairs = []
    for number, group in enumerate(groups(ends)):
        expected = dequantised(of_rows)[group] @ dequantised(of_weights)[number].T
        pairs.append((output[group], expected))
        if group.start == group.stop:
            pairs.append((outer[number], torch.zeros(out, width).double()))
            continue
        first, second = (of_group(each, ends, group, form) for each in (left, right))
        pairs.append((outer[number], first @ second.T))
    return pairs


@of_each_format
@pytest.mark.parametrize("ends", ENDS)
def test_products_are_those_of_the_quantised_values(form: Fp8Format, ends: list[int]) -> None:
    """The same bits where sums are exact; to fp32 rounding elsewhere; zero for empty groups."""
    for dtype in (torch.float32, torch.bfloat16):
        for found, expected in products(ends, whole, dtype, form):
            assert torch.equal(found, expected.to(dtype))
    for found, expected in products(ends, drawn, torch.float32, form):
        if expected.numel():
            error = (found.double() - expected).abs().max()
            assert error <= 1e-6 * expected.abs().max()


@of_each_format
def test_the_error_of_a_product(form: Fp8Format) -> None:
    """Of random values: 2.6 % for each operand, 3.7 % of the result."""
    rows, weights = (
        torch.randn(512, 512, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    ends = torch.tensor([512], dtype=torch.int32)
    operands = (
        quantise_reference(rows, form), quantise_reference(weights[None], form, form.lines)
    )  # fmt: skip
    for operand, given in zip(operands, (rows, weights[None]), strict=True):
        error = (dequantised(operand) - given).norm() / given.norm()
        assert 0.025 < error < 0.028
    exact = rows @ weights.T
    error = (scaled_product(*operands, ends, torch.float32) - exact).norm() / exact.norm()
    assert 0.035 < error < 0.039


@pytest.mark.parametrize("form", [ROWWISE, MXFP8], ids=["rowwise", "mxfp8"])
def test_what_torch_wants_on_a_gpu(form: Fp8Format) -> None:
    """Its shape rules, which know dtypes, strides and numbers of scales, take the operands."""
    num_rows, width, out = in_units(form, ROWS, IN, OUT)
    ends = torch.zeros(4, dtype=torch.int32, device="meta")
    rows, grad = (torch.empty(num_rows, n, device="meta").bfloat16() for n in (width, out))
    weights = quantise_reference(torch.empty(4, out, width, device="meta"), form, form.lines)
    output = scaled_product(quantise_rows(rows, ends, form), weights, ends, torch.bfloat16)
    assert (output.shape, output.dtype) == ((num_rows, out), torch.bfloat16)
    both = grad, quantise_rows(rows, ends, form)
    columns = [quantise_columns(each, ends, form) for each in both]
    assert scaled_outer(*columns, ends, torch.bfloat16).shape == (4, out, width)


def tile_of(tiles: Tensor, line: int, block: int, across: int) -> int:
    """The byte that a product reads for a line and block, of tiles in rows of so many."""
    tile = line // 128 * across + block // 4
    return int(tiles[512 * tile + line % 32 * 16 + line % 128 // 32 * 4 + block % 4])


@pytest.mark.parametrize("ends", [[32, 160, 160, 448], [0, 0, 64, 64], [256, 384, 416, 480]])
def test_scales_are_where_the_products_read_them(ends: list[int]) -> None:
    """Where groups begin is what the CUDA kernels of torch 2.11 compute from the ends."""
    rows, width = 512, 160
    on_device = torch.tensor(ends, dtype=torch.int32)
    scales = torch.randint(1, 250, (rows, width // 32)).byte()
    columns = torch.randint(1, 250, (width, rows // 32)).byte()
    weights = torch.randint(1, 250, (3, width, 7)).byte()
    e8m0 = torch.float8_e8m0fnu
    tiles = tiles_of_rows(scales.view(e8m0), on_device).view(torch.uint8)
    assert (tiles.dim(), tiles.shape[1] % 4, len(tiles) >= rows) == (2, 0, True)
    of_columns = tiles_of_columns(columns.view(e8m0), on_device).view(torch.uint8)
    assert len(of_columns) == 256
    of_weights = tiles_of_matrices(weights.view(e8m0)).view(torch.uint8)
    assert of_weights.shape == (3, 256 * 8)
    for number, line, block in itertools.product(range(3), range(0, width, 7), range(7)):
        assert tile_of(of_weights[number], line, block, 2) == weights[number, line, block]
    row, place = 0, 0
    for group in groups(ends):
        size, start = group.stop - group.start, row * tiles.shape[1]
        for line, block in itertools.product(range(0, size, 5), range(width // 32)):
            byte = tile_of(tiles.flatten()[start:], line, block, tiles.shape[1] // 4)
            assert byte == scales[group.start + line, block]
        across = -(-size // 128)
        for line, block in itertools.product(range(0, width, 3), range(across * 4)):
            byte = tile_of(of_columns.flatten()[place:], line, block, across)
            inside = block < size // 32
            expected = columns[line, group.start // 32 + block] if inside else 0
            assert byte == expected
        row, place = row + across * 128, place + across * 4 * 256


@of_each_format
def test_a_graph_can_hold_it(form: Fp8Format) -> None:
    num_rows, width, out = in_units(form, ROWS, IN, OUT)
    weights = quantise_reference(drawn(4, out, width), form, form.lines)

    def step(rows: Tensor, grad: Tensor, ends: Tensor) -> None:
        packed = quantise_rows(rows, ends, form)
        scaled_product(packed, weights, ends, torch.float32)
        both = (quantise_columns(each, ends, form) for each in (grad, packed))
        scaled_outer(*both, ends, rows.dtype)
        if form == MXFP8:
            tiles_of_rows(packed.scales, ends)
            tiles_of_columns(quantise_columns(rows, ends, form).scales, ends)

    assert_capturable(
        step,
        *(
            (drawn(num_rows, width), drawn(num_rows, out),
             torch.tensor(in_units(form, *e), dtype=torch.int32))
            for e in ENDS
        ),
    )  # fmt: skip


def test_the_layer() -> None:
    """With and without clones, no host read, weights quantised once a step, tokens in FP8."""
    words = ["clones", "sync_and_shapes", "once_a_step", "travel", "biases_and_doubt"]
    print(launch.run(words, 3, script=WORKER).check().output)


def test_the_layer_by_kernels() -> None:
    """Quantisers, products, activation and copies in Triton: operands' bits are torch's way's."""
    print(launch.run(["by_kernels"], 2, script=WORKER).check().output)


def test_the_layer_beside_other_settings() -> None:
    launch.run(["settings"], 4, script=WORKER).check()
