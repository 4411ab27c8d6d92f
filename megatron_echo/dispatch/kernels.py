"""The two copies of ``permute.py`` in Triton, bit-identical to the torch references there.

A program handles a few rows by a block of columns, 16 bytes a load. Rows that no index names are
not read; behind the rows in use, whose number is read on the device, programs exit at once.
Pointers are int64: a buffer may have more than 2^31 elements. Nothing is autotuned, as that would
wait for the device.
"""

# (Triton's functions have no Python types.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_echo.dispatch.layout import wide_dtype

_BLOCK_BYTES = 2048  # 16 bytes for each of 128 threads, four warps
_LOADS = 8  # 16-byte loads that a thread has in flight
_MAX_ROWS = 256
_MAX_UNROLLED = 16


@triton.jit
def _named(source, index, row, column, k, num_source, num_rows, H: tl.constexpr, K: tl.constexpr):
    """Columns of the rows that ``index[row, k]`` names; zeros where it names none."""
    taken = tl.load(index + row * K + k, mask=row < num_rows, other=num_source)
    return tl.load(
        source + taken.to(tl.int64)[:, None] * H + column[None, :],
        mask=(taken < num_source)[:, None] & (column < H)[None, :],
        other=0.0,
    )


@triton.jit(do_not_specialize=["num_source", "num_rows"])
def _take_rows_kernel(
    source, index, output, used, num_source, num_rows,
    IS_BOUNDED: tl.constexpr, H: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if IS_BOUNDED:
        num_rows = tl.minimum(tl.load(used), num_rows)
    row = tl.program_id(0).to(tl.int64) * ROWS
    if row >= num_rows:
        return
    row += tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = _named(source, index, row, column, 0, num_source, num_rows, H, 1)
    inside = (row < num_rows)[:, None] & (column < H)[None, :]
    tl.store(output + row[:, None] * H + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["num_source", "num_rows"])
def _sum_rows_kernel(
    source, index, output, num_source, num_rows, H: tl.constexpr, K: tl.constexpr,
    UNROLLED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if source.dtype.element_ty == tl.float64 else tl.float32
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # The first term is not added to 0, which would lose the sign of -0.
    total = _named(source, index, row, column, 0, num_source, num_rows, H, K).to(wide)
    for k in tl.static_range(1, UNROLLED):
        total += _named(source, index, row, column, k, num_source, num_rows, H, K).to(wide)
    for k in tl.range(UNROLLED, K, loop_unroll_factor=8):
        total += _named(source, index, row, column, k, num_source, num_rows, H, K).to(wide)
    inside = (row < num_rows)[:, None] & (column < H)[None, :]
    tl.store(output + row[:, None] * H + column[None, :], total, mask=inside)


def take_constants(columns: int, itemsize: int, is_bounded: bool) -> dict[str, int]:
    """Compile-time arguments of the kernel of :func:`take_rows`."""
    return {"IS_BOUNDED": is_bounded, "H": columns, **_tile(columns, itemsize, _LOADS)}


def sum_constants(columns: int, itemsize: int, terms: int) -> dict[str, int]:
    """Compile-time arguments of the kernel of :func:`sum_rows`; K terms are summed."""
    tile = _tile(columns, itemsize, max(1, _LOADS // terms))
    return {"H": columns, "K": terms, "UNROLLED": min(terms, _MAX_UNROLLED), **tile}


def _tile(columns: int, itemsize: int, blocks: int) -> dict[str, int]:
    block = min(_BLOCK_BYTES // itemsize, triton.next_power_of_2(columns))
    rows = blocks * _BLOCK_BYTES // itemsize // block
    return {"ROWS": min(triton.next_power_of_2(rows), _MAX_ROWS), "BLOCK": block}


def take_rows(source: Tensor, index: Tensor, used: Tensor | None = None) -> Tensor:
    """``source[index]``, with zeros where the index is ``len(source)``: ``[B, H]``.

    Args:
        source: ``[N, H]`` on a CUDA device (or on the CPU in Triton's interpreter): fp64, fp32,
            bf16 or fp16.
        index: int32 ``[B]``, up to and including N.
        used: int32 ``[1]``, rows in use: those behind are not written. None if all are.
    """
    shape = (index.shape[0], source.shape[1])
    if source.numel() == 0:
        return source.new_zeros(shape)
    output = source.new_empty(shape)
    constants = take_constants(source.shape[1], source.element_size(), used is not None)
    pointers = source, index, output, index if used is None else used
    _launch(_take_rows_kernel, pointers, constants)
    return output


def sum_rows(source: Tensor, index: Tensor, into: Tensor | None = None) -> Tensor:
    """``source[index].sum(1)`` in the wide dtype, in order, ``[N, H]``; ``len(source)`` adds 0.

    Args:
        source: ``[B, H]``, as in :func:`take_rows`.
        index: int32 ``[N, K]``, up to and including B; K is at least 1.
        into: where sums are written and rounded to, contiguous ``[N, H]``; new and wide if None.
    """
    output = into
    if output is None:
        shape, dtype = (index.shape[0], source.shape[1]), wide_dtype(source.dtype)
        output = source.new_empty(shape, dtype=dtype)
    if source.numel() == 0:
        return output.zero_()
    constants = sum_constants(source.shape[1], source.element_size(), index.shape[1])
    _launch(_sum_rows_kernel, (source, index, output), constants)
    return output


def _launch(kernel, pointers: tuple[Tensor, ...], constants: dict[str, int]) -> None:
    source, index, output, *used = pointers
    if output.numel() == 0:
        return
    rows, columns = output.shape
    # Row blocks change fastest: what a block of columns reads again then is still in the L2 cache.
    grid = (triton.cdiv(rows, constants["ROWS"]), triton.cdiv(columns, constants["BLOCK"]))
    with torch.cuda.device_of(source):
        kernel[grid](
            source.contiguous(), index.contiguous(), output, *used, source.shape[0], rows,
            **constants,
        )  # fmt: skip
