"""Differentiable collectives with static shapes, on any backend and on meta tensors.

Megatron's own mappings allocate on ``torch.cuda.current_device()``, whatever the input's device.
With one rank nothing is called and nothing copied.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup
_Op = Callable[[Tensor, Group], Tensor]


def gather(tensor: Tensor, group: Group) -> Tensor:
    """:func:`all_gather` without gradients."""
    if group.size() == 1:
        return tensor
    output = tensor.new_empty(group.size() * tensor.shape[0], *tensor.shape[1:])
    dist.all_gather_into_tensor(output, tensor.contiguous(), group=group)
    return output


def _reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    output = tensor.new_empty(tensor.shape[0] // group.size(), *tensor.shape[1:])
    dist.reduce_scatter_tensor(output, tensor.contiguous(), group=group)
    return output


def exchange(tensor: Tensor, group: Group, peers: range | None = None) -> Tensor:
    """All-to-all of equal parts, without gradients: part r of ``[R * n, ...]`` goes to rank r.

    Args:
        tensor: ``[R * n, ...]``, or with ``peers`` as many parts as these are.
        group: R ranks.
        peers: those that take part with this rank; each of them names the same. None for all.
    """
    number = group.size() if peers is None else len(peers)
    if number == 1:
        return tensor
    output, splits = torch.empty_like(tensor), None
    if number < group.size():
        part = len(tensor) // number
        splits = [part if peers is None or r in peers else 0 for r in range(group.size())]
    dist.all_to_all_single(output, tensor.contiguous(), splits, splits, group=group)
    return output


class _Collective(torch.autograd.Function):
    """A collective in forward, its adjoint in backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, there: _Op, back: _Op) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(tensor, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None


def _collective(tensor: Tensor, group: Group, there: _Op, back: _Op) -> Tensor:
    return tensor if group.size() == 1 else _Collective.apply(tensor, group, there, back)


def all_gather(tensor: Tensor, group: Group) -> Tensor:
    """``[n, ...]`` of every rank, in rank order: ``[R * n, ...]``. Backward reduce-scatters."""
    return _collective(tensor, group, gather, _reduce_scatter)


def reduce_scatter(tensor: Tensor, group: Group) -> Tensor:
    """Sum ``[R * n, ...]`` over the ranks and keep this rank's ``[n, ...]``. Backward gathers."""
    return _collective(tensor, group, _reduce_scatter, gather)


def all_to_all(tensor: Tensor, group: Group) -> Tensor:
    """Exchange equal parts: ``[R * n, ...]``, part r goes to rank r. Backward is the same."""
    return _collective(tensor, group, exchange, exchange)
