"""FP8: how operands of the grouped products are quantised, and the products.

Values are e4m3, and a format (``precision.py``) says which of them share a scale. Rowwise it is one
for each line of numbers that a product sums over: a row of the tokens, an output (or, for the
input's gradient, an input) of an expert, and for weight gradients a column of each expert's rows.
In blocks it is one for so many numbers of such a line, and in weights perhaps for lines beside it
too. Each is the smallest power of two with which the largest value is at most 448, so that to scale
is exact and the only rounding is that to e4m3, to nearest even. NaN and infinity become NaN.

The references here are the specification, and what CPU runs compute: values are multiplied and
summed in fp32, scaled, and rounded once. On a GPU kernels quantise, and the products are those of
``torch._scaled_grouped_mm``, with offsets on the device, or kernels of this package.

As scales are powers of two, a value is rounded to the same number whatever its scale, unless it is
below 2^-15 of the largest beside it. So it hardly matters which rows a clone takes, and rows that
are quantised already can be quantised again by column, for a weight gradient.

Rows are packed: the scales of each are behind its values, filled up to 16 bytes. So a row travels
in one piece, and is where torch's rowwise products want it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_echo.environment import on_gpu
from megatron_echo.experts.grouped_linear import grouped_outer, grouped_product
from megatron_echo.experts.mx_scales import tiles_of_columns, tiles_of_matrices, tiles_of_rows
from megatron_echo.precision import Fp8Format

FP8 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
WORD = torch.int32
"""What transports carry: any bits, and faster to copy than bytes."""

_WITHOUT_SIGN, _INFINITY = 0x7FFFFFFF, 0x7F800000
_UP_FROM_448 = 0x1FFFFF  # 448 is 1.75 x 2^8: a larger fraction than .75 carries into the exponent
_EXPONENT_OF_448 = 8


@dataclass(frozen=True)
class Quantised:
    """An operand.

    Attributes:
        values: e4m3; the dimension that a product sums over is the last, with stride 1.
        scales: what to multiply values by: rowwise fp32, one for each line; in blocks E8M0
            ``[..., n, k]``, each for a part of the last two dimensions.
    """

    values: Tensor
    scales: Tensor

    @property
    def is_in_blocks(self) -> bool:
        """Whether a line has several scales."""
        return self.scales.dtype == E8M0

    def dequantised(self) -> Tensor:
        """In fp32."""
        wide, scales = self.values.float(), self.scales.float()
        if not self.is_in_blocks:
            return wide * scales.unsqueeze(-1)
        sizes = [n // max(k, 1) for n, k in zip(wide.shape[-2:], scales.shape[-2:], strict=True)]
        return (_in_blocks(wide, *sizes) * scales[..., None, :, None]).reshape(wide.shape)


def _in_blocks(wide: Tensor, lines: int, block: int) -> Tensor:
    """``[..., n, k]`` as ``[..., n / lines, lines, k / block, block]``."""
    shape = wide.shape[-2] // max(lines, 1), lines, wide.shape[-1] // max(block, 1), block
    return wide.reshape(*wide.shape[:-2], *shape)


def scales_for(largest: Tensor) -> Tensor:
    """The smallest powers of two, of at least 2^-126, that bring magnitudes to 448 at most.

    Args:
        largest: fp32, not negative. Infinity and NaN get 2^120.
    """
    bits = (largest.view(torch.int32) & _WITHOUT_SIGN).clamp_(max=_INFINITY)
    exponent = ((bits + _UP_FROM_448) >> 23) - _EXPONENT_OF_448
    return (exponent.clamp_(min=1) << 23).view(torch.float32)


def quantise_reference(tensor: Tensor, form: Fp8Format, lines: int = 1) -> Quantised:
    """Scales along the last dimension, each for so many lines: of all but rowwise columns.

    Args:
        tensor: ``[..., n, k]``.
        form: says how long a block is.
        lines: that share a scale.
    """
    blocks = _in_blocks(tensor.float().contiguous(), lines, form.block or tensor.shape[-1])
    scales = scales_for(blocks.abs().amax((-3, -1)))
    values = (blocks * scales.reciprocal()[..., None, :, None]).to(FP8).view(tensor.shape)
    return Quantised(values, scales.to(E8M0) if form.block else scales.squeeze(-1))


def quantise_columns_reference(
    rows: Tensor | Quantised, ends: Tensor, form: Fp8Format
) -> Quantised:
    """Of :func:`quantise_columns`; zero behind the last end."""
    wide = rows.float() if isinstance(rows, Tensor) else rows.dequantised()
    row = torch.arange(len(wide), device=ends.device)
    group = torch.searchsorted(ends, row, right=True)
    wide = wide.masked_fill((group == len(ends))[:, None], 0)
    if form.block:  # no block is in two groups
        return quantise_reference(wide.t().contiguous(), form)
    largest = wide.new_zeros(len(ends) + 1, wide.shape[1])
    index = group[:, None].expand_as(wide)
    scales = scales_for(largest.scatter_reduce_(0, index, wide.abs(), "amax"))
    values = wide * scales.reciprocal().index_select(0, group)
    return Quantised(values.to(FP8).t().contiguous(), scales[:-1])


def pack_rows(rows: Tensor, form: Fp8Format, ends: Tensor | None = None) -> Tensor:
    """Quantise rows into what travels and :func:`unpacked` takes.

    Args:
        rows: ``[B, i]``, any floating dtype; those behind the last end may hold anything.
        form: i is a multiple of its alignment.
        ends: int32 ``[G]``, end offset of each group; None quantises all.

    Returns:
        int32 ``[B, X]``, i bytes and those of the scales; anything behind the last end.
    """
    words = new_words(rows, rows.shape[1], form)
    into = unpacked(words, form)
    if not on_gpu(rows):
        quantised = quantise_reference(rows, form)
        into.values.copy_(quantised.values)
        into.scales.copy_(quantised.scales)
    elif rows.numel():
        from megatron_echo.experts import fp8_kernels

        used, rows = None if ends is None else ends[-1:], rows.contiguous()
        if form.block:
            fp8_kernels.blocks(rows, into.values, into.scales, form.block, used)
        else:  # a stack of rows, as their memory has gaps
            lines, values = rows.unsqueeze(1), into.values.unsqueeze(1)
            fp8_kernels.rows(lines, used, values, into.scales.unsqueeze(1))
    return words


def new_words(like: Tensor, width: int, form: Fp8Format) -> Tensor:
    """Uninitialised packed rows of a width, as many as ``like`` has."""
    row_bytes = width + form.scale_bytes(width)
    return like.new_empty(len(like), row_bytes // WORD.itemsize, dtype=WORD)


def unpacked(words: Tensor, form: Fp8Format) -> Quantised:
    """Values ``[B, i]`` and scales ``[B]``, in blocks ``[B, i / block]``, of packed rows; views."""
    width = form.width(words.shape[1] * WORD.itemsize)
    values = words.view(FP8)[:, :width]
    if form.block:
        return Quantised(values, words.view(E8M0)[:, width : width + width // form.block])
    return Quantised(values, words.view(torch.float32)[:, width // WORD.itemsize])


def quantise_rows(rows: Tensor, ends: Tensor, form: Fp8Format) -> Quantised:
    """What a product takes on its left. See :func:`pack_rows`."""
    return unpacked(pack_rows(rows, form, ends), form)


def quantise_columns(rows: Tensor | Quantised, ends: Tensor, form: Fp8Format) -> Quantised:
    """Scales along the rows of each group, for each column: an operand of a weight gradient.

    Args:
        rows: ``[B, o]``, any floating dtype, or quantised by row; those behind the last end may
            hold anything.
        ends: int32 ``[G]``, end offset of each group; they and B are multiples of the block.
        form: of the result.

    Returns:
        Values ``[o, B]`` and scales ``[G, o]``, in blocks ``[o, B / block]``; anything behind the
        last end.
    """
    given, scales = (rows, None) if isinstance(rows, Tensor) else (rows.values, rows.scales)
    if not on_gpu(given):
        return quantise_columns_reference(rows, ends, form)
    from megatron_echo.experts import fp8_kernels

    values = given.new_empty(given.mT.shape, dtype=FP8)
    if form.block:
        made = given.new_empty(given.shape[1], len(given) // form.block, dtype=E8M0)
        fp8_kernels.blocks(given.mT, values, made, form.block, ends[-1:], row_scales=scales)
    else:
        made = given.new_empty(len(ends), given.shape[1], dtype=torch.float32)
        fp8_kernels.columns(given, ends, values, made, is_stack=False, row_scales=scales)
    return Quantised(values, made)


def quantise_matrices(
    weights: Tensor, into: Quantised, form: Fp8Format, *, is_transposed: bool
) -> None:
    """Scales along the inputs of each output of each expert, or along the outputs of each input.

    Args:
        weights: ``[m, out, in]``, contiguous.
        into: is written: values ``[m, out, in]`` or transposed ``[m, in, out]``, each matrix
            contiguous, and their scales.
        form: of the result.
        is_transposed: the latter.
    """
    if not on_gpu(weights):
        for number, matrix in enumerate(weights):  # one at a time: fp32 meanwhile
            lines = matrix.t() if is_transposed else matrix
            quantised = quantise_reference(lines, form, form.lines)
            into.values[number].copy_(quantised.values)
            into.scales[number].copy_(quantised.scales)
        return
    from megatron_echo.experts import fp8_kernels

    if form.block:
        lines = weights.mT if is_transposed else weights
        fp8_kernels.blocks(lines, into.values, into.scales, form.block, lines=form.lines)
    elif is_transposed:
        experts, out, _ = weights.shape
        ends = torch.arange(1, experts + 1, dtype=torch.int32, device=weights.device) * out
        fp8_kernels.columns(weights.flatten(0, 1), ends, into.values, into.scales, is_stack=True)
    else:
        fp8_kernels.rows(weights, None, into.values, into.scales)


def scaled_product(rows: Quantised, weights: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """``rows[g] @ weights[g].T`` for each group of rows; anything behind the last end.

    Args:
        rows: ``[B, i]``, of :func:`quantise_rows`.
        weights: ``[G, o, i]``, of :func:`quantise_matrices`; in blocks contiguous.
        ends: int32 ``[G]``, end offset of each group, on the device.
        dtype: of the result.
    """
    if rows.values.is_cpu:
        weight = weights.dequantised()
        return grouped_product(rows.dequantised(), weight.mT, ends).to(dtype)
    values, scales, of_weights = rows.values, rows.scales.contiguous(), weights.scales
    if rows.is_in_blocks:  # torch takes neither gaps nor scales where they are
        values = values.contiguous()
        scales, of_weights = tiles_of_rows(scales, ends), tiles_of_matrices(of_weights)
    product = torch._scaled_grouped_mm(values, weights.values.mT, scales, of_weights, offs=ends)
    return product.to(dtype)


def scaled_outer(left: Quantised, right: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """``left[:, g] @ right[:, g].T``, a weight gradient, for each group of rows.

    Args:
        left: ``[o, B]``, from :func:`quantise_columns`.
        right: ``[i, B]``, likewise.
        ends: int32 ``[G]``, multiples of the format's alignment on a GPU.
        dtype: of the result.

    Returns:
        ``[G, o, i]``; zeros for a group without rows.
    """
    if left.values.is_cpu:
        if left.is_in_blocks:
            return grouped_outer(left.dequantised().t(), right.dequantised().t(), ends).to(dtype)
        outer = grouped_outer(left.values.t().float(), right.values.t().float(), ends)
        return outer.mul_(left.scales[:, :, None]).mul_(right.scales[:, None]).to(dtype)
    if left.is_in_blocks:
        of_left, of_right = (tiles_of_columns(each.scales, ends) for each in (left, right))
    else:
        of_left, of_right = left.scales.flatten(), right.scales.flatten()
    outer = torch._scaled_grouped_mm(left.values, right.values.t(), of_left, of_right, offs=ends)
    is_empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return outer.masked_fill_(is_empty[:, None, None], 0).to(dtype)
