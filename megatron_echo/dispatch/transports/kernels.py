"""Rows and matrices of peers, written and summed in Triton; ``PeerRows`` has references.

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

_MATRIX_BLOCK = 4096  # elements of a program: 64 bytes and more for each of 128 threads


@triton.jit
def _pointers(
    own, offsets, places, token, column, k, tokens, stride, H: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Where columns of the row that ``places[token, k]`` names lie, and whether it names one."""
    place = tl.load(places + token * K + k, mask=token < tokens, other=stride - 1)
    row = place % stride
    named = row < stride - 1
    offset = tl.load(offsets + place // stride, mask=named, other=0)
    first = tl.multiple_of(offset, 16) + row.to(tl.int64) * H
    return own + first[:, None] + column[None, :], named[:, None] & (column < H)[None, :]


@triton.jit(do_not_specialize=["tokens", "stride"])
def _put_rows_kernel(
    values, own, offsets, places, tokens, stride,
    H: tl.constexpr, K: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < H)[None, :]
    value = tl.load(values + token[:, None] * H + column[None, :], mask=inside)
    for k in tl.range(0, K, loop_unroll_factor=UNROLLED):
        pointers, named = _pointers(own, offsets, places, token, column, k, tokens, stride, H, K)
        tl.store(pointers, value, mask=named)


@triton.jit(do_not_specialize=["tokens", "stride"])
def _pull_rows_kernel(
    own, offsets, places, output, tokens, stride,
    H: tl.constexpr, K: tl.constexpr, UNROLLED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if own.dtype.element_ty == tl.float64 else tl.float32
    token = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers, named = _pointers(own, offsets, places, token, column, 0, tokens, stride, H, K)
    # The first term is not added to 0, which would lose the sign of -0.
    total = tl.load(pointers, mask=named, other=0.0).to(wide)
    for k in tl.static_range(1, UNROLLED):
        pointers, named = _pointers(own, offsets, places, token, column, k, tokens, stride, H, K)
        total += tl.load(pointers, mask=named, other=0.0).to(wide)
    for k in tl.range(UNROLLED, K, loop_unroll_factor=8):
        pointers, named = _pointers(own, offsets, places, token, column, k, tokens, stride, H, K)
        total += tl.load(pointers, mask=named, other=0.0).to(wide)
    inside = (token < tokens)[:, None] & (column < H)[None, :]
    tl.store(output + token[:, None] * H + column[None, :], total, mask=inside)


@triton.jit
def _put_matrices_kernel(
    matrices, own, offsets, source,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    target = tl.program_id(1)
    matrix = tl.load(source + target)
    if matrix < 0:
        return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.multiple_of(tl.load(offsets + target // SLOTS), 16)
    value = tl.load(matrices + matrix.to(tl.int64) * SIZE + element, mask=element < SIZE)
    slot = (target % SLOTS).to(tl.int64) * SIZE
    tl.store(own + offset + slot + element, value, mask=element < SIZE)


@triton.jit
def _add_matrices_kernel(
    own, offsets, places, home,
    SIZE: tl.constexpr, SLOTS: tl.constexpr, TERMS: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if own.dtype.element_ty == tl.float64 else tl.float32
    matrix = tl.program_id(1)
    term = tl.arange(0, BLOCK_T)
    if tl.max(tl.load(places + matrix * TERMS + term, mask=term < TERMS, other=-1), axis=0) < 0:
        return
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    pointers = home + matrix.to(tl.int64) * SIZE + element
    total = tl.load(pointers, mask=inside).to(wide)
    for number in range(TERMS):
        place = tl.load(places + matrix * TERMS + number)
        if place >= 0:
            offset = tl.multiple_of(tl.load(offsets + place // SLOTS), 16)
            slot = (place % SLOTS).to(tl.int64) * SIZE
            total += tl.load(own + offset + slot + element, mask=inside).to(wide)
    tl.store(pointers, total, mask=inside)


def put_rows(own: Tensor, offsets: Tensor, values: Tensor, places: Tensor) -> None:
    """Write each value to its places.

    Args:
        own: ``[B + 1, H]``, this rank's rows.
        offsets: int64 ``[R]``, elements between their begin and that of each rank's rows,
            multiples of 16.
        values: ``[T, H]``, the same dtype.
        places: int32 ``[T, K]``.
    """
    constants = sum_constants(values.shape[1], values.element_size(), places.shape[1])
    _launch(
        _put_rows_kernel, values, constants,
        (values.contiguous(), own, offsets, places.contiguous(), len(values), len(own)),
    )  # fmt: skip


def pull_rows(own: Tensor, offsets: Tensor, places: Tensor, into: Tensor | None = None) -> Tensor:
    """Sum the rows at ``places`` in the wide dtype, in order: ``[T, H]``.

    Args:
        own: ``[B + 1, H]``, this rank's rows: fp64, fp32, bf16 or fp16.
        offsets: int64 ``[R]``, as in :func:`put_rows`.
        places: int32 ``[T, K]``; K is at least 1.
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


def matrix_constants(size: int, slots: int, terms: int | None = None) -> dict[str, int]:
    """Compile-time arguments of the kernels of matrices.

    Args:
        size: elements of a matrix.
        slots: S.
        terms: that :func:`add_matrices` sums at most; None for :func:`put_matrices`.
    """
    constants = {"SIZE": size, "SLOTS": slots, "BLOCK": _MATRIX_BLOCK}
    if terms is not None:
        constants |= {"TERMS": terms, "BLOCK_T": triton.next_power_of_2(terms)}
    return constants


def put_matrices(own: Tensor, offsets: Tensor, matrices: Tensor, source: Tensor) -> None:
    """Write matrices to slots of ranks; nothing else is read or written.

    Args:
        own: ``[S * out + 1, in]``, this rank's rows.
        offsets: int64 ``[R]``, as in :func:`put_rows`.
        matrices: ``[M, out, in]``, contiguous, the same dtype.
        source: int32 ``[R, S]``, which matrix goes to each slot, -1 for none.
    """
    constants = matrix_constants(matrices[0].numel(), source.shape[1])
    _launch_matrices(
        _put_matrices_kernel, source.numel(), constants,
        (matrices, own, offsets, source.contiguous()),
    )  # fmt: skip


def add_matrices(own: Tensor, offsets: Tensor, places: Tensor, slots: int, home: Tensor) -> None:
    """Add matrices of slots to those that are named; the others are neither read nor written.

    Sums are made in the wide dtype, in the order of the columns, and rounded once.

    Args:
        own: ``[S * out + 1, in]``, this rank's rows.
        offsets: int64 ``[R]``, as in :func:`put_rows`.
        places: int32 ``[m, n]``, ``rank * S + slot`` of what is added, -1 for nothing.
        slots: S.
        home: ``[m, out, in]``, contiguous, any floating dtype.
    """
    constants = matrix_constants(home[0].numel(), slots, places.shape[1])
    _launch_matrices(
        _add_matrices_kernel, len(home), constants, (own, offsets, places.contiguous(), home)
    )


def _launch_matrices(kernel, matrices: int, constants: dict, arguments: tuple) -> None:
    grid = (triton.cdiv(constants["SIZE"], constants["BLOCK"]), matrices)
    if grid[0] * grid[1] == 0:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def _launch(kernel, shaped: Tensor, constants: dict, arguments: tuple) -> None:
    if shaped.numel() == 0:
        return
    rows, columns = shaped.shape
    grid = (triton.cdiv(rows, constants["ROWS"]), triton.cdiv(columns, constants["BLOCK"]))
    with torch.cuda.device_of(shaped):
        kernel[grid](*arguments, **constants)
