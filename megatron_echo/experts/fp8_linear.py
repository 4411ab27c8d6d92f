"""The grouped linear in rowwise FP8: weights quantised once a step, clones that travel quantised.

Parameters and gradients stay as they are, in bf16 as a rule, so checkpoints and optimizers know
nothing of FP8. Input, weights and the gradient of the output are quantised before each product; see
``fp8``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.call_roles import Role, role_of_call
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.dispatch.reroute import Clones
from megatron_echo.environment import is_capturing
from megatron_echo.experts.fp8 import (
    FP8,
    Quantised,
    quantise_columns,
    quantise_matrices,
    quantise_rows,
    scaled_outer,
    scaled_product,
)
from megatron_echo.step.step_end import StepEnd

_WORD = torch.int32  # what transports carry: any bits, and faster to copy than bytes


class _Stack:
    """Home experts in FP8, and room for clones behind them: an expert is one block of bytes.

    Its values come first, then its scales, so that a clone travels in one piece.
    """

    def __init__(self, is_transposed: bool) -> None:
        self._is_transposed = is_transposed
        self._buffer: Tensor | None = None
        self._is_of: tuple | None = None

    def fill(self, weight: Tensor, slots: int, state: tuple | None) -> None:
        """Quantise the home experts, unless that was done in the same state of the weights.

        Args:
            weight: ``[m, out, in]``.
            slots: S.
            state: what changes when the weights may have; None if nobody knows.
        """
        self._home, *self._shape = weight.mT.shape if self._is_transposed else weight.shape
        matrices = self._home + slots
        lines, width = self._shape
        words = lines * (width + torch.float32.itemsize) // _WORD.itemsize
        if self._buffer is None or len(self._buffer) < matrices:
            with torch.inference_mode(False):  # evaluation may come first
                self._buffer = weight.new_empty(matrices, 1, words, dtype=_WORD)
            self._is_of = None
        self._words = self._buffer[:matrices]
        if state is not None and state == self._is_of:
            return
        self._is_of = state
        quantise_matrices(weight.detach(), self.operand, is_transposed=self._is_transposed)

    def bring(self, clones: Clones) -> None:
        """Put the clones behind the home experts."""
        home, plan = self._words[: self._home], (clones.slot_expert, clones.announced)
        clones.transport.push(home, *plan, self.clones)

    @property
    def clones(self) -> Tensor:
        """Words ``[S, 1, n]`` of the slots."""
        return self._words[self._home :]

    @property
    def operand(self) -> Quantised:
        """Values ``[m + S, out, in]``, transposed ``[m + S, in, out]``, and their scales."""
        lines, width = self._shape
        words = self._words.squeeze(1).split((lines * width // _WORD.itemsize, lines), dim=1)
        values = words[0].view(FP8).unflatten(1, (lines, width))
        return Quantised(values, words[1].view(torch.float32))


class Fp8Weights:
    """The weights of one projection in FP8, as its two products want them.

    The stack of the forward pass has a scale for each output, that of the input's gradient is
    transposed and has one for each input. Both are made when they are first wanted in a step, and
    kept until it ends: two bytes an element, of home experts and slots.
    """

    def __init__(self, config: Any) -> None:
        """Follow the steps of a model.

        Args:
            config: its ``TransformerConfig``.
        """
        self._step_end = StepEnd.of(config)
        self._stacks = _Stack(is_transposed=False), _Stack(is_transposed=True)

    def operand(
        self, weight: Tensor, clones: Clones | None, *, is_transposed: bool, trains: bool = True,
        kept: Tensor | None = None,
    ) -> Quantised:  # fmt: skip
        """Home experts and clones; good until the next call.

        Args:
            weight: ``[m, out, in]``, as it is now.
            clones: which experts to bring; None for no slots.
            is_transposed: for the input's gradient.
            trains: False where somebody may exchange weights at any time: nothing is kept then.
            kept: what :meth:`copy_of_clones` gave, in place of bringing them.
        """
        stack = self._stacks[is_transposed]
        # A replay quantises what its capture did, whatever was quantised before.
        state = self._step_end.steps, is_capturing(), weight.data_ptr(), weight._version
        stack.fill(weight, clones.slots if clones else 0, state if trains else None)
        if kept is not None:
            stack.clones.copy_(kept)
        elif clones is not None:
            stack.bring(clones)
        return stack.operand

    def copy_of_clones(self, weight: Tensor, clones: Clones) -> Tensor:
        """The clones as the input's gradient wants them, for a later backward pass."""
        self.operand(weight, clones, is_transposed=True)
        return self._stacks[True].clones.clone()


