"""One autograd node a layer that adds the gradient of all its losses in backward.

    logits = attach_losses(logits, valid, losses, call)                  # the same logits
    scores = attach_losses(logits, valid, losses, call, to_scores=True)  # their scores

The output of the forward pass does not depend on the losses, and no scalar leaves the layer, so
there is nothing that a pipeline stage could lose. The node saves the logits only. What weighs the
losses (counts of other ranks and microbatches, the scale of the main loss) is asked for in
backward, once a node: by then counts may have come that the forward pass could not know.

Under ``torch.compile`` that question is an operator of its own, so a compiled graph holds it
without a break and asks it each time it runs.
"""

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.routing.aux_loss import (
    add_z_gradient_,
    balance_gradient,
    router_scores,
    score_sums,
    scores_gradient_,
    z_sum,
)


class Losses(Protocol):
    """What a node asks in backward."""

    key: int  # from :func:`register`
    score_function: str  # see ``aux_loss.SCORE_FUNCTIONS``
    score_dtype: torch.dtype | None  # None for the default of ``aux_loss.router_scores``
    has_balance_loss: bool
    has_z_loss: bool

    def weigh(self, sums: Tensor, squares: Tensor, call: int) -> tuple[Tensor, Tensor]:
        """Record the losses of the call that the node was made with, and weigh their gradients.

        ``sums`` are ``[b, E]``, :func:`~megatron_echo.routing.aux_loss.score_sums`, or ``[1, 1]``
        zeros without load-balancing losses; ``squares`` a scalar,
        :func:`~megatron_echo.routing.aux_loss.z_sum`, or 0. Gives the rows of the load-balancing
        losses, like ``sums``, and the coefficient of ``squares``, a scalar; both with all factors,
        in the dtype of ``sums``.
        """


_LOSSES: weakref.WeakValueDictionary[int, Losses] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


def register(losses: Losses) -> int:
    """The key under which a compiled graph finds the object while it lives."""
    key = next(_KEYS)
    _LOSSES[key] = losses
    return key


@torch.library.custom_op("megatron_echo::weigh_router_losses", mutates_args=())
def _weigh(sums: Tensor, squares: Tensor, key: int, call: int) -> tuple[Tensor, Tensor]:
    return _LOSSES[key].weigh(sums, squares, call)


@_weigh.register_fake
def _(sums: Tensor, squares: Tensor, key: int, call: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(sums), torch.empty_like(squares)


def measure(
    logits: Tensor, scores: Tensor | None, valid: Tensor | None, losses: Losses
) -> tuple[Tensor, Tensor]:
    """Sum up the scores and squares of a call, for ``Losses.weigh``.

    ``scores`` are those of the logits before normalisation; None will do without load-balancing
    losses. The rest as for :func:`attach_losses`.
    """
    dtype = losses.score_dtype or torch.promote_types(logits.dtype, torch.float32)
    sums = logits.new_zeros(1, 1, dtype=dtype)
    squares = sums.new_zeros(())
    if losses.has_balance_loss:
        assert scores is not None
        sums = score_sums(scores, losses.score_function, valid)
    if losses.has_z_loss:
        squares = z_sum(logits, valid).to(sums.dtype)
    return sums, squares


def _loss_gradient(
    logits: Tensor, valid: Tensor | None, losses: Losses, call: int, grad_scores: Tensor | None
) -> Tensor:
    """The losses' gradient by the logits; with that of the scores, where those go on."""
    function, scores = losses.score_function, None
    if losses.has_balance_loss or grad_scores is not None:
        scores = router_scores(logits, function, losses.score_dtype)
    sums, squares = measure(logits, scores, valid, losses)
    if torch.compiler.is_compiling():
        rows, coefficient = _weigh(sums, squares, losses.key, call)
    else:
        rows, coefficient = losses.weigh(sums, squares, call)
    if scores is None:
        grad = torch.zeros_like(logits, dtype=rows.dtype)
    else:
        if losses.has_balance_loss:
            grad = balance_gradient(scores, function, rows, valid)
            grad = grad if grad_scores is None else grad.add_(grad_scores)
        else:
            assert grad_scores is not None
            grad = grad_scores.clone()
        grad = scores_gradient_(grad, scores, function)
    del scores
    return add_z_gradient_(grad, logits, coefficient, valid) if losses.has_z_loss else grad


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, valid: Tensor | None, losses: Losses, call: int, to_scores: bool
    ) -> Tensor:
        ctx.save_for_backward(logits, valid)
        ctx.losses, ctx.call, ctx.to_scores = losses, call, to_scores
        if to_scores:
            return router_scores(logits, losses.score_function, losses.score_dtype)
        return logits.view_as(logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, valid = ctx.saved_tensors
        grad_scores = grad if ctx.to_scores else None
        added = _loss_gradient(logits, valid, ctx.losses, ctx.call, grad_scores)
        whole = added if ctx.to_scores else added.add_(grad)
        return whole.to(logits.dtype), None, None, None, None


def attach_losses(
    logits: Tensor, valid: Tensor | None, losses: Losses, call: int, to_scores: bool = False
) -> Tensor:
    """The logits, with the gradient of all losses added in backward; or their scores.

    Args:
        logits: ``[s, b, E]``.
        valid: bool ``[s, b]``, False for padding; None if there is none.
        losses: asked in backward.
        call: handed back to ``losses``.
        to_scores: give ``router_scores`` of the logits: where routing goes on from the scores of
            all experts, this is then the one node that saves a tensor of their size.
    """
    return _Attach.apply(logits, valid, losses, call, to_scores)
