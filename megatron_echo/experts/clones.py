"""Cloned experts: their weights brought to the slots, their gradients brought home.

The slots of all layers are one pool. A layer fills it before it computes, and again before it
computes gradients, so the memory of clones does not depend on the number of layers or of
microbatches in flight, and no slot is ever a saved tensor.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.config import clone_itemsize, expert_elements, num_clone_slots
from megatron_echo.dispatch.reroute import Clones
from megatron_echo.experts.grouped_linear import GroupedGemm
from megatron_echo.per_model import PerModel

_WIDE_BYTES = 1 << 30
_STEP = 128  # rows; a tile of the products


class WeightPool(PerModel):
    """A stack of slots ``[S, out, in]`` for each projection, shared by all layers.

    Where the grouped products want all weights in one stack, it is ``[m + S, out, in]``, with the
    home experts before the slots. Where the transport has slots of its own, they are used instead.
    """

    def __init__(self) -> None:
        self._stacks: dict[tuple, Tensor] = {}

    def stack(self, weight: Tensor, size: int) -> Tensor:
        """The buffer for so many matrices like those of ``weight``; what it holds is stale."""
        shape = (size, *weight.shape[1:])
        key = (shape, weight.dtype, weight.device)
        if key not in self._stacks:
            with torch.inference_mode(False):  # evaluation may come first
                self._stacks[key] = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        return self._stacks[key]

    @property
    def nbytes(self) -> int:
        """Bytes held, copies of home weights included."""
        return sum(stack.nbytes for stack in self._stacks.values())

    @property
    def stacks(self) -> tuple[Tensor, ...]:
        """All buffers."""
        return tuple(self._stacks.values())


def kept_clone_bytes(config: Any, microbatches: int | None) -> int:
    """About what one rank keeps at most of clones with ``--no-moe-echo-recompute-expert-dispatch``.

    S x layers x microbatches in flight x the weights of an expert, on the first pipeline stage,
    where the schedules 1F1B and interleaved 1F1B have the most in flight.

    Args:
        config: the transformer's configuration.
        microbatches: of one step, None if it changes.
    """
    stages = config.pipeline_model_parallel_size
    chunks = config.virtual_pipeline_model_parallel_size or 1
    in_flight = stages if chunks == 1 else (stages - 1) * 2 + (chunks - 1) * stages + 1
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [i % frequency == 0 for i in range(config.num_layers)]
    if microbatches is not None:
        in_flight = min(in_flight, microbatches * chunks)
    calls = math.ceil(sum(frequency) / (stages * chunks)) * in_flight
    expert = expert_elements(config) * clone_itemsize(config)
    return num_clone_slots(config) * calls * expert


class _ClonedLinear(torch.autograd.Function):
    """A grouped linear over home experts and clones; gradients are those of the home experts."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones,
        pool: WeightPool, gemm: GroupedGemm, keep: bool,
    ) -> Tensor:  # fmt: skip
        stack = _filled(pool, gemm, weight, clones)
        kept = [stack[-clones.slots :].clone()] if keep else []
        ctx.save_for_backward(rows, weight, ends, clones.slot_expert, *kept)
        ctx.pool, ctx.gemm = pool, gemm
        ctx.of_clones = (
            clones.experts_per_rank, clones.transport, clones.announced, clones.is_frozen,
        )  # fmt: skip
        return gemm.product(rows, weight, stack, ends, transpose=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends, slot_expert, *kept = ctx.saved_tensors
        clones = Clones(slot_expert, *ctx.of_clones)
        stack = _filled(ctx.pool, ctx.gemm, weight, clones, *kept)
        grad = grad.contiguous()
        to_rows = None
        if ctx.needs_input_grad[0]:
            to_rows = ctx.gemm.product(grad, weight, stack, ends, transpose=False)
        # The slots hold experts of other ranks: where those of this rank are frozen, theirs may
        # not be, and nobody here knows.
        to_weight = None
        if not clones.is_frozen:
            to_weight = _weight_gradient(grad, rows, weight, ends, clones, ctx.gemm)
        needs_weight = ctx.needs_input_grad[1]
        return to_rows, to_weight if needs_weight else None, None, None, None, None, None


def _filled(
    pool: WeightPool, gemm: GroupedGemm, weight: Tensor, clones: Clones, kept: Tensor | None = None
) -> Tensor:
    """A stack with the clones, brought or taken from ``kept``, in its last S matrices."""
    size, plan = gemm.stack_size(weight, clones.slots), (clones.slot_expert, clones.announced)
    if size == clones.slots:
        there = kept if kept is not None else clones.transport.push_in_place(weight, *plan)
        if there is not None:
            return there
    stack = pool.stack(weight, size)
    slots = stack[-clones.slots :]
    if kept is not None:
        slots.copy_(kept)
    else:
        clones.transport.push(weight, *plan, slots)
    return stack


def _weight_gradient(
    grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones, gemm: GroupedGemm
) -> Tensor:
    """The gradient of the home experts, ``[m, out, in]``: parts summed wide and rounded once.

    Where parts come wide, some rows of all matrices at a time, so that what is wide is
    ``_WIDE_BYTES`` at most, and not a second stack of all experts and slots.
    """
    dtype, out = gemm.parts_dtype(rows), grad.shape[1]
    plan = (clones.slot_expert, clones.announced)
    if dtype == weight.dtype:
        return clones.transport.bring_home(gemm.outer(grad, rows, ends, dtype), *plan)
    times = math.ceil(len(ends) * weight[0].numel() * dtype.itemsize / _WIDE_BYTES)
    step = math.ceil(out / max(times, 1) / _STEP) * _STEP
    result = torch.empty_like(weight)
    for first in range(0, out, step):
        some = slice(first, first + step)  # no name for its parts: they would live on meanwhile
        result[:, some] = clones.transport.bring_home(
            gemm.outer(grad[:, some], rows, ends, dtype), *plan
        )
    return result


def cloned_linear(
    rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones, pool: WeightPool,
    gemm: GroupedGemm, keep: bool = False,
) -> Tensor:  # fmt: skip
    """``rows[g] @ w[g].T`` for each group of rows: the home experts', then the slots'.

    All ranks of the group must call it together, in forward and in backward; ``weight`` may be
    frozen on some of them, and is on all where ``clones`` says so. Backward returns the gradient of
    the home experts with the parts of all their clones in it, summed in fp32 (or wider) and cast
    once, as *the* gradient of ``weight``: nothing that watches the parameter sees a part of it.

    Args:
        rows: ``[B, in]``.
        weight: ``[m, out, in]``, the home experts' parameter.
        ends: int32 ``[m + S]``, end offset of each group.
        clones: which experts sit in the slots; used as it is now, also in backward.
        pool: where the weights are brought to.
        gemm: what computes the products.
        keep: keep a copy of the clones for backward in place of bringing them again.

    Returns:
        ``[B, out]``; anything in the rows beyond the last end.
    """
    return _ClonedLinear.apply(rows, weight, ends, clones, pool, gemm, keep)
