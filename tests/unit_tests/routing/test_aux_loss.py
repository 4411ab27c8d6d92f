"""The losses as formulas: values against plain definitions, closed forms against autograd."""

import loss_reference
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_echo.routing import aux_loss
from megatron_echo.routing.aux_loss import SCORE_FUNCTIONS

S, B, E, K = 7, 3, 6, 2
LENGTHS = (7, 4, 1)


def draw(seed: int = 0, batch: int = B, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(S, batch, E, dtype=torch.float64, generator=generator)


def mask(lengths: tuple[int, ...] | None) -> Tensor | None:
    return None if lengths is None else torch.arange(S)[:, None] < torch.tensor(lengths)


def choices(logits: Tensor) -> Tensor:
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, logits.topk(K).indices, True)


def normalized(logits: Tensor, function: str) -> Tensor:
    scores = aux_loss.router_scores(logits, function)
    return scores if function == "softmax" else scores / scores.sum(-1, keepdim=True)


def by_definition(scores: Tensor, chosen: Tensor) -> Tensor:
    """``E * sum_i f_i P_i`` of tokens ``[T, E]``."""
    return E * (chosen.double().mean(0) / K * scores.mean(0)).sum()


def losses(logits: Tensor, function: str, valid: Tensor | None) -> dict[str, Tensor]:
    return loss_reference.losses(logits, K, function, valid)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_definition(function: str, lengths: tuple[int, ...] | None) -> None:
    """Each sequence counts with its true length, and tokens of padding not at all."""
    logits, valid = draw(), mask(lengths)
    scores, chosen = normalized(logits, function), choices(logits)
    kept = torch.ones(S, B, dtype=torch.bool) if valid is None else valid
    each = [by_definition(scores[kept[:, b], b], chosen[kept[:, b], b]) for b in range(B)]
    expected = {
        "microbatch": by_definition(scores[kept], chosen[kept]),
        "sequence": torch.stack(each).mean(),
        "z": logits[kept].logsumexp(-1).square().mean(),
    }
    for name, value in losses(logits, function, valid).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=0)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_parts_of_a_batch_add_up(function: str) -> None:
    logits = draw()
    counts = aux_loss.count_tokens(choices(logits), None).sum(0)
    cut = [logits[:, b : b + 1] for b in range(B)]
    parts = [loss_reference.batch_loss(part, function, counts, torch.tensor(S * B)) for part in cut]
    whole = losses(logits, function, None)["microbatch"]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("lengths", [None, LENGTHS, (0, 0, 0)])
@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_closed_forms(function: str, lengths: tuple[int, ...] | None) -> None:
    logits, valid = draw().requires_grad_(), mask(lengths)
    weights = torch.rand(B, E, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = aux_loss.router_scores(logits, function)
    sums = aux_loss.score_sums(scores, function, valid)
    value = aux_loss.balance_loss(sums, weights)
    expected = torch.autograd.grad(value + 0.3 * aux_loss.z_sum(logits, valid), logits)[0]
    with torch.no_grad():
        grad = aux_loss.balance_gradient(scores, function, weights, valid)
        grad = aux_loss.scores_gradient_(grad, scores, function)
        grad = aux_loss.add_z_gradient_(grad, logits, 0.3, valid)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_balance(function: str) -> None:
    """Equal counts: the value is 1, and nothing pulls at the logits."""
    logits = draw()
    scores = aux_loss.router_scores(logits, function)
    counts = torch.full((B, E), 7)
    rows = aux_loss.balance_rows(counts.sum(0, keepdim=True), torch.tensor([S * B]))
    value = aux_loss.balance_loss(aux_loss.score_sums(scores, function, None), rows)
    torch.testing.assert_close(value, value.new_ones(()), rtol=1e-13, atol=0)
    grad = aux_loss.balance_gradient(scores, function, rows, None)
    grad = aux_loss.scores_gradient_(grad, scores, function)
    assert grad.abs().max() < 1e-16


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SCORE_FUNCTIONS), st.permutations(range(S)))
def test_order_of_tokens(seed: int, function: str, order: list[int]) -> None:
    logits = draw(seed)
    before, after = (losses(x, function, None) for x in (logits, logits[order]))
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(SCORE_FUNCTIONS), st.integers(1, 5))
def test_padding_changes_nothing(seed: int, function: str, added: int) -> None:
    logits = draw(seed)
    padded = torch.cat((logits, 100 * draw(seed + 1)[:added]))
    valid = torch.ones(S + added, B, dtype=torch.bool)
    valid[S:] = False
    before, after = losses(logits, function, None), losses(padded, function, valid)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=0)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_constant_added_to_all_logits(seed: int, shift: float) -> None:
    """Only z changes, by ``2 z d + d^2``."""
    logits = draw(seed)
    before, after = (losses(x, "softmax", None) for x in (logits, logits + shift))
    torch.testing.assert_close(after["sequence"], before["sequence"], rtol=1e-12, atol=0)
    change = (2 * logits.logsumexp(-1) * shift + shift**2).mean()
    torch.testing.assert_close(after["z"] - before["z"], change, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", SCORE_FUNCTIONS)
def test_all_padding_is_zero(function: str) -> None:
    logits = draw().requires_grad_()
    value = sum(losses(logits, function, mask((0, 0, 0))).values())
    assert value == 0
    (grad,) = torch.autograd.grad(value, logits)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_extreme_logits() -> None:
    logits = torch.tensor([-300.0, -90.0, 0.0, 90.0, 300.0]).expand(2, 1, 5)
    for function in SCORE_FUNCTIONS:
        scores = aux_loss.router_scores(logits, function)
        grad = aux_loss.balance_gradient(scores, function, torch.ones(1, 5), None)
        assert aux_loss.scores_gradient_(grad, scores, function).isfinite().all()


def test_unknown_score_function() -> None:
    with pytest.raises(ValueError, match=r"unknown\. Use"):
        aux_loss.router_scores(draw(), "tanh")
