"""Grouped matrix products in Triton, with home weights and clones where they lie.

A group's weights are found from one of two base pointers: those of home experts in the parameter,
those of clones in the slot pool. The ends of the groups are read on the device. The grid is a
function of the buffer's size; a program whose tile holds no rows exits at once, so that the work
is that of the rows and not of the buffer. Sums are in fp32, in a fixed order and without atomics.
Pointers are int64. Factors of fp32 are rounded to tf32 only where torch's own products do so.
Nothing is autotuned, as that would wait for the device.

Factors in e4m3 bring their scales: those of a row are behind it, in a multiple of 16 bytes, and
those of a matrix behind its values (``fp8.py``, ``fp8_linear.py``). In blocks the product of each
block is scaled and then added.
"""

# (Triton's functions have no Python types.)

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_echo.experts.fp8_kernels import _powers
from megatron_echo.precision import Fp8Format

_SUPER = 8  # row tiles that share the columns in the L2 cache
_LARGE_TILES = 144 * 1024  # bytes of shared memory


@triton.jit
def _end(ends, group, num_rows):
    """End of a group, 0 before the first; never behind the buffer."""
    return tl.minimum(tl.load(ends + group, mask=group >= 0, other=0), num_rows)


@triton.jit
def _stack_of(home, slots, group, HOME: tl.constexpr, SIZE: tl.constexpr):
    """Where a group's matrix begins, each ``SIZE`` elements behind the one before."""
    clone = group - HOME
    return tl.where(clone < 0, home + group.to(tl.int64) * SIZE, slots + clone.to(tl.int64) * SIZE)


@triton.jit
def _load(pointers, mask, IS_FULL: tl.constexpr):
    return tl.load(pointers) if IS_FULL else tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _swizzled(program, COLUMNS: tl.constexpr, SUPER: tl.constexpr):
    """Row and column of a program's tile: down ``SUPER`` rows, then to the next column."""
    inside = program % (SUPER * COLUMNS)
    return program // (SUPER * COLUMNS) * SUPER + inside % SUPER, inside // SUPER


