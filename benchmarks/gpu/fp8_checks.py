"""What ``kernel_checks.py`` compares in FP8: operands, the activation's rows, and the products."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timing import device
from torch import Tensor

from megatron_echo.environment import on_gpu
from megatron_echo.experts import fp8
from megatron_echo.experts.activation import (
    ExpertActivation,
    packed_activation,
    weighted_activation,
)
from megatron_echo.experts.fp8 import Quantised


def _bits(operands: Sequence[Quantised]) -> list[Tensor]:
    return [t for o in operands for t in (o.values.view(torch.uint8), o.scales)]


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    """Of many magnitudes."""
    size = torch.randn(shape, device=device()).mul_(2).exp_()
    return size.mul_(torch.randn(shape, device=device())).to(dtype)


def operand_inputs(out: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in groups of any size, which fill the buffer, and weights."""
    rows = 3 * out // 2
    ends = torch.tensor([rows // 7, rows // 7, rows], dtype=torch.int32, device=device())
    return _draw(dtype, rows, width), ends, _draw(dtype, 3, out, width)


def quantise(rows: Tensor, ends: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """Operands of all products, as bytes and scales."""
    by_row = fp8.quantise_rows(rows, ends)
    operands = [by_row, *(fp8.quantise_columns(each, ends) for each in (rows, by_row))]
    for is_transposed in (False, True):
        shape = weights.mT.shape if is_transposed else weights.shape
        values = torch.empty(shape, dtype=fp8.FP8, device=weights.device)
        stack = Quantised(values, torch.empty(shape[:2], device=weights.device))
        fp8.quantise_matrices(weights, stack, is_transposed=is_transposed)
        operands.append(stack)
    return _bits(operands)


def quantise_reference(rows: Tensor, ends: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """Of :func:`quantise`, on the CPU."""
    return quantise(rows.cpu(), ends.cpu(), weights.cpu())


def activation_inputs(
    rows: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, ExpertActivation]:
    """Rows of which an eighth is behind the last group."""
    ends = torch.tensor([0, rows - rows // 8], dtype=torch.int32, device=device())
    hidden, probs = _draw(dtype, rows, 2 * width), torch.rand(rows, device=device())
    return hidden, probs, ends, ExpertActivation(F.silu, True)


def activate(
    hidden: Tensor, probs: Tensor, ends: Tensor, kind: ExpertActivation
) -> Sequence[Tensor]:
    """The activation's rows in FP8, by one kernel."""
    return _bits([fp8.unpacked(packed_activation(hidden, probs, ends, kind)[1])])


def activate_reference(
    hidden: Tensor, probs: Tensor, ends: Tensor, kind: ExpertActivation
) -> Sequence[Tensor]:
    """By two."""
    rows = weighted_activation(hidden, probs, ends, kind)
    return _bits([fp8.unpacked(fp8.pack_rows(rows)[: int(ends[-1])])])


def product_inputs(
    out: int, width: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packed rows and gradients, home experts and a clone apart from them."""
    ends = torch.tensor([out // 2, out // 2, out], dtype=torch.int32, device=device()) // 16 * 16
    rows, grads = (_draw(dtype, out + 16, n) for n in (width, out))
    words = torch.empty(3, out * (width + 4) // 4, dtype=torch.int32, device=device())
    fp8.quantise_matrices(_draw(dtype, 3, out, width), _stack(words, out), is_transposed=False)
    words = words.unsqueeze(1)
    return fp8.pack_rows(rows), grads, words[:2], words[2:].clone(), ends


def _stack(words: Tensor, out: int) -> Quantised:
    values, scales = words.split((words.shape[1] - out, out), dim=1)
    return Quantised(values.view(fp8.FP8).unflatten(1, (out, -1)), scales.view(torch.float32))


def multiply(
    packed: Tensor, grads: Tensor, home: Tensor, slots: Tensor, ends: Tensor
) -> Sequence[Tensor]:
    """Forward, and gradient of the weights, by Triton's kernels; tests run them without a GPU."""
    if not on_gpu(packed):
        return _multiplied(packed, grads, home, slots, ends)
    from megatron_echo.experts import kernels

    out = grads.shape[1]
    both = [fp8.quantise_columns(each, ends) for each in (grads, fp8.unpacked(packed))]
    operands = [(each.values, each.scales) for each in both]
    return (
        kernels.scaled_product(packed, home, slots, ends, out, torch.float32),
        kernels.scaled_outer(*operands, ends, torch.float32),
    )


def multiply_reference(
    packed: Tensor, grads: Tensor, home: Tensor, slots: Tensor, ends: Tensor
) -> Sequence[Tensor]:
    """On the CPU."""
    product, gradient = _multiplied(*(t.cpu() for t in (packed, grads, home, slots, ends)))
    return product[: int(ends[-1])], gradient


def _multiplied(
    packed: Tensor, grads: Tensor, home: Tensor, slots: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    weights = _stack(torch.cat((home, slots)).squeeze(1), grads.shape[1])
    rows = fp8.unpacked(packed)
    both = [fp8.quantise_columns(each, ends) for each in (grads, rows)]
    product = fp8.scaled_product(rows, weights, ends, torch.float32)
    return product, fp8.scaled_outer(*both, ends, torch.float32)


BF16, FP32 = torch.bfloat16, torch.float32
FP8_CHECKS: tuple[tuple[Any, ...], ...] = (
    ("operands, bf16", operand_inputs, (4096, 7168), BF16, quantise, quantise_reference, 0.0),
    ("operands, fp32", operand_inputs, (1280, 768), FP32, quantise, quantise_reference, 0.0),
    ("activation", activation_inputs, (4096, 2048), BF16, activate, activate_reference, 0.0),
    ("products", product_inputs, (2048, 4096), BF16, multiply, multiply_reference, 1e-4),
)
"""Name, inputs, their sizes, which a dry run divides, kernel, reference and limit."""
