"""Rows written to and summed from the memory of peers, in Triton; ``PeerRows`` has references.

A place is ``rank * stride + row``; the last row of a rank stands for none and is not touched.
Where the rows of each rank begin comes from a table on the device: how many elements lie between
them and this rank's. The tiles are those of ``dispatch/kernels.py``: 16 bytes at a time, nothing is
autotuned.
"""

# (Triton's functions have no Python types.)

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_echo.dispatch.kernels import sum_constants
from megatron_echo.dispatch.layout import wide_dtype


@triton.jit
def _pointers(
    own, offsets, places, token, column, k, tokens, stride, H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Where columns of the row that ``places[token, k]`` names lie, and whether it names one."""
    place = tl.load(places + token * C + k, mask=token < tokens, other=stride - 1)
    row = place % stride
    named = row < stride - 1
    offset = tl.load(offsets + place // stride, mask=named, other=0)
    first = tl.multiple_of(offset, 16) + row.to(tl.int64) * H
    return own + first[:, None] + column[None, :], named[:, None] & (column < H)[None, :]


@triton.jit(do_not_specialize=["tokens", "stride"])
def _put_rows_kernel(
    values, own, offsets, places, tokens, stride,
    H: tl.constexpr, C: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < H)[None, :]
    value = tl.load(values + token[:, None] * H + column[None, :], mask=inside)
    for k in tl.range(0, C, loop_unroll_factor=UNROLLED):
        pointers, named = _pointers(own, offsets, places, token, column, k, tokens, stride, H, C)
        tl.store(pointers, value, mask=named)


@triton.jit(do_not_specialize=["tokens", "stride"])
def _pull_rows_kernel(
    own, offsets, places, output, tokens, stride,
    H: tl.constexpr, C: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if own.dtype.element_ty == tl.float64 else tl.float32
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers, named = _pointers(own, offsets, places, token, column, 0, tokens, stride, H, C)
    # The first term is not added to 0, which would lose the sign of -0.
    total = tl.load(pointers, mask=named, other=0.0).to(wide)
    for k in tl.static_range(1, UNROLLED):
        pointers, named = _pointers(own, offsets, places, token, column, k, tokens, stride, H, C)
        total += tl.load(pointers, mask=named, other=0.0).to(wide)
    for k in tl.range(UNROLLED, C, loop_unroll_factor=8):
        pointers, named = _pointers(own, offsets, places, token, column, k, tokens, stride, H, C)
        total += tl.load(pointers, mask=named, other=0.0).to(wide)
    inside = (token < tokens)[:, None] & (column < H)[None, :]
    tl.store(output + token[:, None] * H + column[None, :], total, mask=inside)


def put_rows(own: Tensor, offsets: Tensor, values: Tensor, places: Tensor) -> None:
    """Write each value to its places.

    Args:
        own: ``[N + 1, H]``, this rank's rows.
        offsets: int64 ``[R]``, elements between their begin and that of each rank's rows,
            multiples of 16.
        values: ``[T, H]``, the same dtype.
        places: int32 ``[T, C]``.
    """
    constants = sum_constants(values.shape[1], values.element_size(), places.shape[1])
    _launch(
        _put_rows_kernel, values, constants,
        (values.contiguous(), own, offsets, places.contiguous(), len(values), len(own)),
    )  # fmt: skip


def pull_rows(own: Tensor, offsets: Tensor, places: Tensor, into: Tensor | None = None) -> Tensor:
    """Sum the rows at ``places`` in the wide dtype, in order: ``[T, H]``.

    Args:
        own: ``[N + 1, H]``, this rank's rows: fp64, fp32, bf16 or fp16.
        offsets: int64 ``[R]``, as in :func:`put_rows`.
        places: int32 ``[T, C]``; C is at least 1.
        into: where to write, contiguous; new, in the wide dtype, if None.
    """
    tokens, terms = places.shape
    output = into
    if output is None:
        output = own.new_empty((tokens, own.shape[1]), dtype=wide_dtype(own.dtype))
    constants = sum_constants(own.shape[1], own.element_size(), terms)
    _launch(
        _pull_rows_kernel, output, constants,
        (own, offsets, places.contiguous(), output, tokens, len(own)),
    )  # fmt: skip
    return output


def _launch(kernel, shaped: Tensor, constants: dict, arguments: tuple) -> None:
    if shaped.numel() == 0:
        return
    rows, columns = shaped.shape
    grid = (triton.cdiv(rows, constants["ROWS"]), triton.cdiv(columns, constants["BLOCK"]))
    with torch.cuda.device_of(shaped):
        kernel[grid](*arguments, **constants)