@triton.jit(do_not_specialize=["num_rows"])
def _product_kernel(
    rows, home, slots, ends, output, num_rows,
    HOME: tl.constexpr, GROUPS: tl.constexpr, FIRST: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, IS_TRANSPOSED: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUPER: tl.constexpr, PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr, ROW_SCALES: tl.constexpr, MATRIX_SCALES: tl.constexpr,
    IN_BLOCKS: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    tile, column_tile = _swizzled(tl.program_id(0), (OUT + BLOCK_N - 1) // BLOCK_N, SUPER)
    # The tiles of group g begin with number start // BLOCK_M + g: enough for any start.
    before = tl.arange(0, BLOCK_G)
    last_ends = tl.load(ends + before, mask=before < GROUPS - 1, other=0)
    first_tiles = tl.minimum(last_ends, num_rows) // BLOCK_M + before + 1
    group = tl.sum(((first_tiles <= tile) & (before < GROUPS - 1)).to(tl.int32), axis=0)
    start, end = _end(ends, group - 1, num_rows), _end(ends, group, num_rows)
    first_row = start + (tile - start // BLOCK_M - group) * BLOCK_M
    if (first_row >= end) | (group < FIRST):
        return

    row = first_row + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    is_fp8: tl.constexpr = rows.dtype.element_ty == tl.float8e4nv
    pitch: tl.constexpr = IN + ROW_SCALES
    # Rows behind the group's are computed from its last one and not stored.
    begin = rows + tl.minimum(row, end - 1).to(tl.int64) * pitch
    left = begin[:, None] + k[None, :]
    weight = _stack_of(home, slots, group, HOME, IN * OUT + MATRIX_SCALES)
    if IS_TRANSPOSED:  # weights are [OUT, IN]
        right = weight + column[None, :] * IN + k[:, None]
    else:
        right = weight + k[:, None] * OUT + column[None, :]
    is_full: tl.constexpr = IN % BLOCK_K == 0
    is_full_column: tl.constexpr = is_full and OUT % BLOCK_N == 0
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, IN, BLOCK_K):
        inside = first + k < IN
        a = _load(left, inside[None, :], is_full)
        b = _load(right, inside[:, None] & (column < OUT)[None, :], is_full_column)
        if IN_BLOCKS:
            of_rows = (begin + IN).to(tl.pointer_type(tl.uint8)) + first // BLOCK_K
            of_columns = (weight + IN * OUT).to(tl.pointer_type(tl.uint8)) + first // BLOCK_K
            of_columns += column // LINES * (IN // BLOCK_K)
            part = tl.dot(a, b, max_num_imprecise_acc=IMPRECISE)
            part *= _powers(of_rows, row >= 0)[:, None]
            total += part * _powers(of_columns, column < OUT)[None, :]
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
        left += BLOCK_K
        right += BLOCK_K if IS_TRANSPOSED else BLOCK_K * OUT
    if is_fp8 and not IN_BLOCKS:
        to_scale: tl.constexpr = tl.pointer_type(tl.float32)
        total *= tl.load((begin + IN).to(to_scale))[:, None]
        of_columns = (weight + IN * OUT).to(to_scale) + column
        total *= tl.load(of_columns, mask=column < OUT, other=0.0)[None, :]
    pointers = output + row.to(tl.int64)[:, None] * OUT + column[None, :]
    tl.store(pointers, total, mask=(row < end)[:, None] & (column < OUT)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _outer_kernel(
    left, right, ends, home, slots, left_scales, right_scales, num_rows,
    HOME: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUPER: tl.constexpr, PRECISION: tl.constexpr,
    IMPRECISE: tl.constexpr, IN_BLOCKS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    row_tile, column_tile = _swizzled(tl.program_id(0), (IN + BLOCK_N - 1) // BLOCK_N, SUPER)
    if row_tile * BLOCK_M >= OUT:
        return
    start, end = _end(ends, group - 1, num_rows), _end(ends, group, num_rows)
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    within = tl.arange(0, BLOCK_K)
    in_column = (column < IN)[None, :]
    is_fp8: tl.constexpr = left_scales is not None
    if is_fp8:  # turned: [OUT, rows] and [IN, rows]; groups and buffer are padded
        start, end = start // 16 * 16, end // 16 * 16  # what the compiler then knows
        pitch = tl.multiple_of(num_rows.to(tl.int64), 16)
        lefts = left + row[:, None] * pitch + (start + within)[None, :]
        rights = right + column[None, :] * pitch + (start + within)[:, None]
    else:
        first_rows = (start + within).to(tl.int64)[:, None]
        lefts = left + first_rows * OUT + row[None, :]
        rights = right + first_rows * IN + column[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(start, end, BLOCK_K):
        # Both are masked: a row of another group may hold NaN.
        inside = first + within < end
        b = tl.load(rights, mask=inside[:, None] & in_column, other=0.0)
        if is_fp8:
            a = tl.load(lefts, mask=(row < OUT)[:, None] & inside[None, :], other=0.0)
        else:
            a = tl.trans(tl.load(lefts, mask=inside[:, None] & (row < OUT)[None, :], other=0.0))
        if IN_BLOCKS:  # groups are whole blocks
            block, blocks = first // BLOCK_K, num_rows // BLOCK_K
            part = tl.dot(a, b, max_num_imprecise_acc=IMPRECISE)
            part *= _powers(left_scales + row * blocks + block, row < OUT)[:, None]
            total += part * _powers(right_scales + column * blocks + block, column < IN)[None, :]
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
        lefts += BLOCK_K if is_fp8 else BLOCK_K * OUT
        rights += BLOCK_K if is_fp8 else BLOCK_K * IN
    if is_fp8 and not IN_BLOCKS:
        of_row = left_scales + group.to(tl.int64) * OUT + row
        of_column = right_scales + group.to(tl.int64) * IN + column
        total *= tl.load(of_row, mask=row < OUT, other=0.0)[:, None]
        total *= tl.load(of_column, mask=column < IN, other=0.0)[None, :]
    # The two stacks may differ in dtype.
    offset = row[:, None] * IN + column[None, :]
    mask = (row < OUT)[:, None] & in_column
    if group < HOME:
        tl.store(home + group.to(tl.int64) * (OUT * IN) + offset, total, mask=mask)
    else:
        tl.store(slots + (group - HOME).to(tl.int64) * (OUT * IN) + offset, total, mask=mask)


def product_constants(
    rows: int,
    home: int,
    groups: int,
    widths: tuple[int, int],
    itemsize: int,
    is_transposed: bool,
    shared_memory: int = _LARGE_TILES,
    first: int = 0,
    form: Fp8Format | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Compile-time arguments of the kernel of :func:`product`, and its options.

    Args:
        rows: B, of the buffer.
        home: m.
        groups: m + S.
        widths: of the input and of the output.
        itemsize: bytes of an element.
        is_transposed: the weights are ``[out, in]``.
        shared_memory: bytes that a block can have.
        first: groups before it are left out.
        form: of factors in e4m3.
    """
    blocks, options = _tile(rows // groups, itemsize, shared_memory, form)
    groups_block = triton.next_power_of_2(groups)
    constants = {
        "HOME": home, "GROUPS": groups, "FIRST": first, "IN": widths[0], "OUT": widths[1],
        "IS_TRANSPOSED": is_transposed, "BLOCK_G": groups_block, **blocks,
        "ROW_SCALES": form.scale_bytes(widths[0]) if form else 0,
        "MATRIX_SCALES": form.scale_bytes(*widths) if form else 0,
        "LINES": form.lines if form else 1,
    }  # fmt: skip
    return constants, options


def outer_constants(
    home: int,
    widths: Sequence[int],
    itemsize: int,
    shared_memory: int = _LARGE_TILES,
    form: Fp8Format | None = None,
) -> tuple[dict[str, Any], dict[str, int]]:
    """Compile-time arguments of the kernel of :func:`outer`, and its options.

    Args:
        home: m.
        widths: out and in, of the matrices that are made.
        itemsize: bytes of an element of the rows.
        shared_memory: bytes that a block can have.
        form: of factors in e4m3.
    """
    blocks, options = _tile(widths[0], itemsize, shared_memory, form)
    return {"HOME": home, "OUT": widths[0], "IN": widths[1], **blocks}, options


def _tile(
    height: int, itemsize: int, shared_memory: int, form: Fp8Format | None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Two bytes: warp-group products from 144 KB of shared memory, or what fits into 99 KB.

    Four bytes: on CUDA's cores, or on tensor cores where torch rounds to tf32 too. One byte: tensor
    cores keep 14 bits of a sum, so that the sum of each tile of rows is added in fp32.
    """
    if itemsize == 1:
        rows = 128 if height > 64 and shared_memory >= _LARGE_TILES else 64
        sizes, options = (
            (rows, 128, (form and form.block) or 128),
            {"num_warps": rows // 16, "num_stages": 3},
        )
    elif itemsize == 4:
        sizes, options = (64, 64, 32), {"num_warps": 4, "num_stages": 3}
    elif shared_memory < _LARGE_TILES:
        sizes, options = (64, 128, 64), {"num_warps": 4, "num_stages": 3}
    elif height > 64:
        sizes, options = (128, 256, 64), {"num_warps": 8, "num_stages": 3}
    else:
        sizes, options = (64, 256, 64), {"num_warps": 4, "num_stages": 3}
    is_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    imprecise = sizes[2] if itemsize == 1 else None
    precision = "tf32" if is_tf32 else "ieee"
    others = {"SUPER": _SUPER, "PRECISION": precision, "IMPRECISE": imprecise}
    others["IN_BLOCKS"] = form is not None and form.block is not None
    return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), sizes)) | others, options


def _shared_memory(rows: Tensor) -> int:
    if not rows.is_cuda:  # in Triton's interpreter
        return _LARGE_TILES
    properties: Any = torch.cuda.get_device_properties(rows.device)  # torch's types lack this one
    return properties.shared_memory_per_block_optin


def product(
    rows: Tensor, home: Tensor, slots: Tensor | None, ends: Tensor, is_transposed: bool,
    clones_into: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``rows[g] @ w[g]``, or ``rows[g] @ w[g].T`` with ``is_transposed``: ``[B, o]``.

    Rows beyond the last end are neither read nor written. See ``pointer_gemm`` for the arguments.
    With ``clones_into``, contiguous ``[B, o]``, only the rows of slots are computed, into it.
    """
    width = home.shape[1 if is_transposed else 2]
    output = rows.new_empty(rows.shape[0], width) if clones_into is None else clones_into
    first = 0 if clones_into is None else len(home)
    _product(rows.contiguous(), home, slots, ends, output, rows.shape[1], is_transposed, first)
    return output


def scaled_product(
    rows: Tensor, home: Tensor, slots: Tensor, ends: Tensor, width: int, dtype: torch.dtype,
    form: Fp8Format,
) -> Tensor:  # fmt: skip
    """``rows[g] @ w[g].T`` in FP8, ``[B, o]``; rows beyond the last end as in :func:`product`.

    Args:
        rows: int32 ``[B, X]``, packed.
        home: int32 ``[m, 1, n]``, each expert its values ``[o, i]`` and then its scales.
        slots: int32 ``[S, 1, n]``, likewise; where they lie does not matter.
        ends: int32 ``[m + S]``, end offset of each group.
        width: o.
        dtype: of the result.
        form: of the factors.
    """
    given = (tensor.view(torch.float8_e4m3fn) for tensor in (rows, home, slots))
    output = rows.new_empty(len(rows), width, dtype=dtype)
    taken = form.width(rows.shape[1] * 4)
    rows, home, slots = given
    _product(rows, home, slots, ends, output, taken, is_transposed=True, first=0, form=form)
    return output


def _product(
    rows: Tensor, home: Tensor, slots: Tensor | None, ends: Tensor, output: Tensor, taken: int,
    is_transposed: bool, first: int, form: Fp8Format | None = None,
) -> None:  # fmt: skip
    if output.numel() == 0:
        return
    width = output.shape[1]
    constants, options = product_constants(
        rows.shape[0], len(home), len(ends), (taken, width), rows.element_size(), is_transposed,
        _shared_memory(rows), first, form,
    )  # fmt: skip
    tiles = rows.shape[0] // constants["BLOCK_M"] + len(ends)
    columns = triton.cdiv(width, constants["BLOCK_N"])
    with torch.cuda.device_of(rows):
        _product_kernel[(_round_up(tiles) * columns,)](
            rows, home, home if slots is None else slots, ends.contiguous(), output,
            rows.shape[0], **constants, **options,
        )  # fmt: skip


def outer(left: Tensor, right: Tensor, ends: Tensor, home: Tensor, slots: Tensor | None) -> None:
    """Writes ``left[g].T @ right[g]``; see ``pointer_gemm`` for the arguments."""
    _outer(left.contiguous(), right.contiguous(), ends, home, slots, None, None, len(left), None)


def scaled_outer(
    left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], ends: Tensor, dtype: torch.dtype,
    form: Fp8Format,
) -> Tensor:  # fmt: skip
    """``left[:, g] @ right[:, g].T`` in FP8: ``[G, o, i]``; zeros for a group without rows.

    Args:
        left: values e4m3 ``[o, B]`` and their scales, of ``fp8.quantise_columns``.
        right: ``[i, B]``, likewise.
        ends: int32 ``[G]``.
        dtype: of the result.
        form: of the factors.
    """
    (lefts, left_scales), (rights, right_scales) = left, right
    result = lefts.new_empty(len(ends), len(lefts), len(rights), dtype=dtype)
    of_left, of_right = left_scales.contiguous(), right_scales.contiguous()
    if form.block:
        of_left, of_right = of_left.view(torch.uint8), of_right.view(torch.uint8)
    _outer(lefts, rights, ends, result, None, of_left, of_right, lefts.shape[1], form)
    return result


def _outer(
    left: Tensor, right: Tensor, ends: Tensor, home: Tensor, slots: Tensor | None,
    left_scales: Tensor | None, right_scales: Tensor | None, num_rows: int,
    form: Fp8Format | None,
) -> None:  # fmt: skip
    if home[0].numel() == 0:
        return
    constants, options = outer_constants(
        len(home), home.shape[1:], left.element_size(), _shared_memory(left), form
    )
    tiles = triton.cdiv(home.shape[1], constants["BLOCK_M"])
    columns = triton.cdiv(home.shape[2], constants["BLOCK_N"])
    with torch.cuda.device_of(left):
        _outer_kernel[(_round_up(tiles) * columns, len(ends))](
            left, right, ends.contiguous(), home, home if slots is None else slots, left_scales,
            right_scales, num_rows, **constants, **options,
        )  # fmt: skip


def _round_up(tiles: int) -> int:
    return triton.cdiv(tiles, _SUPER) * _SUPER
