"""Stand-ins on fake tensors: shapes only, in place of values or of many small operators.

Import it after the CPU backend is enabled: it imports Megatron.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, override
from unittest import mock

import torch
from megatron.core.optimizer import optimizer
from torch import Tensor

from megatron_echo.dispatch.dispatcher import EchoTokenDispatcher
from megatron_echo.experts.grouped_linear import TorchGemm
from megatron_echo.experts.projection import GROUPED_GEMMS
from megatron_echo.host_copy import HostCopy
from megatron_echo.local_modules import LocalCoreAttention
from megatron_echo.planner import ClonePlan


class FlashAttentionShapes(torch.autograd.Function):
    """Attention as a flash kernel does it; nothing is computed, results are uninitialised.

    Queries, keys, values, output and a log-sum a row are kept for backward; never the scores.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """From ``[s, b, n, k]``, ``[s, b, g, k]`` and ``[s, b, g, v]`` to ``[s, b, n * v]``."""
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


def no_plan(counts: Tensor, num_slots: int, *_: Any) -> ClonePlan:
    """In place of ``plan_clones``."""
    ranks, experts = counts.shape
    per_rank = counts.new_zeros(ranks)
    slots, allocation = counts.new_zeros(ranks, num_slots), counts.new_zeros(experts, ranks)
    return ClonePlan(counts, slots, allocation, per_rank, per_rank, counts.new_zeros(()))


def no_plans(model: Sequence[torch.nn.Module]) -> None:
    """Let the dispatchers of model chunks plan by :func:`no_plan`."""
    for module in (module for chunk in model for module in chunk.modules()):
        if isinstance(dispatcher := getattr(module, "token_dispatcher", None), EchoTokenDispatcher):
            dispatcher.planner = no_plan


def one_slot_in_use(plan: HostCopy) -> list[list[int]]:
    """In place of ``HostCopy.read``: on each rank a clone of the first expert in the first slot.

    Its home is the estimated rank, which gets as many gradients at once as there can be; slots come
    one after another.
    """
    ranks, slots = plan._host.shape
    return [[0] + [-1] * (slots - 1)] * ranks


class ShapesGemm(TorchGemm):
    """Torch's, but that no weight gradient is computed."""

    @override
    def outer(self, left: Tensor, right: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
        left, right = left.to(dtype), right.to(dtype)  # as on a CPU
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


@contextlib.contextmanager
def stand_ins(flash_attention: bool) -> Iterator[None]:
    """Use them inside the block; attention only where it is to be without scores."""
    conversions = {"bfloat16": torch.bfloat16, "half": torch.float16}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(GROUPED_GEMMS, torch=ShapesGemm()))
        stack.enter_context(mock.patch.object(HostCopy, "read", one_slot_in_use))
        if flash_attention:
            stack.enter_context(mock.patch.object(LocalCoreAttention, "forward", attend))
        for name, dtype in conversions.items():
            converted = functools.partialmethod(_convert, dtype)
            stack.enter_context(mock.patch.object(torch.nn.Module, name, converted))
        # Reads values on the host, and needs next to no memory.
        stack.enter_context(mock.patch.object(optimizer, "get_grad_norm_fp32", return_value=0.0))
        yield