class _Fp8Linear(torch.autograd.Function):
    """Gradients are those of the home experts, with the parts of their clones in them."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones | None,
        weights: Fp8Weights, trains: bool, keep: bool,
    ) -> Tensor:  # fmt: skip
        operand = weights.operand(weight, clones, is_transposed=False, trains=trains)
        output = scaled_product(quantise_rows(rows, ends), operand, ends, rows.dtype)
        saved = [rows, weight, ends]
        ctx.weights, ctx.of_clones = weights, None
        if clones is not None:
            saved.append(clones.slot_expert)
            ctx.of_clones = (
                clones.experts_per_rank, clones.transport, clones.announced, clones.is_frozen,
            )  # fmt: skip
            if keep and trains:
                saved.append(weights.copy_of_clones(weight, clones))
        ctx.save_for_backward(*saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends, *of_clones = ctx.saved_tensors
        clones, kept = None, None
        if of_clones:
            clones = Clones(of_clones[0], *ctx.of_clones)
            kept = of_clones[1] if len(of_clones) > 1 else None
        grad, to_rows, to_weight = grad.contiguous(), None, None
        if clones is not None or ctx.needs_input_grad[0]:
            # With clones every rank brings them, whoever wants the gradient.
            operand = ctx.weights.operand(weight, clones, is_transposed=True, kept=kept)
            if ctx.needs_input_grad[0]:
                to_rows = scaled_product(quantise_rows(grad, ends), operand, ends, grad.dtype)
        if ctx.needs_input_grad[1] or (clones is not None and not clones.is_frozen):
            to_weight = _weight_gradient(grad, rows, weight, ends, clones)
        nothing = None, None, None, None, None
        return to_rows, to_weight if ctx.needs_input_grad[1] else None, *nothing


def _weight_gradient(
    grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones | None
) -> Tensor:
    """``[m, out, in]``; the parts of clones in the dtype of the product, summed wide."""
    left, right = quantise_columns(grad, ends), quantise_columns(rows, ends)
    dtype = wide_dtype(weight.dtype) if grad.is_cpu else weight.dtype
    parts = scaled_outer(left, right, ends, dtype)
    if clones is not None:
        parts = clones.transport.bring_home(parts, clones.slot_expert, clones.announced)
    return parts.to(weight.dtype)


def fp8_linear(
    rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones | None, weights: Fp8Weights,
    *, trains: bool, keep: bool = False,
) -> Tensor:  # fmt: skip
    """``rows[g] @ w[g].T`` in FP8 for each group of rows: the home experts', then the slots'.

    As :func:`~megatron_echo.experts.clones.cloned_linear`, and its operands are quantised. All
    ranks of the group must call it together.

    Args:
        rows: ``[B, in]``; B and ``in`` are multiples of 16. Rows of padding are zero.
        weight: ``[m, out, in]``, the home experts' parameter; ``out`` is a multiple of 16.
        ends: int32 ``[m]``, with clones ``[m + S]``, end offset of each group, multiples of 16.
        clones: which experts sit in the slots, None without.
        weights: of this projection.
        trains: the module is in training; quantised weights are kept until the step ends.
        keep: keep a copy of the clones for backward in place of bringing them again.

    Returns:
        ``[B, out]``; anything in the rows beyond the last end.
    """
    trains = trains and role_of_call() is not Role.UNRECORDED
    return _Fp8Linear.apply(rows, weight, ends, clones, weights, trains, keep)
