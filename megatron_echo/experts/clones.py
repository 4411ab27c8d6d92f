"""Cloned experts: their weights brought to the slots, their gradients brought home.

The slots of all layers are one pool. A layer fills it before it computes, and again before it
computes gradients, so the memory of clones does not depend on the number of layers or of
microbatches in flight, and no slot is ever a saved tensor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.permute import wide_dtype
from megatron_echo.dispatch.reroute import Clones
from megatron_echo.dispatch.transports.collectives import exchange
from megatron_echo.experts.grouped_linear import grouped_outer, grouped_product


class WeightPool:
    """``[m + S, out, in]`` for each projection, shared by all layers: home experts, then slots.

    One object for a model, kept on its configuration: :meth:`of` finds or makes it.
    """

    def __init__(self) -> None:
        self._stacks: dict[tuple, Tensor] = {}

    @classmethod
    def of(cls, config: Any) -> "WeightPool":
        """The pool of a model, from its ``TransformerConfig``."""
        pool = getattr(config, "echo_weight_pool", None)
        if pool is None:
            pool = config.echo_weight_pool = cls()
        return pool

    def __deepcopy__(self, memo: dict) -> "WeightPool":
        return self  # Megatron copies configurations for some layers; the model stays one

    def stack(self, weight: Tensor, slots: int) -> Tensor:
        """The buffer for home weights ``[m, out, in]`` and some slots; what it holds is stale."""
        shape = (weight.shape[0] + slots, *weight.shape[1:])
        key = (shape, weight.dtype, weight.device)
        if key not in self._stacks:
            with torch.inference_mode(False):  # evaluation may come first
                self._stacks[key] = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        return self._stacks[key]

    @property
    def nbytes(self) -> int:
        """Bytes held, the copies of home weights included."""
        return sum(stack.nbytes for stack in self._stacks.values())

    @property
    def stacks(self) -> tuple[Tensor, ...]:
        """All buffers."""
        return tuple(self._stacks.values())


def push_weights(weight: Tensor, clones: Clones, stack: Tensor) -> Tensor:
    """Fill a pool's buffer: the home experts, and each slot with its expert's weights.

    One exchange a slot, of one expert for each rank: shapes do not depend on the plan, and the
    buffers are R experts, not R * S. Slots without an expert get some other expert's weights.

    Args:
        weight: ``[m, out, in]``, this rank's home experts.
        clones: the plan.
        stack: ``[m + S, out, in]``, from :meth:`WeightPool.stack`.
    """
    experts, rank = clones.experts_per_rank, clones.group.rank()
    stack[:experts].copy_(weight)
    for slot, expert in enumerate(clones.slot_expert.unbind(1)):
        wanted = (expert - rank * experts).clamp(0, experts - 1)
        received = exchange(weight.index_select(0, wanted), clones.group)
        home = (expert[rank : rank + 1] // experts).clamp_(min=0)
        stack[experts + slot] = received.index_select(0, home).squeeze(0)
    return stack


def return_gradients(grads: Tensor, clones: Clones) -> Tensor:
    """Add the gradients of clones to those of their home experts.

    Args:
        grads: ``[m + S, out, in]`` of this rank's groups, in the dtype to sum in.
        clones: the plan.

    Returns:
        ``[m, out, in]``: home part first, then clones in the order of slots and ranks. Experts
        without clones keep their bits.
    """
    experts, rank = clones.experts_per_rank, clones.group.rank()
    trash = grads.new_zeros(1, *grads.shape[1:])
    total = torch.cat((grads[:experts], trash))
    for slot, expert in enumerate(clones.slot_expert.unbind(1)):
        sent = grads[experts + slot].expand(clones.group.size(), *grads.shape[1:])
        received = exchange(sent.contiguous(), clones.group)
        local = expert - rank * experts
        mine = (local >= 0) & (local < experts)
        target = torch.where(mine, local, experts)
        for source in range(clones.group.size()):
            total.index_add_(0, target[source : source + 1], received[source : source + 1])
    return total[:experts]


class _ClonedLinear(torch.autograd.Function):
    """A grouped linear over home experts and clones; gradients are those of the home experts."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones,
        pool: WeightPool, keep: bool,
    ) -> Tensor:  # fmt: skip
        slots = clones.slot_expert.shape[1]
        stack = push_weights(weight, clones, pool.stack(weight, slots))
        kept = [stack[clones.experts_per_rank :].clone()] if keep else []
        ctx.save_for_backward(rows, weight, ends, clones.slot_expert, *kept)
        ctx.experts_per_rank, ctx.group, ctx.pool = clones.experts_per_rank, clones.group, pool
        return grouped_product(rows, stack.transpose(1, 2), ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends, slot_expert, *kept = ctx.saved_tensors
        clones = Clones(slot_expert, ctx.experts_per_rank, ctx.group)
        stack = ctx.pool.stack(weight, slot_expert.shape[1])
        if kept:
            stack[: clones.experts_per_rank].copy_(weight)
            stack[clones.experts_per_rank :].copy_(kept[0])
        else:
            push_weights(weight, clones, stack)
        grad = grad.contiguous()
        to_rows = grouped_product(grad, stack, ends) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            wide = wide_dtype(weight.dtype)
            if rows.is_cpu:  # CUDA has no fast grouped product of fp32: there each part is rounded
                grad, rows = grad.to(wide), rows.to(wide)
            parts = grouped_outer(grad, rows, ends).to(wide)
            to_weight = return_gradients(parts, clones).to(weight.dtype)
        return to_rows, to_weight, None, None, None, None


def cloned_linear(
    rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones, pool: WeightPool, keep: bool = False
) -> Tensor:
    """``rows[g] @ w[g].T`` for each group of rows: the home experts', then the slots'.

    All ranks of the group must call it together, in forward and in backward. Backward returns the
    gradient of the home experts with the parts of all their clones in it, summed in fp32 (or
    wider) and cast once, as *the* gradient of ``weight``: nothing that watches the parameter sees
    a part of it.

    Args:
        rows: ``[B, in]``.
        weight: ``[m, out, in]``, the home experts' parameter.
        ends: int32 ``[m + S]``, end offset of each group.
        clones: which experts sit in the slots; used as it is now, also in backward.
        pool: where the weights are brought to.
        keep: keep a copy of the clones for backward in place of bringing them again.

    Returns:
        ``[B, out]``; anything in the rows beyond the last end.
    """
    return _ClonedLinear.apply(rows, weight, ends, clones, pool, keep)
