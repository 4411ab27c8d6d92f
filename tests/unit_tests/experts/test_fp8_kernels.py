"""The kernels that quantise against their references, bit for bit, in Triton's interpreter."""

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton_interpreter
from moe_cases import layer_config
from torch import Tensor
from unit_tests.dispatch.test_kernels import run_script

from megatron_echo.experts import fp8, kernels
from megatron_echo.experts.fp8 import FP8, Quantised
from megatron_echo.experts.fp8_linear import Fp8Weights, fp8_linear
from megatron_echo.precision import FORMATS, Fp8Format

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = ((1, 16), (37, 48), (130, 80), (16, 528))
ROWWISE = FORMATS["fp8-rowwise"]
of_each_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
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
    assert torch.equal(found.scales.float(), expected.scales.float())
    bits = [operand.values.contiguous().view(torch.uint8) for operand in (found, expected)]
    is_nan = [(each & 0x7F) == 0x7F for each in bits]
    assert torch.equal(*is_nan)
    assert torch.equal(*(each.masked_fill(is_nan[0], 0) for each in bits))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@of_each_format
def test_rows(dtype: torch.dtype, shape: tuple[int, int], form: Fp8Format) -> None:
    """Widths of blocks are multiples of them, and not of a kernel's tile."""
    num_rows, width = shape[0], -(-shape[1] // form.alignment) * form.alignment
    rows = drawn(dtype, num_rows, width)
    last = num_rows - num_rows // 4
    found = fp8.quantise_rows(rows, torch.tensor([0, last], dtype=torch.int32), form)
    expected = fp8.quantise_reference(rows[:last], form)
    same(Quantised(found.values[:last], found.scales[:last]), expected)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_columns(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """Groups of several blocks, small and empty ones; the last end is before the last row.

    Of rows, and of rows that are quantised. Groups are padded to 16 rows.
    """
    num_rows, last, third = (
        -(-rows // 16) * 16 for rows in (shape[0], shape[0] - 16, shape[0] / 4)
    )
    rows, last, third = drawn(dtype, num_rows, shape[1]), max(last, 16), int(third)
    for ends in ([third, third, last], [0, last], [0, 0], [last, last]):
        on_device = torch.tensor(ends, dtype=torch.int32)
        packed = fp8.quantise_reference(rows, ROWWISE)
        packed.scales[last:] = torch.nan
        for given in (rows, packed):
            found = fp8.quantise_columns(given, on_device, ROWWISE)
            expected = fp8.quantise_columns_reference(given, on_device, ROWWISE)
            part = slice(ends[-1])
            same(
                Quantised(found.values[:, part], found.scales),
                Quantised(expected.values[:, part], expected.scales),
            )


@pytest.mark.parametrize("form", [FORMATS["mxfp8"], FORMATS["fp8-blockwise"]], ids=["32", "128"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_columns_in_blocks(dtype: torch.dtype, form: Fp8Format) -> None:
    """Of rows, and of rows that are quantised; what is behind the last end is not written."""
    unit = form.alignment
    rows = drawn(dtype, 3 * unit, 2 * unit)
    packed = fp8.unpacked(fp8.pack_rows(rows, form), form)
    for ends in ([unit, unit, 2 * unit], [0, 3 * unit], [0, 0]):
        on_device, used = torch.tensor(ends, dtype=torch.int32), slice(ends[-1])
        packed.scales[used.stop :] = torch.nan
        for given in (rows, packed):
            found = fp8.quantise_columns(given, on_device, form)
            expected = fp8.quantise_columns_reference(given, on_device, form)
            blocks = slice(ends[-1] // unit)
            same(
                Quantised(found.values[:, used], found.scales[:, blocks]),
                Quantised(expected.values[:, used], expected.scales[:, blocks]),
            )


@pytest.mark.parametrize("is_transposed", [False, True])
@of_each_format
def test_matrices_of_a_stack_with_gaps(is_transposed: bool, form: Fp8Format) -> None:
    """What lies between two matrices, their scales as a rule, is not touched."""
    out, width = 3 * form.alignment, 5 * form.alignment
    weights = drawn(torch.bfloat16, 3, out, width)
    lines = weights.mT if is_transposed else weights
    memory = torch.full((3, out * width + 64), 7, dtype=torch.uint8)
    values = memory[:, :-64].view(FP8).unflatten(1, lines.shape[1:])
    expected = fp8.quantise_reference(lines, form, form.lines)
    scales = torch.zeros_like(torch.cat((expected.scales,) * 2, 1))[:, : expected.scales.shape[1]]
    into = Quantised(values, scales)
    fp8.quantise_matrices(weights, into, form, is_transposed=is_transposed)
    same(into, expected)
    assert (memory[:, -64:] == 7).all()


def stack(words: Tensor, out: int, width: int, form: Fp8Format) -> Quantised:
    """Values and scales of experts as words, which are one behind the other."""
    values, scales = words.squeeze(1).split(
        (out * width // 4, form.scale_bytes(width, out) // 4), 1
    )
    if form.block is None:
        of_lines = scales[:, :out].view(torch.float32)
    else:
        parts = out // form.lines, width // form.block
        of_lines = scales.view(fp8.E8M0)[:, : parts[0] * parts[1]].unflatten(1, parts)
    return Quantised(values.view(FP8).unflatten(1, (out, width)), of_lines)


def blocks(weights: Tensor, apart: int, form: Fp8Format) -> tuple[Tensor, Tensor, Quantised]:
    """Experts as words, values and then scales, of which the last ``apart`` lie elsewhere."""
    experts, out, width = weights.shape
    size = out * width + form.scale_bytes(width, out)
    words = torch.empty(experts, 1, size // 4, dtype=torch.int32)
    into = stack(words, out, width, form)
    fp8.quantise_matrices(weights, into, form, is_transposed=False)
    return words[:-apart], words[-apart:].clone(), into


@pytest.mark.parametrize("ends", [[32, 32, 144, 160], [0, 0, 0, 0]])
@pytest.mark.parametrize("is_exact", [True, False])
@of_each_format
def test_products_take_home_experts_and_clones_where_they_lie(
    ends: list[int], is_exact: bool, form: Fp8Format
) -> None:
    """The reference's bits where sums are exact, scales of many sizes; else to fp32 rounding.

    NaN behind the last end reaches nothing, and padding with a scale of NaN its own row.
    """
    sizes = {None: (176, 144, 48), 32: (352, 96, 96), 128: (512, 256, 128)}
    rows, width, out = sizes[form.block]
    if form.block == 32:
        ends = [2 * end for end in ends]
    elif form.block == 128 and ends[-1]:
        ends = [128, 128, 256, 384]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        values = torch.randint(-8, 9, shape, generator=generator).float()
        if not is_exact:
            return values * torch.randn(shape, generator=generator).exp()
        if form.block is None:
            values[..., 0] = 8  # so that a line has the scale of its size
            return values * 2.0 ** torch.randint(-9, 9, (*shape[:-1], 1), generator=generator)
        values[..., :: form.block] = 8
        lines = form.lines if len(shape) == 3 else 1
        parts = shape[-2] // lines, shape[-1] // form.block
        sizes = torch.randint(-3, 4, (*shape[:-2], *parts), generator=generator).float().exp2()
        return values * sizes.repeat_interleave(lines, -2).repeat_interleave(form.block, -1)

    given, weights, on_device = draw(rows, width), draw(4, out, width), torch.tensor(ends).int()
    given[ends[-1] :] = torch.nan
    home, slots, operand = blocks(weights, 1, form)
    packed = fp8.pack_rows(given, form)
    with mock.patch.object(fp8, "on_gpu", return_value=False):
        quantised = fp8.unpacked(packed, form)
        expected = fp8.scaled_product(quantised, operand, on_device, torch.float32)
    found = kernels.scaled_product(packed, home, slots, on_device, out, torch.float32, form)
    limit = 0 if is_exact else 1e-6
    near(found[: ends[-1]], expected[: ends[-1]], limit)
    fp8.unpacked(packed, form).scales[1] = torch.nan
    broken = kernels.scaled_product(packed, home, slots, on_device, out, torch.float32, form)
    others = [row for row in range(ends[-1]) if row != 1]
    assert torch.equal(broken[others], found[others])
    assert not broken[1].isfinite().any() or ends[-1] == 0

    grad = torch.randint(-8, 9, (rows, out), generator=generator).float()
    left, right = (fp8.quantise_columns(each, on_device, form) for each in (grad, given))
    for operand in (left, right):
        operand.values[:, ends[-1] :] = torch.nan
    both = (left.values, left.scales), (right.values, right.scales)
    outer = kernels.scaled_outer(*both, on_device, torch.float32, form)
    with mock.patch.object(fp8, "on_gpu", return_value=False):
        for operand in (left, right):
            operand.values[:, ends[-1] :] = 0
            if form.block:
                operand.scales[:, ends[-1] // form.block :] = 1
        wanted = fp8.scaled_outer(left, right, on_device, torch.float32)
    near(outer, wanted, 1e-6)


def near(found: Tensor, expected: Tensor, limit: float) -> None:
    """To a part of the largest value; 0 for the same bits."""
    assert found.shape == expected.shape
    if expected.numel():
        assert (found - expected).abs().max() <= limit * expected.abs().max()


@of_each_format
def test_the_linear_by_kernels(form: Fp8Format) -> None:
    """Output and both gradients of torch's way."""
    (name,) = (word for word, each in FORMATS.items() if each == form)
    unit, width, out = form.alignment, 2 * form.alignment, form.alignment
    config = layer_config(
        1, 2, torch.float32, moe_echo_expert_precision=name, hidden_size=width,
        moe_ffn_hidden_size=width,
    )  # fmt: skip
    ends, generator = torch.tensor([unit, 3 * unit]).int(), torch.Generator().manual_seed(1)
    shapes = (3 * unit, width), (2, out, width)
    given = [torch.randn(shape, generator=generator) for shape in shapes]
    grad = torch.randn(3 * unit, out, generator=generator)
    results = []
    for gemm in ("torch", "triton"):
        with mock.patch.object(config, "moe_echo_grouped_gemm", gemm):
            weights = Fp8Weights(config)
        leaves = [t.clone().requires_grad_() for t in given]
        output = fp8_linear(*leaves, ends, None, weights, trains=True)
        results.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    for expected, found in zip(*results, strict=True):
        near(found, expected, 1e-6)


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_echo.experts import fp8_kernels

for name, source, constants in {cases}:
    kernel = getattr(fp8_kernels, name)
    types = {{arg: "i32" for arg in kernel.arg_names}}
    types |= {{"source": "*" + source, "values": "*fp8e4nv", "ends": "*i32", "used": "*i32"}}
    of_scales = "*fp32" if name == "_columns_kernel" else "*u8"
    types |= dict.fromkeys(("scales", "row_scales"), of_scales)
    types |= dict.fromkeys(constants, "constexpr")
    types = {{arg: types[arg] for arg in kernel.arg_names}}
    aligned = {{
        (n,): [["tt.divisibility", 16]]
        for n, arg in enumerate(kernel.arg_names)
        if types[arg] != "constexpr" and arg != "num_rows"  # which is not specialised
    }}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {{"num_warps": 4 if name == "_columns_kernel" else 8}}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    words = r"st[.]global[^;]*[.]v4[.]b32", r"st[.]global[.]b8", "ld[.]local"
    print("COMPILED", *(len(re.findall(word, ptx)) for word in words))
"""


def test_columns_are_stored_by_16_bytes(tmp_path: Path) -> None:
    """For an H100, of rows and of rows that are quantised; single bytes are scales of blocks."""
    columns = {"WIDTH": 7168, "IS_STACK": False, "COLUMNS": 64, "BLOCK": 64}
    turned = {"IS_TURNED": True, "IS_BOUNDED": True, "LINES": 1, "TILE_LINES": 64, "TILE": 128}
    cases = [
        ("_columns_kernel", "bf16", {**columns, "IS_STACK": True, "row_scales": None}),
        ("_columns_kernel", "fp8e4nv", columns),
        ("_blocks_kernel", "fp8e4nv", {**turned, "BLOCK": 32}),
    ]
    lines = run_script(COMPILE.format(cases=cases), tmp_path).splitlines()
    figures = [list(map(int, line.split()[1:])) for line in lines if line.startswith("COMPILED")]
    assert len(figures) == len(cases)
    for (name, *_), (wide, bytes_alone, spilled) in zip(cases, figures, strict=True):
        assert wide > 0
        assert bytes_alone == (name == "_blocks_kernel")
        assert spilled == 0
