"""The grouped linear in FP8: weights quantised once a step, clones that travel quantised.

Parameters and gradients stay as they are, in bf16 as a rule, so checkpoints and optimizers know
nothing of FP8. Input, weights and the gradient of the output are quantised before each product; see
``fp8``. The input often is already: tokens travel so, and the activation's kernel gives it so.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.config import echo_setting, fp8_format
from megatron_echo.dispatch.clones_of_call import Clones, as_it_is_now, storage_key
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.environment import is_capturing
from megatron_echo.experts.delayed import DelayedGradients, now_or_later
from megatron_echo.experts.fp8 import (
    E8M0,
    FP8,
    WORD,
    Quantised,
    pack_rows,
    quantise_columns,
    quantise_matrices,
    scaled_outer,
    scaled_product,
    unpacked,
)
from megatron_echo.precision import Fp8Format
from megatron_echo.step.step_end import StepEnd


class _Stack:
    """Home experts in FP8, and room for clones behind them.

    An expert is one block of bytes, its values and then its scales, so that a clone travels in one
    piece; or two, where torch wants the values of all experts without gaps.

    Attributes:
        home: words ``[m, 1, n]`` of the home experts, of each piece.
        clones: words ``[S, 1, n]`` of the slots, likewise.
    """

    def __init__(self, form: Fp8Format, *, is_transposed: bool, is_apart: bool) -> None:
        self._form, self._is_transposed, self._is_apart = form, is_transposed, is_apart
        self._buffers: list[Tensor] = []
        self._is_of: tuple | None = None

    def fill(self, weight: Tensor, slots: int, state: tuple | None) -> None:
        """Quantise the home experts, unless that was done in the same state of the weights.

        Args:
            weight: ``[m, out, in]``.
            slots: S.
            state: what changes when the weights may have; None if nobody knows.
        """
        home, *self._shape = weight.mT.shape if self._is_transposed else weight.shape
        matrices = home + slots
        lines, width = self._shape
        sizes = [lines * width, self._form.scale_bytes(width, lines)]
        if not self._buffers or len(self._buffers[0]) < matrices:
            with torch.inference_mode(False):  # evaluation may come first
                self._buffers = [
                    weight.new_empty(matrices, 1, size // WORD.itemsize, dtype=WORD)
                    for size in (sizes if self._is_apart else [sum(sizes)])
                ]
            self._is_of = None
        self._words = [buffer[:matrices] for buffer in self._buffers]
        self.home, self.clones = zip(*(words.split((home, slots)) for words in self._words))
        if state is not None and state == self._is_of:
            return
        self._is_of = state
        into, form = self.operand, self._form
        quantise_matrices(weight.detach(), into, form, is_transposed=self._is_transposed)

    def bring(self, clones: Clones, kept: Sequence[Tensor], in_place: bool) -> None:
        """Put the clones behind the home experts; or, in place, where they may be instead.

        Args:
            clones: which experts to bring.
            kept: words of the clones, in place of bringing them; none to bring them.
            in_place: they need not be in the stack.
        """
        plan = clones.slot_expert, clones.announced
        if in_place:
            (home,) = self.home
            there = kept[0] if kept else clones.transport.push_in_place(home, *plan)
            if there is not None:
                self.clones = (there,)
                return
        for number, (home, slots) in enumerate(zip(self.home, self.clones, strict=True)):
            if kept:
                slots.copy_(kept[number])
            else:
                clones.transport.push(home, *plan, slots)

    @property
    def operand(self) -> Quantised:
        """Values ``[m + S, out, in]``, transposed ``[m + S, in, out]``, and their scales."""
        (lines, width), form = self._shape, self._form
        every = [words.squeeze(1) for words in self._words]
        size = lines * width // WORD.itemsize
        values, scales = every if self._is_apart else (every[0][:, :size], every[0][:, size:])
        if form.block is None:
            of_lines = scales[:, :lines].view(torch.float32)
        else:
            parts = lines // form.lines, width // form.block
            of_lines = scales.view(E8M0)[:, : parts[0] * parts[1]].unflatten(1, parts)
        return Quantised(values.view(FP8).unflatten(1, (lines, width)), of_lines)


class Fp8Weights:
    """The weights of one projection in FP8, as its two products want them.

    The stack of the forward pass has scales along the inputs, that of the input's gradient is
    transposed and has them along the outputs. Both are made when they are first wanted in a step,
    and kept until it ends: two bytes an element, of home experts and slots.

    Attributes:
        form: of all operands.
        by_kernel: kernels of this package multiply.
    """

    def __init__(self, config: Any) -> None:
        """Follow the steps of a model.

        Args:
            config: its ``TransformerConfig``.
        """
        form = fp8_format(config)
        assert form is not None
        self.form, self._step_end = form, StepEnd.of(config)
        kind = echo_setting(config, "moe_echo_grouped_gemm")
        self.by_kernel = kind == "triton" or not form.has_product()
        is_apart = form.block is not None and not self.by_kernel
        self._stacks = [
            _Stack(form, is_transposed=turned, is_apart=is_apart) for turned in (False, True)
        ]

    def product(
        self, packed: Tensor, weight: Tensor, ends: Tensor, clones: Clones | None,
        dtype: torch.dtype, *, is_transposed: bool, trains: bool = True,
        kept: Sequence[Tensor] = (),
    ) -> Tensor:  # fmt: skip
        """``rows[g] @ w[g].T`` of home experts and clones, or ``rows[g] @ w[g]``.

        Args:
            packed: the rows.
            weight: ``[m, out, in]``, as it is now.
            ends: int32 ``[m + S]``.
            clones: which experts to bring; None for no slots.
            dtype: of the result.
            is_transposed: for the input's gradient, the latter product.
            trains: False where somebody may exchange weights at any time: nothing is kept then.
            kept: what :meth:`copy_of_clones` gave, in place of bringing them.
        """
        bring = self.bringer(weight, clones, is_transposed=is_transposed, trains=trains, kept=kept)
        if clones is None or kept:
            stack = bring()
        else:
            stack = clones.brought(storage_key(weight), bring)
        if not self.by_kernel:
            return scaled_product(unpacked(packed, self.form), stack.operand, ends, dtype)
        from megatron_echo.experts import kernels

        width = weight.shape[2 if is_transposed else 1]
        both = stack.home[0], stack.clones[0]
        return kernels.scaled_product(packed, *both, ends, width, dtype, self.form)

    def outer(self, left: Quantised, right: Quantised, ends: Tensor, dtype: torch.dtype) -> Tensor:
        """See :func:`~megatron_echo.experts.fp8.scaled_outer`."""
        if not self.by_kernel:
            return scaled_outer(left, right, ends, dtype)
        from megatron_echo.experts import kernels

        both = (left.values, left.scales), (right.values, right.scales)
        return kernels.scaled_outer(*both, ends, dtype, self.form)

    def bringer(
        self, weight: Tensor, clones: Clones | None, *, is_transposed: bool, trains: bool = True,
        kept: Sequence[Tensor] = (),
    ) -> Callable[[], _Stack]:  # fmt: skip
        """What makes home experts and clones ready for a :meth:`product`, also before it."""
        stack = self._stacks[is_transposed]

        def bring() -> _Stack:
            # A replay quantises what its capture did, whatever was quantised before.
            state = self._step_end.steps, is_capturing(), weight.data_ptr(), weight._version
            stack.fill(weight, clones.slots if clones else 0, state if trains else None)
            if clones is not None:
                stack.bring(clones, kept, in_place=self.by_kernel)
            return stack

        return bring

    def copy_of_clones(self, weight: Tensor, clones: Clones) -> list[Tensor]:
        """The clones as the input's gradient wants them, for a later backward pass."""
        bring = self.bringer(weight, clones, is_transposed=True)
        stack: _Stack = clones.brought(storage_key(weight), bring)
        return [piece.clone() for piece in stack.clones]


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, packed: Tensor, form: Fp8Format) -> Tensor:
        return unpacked(packed, form).dequantised().to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


