"""Matrix products of grouped rows with home weights and clones, each where it lies.

``grouped_mm`` wants one stack of weights, and so a copy of the home experts beside the clones.
These take the stack in two parts: ``home``, the parameter itself, and ``slots``, the pool of the
clones. Group g is ``home[g]`` for g below m, else ``slots[g - m]``.

On a GPU, and in Triton's interpreter, they are Triton kernels, for bf16, fp16 and fp32 (rounded to
tf32 where torch's own products are) of any width. Tiles are smaller where a block cannot have
144 KiB of shared memory, as it can on A100 and H100. No value is read on the host. Elsewhere they
are the products of ``grouped_linear``, on the two parts put together; its references say what the
kernels compute.
"""

from typing import override

import torch
from torch import Tensor

from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.environment import runs_triton
from megatron_echo.experts.grouped_linear import GroupedGemm, grouped_outer, grouped_product

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def pointer_product(
    rows: Tensor, home: Tensor, slots: Tensor | None, ends: Tensor, *, transpose: bool
) -> Tensor:
    """``rows[g] @ w[g].T`` with ``transpose``, else ``rows[g] @ w[g]``, for each group of rows.

    With weights ``[out, in]`` the first is a linear layer and the second its input's gradient.
    Sums are in fp32 (fp64 for fp64) and rounded once. Rows beyond the last end are
    neither read nor, by the kernel, written: the output holds anything there.

    Args:
        rows: ``[B, i]``.
        home: ``[m, out, in]``, contiguous, the same dtype.
        slots: ``[S, out, in]``, likewise; None if there are no clones.
        ends: int32 ``[m + S]``, end offset of each group, on the device, not falling.
        transpose: multiply with the transposed weights.

    Returns:
        ``[B, out]``, or ``[B, in]`` without ``transpose``.

    Raises:
        ValueError: shapes, dtypes or strides that do not fit.
    """
    _check(home, slots, ends, rows.shape[1:], home.shape[2 if transpose else 1 :][:1])
    dtypes = {tensor.dtype for tensor in (rows, home, slots) if tensor is not None}
    if len(dtypes) > 1:
        raise ValueError(f"Rows and weights are {dtypes}. Cast them to one dtype first.")
    if _takes_kernel(rows):
        from megatron_echo.experts import kernels

        return kernels.product(rows, home, slots, ends, transpose)
    weights = home if slots is None else torch.cat((home, slots))
    return grouped_product(rows, weights.mT if transpose else weights, ends)


def pointer_outer(
    left: Tensor, right: Tensor, ends: Tensor, home: Tensor, slots: Tensor | None
) -> None:
    """Write ``left[g].T @ right[g]``, a weight gradient, for each group of rows.

    Sums are in fp32 and rounded once, to the dtype of what is written: with bf16 rows an fp32
    ``slots`` gets gradients that have not been rounded. A group without rows gets zeros.

    Args:
        left: ``[B, out]``, gradients of the outputs.
        right: ``[B, in]``, inputs, the same dtype.
        ends: int32 ``[m + S]``, as in :func:`pointer_product`.
        home: ``[m, out, in]``, contiguous, any floating dtype; is overwritten.
        slots: ``[S, out, in]``, likewise, and of a dtype of its own; None if there are no clones.

    Raises:
        ValueError: shapes or strides that do not fit.
    """
    _check(home, slots, ends, left.shape[1:] + right.shape[1:], home.shape[1:])
    if _takes_kernel(left):
        from megatron_echo.experts import kernels

        kernels.outer(left, right, ends, home, slots)
        return
    wide = torch.promote_types(left.dtype, home.dtype)
    parts = grouped_outer(left.to(wide), right.to(wide), ends)
    home.copy_(parts[: len(home)])
    if slots is not None:
        slots.copy_(parts[len(home) :])


class PointerGemm(GroupedGemm):
    """The products above: the pool holds clones only."""

    @override
    def stack_size(self, weight: Tensor, slots: int) -> int:
        return slots

    @override
    def parts_dtype(self, rows: Tensor) -> torch.dtype:
        return wide_dtype(rows.dtype)

    @override
    def product(
        self, rows: Tensor, weight: Tensor, stack: Tensor | None, ends: Tensor, *, transpose: bool
    ) -> Tensor:
        return pointer_product(rows, weight, stack, ends, transpose=transpose)

    def outer(self, left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """See :class:`GroupedGemm`; sums are rounded once, to ``dtype``."""
        parts = left.new_empty(len(ends), left.shape[1], right.shape[1], dtype=dtype)
        pointer_outer(left, right, ends, parts, None)
        return parts


def _takes_kernel(rows: Tensor) -> bool:
    return runs_triton(rows) and rows.dtype in KERNEL_DTYPES


def _check(
    home: Tensor, slots: Tensor | None, ends: Tensor, given: torch.Size, wanted: torch.Size
) -> None:
    if given != wanted:
        raise ValueError(
            f"Rows of width {tuple(given)} do not fit matrices of {tuple(home.shape[1:])}. "
            "Check the order of the arguments and whether the weights are transposed."
        )
    groups = len(home) + (0 if slots is None else len(slots))
    if ends.dtype != torch.int32 or ends.shape != (groups,):
        raise ValueError(
            f"The ends are {ends.dtype} {tuple(ends.shape)}, not int32 ({groups},). "
            "Give one for each home expert and for each slot."
        )
    if slots is not None and slots.shape[1:] != home.shape[1:]:
        raise ValueError(
            f"Slots of {tuple(slots.shape[1:])} cannot hold clones of {tuple(home.shape[1:])}. "
            "Make them of the same shape."
        )
    if not (home.is_contiguous() and (slots is None or slots.is_contiguous())):
        raise ValueError(
            "Weights in another order than [expert, out, in] would have to be copied. "
            "Pass contiguous stacks."
        )
