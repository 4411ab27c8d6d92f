"""Stand-ins on fake tensors: shapes only, in place of values or of many small operators.

Import it after the CPU backend is enabled: it imports Megatron.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, override
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.optimizer import optimizer
from torch import Tensor

from megatron_echo.dispatch import dispatcher
from megatron_echo.dispatch.dispatcher import EchoTokenDispatcher
from megatron_echo.dispatch.transports import weights
from megatron_echo.dispatch.transports.automatic import ENGINES, Topology, Transports, node_of
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


def topology_of(group: dist.ProcessGroup, ranks_per_node: int) -> Topology:
    """In place of ``Topology.of``: GPUs that reach each other's memory on machines of so many."""
    machines = [rank // ranks_per_node for rank in dist.get_process_group_ranks(group)]
    has_nccl = len(machines) > 1
    return Topology(len(machines), has_nccl, node_of(machines), has_peer_memory=has_nccl)


def _without_peers(name: str, like: str) -> Any:
    """Let a method of the dispatcher make what is like a transport that needs peers."""
    make, needing = getattr(EchoTokenDispatcher, name), (*ENGINES, "symmetric_memory")

    def made(own: Any, way: str) -> Any:
        transport = make(own, like if way in needing else way)
        if like == "p2p" and way in needing:
            transport.is_hidden = not own._overlaps  # gradients live as long
        return transport

    return mock.patch.object(EchoTokenDispatcher, name, made)


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
def stand_ins(flash_attention: bool, ranks_per_node: int) -> Iterator[dict[str, None]]:
    """Use them inside the block, on machines of so many GPUs.

    Attention only where it is to be without scores. Gives what was said of transports so far.
    """
    conversions = {"bfloat16": torch.bfloat16, "half": torch.float16}
    said: dict[str, None] = {}

    def note(ways: Transports, tokens: int, slots: int) -> None:
        if ways.clone_group.size() > 1:
            said[ways.line(tokens, slots)] = None

    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (HostCopy, "read", one_slot_in_use),
            (weights, "_complete", lambda _: None),
            (dispatcher, "planner_backend", lambda _: no_plan),
            (Topology, "of", lambda group, _: topology_of(group, ranks_per_node)),
            (Transports, "announce", note),
            *([(LocalCoreAttention, "forward", attend)] if flash_attention else []),
            # Reads values on the host, and needs next to no memory.
            (optimizer, "get_grad_norm_fp32", lambda *_, **__: 0.0),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(_without_peers("_make_transport", "all_gather"))
        stack.enter_context(_without_peers("_make_weight_transport", "p2p"))
        stack.enter_context(mock.patch.dict(GROUPED_GEMMS, torch=ShapesGemm()))
        for name, dtype in conversions.items():
            converted = functools.partialmethod(_convert, dtype)
            stack.enter_context(mock.patch.object(torch.nn.Module, name, converted))
        yield said
