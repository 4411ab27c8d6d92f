"""Biases of experts: those of clones brought beside their weights, and what is added to rows.

A stack of biases is ``[G, out]``, one for each home expert and slot, in the wide dtype: so parts of
a gradient are summed wide, over the rows of a group and over the clones of an expert, and rounded
once, as those of weights are.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.clones_of_call import Clones
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.environment import on_gpu

_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def row_groups(ends: Tensor, rows: int) -> Tensor:
    """The group of each row, int32 ``[B]``; G in rows beyond the last end.

    Args:
        ends: int32 ``[G]``, end offset of each group, on the device.
        rows: B.
    """
    row = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    return torch.bucketize(row, ends, right=True, out_int32=True)


def bias_of_rows(bias: Tensor, groups: Tensor) -> Tensor:
    """``[G, out]`` and ``[B]`` to ``[B, out]``; some group's in rows of none."""
    return bias.index_select(0, groups.clamp(max=len(bias) - 1))


def group_sums(
    rows: Tensor, groups: Tensor, ends: Tensor, like: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The gradient of a stack of biases: each group's rows, weighed and summed in a fixed order.

    Args:
        rows: ``[B, out]``; those beyond the last end are not read.
        groups: int32 ``[B]``, of :func:`row_groups`.
        ends: int32 ``[G]``.
        like: ``[G, out]``, the stack; the result has its dtype.
        weights: ``[B]``; 1 by default.
    """
    if on_gpu(rows):
        from megatron_echo.experts import bias_kernels

        return bias_kernels.group_sums(rows, ends, like, weights)
    terms = rows.to(like.dtype)
    if weights is not None:
        terms = terms * weights[:, None].to(like.dtype)
    sums = like.new_zeros(len(ends) + 1, rows.shape[1])  # the last is that of no group
    return sums.index_add_(0, groups, terms)[:-1]


class _ClonedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, clones: Clones) -> Tensor:
        ctx.save_for_backward(clones.slot_expert)
        ctx.clones, ctx.dtype = clones, bias.dtype
        slots = bias.new_empty(clones.slots, 1, bias.shape[1])
        moved = bias[:, None], clones.slot_expert, clones.announced, slots
        clones.run(lambda: clones.transport.push(*moved)).wait()
        return torch.cat((bias, slots[:, 0])).to(wide_dtype(bias.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        clones = ctx.clones.given_back(*ctx.saved_tensors)
        parts = grad[:, None].clone(memory_format=torch.contiguous_format)
        moved = parts, clones.slot_expert, clones.announced
        home = clones.run(lambda: clones.transport.bring_home(*moved)).wait()
        return home[:, 0].to(ctx.dtype), None


def bias_stack(bias: Tensor, clones: Clones | None) -> Tensor:
    """The biases of home experts, and behind them those of the slots, in the wide dtype.

    With clones all ranks of the group must call it together, in forward and in backward, as
    :func:`~megatron_echo.experts.clones.cloned_linear`. They travel like matrices of one row, with
    an exchange of their own, which is a millionth of that of the weights or so; they are not
    brought again in backward.

    Args:
        bias: ``[m, out]``, the home experts' parameter.
        clones: which experts sit in the slots.

    Returns:
        ``[m, out]``, with clones ``[m + S, out]``.
    """
    if clones is None:
        return bias.to(wide_dtype(bias.dtype))
    return _ClonedBias.apply(bias, clones)


class _WithWeightedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, bias: Tensor, probs: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(bias, probs, ends)
        groups = row_groups(ends, len(rows))
        if _takes_kernel(rows, probs):
            from megatron_echo.experts import bias_kernels

            return bias_kernels.with_weighted_bias(rows, bias, groups, probs, ends)
        return (rows + bias_of_rows(bias, groups) * probs[:, None]).to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        bias, probs, ends = ctx.saved_tensors
        groups = row_groups(ends, len(grad))
        if _takes_kernel(grad, probs):
            from megatron_echo.experts import bias_kernels

            to_probs = bias_kernels.bias_products(grad, bias, groups, ends)
        else:
            to_probs = (grad * bias_of_rows(bias, groups)).sum(1).to(probs.dtype)
        return grad, group_sums(grad, groups, ends, bias, probs), to_probs, None


def _takes_kernel(rows: Tensor, probs: Tensor) -> bool:
    return on_gpu(rows) and rows.dtype in _KERNEL_DTYPES and probs.dtype == torch.float32


def with_weighted_bias(rows: Tensor, bias: Tensor, probs: Tensor, ends: Tensor) -> Tensor:
    """``rows + bias * probs``: the router's probability weighs the second projection's bias too.

    Added wide and rounded once. On a GPU it is one kernel forward and two backward.

    Args:
        rows: ``[B, out]``.
        bias: ``[G, out]``, of :func:`bias_stack`.
        probs: ``[B]``.
        ends: int32 ``[G]``, end offset of each group of rows, on the device.

    Returns:
        ``[B, out]`` in the rows' dtype; anything in the rows beyond the last end.
    """
    return _WithWeightedBias.apply(rows, bias, probs, ends)
