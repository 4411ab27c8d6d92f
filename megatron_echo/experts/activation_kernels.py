"""The activation times the router's probability in Triton: one kernel forward, one backward.

Another one forward gives rows in FP8, packed.

Computed in fp32 and rounded once, where the reference of ``activation.py`` rounds after each of its
operators. The number of rows in use is read on the device: a program behind them exits at once, so
that the work is that of the rows and not of the buffer, and the rows behind are not written.
Pointers are int64. Nothing is autotuned, as that would wait for the device.
"""

# (Triton's functions have no Python types.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_echo.experts.fp8_kernels import _in_blocks, _magnitude, _rounded, _scale_and_inverse

_COLUMNS = 256
_FORWARD_ROWS, _BACKWARD_ROWS = 16, 8  # a thread has 16 or 8 elements of each tensor in flight


@triton.jit
def _value_and_slope(x, KIND: tl.constexpr):
    """The function at ``x`` in fp32, and its derivative."""
    if KIND == "squared_relu":
        positive = tl.where(x < 0, 0.0, x)
        value, slope = positive * positive, 2 * positive
    elif KIND == "gelu":
        root_half: tl.constexpr = 0.7071067811865476
        density_at_0: tl.constexpr = 0.3989422804014327  # of the normal distribution
        share = 0.5 * (1 + tl.erf(x * root_half))
        value, slope = x * share, share + x * density_at_0 * tl.exp(-0.5 * x * x)
    else:
        steepness: tl.constexpr = 1.702 if KIND == "quick_gelu" else 1.0
        share = 1 / (1 + tl.exp(-steepness * x))
        value, slope = x * share, share * (1 + steepness * x * (1 - share))
    return value, slope


