"""The second projection's weighted bias, and gradients of biases, in Triton.

Sums are wide, in a fixed order and without atomics. Rows beyond the last group are neither read nor
written; the ends are read on the device. Pointers are int64. Nothing is autotuned, as that would
wait for the device.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 256
_ROWS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _add_kernel(
    rows, bias, groups, probs, used, output, num_rows,
    OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    end = tl.minimum(tl.load(used), num_rows)
    row = tl.program_id(0).to(tl.int64) * ROWS
    if row >= end:
        return
    row += tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (row < end)[:, None] & (column < OUT)[None, :]
    at = row[:, None] * OUT + column[None, :]
    group = tl.load(groups + row, mask=row < end, other=0)[:, None]
    prob = tl.load(probs + row, mask=row < end, other=0.0)[:, None]
    added = tl.load(bias + group * OUT + column[None, :], mask=mask, other=0.0) * prob
    value = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32) + added
    tl.store(output + at, value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _products_kernel(
    grad, bias, groups, used, to_probs, num_rows,
    OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    end = tl.minimum(tl.load(used), num_rows)
    row = tl.program_id(0).to(tl.int64) * ROWS
    if row >= end:
        return
    row += tl.arange(0, ROWS)
    group = tl.load(groups + row, mask=row < end, other=0)[:, None]
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, OUT, BLOCK):
        column = first + tl.arange(0, BLOCK)
        mask = (row < end)[:, None] & (column < OUT)[None, :]
        value = tl.load(grad + row[:, None] * OUT + column[None, :], mask=mask, other=0.0)
        of_row = tl.load(bias + group * OUT + column[None, :], mask=mask, other=0.0)
        total += value.to(tl.float32) * of_row
    tl.store(to_probs + row, tl.sum(total, axis=1), mask=row < end)


@triton.jit(do_not_specialize=["num_rows"])
def _group_sums_kernel(
    rows, weights, ends, sums, num_rows,
    OUT: tl.constexpr, HAS_WEIGHTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    start = tl.minimum(tl.load(ends + group - 1, mask=group > 0, other=0), num_rows)
    end = tl.minimum(tl.load(ends + group), num_rows)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wide: tl.constexpr = sums.dtype.element_ty
    total = tl.zeros((ROWS, BLOCK), dtype=wide)
    for first in range(start, end, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < end)[:, None] & (column < OUT)[None, :]
        value = tl.load(rows + row[:, None] * OUT + column[None, :], mask=mask, other=0.0).to(wide)
        if HAS_WEIGHTS:
            value *= tl.load(weights + row, mask=row < end, other=0.0).to(wide)[:, None]
        total += value
    tl.store(sums + group.to(tl.int64) * OUT + column, tl.sum(total, axis=0), mask=column < OUT)


def constants(width: int) -> dict[str, Any]:
    """Compile-time arguments of all three kernels, for rows of ``width``."""
    return {"OUT": width, "ROWS": _ROWS, "BLOCK": min(_COLUMNS, triton.next_power_of_2(width))}


def with_weighted_bias(
    rows: Tensor, bias: Tensor, groups: Tensor, probs: Tensor, ends: Tensor
) -> Tensor:
    """``rows + bias * probs``: ``[B, out]``, rounded once; rows beyond the last end not written.

    Args:
        rows: ``[B, out]``, bf16, fp16 or fp32, on a CUDA device (or on the CPU in Triton's
            interpreter).
        bias: fp32 ``[G, out]``.
        groups: int32 ``[B]``, the group of each row.
        probs: fp32 ``[B]``.
        ends: int32 ``[G]``; only the last is read.
    """
    output, chosen = torch.empty_like(rows), constants(rows.shape[1])
    grid = (triton.cdiv(len(rows), _ROWS), triton.cdiv(rows.shape[1], chosen["BLOCK"]))
    if output.numel() > 0:
        with torch.cuda.device_of(rows):
            _add_kernel[grid](
                rows.contiguous(), bias.contiguous(), groups, probs.contiguous(), ends[-1:],
                output, len(rows), **chosen,
            )  # fmt: skip
    return output


def bias_products(grad: Tensor, bias: Tensor, groups: Tensor, ends: Tensor) -> Tensor:
    """Sum of each row times its group's bias, fp32 ``[B]``; arguments as above."""
    to_probs = bias.new_empty(len(grad))
    if len(grad) > 0:
        with torch.cuda.device_of(grad):
            _products_kernel[(triton.cdiv(len(grad), _ROWS),)](
                grad.contiguous(), bias.contiguous(), groups, ends[-1:], to_probs, len(grad),
                **constants(grad.shape[1]),
            )  # fmt: skip
    return to_probs


def group_sums(rows: Tensor, ends: Tensor, like: Tensor, weights: Tensor | None) -> Tensor:
    """Sums of the rows of each group, with weights where there are some.

    Args:
        rows: ``[B, out]``, any floating dtype.
        ends: int32 ``[G]``.
        like: ``[G, out]``, fp32 or fp64, of the dtype to sum in.
        weights: ``[B]``, or None.

    Returns:
        ``[G, out]``; zeros for a group without rows.
    """
    sums, chosen = torch.empty_like(like), constants(rows.shape[1])
    grid = (len(ends), triton.cdiv(rows.shape[1], chosen["BLOCK"]))
    if sums.numel() > 0:
        with torch.cuda.device_of(rows):
            _group_sums_kernel[grid](
                rows.contiguous(), weights, ends.contiguous(), sums, len(rows),
                HAS_WEIGHTS=weights is not None, **chosen,
            )  # fmt: skip
    return sums
