"""Stand-ins on fake tensors: shapes only, in place of values or of many small operators."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # they import Megatron, which has to wait for the CPU backend
    from megatron_echo.host_copy import HostCopy
    from megatron_echo.planner import ClonePlan


class FlashAttentionShapes(torch.autograd.Function):
    """Attention as a flash kernel does it.

    Queries, keys, values, output and a log-sum a row are kept for backward; never the scores.

    Nothing is computed: results are uninitialised.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend.

        Args:
            ctx: autograd's.
            query: ``[s, b, n, k]``.
            key: ``[s, b, g, k]``.
            value: ``[s, b, g, v]``.

        Returns:
            ``[s, b, n * v]``.
        """
        rows, batch, heads, _ = query.shape
        output = query.new_empty(rows, batch, heads * value.size(3))
        log_sums = query.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        """The three gradients."""
        return tuple(torch.empty_like(kept) for kept in ctx.saved_tensors[:3])


def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any) -> Tensor:
    """In place of ``forward`` of a core attention module, whose mask and dropout are not needed."""
    return FlashAttentionShapes.apply(query, key, value)


def no_plan(counts: Tensor, num_slots: int, *_: Any) -> "ClonePlan":
    """In place of ``plan_clones``."""
    from megatron_echo.planner import ClonePlan

    ranks, experts = counts.shape
    per_rank = counts.new_zeros(ranks)
    slots, allocation = counts.new_zeros(ranks, num_slots), counts.new_zeros(experts, ranks)
    return ClonePlan(counts, slots, allocation, per_rank, per_rank, counts.new_zeros(()))


def one_slot_in_use(plan: "HostCopy") -> list[list[int]]:
    """In place of ``HostCopy.read``: on each rank a clone of the first expert in the first slot.

    Its home is the estimated rank, which gets as many gradients at once as there can be; slots come
    one after another.
    """
    ranks, slots = plan._host.shape
    return [[0] + [-1] * (slots - 1)] * ranks


def outer_product(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """In place of ``grouped_outer``: ``[G, o, i]`` of ``[B, o]`` and ``[B, i]``."""
    return left.new_empty(len(ends), left.shape[1], right.shape[1])


def _convert(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """``module.to(dtype)``, which refuses to swap fake parameters that something refers to."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                converted = torch.nn.Parameter(parameter.detach().to(dtype))
                converted.__dict__.update(parameter.__dict__)
                part._parameters[name] = converted
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                part._buffers[name] = buffer.to(dtype)
    return module


def to_bfloat16(module: torch.nn.Module) -> torch.nn.Module:
    """In place of ``Module.bfloat16``."""
    return _convert(module, torch.bfloat16)


def to_half(module: torch.nn.Module) -> torch.nn.Module:
    """In place of ``Module.half``."""
    return _convert(module, torch.float16)
