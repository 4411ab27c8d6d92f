"""Matrix products of grouped rows with a stack of weights, with offsets on the device."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, override

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from megatron_echo.dispatch.clones_of_call import as_it_is_now
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.environment import on_gpu
from megatron_echo.experts.delayed import DelayedGradients, now_or_later

_ROW_BYTES = 16
_MOST_GROUPS = 1023  # of grouped_mm on CUDA


def grouped_product_reference(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``rows[g] @ weights[g]`` for each group of rows, in any dtype; other rows are zero.

    Args:
        rows: ``[B, i]``.
        weights: ``[G, i, o]``.
        ends: int32 ``[G]``, end offset of each group.
    """
    output = rows.new_zeros(rows.shape[0], weights.shape[2])
    for in_group, weight in zip(_masks(ends, rows.shape[0]), weights, strict=True):
        product = torch.where(in_group, rows, 0) @ weight
        output = torch.where(in_group, product, output)
    return output


def grouped_outer_reference(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``left[g].T @ right[g]`` for each group of rows, in any dtype: ``[G, o, i]``."""
    return torch.stack(
        [
            torch.where(in_group, left, 0).t() @ torch.where(in_group, right, 0)
            for in_group in _masks(ends, left.shape[0])
        ]
    )


def _masks(ends: Tensor, rows: int) -> list[Tensor]:
    row = torch.arange(rows, device=ends.device)[:, None]
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    return [
        (row >= start) & (row < end)
        for start, end in zip(starts.unbind(), ends.unbind(), strict=True)
    ]


def has_grouped_mm(
    capability: tuple[int, int], dtype: torch.dtype, widths: Iterable[int], groups: int
) -> bool:
    """Whether ``grouped_mm`` has a kernel on a GPU that does not read the offsets on the host.

    Args:
        capability: of the device.
        dtype: of rows and weights.
        widths: of rows and results. Rows must be multiples of 16 bytes.
        groups: m + S.
    """
    is_fast = capability[0] in (9, 10) and dtype == torch.bfloat16 and groups <= _MOST_GROUPS
    return is_fast and _are_aligned(dtype, widths)


def _are_aligned(dtype: torch.dtype, widths: Iterable[int]) -> bool:
    return all(width * dtype.itemsize % _ROW_BYTES == 0 for width in widths)


def _takes_grouped_mm(rows: Tensor, groups: int, *widths: int) -> bool:
    if on_gpu(rows):
        capability = torch.cuda.get_device_capability(rows.device)
        return has_grouped_mm(capability, rows.dtype, widths, groups)
    if rows.is_cpu and not isinstance(rows, FakeTensor):
        return rows.dtype != torch.float64 and _are_aligned(rows.dtype, widths)
    # All that the operator's shape rule knows.
    return rows.dtype == torch.bfloat16 and _are_aligned(rows.dtype, widths)


def grouped_product(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """``rows[g] @ weights[g]``; see :func:`grouped_product_reference`, without its zeros."""
    if _takes_grouped_mm(rows, *weights.shape):
        return grouped_mm(rows, weights, offs=ends)
    return grouped_product_reference(rows, weights, ends)


def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """``left[g].T @ right[g]``; see :func:`grouped_outer_reference`."""
    if _takes_grouped_mm(left, len(ends), left.shape[1], right.shape[1]):
        outer = grouped_mm(left.t(), right, offs=ends)
        if on_gpu(left) and torch.cuda.get_device_capability(left.device)[0] == 10:
            # Groups without rows are not zero there: github.com/pytorch/pytorch/issues/172439
            rows = torch.diff(ends, prepend=ends.new_zeros(1))
            outer.masked_fill_((rows == 0)[:, None, None], 0)
        return outer
    return grouped_outer_reference(left, right, ends)


def _is_cast_first(rows: Tensor) -> bool:
    """CUDA has no fast grouped product of fp32: there each part of a gradient is rounded."""
    return rows.is_cpu


class GroupedGemm(ABC):
    """What computes the grouped products of a layer; keeps no state."""

    @abstractmethod
    def stack_size(self, weight: Tensor, slots: int) -> int:
        """Matrices that the pool must hold for S clones beside home experts ``[m, out, in]``."""

    @abstractmethod
    def parts_dtype(self, rows: Tensor) -> torch.dtype:
        """In what a weight gradient comes that is to be summed: wide, where that is to be had."""

    @abstractmethod
    def product(
        self, rows: Tensor, weight: Tensor, stack: Tensor | None, ends: Tensor, *, transpose: bool
    ) -> Tensor:
        """``rows[g] @ w[g].T`` with ``transpose``, else ``rows[g] @ w[g]``, for each group of rows.

        Args:
            rows: ``[B, i]``.
            weight: ``[m, out, in]``, the home experts.
            stack: the pool's buffer, the clones in its last S matrices; None if there are none.
            ends: int32 ``[m + S]``, end offset of each group, on the device.
            transpose: multiply with the transposed weights, as a linear layer does.

        Returns:
            ``[B, out]``, or ``[B, in]`` without ``transpose``; anything in the rows beyond the
            last end.
        """

    @abstractmethod
    def outer(self, left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """``left[g].T @ right[g]``, a weight gradient, for each group of rows.

        Args:
            left: ``[B, out]``.
            right: ``[B, in]``.
            ends: int32 ``[G]``.
            dtype: of the result, not narrower than that of the rows.

        Returns:
            ``[G, out, in]``; zeros for a group without rows.
        """


class TorchGemm(GroupedGemm):
    """torch's ``grouped_mm``, which wants one stack.

    On a GPU it multiplies the rows of the home experts, and this package's kernel those of the
    clones. Elsewhere home experts are copied into the pool.
    """

    @override
    def stack_size(self, weight: Tensor, slots: int) -> int:
        return slots if _has_kernel_for_clones(weight) else len(weight) + slots

    @override
    def parts_dtype(self, rows: Tensor) -> torch.dtype:
        return wide_dtype(rows.dtype) if _is_cast_first(rows) else rows.dtype

    @override
    def product(
        self, rows: Tensor, weight: Tensor, stack: Tensor | None, ends: Tensor, *, transpose: bool
    ) -> Tensor:
        home = len(weight)
        if stack is not None and len(stack) < len(ends):
            output = grouped_product(rows, weight.mT if transpose else weight, ends[:home])
            from megatron_echo.experts import kernels

            return kernels.product(rows, weight, stack, ends, transpose, clones_into=output)
        if stack is not None:
            stack[:home].copy_(weight)
            weight = stack
        return grouped_product(rows, weight.mT if transpose else weight, ends)

    @override
    def outer(self, left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        if _is_cast_first(left):
            left, right = left.to(dtype), right.to(dtype)
        return grouped_outer(left, right, ends).to(dtype)


def _has_kernel_for_clones(weight: Tensor) -> bool:
    return on_gpu(weight) and weight.dtype != torch.float64


def kept_rows(rows: Tensor) -> Tensor | None:
    """What a product saves of its rows: nothing where the node that made them makes them again.

    Such a node has ``output_again(node)``: the same bits, from what the node saved for itself.
    """
    return None if hasattr(rows.grad_fn, "output_again") else rows


def rows_again(ctx: Any, kept: Tensor | None) -> Tensor:
    """The rows in backward, from what :func:`kept_rows` gave; they are the node's first input."""
    if kept is not None:
        return kept
    maker = ctx.next_functions[0][0]
    return maker.output_again(maker)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, gemm: GroupedGemm,
        later: DelayedGradients | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(kept_rows(rows), weight, ends)
        ctx.gemm, ctx.later = gemm, later
        return gemm.product(rows, weight, None, ends, transpose=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        weight, grad = as_it_is_now(weight), grad.contiguous()
        to_rows = to_weight = None
        if ctx.needs_input_grad[0]:
            to_rows = ctx.gemm.product(grad, weight, None, ends, transpose=False)
        if ctx.needs_input_grad[1] or ctx.later is not None:
            rows = rows_again(ctx, rows)
            make = functools.partial(ctx.gemm.outer, grad, rows, ends, weight.dtype)
            to_weight = now_or_later(ctx.later, make)
        return to_rows, to_weight, None, None, None


def grouped_linear(
    rows: Tensor, weights: Tensor, ends: Tensor, gemm: GroupedGemm | None = None,
    later: DelayedGradients | None = None,
) -> Tensor:  # fmt: skip
    """``rows[g] @ weights[g].T`` for each group of rows.

    Rows beyond the last end are neither read nor, with a kernel, written: the output holds
    anything there. The same is true of the gradient with respect to ``rows``. The gradient of a
    group without rows is zero.

    Args:
        rows: ``[B, i]``.
        weights: ``[G, o, i]``, the same dtype.
        ends: int32 ``[G]``, end offset of each group, not above B, on the device.
        gemm: what computes the products, by default torch's.
        later: where the gradient of ``weights`` waits; None computes it with the others.

    Returns:
        ``[B, o]``.
    """
    return _GroupedLinear.apply(rows, weights, ends, gemm or TorchGemm(), later)