def values_of(rows: Tensor, packed: Tensor, form: Fp8Format) -> Tensor:
    """What packed rows hold, ``[B, in]``, with the gradient of the rows that stand for them."""
    return _Values.apply(rows, packed, form)


class _Fp8Linear(torch.autograd.Function):
    """Gradients are those of the home experts, with the parts of their clones in them."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, packed: Tensor | None, target: Tensor, home: tuple[Tensor],
        ends: Tensor, clones: Clones | None, weights: Fp8Weights, trains: bool, keep: bool,
        later: DelayedGradients | None,
    ) -> Tensor:  # fmt: skip
        (weight,) = home
        packed = pack_rows(rows, weights.form, ends) if packed is None else packed
        output = weights.product(
            packed, weight, ends, clones, rows.dtype, is_transposed=False, trains=trains
        )
        saved = [packed, weight, ends]
        if clones is not None:
            saved.append(clones.slot_expert)
            if keep and trains:
                saved.extend(weights.copy_of_clones(weight, clones))
        ctx.save_for_backward(*saved)
        ctx.weights, ctx.clones, ctx.later = weights, clones, later
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, weight, ends, *of_clones = ctx.saved_tensors
        weight, clones, kept = as_it_is_now(weight), ctx.clones, of_clones[1:]
        if of_clones:
            clones = clones.given_back(of_clones[0])
        grad, to_rows, to_weight = grad.contiguous(), None, None
        if clones is not None or ctx.needs_input_grad[0]:
            # With clones every rank brings them, whoever wants the gradient.
            to_rows = ctx.weights.product(
                pack_rows(grad, ctx.weights.form, ends), weight, ends, clones, grad.dtype,
                is_transposed=True, kept=kept,
            )  # fmt: skip
        is_wanted = ctx.needs_input_grad[2]
        is_trained = is_wanted or ctx.later is not None
        if is_trained if clones is None else not clones.is_frozen:

            def make() -> Tensor:
                parts = _weight_gradient(ctx.weights, grad, packed, weight, ends)
                return _brought_home(parts, weight, clones, is_wanted)

            to_weight = now_or_later(ctx.later, make)
        nothing = None, None, None, None, None, None, None
        return to_rows, None, to_weight if is_wanted else None, *nothing


def _weight_gradient(
    weights: Fp8Weights, grad: Tensor, packed: Tensor, weight: Tensor, ends: Tensor
) -> Tensor:
    """``[G, out, in]``, in the dtype of the product."""
    form = weights.form
    left, right = (quantise_columns(t, ends, form) for t in (grad, unpacked(packed, form)))
    dtype = wide_dtype(weight.dtype) if grad.is_cpu else weight.dtype
    return weights.outer(left, right, ends, dtype)


def _brought_home(parts: Tensor, weight: Tensor, clones: Clones | None, is_wanted: bool) -> Tensor:
    """``[m, out, in]`` in the parameter's dtype: the parts of clones are added, wide."""
    if clones is None:
        return parts.to(weight.dtype)

    def movement() -> Tensor:
        home = clones.transport.bring_home(parts, clones.slot_expert, clones.announced)
        return home.to(weight.dtype)

    errand = clones.run(movement)
    return clones.homeward(weight, errand.result, errand, is_wanted=is_wanted)


