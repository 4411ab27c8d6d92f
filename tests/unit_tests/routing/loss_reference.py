"""The losses of a whole batch from their definitions, by autograd."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from torch import Tensor

from megatron_echo.routing import aux_loss


def batch_loss(
    logits: Tensor, function: str, counts: Tensor, tokens: Tensor, valid: Tensor | None = None
) -> Tensor:
    """The part that these tokens have in the loss of a batch of so many, of counts ``[E]``."""
    sums = aux_loss.score_sums(aux_loss.router_scores(logits, function), function, valid)
    return aux_loss.balance_loss(sums, aux_loss.balance_rows(counts, tokens).to(sums.dtype))


def losses(logits: Tensor, topk: int, function: str, valid: Tensor | None) -> dict[str, Tensor]:
    """The losses of ``[S, B, E]`` as scalars in the graph."""
    chosen = torch.zeros_like(logits, dtype=torch.bool)
    chosen.scatter_(-1, logits.topk(topk).indices, True)
    counts = aux_loss.count_tokens(chosen, valid)
    tokens = torch.tensor(logits.shape[:2].numel()) if valid is None else valid.sum()
    sums = aux_loss.score_sums(aux_loss.router_scores(logits, function), function, valid)
    rows = aux_loss.balance_rows(counts, counts.sum(-1) // topk) / len(counts)
    return {
        "microbatch": batch_loss(logits, function, counts.sum(0), tokens, valid),
        "sequence": aux_loss.balance_loss(sums, rows.to(sums.dtype)),
        "z": aux_loss.z_sum(logits, valid) / tokens.clamp(min=1),
    }


def balance(scores: Tensor, chosen: Tensor, topk: int) -> Tensor:
    """``E * sum_i f_i P_i`` of tokens ``[T, E]``."""
    fractions = chosen.to(scores.dtype).mean(0) / topk
    return scores.shape[1] * (fractions * scores.mean(0)).sum()


def gradients(
    hidden: Tensor, lengths: tuple[int, ...] | None, build: Callable, made: Any
) -> tuple[Tensor, Tensor]:
    """Gradient by the router's weight of its one loss, and of the mean main loss.

    Sequences are cut to their lengths; each counts by its tokens with
    ``calculate_per_token_loss``. Scores are Megatron's own, in fp32.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    router = build(TopKRouter, made)
    cut = lengths or (hidden.shape[0],) * hidden.shape[1]
    parts = [hidden[:length, b] for b, length in enumerate(cut) if length]
    logits = router.gating(torch.cat(parts)[:, None]).squeeze(1)
    settings = {
        "use_pre_softmax": made.moe_router_pre_softmax,
        "score_function": made.moe_router_score_function,
    }
    probs, _ = topk_routing_with_score_function(logits, router.topk, **settings)
    main = (probs * torch.arange(probs.shape[1])).square().sum(1).mean()
    chosen, scores = compute_routing_scores_for_aux_loss(
        logits, router.topk, made.moe_router_score_function
    )
    if made.moe_z_loss_coeff is not None:
        loss = made.moe_z_loss_coeff * logits.logsumexp(-1).square().mean()
    elif made.moe_router_load_balancing_type == "seq_aux_loss":
        sizes = [length for length in cut if length]
        each = [
            balance(s.double(), c, router.topk)
            for s, c in zip(scores.split(sizes), chosen.split(sizes), strict=True)
        ]
        weights = torch.tensor(sizes if made.calculate_per_token_loss else [1] * len(sizes))
        loss = (torch.stack(each) * weights).sum() / weights.sum()
    else:
        loss = balance(scores.double(), chosen, router.topk)
    if made.moe_z_loss_coeff is None:
        loss = made.moe_aux_loss_coeff * loss
    grads = [torch.autograd.grad(value, router.weight, retain_graph=True) for value in (loss, main)]
    return grads[0][0], grads[1][0]
