"""The losses of a router and their gradients in closed form, as pure functions.

Every load-balancing loss here has one form. Tokens fall into groups ``g`` (the microbatch, one
sequence, the global batch), ``f_g`` is the part of a group's token-expert pairs that each expert
gets, and ``s'`` are the scores of a token, which sum to 1::

    loss = sum_t <row_g(t), s'_t>        row_g = E * f_g / tokens_g        1.0 is perfect balance

``f`` is a count, so the loss is linear in the scores and all losses of a layer add up to one row
of weights a group. A level is a choice of groups and of the counts that make ``f``:

* microbatch: Switch Transformer (arXiv 2101.03961, eq. 4-6);
* sequence: DeepSeek-V3 (arXiv 2412.19437, eq. 17-20), each sequence with its true length;
* batch: Global-batch load balancing (arXiv 2501.11873): the counts of all ranks and of more
  microbatches than the one whose scores are summed;

and the z loss (ST-MoE, arXiv 2202.08906, eq. 5) is the mean of ``logsumexp(logits) ** 2``.

Shapes: logits and scores ``[s, b, E]`` (sequence, batch, experts), ``valid`` bool ``[s, b]`` or
None (every token counts), rows and counts ``[g, E]`` with g of 1 or b. Arithmetic is in fp32, or
in fp64 where logits are. Nothing reads a value on the host.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_echo.step.load_metrics import load_fractions

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
_EPSILON = 1e-20
"""Added by Megatron to the sum of scores that it divides by."""


def router_scores(logits: Tensor, function: str, dtype: torch.dtype | None = None) -> Tensor:
    """Scores ``[..., E]`` before normalisation, the same bits as Megatron's in fp32.

    Args:
        logits: ``[..., E]``.
        function: one of :data:`SCORE_FUNCTIONS`; another is a ``ValueError``.
        dtype: of the scores; fp32, or fp64 where the logits are, by default.
    """
    dtype = dtype or torch.promote_types(logits.dtype, torch.float32)
    if function == "softmax":
        return torch.softmax(logits, dim=-1, dtype=dtype)
    if function == "sigmoid":
        return torch.sigmoid(logits.to(dtype))
    if function == "sqrtsoftplus":
        return F.softplus(logits.to(dtype)).sqrt()
    raise ValueError(f"The score function {function!r} is unknown. Use {SCORE_FUNCTIONS}.")


def count_tokens(routing_map: Tensor, valid: Tensor | None) -> Tensor:
    """Pairs of each sequence and expert, int64 ``[b, E]``, of a bool map of choices."""
    if valid is not None:
        routing_map = routing_map & valid[..., None]
    return routing_map.sum(0)


def balance_rows(counts: Tensor, tokens: Tensor) -> Tensor:
    """The rows ``E * f / tokens`` of a load-balancing loss, fp64 ``[g, E]``.

    ``counts`` are the pairs that make ``f``, ``tokens`` ``[g]`` the valid ones of each group whose
    scores are summed. A group without tokens has a row of zeros.
    """
    per_token = load_fractions(counts) * counts.shape[-1]
    return per_token / tokens.clamp(min=1).double()[..., None]


def score_sums(scores: Tensor, function: str, valid: Tensor | None) -> Tensor:
    """The normalised scores of each sequence's valid tokens, added up: ``[b, E]``.

    ``scores`` are those of :func:`router_scores` with the same ``function``.
    """
    weights = None if valid is None else valid.to(scores.dtype)
    if function != "softmax":
        part = 1 / (scores.sum(-1) + _EPSILON)
        weights = part if weights is None else part * weights
    return scores.sum(0) if weights is None else torch.einsum("sbe,sb->be", scores, weights)


def balance_loss(sums: Tensor, rows: Tensor) -> Tensor:
    """The value ``sum_t <row, s'_t>`` from :func:`score_sums`, a scalar."""
    return (sums * rows).sum()


def z_sum(logits: Tensor, valid: Tensor | None) -> Tensor:
    """The sum over valid tokens of ``logsumexp(logits) ** 2``, a scalar."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    squares = torch.logsumexp(logits.to(wide), dim=-1).square()
    return squares.sum() if valid is None else torch.where(valid, squares, 0).sum()


def balance_gradient(scores: Tensor, function: str, rows: Tensor, valid: Tensor | None) -> Tensor:
    """The gradient of :func:`balance_loss` by the scores before normalisation, ``[s, b, E]``.

    ``rows``, ``[1, E]`` or ``[b, E]``, are the sum of all losses' rows.
    """
    if function == "softmax":
        grad = rows.expand_as(scores).clone()
    else:
        total = scores.sum(-1, keepdim=True) + _EPSILON
        mean = torch.einsum("sbe,be->sb", scores, rows.expand_as(scores[0])).contiguous()
        grad = (rows - mean[..., None] / total).div_(total)
    return grad if valid is None else grad.masked_fill_(~valid[..., None], 0)


def scores_gradient_(grad: Tensor, scores: Tensor, function: str) -> Tensor:
    """Turn a gradient by the scores into one by the logits, ``[s, b, E]``, in its memory."""
    if function == "sqrtsoftplus":
        slope = -torch.expm1(-scores.square()) / (2 * scores)
        return grad.mul_(torch.where(scores > 0, slope, 0))
    grad = grad.mul_(scores)
    if function == "sigmoid":
        return grad.addcmul_(grad, scores, value=-1)
    return grad.addcmul_(scores, grad.sum(-1, keepdim=True), value=-1)


def add_z_gradient_(
    grad: Tensor, logits: Tensor, coefficient: Tensor | float, valid: Tensor | None
) -> Tensor:
    """Add the gradient of ``coefficient * z_sum`` by the logits to ``grad``, ``[s, b, E]``."""
    logits = logits.to(grad.dtype)
    z = torch.logsumexp(logits, dim=-1, keepdim=True)
    slope = 2 * coefficient * z
    if valid is not None:
        slope = torch.where(valid[..., None], slope, 0)
    return grad.addcmul_((logits - z).exp_(), slope)
