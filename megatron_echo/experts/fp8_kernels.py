"""FP8 in Triton: operands of the grouped products, with the bits of ``fp8.py``.

In blocks each number is read once, and one kernel makes all operands. Rowwise each line of numbers
is read twice: for its largest magnitude, and to be scaled. Magnitudes are compared as integers, so
that NaN is the largest of all. A program behind the rows in use exits at once; what nobody reads is
not written.
"""

# (Triton's functions have no Python types.)

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _ROW_BLOCK = 4, 512
_COLUMNS, _COLUMN_BLOCK = 64, 64
_TILE = 128


@triton.jit
def _magnitude(x):
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_and_inverse(largest):
    """Both powers of two, from the bits of the largest magnitude."""
    exponent = ((tl.minimum(largest, 0x7F800000) + 0x1FFFFF) >> 23) - 8
    exponent = tl.maximum(exponent, 1)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x, inverse):
    """e4m3; infinity is none of its numbers, and a GPU would make it 448."""
    is_finite = _magnitude(x) < 0x7F800000
    return tl.where(is_finite, x * inverse, float("nan")).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["num_lines"])
def _rows_kernel(
    source, used, values, scales, num_lines, lines, value_stride, scale_stride,
    WIDTH: tl.constexpr, IS_BOUNDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * ROWS
    end = tl.minimum(tl.load(used), num_lines) if IS_BOUNDED else num_lines
    if line >= end:
        return
    line += tl.arange(0, ROWS)
    largest = tl.zeros((ROWS,), dtype=tl.int32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (line < end)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(source + line[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(_magnitude(x.to(tl.float32)), axis=1))
    scale, inverse = _scale_and_inverse(largest)
    matrix, inside = line // lines, line % lines
    tl.store(scales + matrix * scale_stride + inside, scale, mask=line < end)
    to = values + (matrix * value_stride + inside * WIDTH)[:, None]
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (line < end)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(source + line[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        tl.store(to + column[None, :], _rounded(x.to(tl.float32), inverse[:, None]), mask=mask)


@triton.jit
def _wide(source, row_scales, row, column, mask, row_stride, row_scale_stride):
    """Columns of rows in fp32; times the scale of each row, if they have any."""
    x = tl.load(source + row[:, None] * row_stride + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if row_scales is not None:
        inside = tl.max(mask.to(tl.int32), axis=1) > 0
        x *= tl.load(row_scales + row * row_scale_stride, mask=inside, other=0.0)[:, None]
    return x


@triton.jit
def _whole(end, size, PIECE: tl.constexpr):
    """An end of so many padded rows, as a multiple of what the compiler then knows."""
    return tl.minimum(end, size) // PIECE * PIECE


@triton.jit(do_not_specialize=["num_rows"])
def _columns_kernel(
    source, row_scales, ends, values, scales, num_rows, row_stride, row_scale_stride, line_stride,
    value_stride, scale_stride,
    WIDTH: tl.constexpr, IS_STACK: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    start = _whole(tl.load(ends + group - 1, mask=group > 0, other=0), num_rows, 16)
    end = _whole(tl.load(ends + group), num_rows, 16)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < WIDTH
    largest = tl.zeros((COLUMNS,), dtype=tl.int32)
    for first in range(start, end, BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(tl.int64)
        mask = (row < end)[:, None] & within[None, :]
        x = _wide(source, row_scales, row, column, mask, row_stride, row_scale_stride)
        largest = tl.maximum(largest, tl.max(_magnitude(x), axis=0))
    scale, inverse = _scale_and_inverse(largest)
    wide_group = group.to(tl.int64)
    tl.store(scales + wide_group * scale_stride + column, scale, mask=within)
    # Rows are counted from the matrix of a stack, else from the first of all groups.
    to = values + wide_group * value_stride + column[:, None] * line_stride
    if IS_STACK:
        to -= start
    for first in range(start, end, BLOCK):
        row = (first + tl.arange(0, BLOCK)).to(tl.int64)
        mask = (row < end)[:, None] & within[None, :]
        x = _wide(source, row_scales, row, column, mask, row_stride, row_scale_stride)
        turned = tl.trans(_rounded(x, inverse[None, :]))
        tl.store(to + row[None, :], turned, mask=tl.trans(mask))


@triton.jit
def _powers(pointers, mask):
    """Scales in E8M0 as fp32."""
    exponents = tl.load(pointers, mask=mask, other=0).to(tl.int32)
    return (exponents << 23).to(tl.float32, bitcast=True)


@triton.jit
def _in_blocks(x, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The scales of a tile ``[n, k]`` in E8M0, ``[n / LINES, k / BLOCK]``, and it in e4m3."""
    lines: tl.constexpr = x.shape[0] // LINES
    parts: tl.constexpr = x.shape[1] // BLOCK
    blocks = tl.reshape(x, (lines, LINES, parts, BLOCK))
    scale, inverse = _scale_and_inverse(tl.max(tl.max(_magnitude(blocks), axis=3), axis=1))
    values = _rounded(blocks, inverse[:, None, :, None])
    exponents = (scale.to(tl.int32, bitcast=True) >> 23).to(tl.uint8)
    return exponents, tl.reshape(values, (x.shape[0], x.shape[1]))


@triton.jit
def _blocks_kernel(
    source, row_scales, used, values, scales, num_lines, width, source_matrix, source_pitch,
    row_scale_pitch, value_matrix, value_pitch, scale_matrix, scale_pitch,
    IS_TURNED: tl.constexpr, IS_BOUNDED: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
    TILE_LINES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    first_line, first = tl.program_id(0) * TILE_LINES, tl.program_id(1) * TILE
    end = width
    if IS_BOUNDED:
        if IS_TURNED:
            end = _whole(tl.load(used), width, BLOCK)
        else:
            num_lines = tl.minimum(tl.load(used), num_lines)
    if (first_line >= num_lines) | (first >= end):
        return
    matrix = tl.program_id(2).to(tl.int64)
    line = (first_line + tl.arange(0, TILE_LINES)).to(tl.int64)
    at = (first + tl.arange(0, TILE)).to(tl.int64)
    mask = (line < num_lines)[:, None] & (at < end)[None, :]
    if IS_TURNED:
        offset = line[:, None] + at[None, :] * source_pitch
    else:
        offset = line[:, None] * source_pitch + at[None, :]
    x = tl.load(source + matrix * source_matrix + offset, mask=mask, other=0.0).to(tl.float32)
    if row_scales is not None:
        x *= _powers(row_scales + at[None, :] * row_scale_pitch + line[:, None] // BLOCK, mask)
    exponents, rounded = _in_blocks(x, LINES, BLOCK)
    to = values + matrix * value_matrix + line[:, None] * value_pitch + at[None, :]
    tl.store(to, rounded, mask=mask)
    line = first_line // LINES + tl.arange(0, TILE_LINES // LINES)
    part = first // BLOCK + tl.arange(0, TILE // BLOCK)
    to = scales + matrix * scale_matrix + line.to(tl.int64)[:, None] * scale_pitch + part[None, :]
    mask = (line * LINES < num_lines)[:, None] & (part * BLOCK < end)[None, :]
    tl.store(to, exponents, mask=mask)


def blocks(
    source: Tensor, values: Tensor, scales: Tensor, block: int, used: Tensor | None = None,
    *, lines: int = 1, row_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Quantise in blocks along the last dimension.

    Args:
        source: ``[n, k]`` or ``[M, n, k]``, bf16, fp16, fp32 or e4m3; one of the last two
            dimensions is contiguous. If it is the other than the last one, it is turned.
        values: e4m3, of the same shape, each line contiguous; is written.
        scales: E8M0 ``[n / lines, k / block]``, likewise.
        block: elements of a line that share a scale, a divisor of 128.
        used: int32 ``[1]``: lines from there on, turned whole blocks of them, are not written.
        lines: that share a scale, a divisor of 128.
        row_scales: E8M0 ``[k, n / block]``, what to multiply a turned source by first.
    """
    if source.dim() == 2:
        source, values, scales = (tensor.unsqueeze(0) for tensor in (source, values, scales))
    matrices, num_lines, width = source.shape
    is_turned = source.stride(2) != 1
    tile_lines = 128 if lines > 1 else 64
    grid = triton.cdiv(num_lines, tile_lines), triton.cdiv(width, _TILE), matrices
    scales = scales.view(torch.uint8)
    row_scales = None if row_scales is None else row_scales.view(torch.uint8)
    with torch.cuda.device_of(source):
        _blocks_kernel[grid](
            source, row_scales, source if used is None else used, values, scales, num_lines, width,
            source.stride(0), source.stride(2 if is_turned else 1),
            0 if row_scales is None else row_scales.stride(0), values.stride(0), values.stride(1),
            scales.stride(0), scales.stride(1),
            IS_TURNED=is_turned, IS_BOUNDED=used is not None, LINES=lines, BLOCK=block,
            TILE_LINES=tile_lines, TILE=_TILE, num_warps=8,
        )  # fmt: skip


def rows(source: Tensor, used: Tensor | None, values: Tensor, scales: Tensor) -> None:
    """Quantise lines of a stack of matrices, or rows of a buffer.

    Args:
        source: ``[M, n, i]``, contiguous, bf16, fp16 or fp32.
        used: int32 ``[1]``, lines from there on are not written; None for all.
        values: e4m3 ``[M, n, i]``, each matrix contiguous; is written.
        scales: fp32 ``[M, n]``, likewise.
    """
    matrices, lines, width = source.shape
    total, block = matrices * lines, min(_ROW_BLOCK, triton.next_power_of_2(width))
    with torch.cuda.device_of(source):
        _rows_kernel[(triton.cdiv(total, _ROWS),)](
            source, source if used is None else used, values, scales, total, lines,
            values.stride(0), scales.stride(0),
            WIDTH=width, IS_BOUNDED=used is not None, ROWS=_ROWS, BLOCK=block,
        )  # fmt: skip


def columns(
    source: Tensor, ends: Tensor, values: Tensor, scales: Tensor, *, is_stack: bool,
    row_scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Quantise columns of each group of rows, turned.

    Args:
        source: ``[B, o]``, bf16, fp16, fp32 or e4m3; each row is contiguous.
        ends: int32 ``[G]``, end offset of each group; they and B are multiples of 16.
        values: e4m3, is written: ``[o, B]``, or with ``is_stack`` ``[G, o, n]``, each matrix
            contiguous, for groups of n rows.
        scales: fp32 ``[G, o]``, likewise.
        is_stack: the groups are matrices of a stack.
        row_scales: fp32 ``[B]``, what to multiply each row by first.
    """
    grid = triton.cdiv(source.shape[1], _COLUMNS), len(ends)
    with torch.cuda.device_of(source):
        _columns_kernel[grid](
            source, row_scales, ends, values, scales, len(source), source.stride(0),
            0 if row_scales is None else row_scales.stride(0), values.shape[-1],
            values.stride(0) if is_stack else 0, scales.stride(0),
            WIDTH=source.shape[1], IS_STACK=is_stack, COLUMNS=_COLUMNS, BLOCK=_COLUMN_BLOCK,
        )  # fmt: skip