def fp8_linear(
    rows: Tensor, weight: Tensor, ends: Tensor, clones: Clones | None, weights: Fp8Weights,
    *, trains: bool, keep: bool = False, packed: Tensor | None = None,
    later: DelayedGradients | None = None,
) -> Tensor:  # fmt: skip
    """``rows[g] @ w[g].T`` in FP8 for each group of rows: the home experts', then the slots'.

    As :func:`~megatron_echo.experts.clones.cloned_linear`, and its operands are quantised. All
    ranks of the group must call it together.

    Args:
        rows: ``[B, in]``. Rows of padding are zero.
        weight: ``[m, out, in]``, the home experts' parameter.
        ends: int32 ``[m]``, with clones ``[m + S]``, end offset of each group. All sizes are
            multiples of the format's alignment.
        clones: which experts sit in the slots, None without.
        weights: of this projection.
        trains: the call is one of a training step; quantised weights are kept until it ends.
        keep: keep a copy of the clones for backward in place of bringing them again.
        packed: the rows quantised, of :func:`~megatron_echo.experts.fp8.pack_rows`; ``rows`` are
            then not read, and only their gradient is. It is what is kept for backward.
        later: where the gradient of ``weight`` waits; None computes it with the others.

    Returns:
        ``[B, out]``; anything in the rows beyond the last end.
    """
    target = weight if clones is None else clones.target(weight)
    return _Fp8Linear.apply(
        rows, packed, target, (weight,), ends, clones, weights, trains, keep, later
    )
