"""Rowwise FP8: how operands of the grouped products are quantised, and the products.

Values are e4m3 and scales fp32, one for each line of numbers that a product sums over: a row of the
tokens, an output (or, for the input's gradient, an input) of an expert, and for weight gradients a
column of each expert's rows. A scale is the smallest power of two with which the largest value is
at most 448, so that to scale is exact and the only rounding is that to e4m3, to nearest even. NaN
and infinity become NaN.

The references here are the specification, and what CPU runs compute: values are multiplied and
summed in fp32, scaled, and rounded once. On a GPU kernels quantise, and the products are those of
``torch._scaled_grouped_mm``, with offsets on the device.

As scales are powers of two, a value is rounded to the same number whatever its scale, unless it is
below 2^-15 of the largest beside it. So it hardly matters which rows a clone takes, and rows that
are quantised already can be quantised again by column, for a weight gradient.

Rows are packed: 16 bytes behind the values of each hold its scale. So a row travels in one piece,
and is where torch's products want it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_echo.environment import on_gpu
from megatron_echo.experts.grouped_linear import grouped_outer, grouped_product

FP8 = torch.float8_e4m3fn
WORD = torch.int32
"""What transports carry: any bits, and faster to copy than bytes."""

_BEHIND = 4  # words, so that each row begins at a multiple of 16 bytes; the first is the scale
_WITHOUT_SIGN, _INFINITY = 0x7FFFFFFF, 0x7F800000
_UP_FROM_448 = 0x1FFFFF  # 448 is 1.75 x 2^8: a larger fraction than .75 carries into the exponent
_EXPONENT_OF_448 = 8


@dataclass(frozen=True)
class Quantised:
    """An operand.

    Attributes:
        values: e4m3; the dimension that a product sums over is the last, with stride 1.
        scales: fp32, what to multiply each line of values by.
    """

    values: Tensor
    scales: Tensor

    def dequantised(self) -> Tensor:
        """In fp32."""
        return self.values.float() * self.scales.unsqueeze(-1)


def scales_for(largest: Tensor) -> Tensor:
    """The smallest powers of two, of at least 2^-126, that bring magnitudes to 448 at most.

    Args:
        largest: fp32, not negative. Infinity and NaN get 2^120.
    """
    bits = (largest.view(torch.int32) & _WITHOUT_SIGN).clamp_(max=_INFINITY)
    exponent = ((bits + _UP_FROM_448) >> 23) - _EXPONENT_OF_448
    return (exponent.clamp_(min=1) << 23).view(torch.float32)


def quantise_rows_reference(tensor: Tensor) -> Quantised:
    """A scale for each line of the last dimension: of :func:`quantise_rows`."""
    wide = tensor.float()
    scales = scales_for(wide.abs().amax(-1))
    return Quantised((wide * scales.reciprocal().unsqueeze(-1)).to(FP8), scales)


def quantise_columns_reference(rows: Tensor | Quantised, ends: Tensor) -> Quantised:
    """Of :func:`quantise_columns`; zero behind the last end."""
    wide = rows.float() if isinstance(rows, Tensor) else rows.dequantised()
    row = torch.arange(len(wide), device=ends.device)
    group = torch.searchsorted(ends, row, right=True)
    wide = wide.masked_fill((group == len(ends))[:, None], 0)
    largest = wide.new_zeros(len(ends) + 1, wide.shape[1])
    index = group[:, None].expand_as(wide)
    scales = scales_for(largest.scatter_reduce_(0, index, wide.abs(), "amax"))
    values = wide * scales.reciprocal().index_select(0, group)
    return Quantised(values.to(FP8).t().contiguous(), scales[:-1])


def pack_rows(rows: Tensor, ends: Tensor | None = None) -> Tensor:
    """Quantise rows, a scale for each, into what travels and :func:`unpacked` takes.

    Args:
        rows: ``[B, i]``, any floating dtype; those behind the last end may hold anything.
        ends: int32 ``[G]``, end offset of each group; None quantises all.

    Returns:
        int32 ``[B, i / 4 + 4]``; anything behind the last end.
    """
    words = new_words(rows, rows.shape[1])
    into = unpacked(words)
    if not on_gpu(rows):
        quantised = quantise_rows_reference(rows)
        into.values.copy_(quantised.values)
        into.scales.copy_(quantised.scales)
    elif rows.numel():
        from megatron_echo.experts import fp8_kernels

        used = None if ends is None else ends[-1:]
        lines = rows.contiguous().unsqueeze(1)  # a stack of rows, as their memory has gaps
        fp8_kernels.rows(lines, used, into.values.unsqueeze(1), into.scales.unsqueeze(1))
    return words


def new_words(like: Tensor, width: int) -> Tensor:
    """Uninitialised packed rows of a width, as many as ``like`` has."""
    return like.new_empty(len(like), width // WORD.itemsize + _BEHIND, dtype=WORD)


def unpacked(words: Tensor) -> Quantised:
    """Values ``[B, i]`` and scales ``[B]`` of packed rows; views."""
    values = words.view(FP8)[:, : -_BEHIND * WORD.itemsize]
    return Quantised(values, words.view(torch.float32)[:, -_BEHIND])


def quantise_rows(rows: Tensor, ends: Tensor) -> Quantised:
    """A scale for each row: what a product takes on its left. See :func:`pack_rows`."""
    return unpacked(pack_rows(rows, ends))


def quantise_columns(rows: Tensor | Quantised, ends: Tensor) -> Quantised:
    """A scale for each column of each group of rows: an operand of a weight gradient.

    Args:
        rows: ``[B, o]``, any floating dtype, or quantised by row; those behind the last end may
            hold anything.
        ends: int32 ``[G]``, end offset of each group.

    Returns:
        Values ``[o, B]`` and scales ``[G, o]``; anything behind the last end.
    """
    given, scales = (rows, None) if isinstance(rows, Tensor) else (rows.values, rows.scales)
    if not on_gpu(given):
        return quantise_columns_reference(rows, ends)
    from megatron_echo.experts import fp8_kernels

    shape = len(ends), given.shape[1]
    into = Quantised(_new(given, *given.mT.shape), given.new_empty(shape, dtype=torch.float32))
    fp8_kernels.columns(given, ends, into.values, into.scales, is_stack=False, row_scales=scales)
    return into


def quantise_matrices(weights: Tensor, into: Quantised, *, is_transposed: bool) -> None:
    """A scale for each output of each expert, or for each input.

    Args:
        weights: ``[m, out, in]``, contiguous.
        into: is written: ``[m, out, in]`` and ``[m, out]``, or transposed ``[m, in, out]`` and
            ``[m, in]``. Each matrix is contiguous.
        is_transposed: a scale for each input.
    """
    if not on_gpu(weights):
        for number, matrix in enumerate(weights):  # one at a time: fp32 meanwhile
            quantised = quantise_rows_reference(matrix.t() if is_transposed else matrix)
            into.values[number].copy_(quantised.values)
            into.scales[number].copy_(quantised.scales)
        return
    from megatron_echo.experts import fp8_kernels

    if is_transposed:
        experts, out, _ = weights.shape
        ends = torch.arange(1, experts + 1, dtype=torch.int32, device=weights.device) * out
        fp8_kernels.columns(weights.flatten(0, 1), ends, into.values, into.scales, is_stack=True)
    else:
        fp8_kernels.rows(weights, None, into.values, into.scales)


def _new(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=FP8, device=like.device)


def scaled_product(rows: Quantised, weights: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows[g] @ weights[g].T`` for each group of rows; anything behind the last end.

    Args:
        rows: ``[B, i]`` and ``[B]``; i is a multiple of 16.
        weights: ``[G, o, i]`` and ``[G, o]``; o is one too.
        ends: int32 ``[G]``, end offset of each group, on the device.
        dtype: of the result.
    """
    if not rows.values.is_cpu:
        product = torch._scaled_grouped_mm(
            rows.values, weights.values.mT, rows.scales.contiguous(), weights.scales, offs=ends
        )
        return product.to(dtype)
    row = torch.arange(len(rows.scales), device=ends.device)
    group = torch.searchsorted(ends, row, right=True, out_int32=True).clamp_(max=len(ends) - 1)
    total = grouped_product(rows.values.float(), weights.values.float().mT, ends)
    total *= rows.scales[:, None]
    return (total * weights.scales.index_select(0, group)).to(dtype)


def scaled_outer(left: Quantised, right: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """``left[:, g] @ right[:, g].T``, a weight gradient, for each group of rows.

    Args:
        left: ``[o, B]`` and ``[G, o]``, from :func:`quantise_columns`.
        right: ``[i, B]`` and ``[G, i]``, likewise.
        ends: int32 ``[G]``, multiples of 16 on a GPU.
        dtype: of the result.

    Returns:
        ``[G, o, i]``; zeros for a group without rows.
    """
    if not left.values.is_cpu:
        outer = torch._scaled_grouped_mm(
            left.values, right.values.t(), left.scales.flatten(), right.scales.flatten(), offs=ends
        )
        is_empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
        return outer.masked_fill_(is_empty[:, None, None], 0).to(dtype)
    outer = grouped_outer(left.values.t().float(), right.values.t().float(), ends)
    return outer.mul_(left.scales[:, :, None]).mul_(right.scales[:, None]).to(dtype)
