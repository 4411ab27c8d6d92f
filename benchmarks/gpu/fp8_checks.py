"""What ``kernel_checks.py`` compares in FP8: operands, the activation's rows, and the products."""

from collections.abc import Sequence
from functools import partial
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
from megatron_echo.precision import FORMATS, Fp8Format

ROWWISE, MXFP8, BLOCKWISE = FORMATS.values()


def _bits(operands: Sequence[Quantised]) -> list[Tensor]:
    return [t for o in operands for t in (o.values.view(torch.uint8), o.scales.float())]


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    """Of many magnitudes."""
    size = torch.randn(shape, device=device()).mul_(2).exp_()
    return size.mul_(torch.randn(shape, device=device())).to(dtype)


def _aligned(form: Fp8Format, *sizes: int) -> list[int]:
    """Up to the next multiple of a block."""
    return [-(-size // form.alignment) * form.alignment for size in sizes]


def operand_inputs(
    form: Fp8Format, out: int, width: int, dtype: torch.dtype
) -> tuple[Fp8Format, Tensor, Tensor, Tensor]:
    """Rows in groups, which fill the buffer, and weights."""
    rows = 3 * out // 2
    rows, out, width, first = _aligned(form, rows, out, width, rows // 7)
    ends = torch.tensor([first, first, rows], dtype=torch.int32, device=device())
    return form, _draw(dtype, rows, width), ends, _draw(dtype, 3, out, width)


def quantise(form: Fp8Format, rows: Tensor, ends: Tensor, weights: Tensor) -> Sequence[Tensor]:
    """Operands of all products, as bytes and scales."""
    by_row = fp8.quantise_rows(rows, ends, form)
    operands = [by_row, *(fp8.quantise_columns(each, ends, form) for each in (rows, by_row))]
    for is_transposed in (False, True):
        lines = weights.mT if is_transposed else weights
        words = _words(form, *lines.shape)
        stack = _stack(words, form, *lines.shape[1:])
        fp8.quantise_matrices(weights, stack, form, is_transposed=is_transposed)
        operands.append(stack)
    return _bits(operands)


def quantise_reference(
    form: Fp8Format, rows: Tensor, ends: Tensor, weights: Tensor
) -> Sequence[Tensor]:
    """Of :func:`quantise`, on the CPU."""
    return quantise(form, rows.cpu(), ends.cpu(), weights.cpu())


def activation_inputs(
    form: Fp8Format, rows: int, width: int, dtype: torch.dtype
) -> tuple[Fp8Format, Tensor, Tensor, Tensor, ExpertActivation]:
    """Rows of which an eighth is behind the last group."""
    ends = torch.tensor([0, rows - rows // 8], dtype=torch.int32, device=device())
    (width,) = _aligned(form, width)
    hidden, probs = _draw(dtype, rows, 2 * width), torch.rand(rows, device=device())
    return form, hidden, probs, ends, ExpertActivation(F.silu, True)


def activate(
    form: Fp8Format, hidden: Tensor, probs: Tensor, ends: Tensor, kind: ExpertActivation
) -> Sequence[Tensor]:
    """The activation's rows in FP8, by one kernel."""
    return _bits([fp8.unpacked(packed_activation(hidden, probs, ends, kind, form)[1], form)])


def activate_reference(
    form: Fp8Format, hidden: Tensor, probs: Tensor, ends: Tensor, kind: ExpertActivation
) -> Sequence[Tensor]:
    """By two."""
    rows = weighted_activation(hidden, probs, ends, kind)
    return _bits([fp8.unpacked(fp8.pack_rows(rows, form)[: int(ends[-1])], form)])


def product_inputs(
    form: Fp8Format, out: int, width: int, dtype: torch.dtype
) -> tuple[Fp8Format, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packed rows and gradients, home experts and a clone apart from them."""
    unit = form.alignment
    out, width, half = _aligned(form, out, width, out // 2)
    ends = torch.tensor([half, half, out], dtype=torch.int32, device=device())
    rows, grads = (_draw(dtype, out + unit, n) for n in (width, out))
    words = _words(form, 3, out, width)
    stack = _stack(words, form, out, width)
    fp8.quantise_matrices(_draw(dtype, 3, out, width), stack, form, is_transposed=False)
    words = words.unsqueeze(1)
    return form, fp8.pack_rows(rows, form), grads, words[:2], words[2:].clone(), ends


def _words(form: Fp8Format, experts: int, out: int, width: int) -> Tensor:
    size = out * width + form.scale_bytes(width, out)
    return torch.empty(experts, size // 4, dtype=torch.int32, device=device())


def _stack(words: Tensor, form: Fp8Format, out: int, width: int) -> Quantised:
    values, scales = words[:, : out * width // 4], words[:, out * width // 4 :]
    if form.block:
        parts = out // form.lines, width // form.block
        scales = scales.view(fp8.E8M0)[:, : parts[0] * parts[1]].unflatten(1, parts)
    else:
        scales = scales[:, :out].view(torch.float32)
    return Quantised(values.view(fp8.FP8).unflatten(1, (out, width)), scales)


def multiply(
    form: Fp8Format, packed: Tensor, grads: Tensor, home: Tensor, slots: Tensor, ends: Tensor
) -> Sequence[Tensor]:
    """Forward, and gradient of the weights, by Triton's kernels; tests run them without a GPU."""
    if not on_gpu(packed):
        return _multiplied(form, packed, grads, home, slots, ends)
    from megatron_echo.experts import kernels

    out = grads.shape[1]
    both = grads, fp8.unpacked(packed, form)
    both = [fp8.quantise_columns(each, ends, form) for each in both]
    operands = [(each.values, each.scales) for each in both]
    return (
        kernels.scaled_product(packed, home, slots, ends, out, torch.float32, form),
        kernels.scaled_outer(*operands, ends, torch.float32, form),
    )


def multiply_reference(
    form: Fp8Format, packed: Tensor, grads: Tensor, home: Tensor, slots: Tensor, ends: Tensor
) -> Sequence[Tensor]:
    """On the CPU."""
    given = (t.cpu() for t in (packed, grads, home, slots, ends))
    product, gradient = _multiplied(form, *given)
    return product[: int(ends[-1])], gradient


def _multiplied(
    form: Fp8Format, packed: Tensor, grads: Tensor, home: Tensor, slots: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    rows = fp8.unpacked(packed, form)
    weights = _stack(
        torch.cat((home, slots)).squeeze(1), form, grads.shape[1], rows.values.shape[1]
    )
    both = [fp8.quantise_columns(each, ends, form) for each in (grads, rows)]
    product = fp8.scaled_product(rows, weights, ends, torch.float32)
    return product, fp8.scaled_outer(*both, ends, torch.float32)


BF16, FP32 = torch.bfloat16, torch.float32
PRODUCT_LIMIT = 5e-4
"""Tensor cores of sm_90 keep 13 bits behind the largest term of a sum of 32 products in FP8. Sums
of 128 that are added in fp32 are then 1e-4 to 2.5e-4 off; longer ones 7e-4 and more."""
FP8_CHECKS: tuple[tuple[Any, ...], ...] = tuple(
    (f"{kind}{name}", partial(inputs, form), sizes, dtype, *rest)
    for kind, form in (("", ROWWISE), ("mxfp8, ", MXFP8), ("blockwise, ", BLOCKWISE))
    for name, inputs, sizes, dtype, *rest in (
        ("operands, bf16", operand_inputs, (4096, 7168), BF16, quantise, quantise_reference, 0.0),
        ("operands, fp32", operand_inputs, (1280, 768), FP32, quantise, quantise_reference, 0.0),
        ("activation", activation_inputs, (4096, 2048), BF16, activate, activate_reference, 0.0),
        (
            "products",
            product_inputs,
            (2048, 4096),
            BF16,
            multiply,
            multiply_reference,
            PRODUCT_LIMIT,
        ),
    )
)
"""Name, inputs, their sizes, which a dry run divides, kernel, reference and limit."""
