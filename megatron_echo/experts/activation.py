"""The activation between the two projections, with the router's probability inside it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.permute import stand_in
from megatron_echo.environment import on_gpu
from megatron_echo.experts.biases import bias_of_rows, group_sums, row_groups
from megatron_echo.experts.fp8 import new_words, pack_rows, unpacked
from megatron_echo.precision import Fp8Format

_KERNELS: dict[Callable[[Tensor], Tensor], str] = {
    F.silu: "silu",
    F.gelu: "gelu",
    quick_gelu: "quick_gelu",
    squared_relu: "squared_relu",
}
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ExpertActivation:
    """The activation of an expert: of ``[B, 2F]`` where it is gated, else ``[B, F]``: ``[B, F]``.

    Attributes:
        function: elementwise.
        is_gated: the function of the first half is multiplied with the second half.
        limit: clamps the first half from above and the second on both sides; None does not.
        offset: is added to the second half.
    """

    function: Callable[[Tensor], Tensor]
    is_gated: bool = False
    limit: float | None = None
    offset: float = 0.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """In ``hidden``'s dtype."""
        if not self.is_gated:
            return self.function(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(min=-self.limit, max=self.limit)
        if self.offset:
            up = up + self.offset
        return self.function(gate) * up

    def kernel_settings(self, hidden: Tensor, probs: Tensor) -> dict[str, Any] | None:
        """What the kernels are told; None where the reference computes."""
        is_known = hidden.dtype in _KERNEL_DTYPES and probs.dtype == torch.float32
        if not (on_gpu(hidden) and is_known and self.function in _KERNELS):
            return None
        return {
            "KIND": _KERNELS[self.function],
            "IS_GATED": self.is_gated,
            "LIMIT": self.limit,
            "OFFSET": self.offset,
        }


def expert_activation(config: Any) -> ExpertActivation:
    """The activation of a ``TransformerConfig``, clamp value and linear offset included."""
    if not config.gated_linear_unit:
        return ExpertActivation(config.activation_func)
    return ExpertActivation(
        config.activation_func,
        True,
        config.activation_func_clamp_value,
        config.glu_linear_offset,
    )


class _WeightedActivation(torch.autograd.Function):
    """Keeps its inputs only; backward computes the activation again, for the next product too."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, probs: Tensor, ends: Tensor, activation: ExpertActivation,
        bias: Tensor | None, form: Fp8Format | None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(hidden, probs, ends, *([] if bias is None else [bias]))
        ctx.activation, ctx.again, ctx.output_again = activation, None, _output_again
        given = [] if bias is None else [bias, row_groups(ends, len(hidden))]
        settings = activation.kernel_settings(hidden, probs)
        if settings is None:
            output = _weighted(_biased(hidden, *given), probs, activation)
            output = pack_rows(output, form, ends) if form else output
        else:
            output = _by_kernel(hidden, probs, ends, settings, given, form)
        if form is None:
            return output
        ctx.mark_non_differentiable(output)
        ctx.set_materialize_grads(False)
        return stand_in(hidden, len(hidden), unpacked(output, form).values.shape[1]), output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        again, ctx.again = ctx.again or _computed_again(ctx), None
        (hidden, probs, ends, *given), output = again
        if output is not None:
            to_hidden, to_probs = torch.autograd.grad(output, (hidden, probs), grad)
        else:
            from megatron_echo.experts import activation_kernels

            settings = ctx.activation.kernel_settings(hidden, probs)
            to_hidden, to_probs = activation_kernels.backward(
                hidden, probs, ends, grad, settings, *given
            )
        to_bias = group_sums(to_hidden, given[1], ends, given[0]) if given else None
        return to_hidden, to_probs, None, None, to_bias, None


def _by_kernel(
    hidden: Tensor, probs: Tensor, ends: Tensor, settings: dict[str, Any], given: list[Tensor],
    form: Fp8Format | None,
) -> Tensor:  # fmt: skip
    from megatron_echo.experts import activation_kernels

    if form is None:
        return activation_kernels.forward(hidden, probs, ends, settings, *given)
    words = new_words(hidden, hidden.shape[1] // (2 if settings["IS_GATED"] else 1), form)
    into = unpacked(words, form)
    activation_kernels.packed(
        hidden, probs, ends, into.values, into.scales, form.block, settings, *given
    )
    return words


def _computed_again(ctx: Any) -> tuple[list[Tensor], Tensor | None]:
    """In backward: hidden, probabilities, ends, perhaps the bias and the group of each row.

    And where no kernel computes, the output with its graph, whose leaves are then the first two:
    hidden with the bias added, and the probabilities.
    """
    hidden, probs, ends, *bias = ctx.saved_tensors
    given = [*bias, row_groups(ends, len(hidden))] if bias else []
    output = None
    if ctx.activation.kernel_settings(hidden, probs) is None:
        with torch.enable_grad():
            hidden = _biased(hidden, *given)
            hidden, probs = (t.detach().requires_grad_() for t in (hidden, probs))
            output = _weighted(hidden, probs, ctx.activation)
    return [hidden, probs, ends, *given], output


def _output_again(ctx: Any) -> Tensor:
    """The output, for the node of backward before this one: see ``grouped_linear.kept_rows``.

    What is unpacked for it is left for this node: hooks may let nothing be unpacked twice.
    """
    ctx.again = _computed_again(ctx)
    (hidden, probs, ends, *given), output = ctx.again
    if output is not None:
        return output
    settings = ctx.activation.kernel_settings(hidden, probs)
    return _by_kernel(hidden, probs, ends, settings, given, None)


def _biased(hidden: Tensor, bias: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
    if bias is None or groups is None:
        return hidden
    return (hidden + bias_of_rows(bias, groups)).to(hidden.dtype)


def _weighted(hidden: Tensor, probs: Tensor, activation: ExpertActivation) -> Tensor:
    return (activation(hidden) * probs.unsqueeze(-1)).to(hidden.dtype)


def weighted_activation(
    hidden: Tensor, probs: Tensor, ends: Tensor, activation: ExpertActivation,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``activation(hidden + bias) * probs``, multiplied in the wider of the two dtypes.

    With the probability here, and not behind the second projection, that projection's output need
    not be kept for the probability's gradient ("memory-efficient permutation"). On a GPU it is one
    kernel forward and one backward, which do not touch the rows beyond the last end.

    Args:
        hidden: ``[B, 2F]`` or ``[B, F]``.
        probs: ``[B]``.
        ends: int32 ``[G]``, end offset of each group of rows, on the device.
        activation: elementwise on rows; its clamp comes after the bias.
        bias: ``[G, 2F]`` or ``[G, F]``, wide; see :func:`~megatron_echo.experts.biases.bias_stack`.

    Returns:
        ``[B, F]`` in ``hidden``'s dtype; anything in the rows beyond the last end.
    """
    return _WeightedActivation.apply(hidden, probs, ends, activation, bias, None)


def packed_activation(
    hidden: Tensor, probs: Tensor, ends: Tensor, activation: ExpertActivation, form: Fp8Format,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """:func:`weighted_activation` in FP8: a stand-in for its gradient, and the packed rows.

    They are those of ``pack_rows`` of its output. On a GPU one kernel makes both, and the output
    itself never is in memory.
    """
    return _WeightedActivation.apply(hidden, probs, ends, activation, bias, form)
