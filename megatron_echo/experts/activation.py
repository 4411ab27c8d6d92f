"""The activation between the two projections, with the router's probability inside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Activation = Callable[[Tensor], Tensor]


def expert_activation(config: Any) -> Activation:
    """The activation of a ``TransformerConfig``, clamp value and linear offset included.

    It takes ``[B, 2F]`` where it is gated, gate first, else ``[B, F]``, and gives ``[B, F]``.
    """
    if not config.gated_linear_unit:
        return config.activation_func

    def gated(hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, dim=-1)
        limit = config.activation_func_clamp_value
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
        if config.glu_linear_offset:
            up = up + config.glu_linear_offset
        return config.activation_func(gate) * up

    return gated


class _WeightedActivation(torch.autograd.Function):
    """Keeps its inputs only; backward computes the activation again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, probs: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(hidden, probs)
        ctx.activation = activation
        return _weighted(hidden, probs, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        with torch.enable_grad():
            hidden, probs = (tensor.detach().requires_grad_() for tensor in saved)
            output = _weighted(hidden, probs, ctx.activation)
        to_hidden, to_probs = torch.autograd.grad(output, (hidden, probs), grad)
        return to_hidden, to_probs, None


def _weighted(hidden: Tensor, probs: Tensor, activation: Activation) -> Tensor:
    return (activation(hidden) * probs.unsqueeze(-1)).to(hidden.dtype)


def weighted_activation(hidden: Tensor, probs: Tensor, activation: Activation) -> Tensor:
    """``activation(hidden) * probs``, multiplied in the wider of the two dtypes.

    With the probability here, and not behind the second projection, that projection's output need
    not be kept for the probability's gradient ("memory-efficient permutation").

    Args:
        hidden: ``[B, 2F]`` or ``[B, F]``.
        probs: ``[B]``.
        activation: elementwise on rows, from :func:`expert_activation`.

    Returns:
        ``[B, F]`` in ``hidden``'s dtype.
    """
    return _WeightedActivation.apply(hidden, probs, activation)
