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


def exchange(tensor: Tensor, group: Group) -> Tensor:
    """:func:`all_to_all` without gradients."""
    if group.size() == 1:
        return tensor
    output = torch.empty_like(tensor)
    dist.all_to_all_single(output, tensor.contiguous(), group=group)
    return output


def _bound_device() -> Any:
    """Of the whole job's group, None where it has none."""
    return getattr(dist.group.WORLD, "bound_device_id", None)


def part_of(group: Group, size: int) -> Group:
    """Of so many consecutive ranks of a group, those among which this one is; its timeout too.

    All ranks of the group call it together, in the same order as other groups are made. No others
    have to: stages of a pipeline may have no layer that wants it.

    Args:
        group: R ranks.
        size: a divisor of R.
    """
    if size == group.size():
        return group
    first = group.rank() // size * size
    options = group._get_backend(group._device_types[0]).options
    timeout = None if options is None else options._timeout
    if _bound_device() is not None:  # groups are split off, by all ranks of their parent
        numbers = list(range(group.size()))
        parts = [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]
        part = dist.split_group(group, parts, timeout)
    else:
        ranks = dist.get_process_group_ranks(group)[first : first + size]
        part = dist.new_group(ranks, timeout, use_local_synchronization=True)
    assert part is not None
    return part


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
