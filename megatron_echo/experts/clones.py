"""Cloned experts: their weights brought to the slots, their gradients brought home.

The slots of all layers are one pool. A layer fills it before it computes, and again before it
computes gradients, so the memory of clones does not depend on the number of layers or of
microbatches in flight, and no slot is ever a saved tensor.

Where the transport is hidden, slots are filled and gradients travel beside compute:

=====================================  ==========================================================
first                                  then
=====================================  ==========================================================
products that read the slots before    the next fill (it is begun behind them)
fill                                   products that read the slots (``Clones.brought``)
outer products                         gradients go home
gradients at home                      the parameter gets them (``Homecoming``), parts are freed
=====================================  ==========================================================

What other ranks do is ordered by the barriers of ``dispatch/transports/peer_buffers.py``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.compatibility import moe_layer_pattern
from megatron_echo.config import clone_itemsize, expert_elements, num_clone_slots
from megatron_echo.copy_lanes import Errand
from megatron_echo.dispatch.clones_of_call import Clones, as_it_is_now, storage_key
from megatron_echo.experts.delayed import DelayedGradients, now_or_later
from megatron_echo.experts.grouped_linear import GroupedGemm, kept_rows, rows_again
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
    where the schedules 1F1B and interleaved 1F1B have the most in flight; one more where they
    overlap expert communication.

    Args:
        config: the transformer's configuration.
        microbatches: of one step, None if it changes.
    """
    stages = config.pipeline_model_parallel_size
    chunks = config.virtual_pipeline_model_parallel_size or 1
    in_flight = stages if chunks == 1 else (stages - 1) * 2 + (chunks - 1) * stages + 1
    in_flight += config.overlap_moe_expert_parallel_comm
    if microbatches is not None:
        in_flight = min(in_flight, microbatches * chunks)
    calls = math.ceil(sum(moe_layer_pattern(config)) / (stages * chunks)) * in_flight
    expert = expert_elements(config) * clone_itemsize(config)
    return num_clone_slots(config) * calls * expert


class _ClonedLinear(torch.autograd.Function):
    """A grouped linear over home experts and clones; gradients are those of the home experts."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, target: Tensor, home: tuple[Tensor], ends: Tensor, clones: Clones,
        pool: WeightPool, gemm: GroupedGemm, keep: bool, later: DelayedGradients | None,
    ) -> Tensor:  # fmt: skip
        (weight,) = home
        stack = clones.brought(storage_key(weight), bringer(weight, clones, pool, gemm))
        kept = [stack[-clones.slots :].clone()] if keep else []
        ctx.save_for_backward(kept_rows(rows), weight, ends, clones.slot_expert, *kept)
        ctx.pool, ctx.gemm, ctx.clones, ctx.later = pool, gemm, clones, later
        return gemm.product(rows, weight, stack, ends, transpose=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends, slot_expert, *kept = ctx.saved_tensors
        weight = as_it_is_now(weight)
        clones, pool, gemm = ctx.clones.given_back(slot_expert), ctx.pool, ctx.gemm
        if kept:
            stack = _filled(pool, gemm, weight, clones, *kept)
        else:
            stack = clones.brought(storage_key(weight), bringer(weight, clones, pool, gemm))
        grad = grad.contiguous()
        to_rows = None
        if ctx.needs_input_grad[0]:
            to_rows = gemm.product(grad, weight, stack, ends, transpose=False)
        rows = rows_again(ctx, rows)
        # The slots hold experts of other ranks: where those of this rank are frozen, theirs may
        # not be, and nobody here knows.
        is_wanted, to_weight = ctx.needs_input_grad[1], None

        def make() -> Tensor:
            gradient = _weight_gradient(grad, rows, weight, ends, clones, gemm)
            return clones.homeward(weight, *gradient, is_wanted=is_wanted)

        if not clones.is_frozen:
            to_weight = now_or_later(ctx.later, make)
        nothing = None, None, None, None, None, None, None
        return to_rows, to_weight if is_wanted else None, *nothing


def bringer(
    weight: Tensor, clones: Clones, pool: WeightPool, gemm: GroupedGemm
) -> Callable[[], Tensor]:
    """What brings clones into the last S matrices of a stack, and returns that."""
    return lambda: _filled(pool, gemm, weight, clones)


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
) -> tuple[Tensor, Errand]:
    """The gradient of the home experts, ``[m, out, in]``: parts summed wide and rounded once.

    Where parts come wide, some rows of all matrices at a time, so that what is wide is
    ``_WIDE_BYTES`` at most, and not a second stack of all experts and slots.

    Returns:
        The gradient, and what must be waited for before it is whole.
    """
    dtype, out = gemm.parts_dtype(rows), grad.shape[1]
    errand: Errand | None = None

    def send(parts: Tensor, into: Tensor | None = None) -> Errand:
        def movement() -> Tensor:
            plan = (clones.slot_expert, clones.announced)
            total = clones.transport.bring_home(parts, *plan)
            return total if into is None else into.copy_(total)

        return clones.run(movement)

    if dtype == weight.dtype:
        errand = send(gemm.outer(grad, rows, ends, dtype))
        return errand.result, errand
    times = math.ceil(len(ends) * weight[0].numel() * dtype.itemsize / _WIDE_BYTES)
    step = math.ceil(out / max(times, 1) / _STEP) * _STEP
    result = torch.empty_like(weight)
    for first in range(0, out, step):
        if errand is not None:
            errand.wait()  # its parts go before there are others
        some = slice(first, first + step)
        errand = send(gemm.outer(grad[:, some], rows, ends, dtype), result[:, some])
    assert errand is not None
    return result, errand


def cloned_linear(
    rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones, pool: WeightPool,
    gemm: GroupedGemm, keep: bool = False, later: DelayedGradients | None = None,
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
        later: where the gradient of ``weight`` waits; None computes it with the others.

    Returns:
        ``[B, out]``; anything in the rows beyond the last end.
    """
    target = clones.target(weight)
    return _ClonedLinear.apply(rows, target, (weight,), ends, clones, pool, gemm, keep, later)