@triton.jit
def _biased(hidden, bias, group, row, column, mask, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr):
    """``[B, WIDTH]`` in fp32, with the bias of each row's group."""
    x = tl.load(hidden + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + group[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    return x


@triton.jit
def _gate_and_up(
    hidden, bias, group, row, column, mask,
    F: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """The two halves in fp32 with clamp and offset; and where the clamp lets gradients through."""
    gate = _biased(hidden, bias, group, row, column, mask, 2 * F, HAS_BIAS)
    up = _biased(hidden, bias, group, row, column + F, mask, 2 * F, HAS_BIAS)
    passes_gate, passes_up = mask, mask
    if LIMIT is not None:
        passes_gate, passes_up = gate <= LIMIT, (up >= -LIMIT) & (up <= LIMIT)
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    return gate, up + OFFSET, passes_gate, passes_up


@triton.jit
def _activated(
    hidden, bias, group, row, column, mask,
    F: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Columns of the activation in fp32, before the probability."""
    if IS_GATED:
        gate, up, _, _ = _gate_and_up(
            hidden, bias, group, row, column, mask, F, LIMIT, OFFSET, HAS_BIAS
        )
        value, _ = _value_and_slope(gate, KIND)
        value *= up
    else:
        x = _biased(hidden, bias, group, row, column, mask, F, HAS_BIAS)
        value, _ = _value_and_slope(x, KIND)
    return value


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    hidden, probs, used, bias, groups, output, num_rows,
    F: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    end = tl.minimum(tl.load(used), num_rows)
    row = tl.program_id(0).to(tl.int64) * ROWS
    if row >= end:
        return
    row += tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < end)[:, None] & (column < F)[None, :]
    prob = tl.load(probs + row, mask=row < end, other=0.0)[:, None]
    group = tl.load(groups + row, mask=row < end, other=0) if HAS_BIAS else 0
    value = _activated(
        hidden, bias, group, row, column, mask, F, KIND, IS_GATED, LIMIT, OFFSET, HAS_BIAS
    )
    tl.store(output + row[:, None] * F + column[None, :], value * prob, mask=mask)


@triton.jit
def _narrowed(
    hidden, bias, group, row, column, mask, prob,
    F: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """What is quantised: rounded to the dtype of ``hidden``, as the reference is."""
    value = _activated(
        hidden, bias, group, row, column, mask, F, KIND, IS_GATED, LIMIT, OFFSET, HAS_BIAS
    )
    return (value * prob).to(hidden.dtype.element_ty).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _packed_kernel(
    hidden, probs, used, bias, groups, values, scales, num_rows, value_stride, scale_stride,
    F: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Rowwise each row is computed twice, for its largest magnitude and to be stored."""
    end = tl.minimum(tl.load(used), num_rows)
    row = tl.program_id(0).to(tl.int64) * ROWS
    if row >= end:
        return
    row += tl.arange(0, ROWS)
    prob = tl.load(probs + row, mask=row < end, other=0.0)[:, None]
    group = tl.load(groups + row, mask=row < end, other=0) if HAS_BIAS else 0
    largest = tl.zeros((ROWS,), dtype=tl.int32)
    for first in range(0, F if SCALE_BLOCK is None else 0, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (row < end)[:, None] & (column < F)[None, :]
        value = _narrowed(
            hidden, bias, group, row, column, mask, prob, F, KIND, IS_GATED, LIMIT, OFFSET, HAS_BIAS
        )
        largest = tl.maximum(largest, tl.max(tl.where(mask, _magnitude(value), 0), axis=1))
    scale, inverse = _scale_and_inverse(largest)
    if SCALE_BLOCK is None:
        tl.store(scales + row * scale_stride, scale, mask=row < end)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (row < end)[:, None] & (column < F)[None, :]
        value = _narrowed(
            hidden, bias, group, row, column, mask, prob, F, KIND, IS_GATED, LIMIT, OFFSET, HAS_BIAS
        )
        if SCALE_BLOCK is None:
            rounded = _rounded(value, inverse[:, None])
        else:
            exponents, rounded = _in_blocks(tl.where(mask, value, 0.0), 1, SCALE_BLOCK)
            part = first // SCALE_BLOCK + tl.arange(0, BLOCK // SCALE_BLOCK)
            inside = (row < end)[:, None] & (part * SCALE_BLOCK < F)[None, :]
            tl.store(scales + row[:, None] * scale_stride + part[None, :], exponents, mask=inside)
        tl.store(values + row[:, None] * value_stride + column[None, :], rounded, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    hidden, probs, used, bias, groups, grad, to_hidden, to_probs, num_rows,
    F: tl.constexpr, KIND: tl.constexpr, IS_GATED: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    end = tl.minimum(tl.load(used), num_rows)
    row = tl.program_id(0).to(tl.int64) * ROWS
    if row >= end:
        return
    row += tl.arange(0, ROWS)
    prob = tl.load(probs + row, mask=row < end, other=0.0)[:, None]
    group = tl.load(groups + row, mask=row < end, other=0) if HAS_BIAS else 0
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, F, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (row < end)[:, None] & (column < F)[None, :]
        incoming = tl.load(grad + row[:, None] * F + column[None, :], mask=mask, other=0.0)
        incoming = incoming.to(tl.float32)
        if IS_GATED:
            at = row[:, None] * (2 * F) + column[None, :]
            gate, up, passes_gate, passes_up = _gate_and_up(
                hidden, bias, group, row, column, mask, F, LIMIT, OFFSET, HAS_BIAS
            )
            value, slope = _value_and_slope(gate, KIND)
            to_gate = tl.where(passes_gate, incoming * prob * up * slope, 0.0)
            to_up = tl.where(passes_up, incoming * prob * value, 0.0)
            tl.store(to_hidden + at, to_gate, mask=mask)
            tl.store(to_hidden + at + F, to_up, mask=mask)
            total += tl.where(mask, incoming * value * up, 0.0)
        else:
            at = row[:, None] * F + column[None, :]
            x = _biased(hidden, bias, group, row, column, mask, F, HAS_BIAS)
            value, slope = _value_and_slope(x, KIND)
            tl.store(to_hidden + at, incoming * prob * slope, mask=mask)
            total += tl.where(mask, incoming * value, 0.0)
    tl.store(to_probs + row, tl.sum(total, axis=1), mask=row < end)


def constants(
    width: int, settings: dict[str, Any], is_backward: bool, has_bias: bool = False
) -> dict[str, Any]:
    """The kernels' compile-time arguments.

    Args:
        width: F.
        settings: ``KIND``, ``IS_GATED``, ``LIMIT`` and ``OFFSET``, from
            :meth:`~megatron_echo.experts.activation.ExpertActivation.kernel_settings`.
        is_backward: for the backward kernel, or that of :func:`packed`, which take all columns.
        has_bias: the rows get one.
    """
    rows = _BACKWARD_ROWS if is_backward else _FORWARD_ROWS
    block = min(_COLUMNS, triton.next_power_of_2(width))
    return {"F": width, "ROWS": rows, "BLOCK": block, "HAS_BIAS": has_bias, **settings}


def forward(
    hidden: Tensor, probs: Tensor, ends: Tensor, settings: dict[str, Any],
    bias: Tensor | None = None, groups: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(hidden) * probs``: ``[B, F]``; the rows beyond the last end are not written.

    Args:
        hidden: ``[B, 2F]`` or ``[B, F]``, bf16, fp16 or fp32, on a CUDA device (or on the CPU in
            Triton's interpreter).
        probs: fp32 ``[B]``.
        ends: int32 ``[G]``; only the last is read.
        settings: as in :func:`constants`.
        bias: fp32 ``[G, 2F]`` or ``[G, F]``, contiguous; added to the rows first.
        groups: int32 ``[B]``, the group of each row; with a bias.
    """
    rows, width = hidden.shape[0], hidden.shape[1] // (2 if settings["IS_GATED"] else 1)
    output = hidden.new_empty(rows, width)
    if output.numel() == 0:
        return output
    chosen = constants(width, settings, is_backward=False, has_bias=bias is not None)
    grid = (triton.cdiv(rows, chosen["ROWS"]), triton.cdiv(width, chosen["BLOCK"]))
    with torch.cuda.device_of(hidden):
        _forward_kernel[grid](
            hidden.contiguous(), probs.contiguous(), ends[-1:], bias, groups, output, rows, **chosen
        )
    return output


def packed(
    hidden: Tensor, probs: Tensor, ends: Tensor, values: Tensor, scales: Tensor,
    block: int | None, settings: dict[str, Any], bias: Tensor | None = None,
    groups: Tensor | None = None,
) -> None:  # fmt: skip
    """:func:`forward`, rounded to the dtype of ``hidden`` and then quantised by row.

    Args:
        hidden: as the others in :func:`forward`.
        probs: likewise.
        ends: likewise.
        values: e4m3 ``[B, F]``, each row contiguous; is written.
        scales: fp32 ``[B]``, in blocks E8M0 ``[B, F / block]``, likewise.
        block: elements that share a scale, a divisor of 128; None for all.
        settings: as in :func:`constants`.
        bias: as in :func:`forward`.
        groups: likewise.
    """
    rows, width = values.shape
    if values.numel() == 0:
        return
    chosen = constants(width, settings, is_backward=True, has_bias=bias is not None)
    chosen["SCALE_BLOCK"], scales = block, scales.view(torch.uint8) if block else scales
    with torch.cuda.device_of(hidden):
        _packed_kernel[(triton.cdiv(rows, chosen["ROWS"]),)](
            hidden.contiguous(), probs.contiguous(), ends[-1:], bias, groups, values, scales, rows,
            values.stride(0), scales.stride(0), **chosen,
        )  # fmt: skip


def backward(
    hidden: Tensor, probs: Tensor, ends: Tensor, grad: Tensor, settings: dict[str, Any],
    bias: Tensor | None = None, groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of ``hidden`` and of ``probs``, from that of the output, ``[B, F]``.

    That of the bias is the sum of the former over the rows of each group.
    """
    rows, width = grad.shape
    to_hidden, to_probs = hidden.new_empty(hidden.shape), probs.new_empty(rows)
    if grad.numel() == 0:
        return to_hidden, to_probs.zero_()
    chosen = constants(width, settings, is_backward=True, has_bias=bias is not None)
    with torch.cuda.device_of(hidden):
        _backward_kernel[(triton.cdiv(rows, chosen["ROWS"]),)](
            hidden.contiguous(), probs.contiguous(), ends[-1:], bias, groups, grad.contiguous(),
            to_hidden, to_probs, rows, **chosen,
        )  # fmt: skip
    return to_hidden, to_probs
