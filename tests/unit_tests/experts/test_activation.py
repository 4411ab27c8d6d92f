"""The activation with the probability inside, against the same formula under plain autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_echo.experts.activation import (
    ExpertActivation,
    expert_activation,
    weighted_activation,
)
from megatron_echo.experts.grouped_linear import grouped_linear

ROWS, WIDTH = 7, 6
ENDS = torch.tensor([3, ROWS], dtype=torch.int32)
Formula = Callable[[Tensor], Tensor]


def halves(hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden[:, : hidden.shape[1] // 2], hidden[:, hidden.shape[1] // 2 :]


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = halves(hidden)
    return gate / (1 + torch.exp(-gate)) * up


def geglu(hidden: Tensor) -> Tensor:
    gate, up = halves(hidden)
    return gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up


def gelu(hidden: Tensor) -> Tensor:
    return hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))


def relu_squared(hidden: Tensor) -> Tensor:
    return torch.where(hidden > 0, hidden * hidden, torch.zeros_like(hidden))


def clamped_swiglu(hidden: Tensor) -> Tensor:
    gate, up = halves(hidden)
    limit = torch.tensor(0.7, dtype=hidden.dtype)
    gate, up = torch.minimum(gate, limit), torch.minimum(torch.maximum(up, -limit), limit)
    return gate * torch.sigmoid(gate) * up


def offset_swiglu(hidden: Tensor) -> Tensor:
    gate, up = halves(hidden)
    return gate * torch.sigmoid(gate) * (up + 1.0)


def gpt_oss(hidden: Tensor) -> Tensor:
    gate, up = halves(hidden)
    limit = torch.tensor(0.7, dtype=hidden.dtype)
    gate, up = torch.minimum(gate, limit), torch.minimum(torch.maximum(up, -limit), limit)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1.0)


KINDS: dict[str, tuple[Formula, dict[str, Any]]] = {
    "swiglu": (swiglu, {"activation_func": F.silu}),
    "geglu": (geglu, {"activation_func": F.gelu}),
    "gelu": (gelu, {"activation_func": F.gelu, "gated_linear_unit": False}),
    "squared relu": (relu_squared, {"activation_func": squared_relu, "gated_linear_unit": False}),
    "clamped": (clamped_swiglu, {"activation_func": F.silu, "activation_func_clamp_value": 0.7}),
    "offset": (offset_swiglu, {"activation_func": F.silu, "glu_linear_offset": 1.0}),
    "clamped, offset": (
        gpt_oss,
        {
            "activation_func": quick_gelu,
            "activation_func_clamp_value": 0.7,
            "glu_linear_offset": 1.0,
        },
    ),
}


def activation(kind: str) -> ExpertActivation:
    fields = {"gated_linear_unit": True, **KINDS[kind][1]}
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, add_bias_linear=False, **fields
    )
    return expert_activation(config)


def inputs(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden, probabilities (one of them 0) and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    gated = KINDS[kind][1].get("gated_linear_unit", True)
    shapes = (ROWS, 2 * WIDTH if gated else WIDTH), (ROWS,), (ROWS, WIDTH)
    hidden, probs, grad = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    probs = probs.abs()
    probs[2] = 0
    return hidden.to(dtype).requires_grad_(), probs.requires_grad_(), grad.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str) -> None:
    hidden, probs, grad = inputs(kind)
    output = weighted_activation(hidden, probs, ENDS, activation(kind))
    expected = KINDS[kind][0](hidden) * probs[:, None]
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-14)
    actual_grads = torch.autograd.grad(output, (hidden, probs), grad)
    expected_grads = torch.autograd.grad(expected, (hidden, probs), grad)
    torch.testing.assert_close(actual_grads, expected_grads, rtol=1e-12, atol=1e-13)
    assert (output[2] == 0).all()
    assert actual_grads[1][2] != 0  # a probability of 0 has a gradient all the same


@pytest.mark.parametrize("kind", ["swiglu", "gelu", "clamped, offset"])
def test_gradcheck(kind: str) -> None:
    hidden, probs, _ = inputs(kind)
    function = activation(kind)
    assert torch.autograd.gradcheck(
        lambda a, b: weighted_activation(a, b, ENDS, function), (hidden, probs)
    )


@pytest.mark.parametrize("kind", ["clamped", "clamped, offset"])
def test_the_clamp_is_reached(kind: str) -> None:
    """Some of the test's values are beyond it on every side; no gradient goes through those."""
    hidden, probs, grad = inputs(kind)
    gate, up = halves(hidden.detach())
    beyond = torch.cat((gate > 0.7, up.abs() > 0.7), dim=1)
    assert (gate > 0.7).any()
    assert (gate < -0.7).any()
    assert (up > 0.7).any()
    assert (up < -0.7).any()
    output = weighted_activation(hidden, probs, ENDS, activation(kind))
    (to_hidden,) = torch.autograd.grad(output, hidden, grad)
    assert (to_hidden[beyond] == 0).all()
    others = to_hidden[probs.detach() > 0][~beyond[probs.detach() > 0]]
    assert (others != 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    """The product is taken in the probability's dtype and cast once; gradients keep theirs."""
    hidden, _, grad = inputs(kind, dtype)
    probs = inputs(kind)[1].detach().float().requires_grad_()
    function = activation(kind)
    output = weighted_activation(hidden, probs, ENDS, function)
    assert output.dtype == dtype
    exact = (function(hidden).float() * probs[:, None]).to(dtype)
    assert torch.equal(output, exact)
    to_hidden, to_probs = torch.autograd.grad(output, (hidden, probs), grad)
    assert (to_hidden.dtype, to_probs.dtype) == (dtype, torch.float32)
    terms = function(hidden).double() * grad.double()
    expected = terms.sum(1)
    tolerance = WIDTH * torch.finfo(torch.float32).eps
    assert ((to_probs.double() - expected).abs() <= tolerance * terms.abs().sum(1)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_rows_stay_alone(kind: str) -> None:
    """What a grouped product leaves in a row does not reach another row, forward or backward."""
    hidden, probs, grad = inputs(kind)
    clean = weighted_activation(hidden, probs, ENDS, activation(kind))
    clean_grads = torch.autograd.grad(clean, (hidden, probs), grad)
    with torch.no_grad():
        hidden[5:] = float("nan")
    output = weighted_activation(hidden, probs, ENDS, activation(kind))
    grads = torch.autograd.grad(output, (hidden, probs), grad)
    for now, before in zip((output, *grads), (clean, *clean_grads), strict=True):
        assert torch.equal(now[:5], before[:5])


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_inputs_are_kept(kind: str) -> None:
    hidden, probs, grad = inputs(kind)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = weighted_activation(hidden, probs, ENDS, activation(kind))
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (hidden, probs, ENDS)]
    output.backward(grad)
    assert hidden.grad is not None
    assert probs.grad is not None


class WithProduct:
    """An activation and the product behind it, with what that keeps of its rows, or without.

    Attributes:
        leaves: hidden, probabilities, weights and perhaps a bias.
    """

    def __init__(self, kind: str, *, is_kept: bool, has_bias: bool = False) -> None:
        hidden, probs, self._grad = inputs(kind)
        generator = torch.Generator().manual_seed(1)
        shapes = (2, WIDTH, WIDTH), (2, hidden.shape[1])
        weights, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
            for shape in shapes
        )
        self.leaves = [hidden, probs, weights, *([bias] if has_bias else [])]
        self._function, self._is_kept = activation(kind), is_kept

    def __call__(self, hidden: Tensor, probs: Tensor, weights: Tensor, *bias: Tensor) -> Tensor:
        rows = weighted_activation(hidden, probs, ENDS, self._function, *bias)
        # The node of a copy cannot make it again.
        return grouped_linear(rows.clone() if self._is_kept else rows, weights, ENDS)

    def gradients(self, output: Tensor, *, is_last: bool = True) -> list[Tensor]:
        return list(torch.autograd.grad(output, self.leaves, self._grad, retain_graph=not is_last))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "squared relu", "clamped, offset"])
def test_the_product_behind_keeps_none_of_it(kind: str, has_bias: bool) -> None:
    """The same bits; also where backward passes twice, or asks for the weights' gradient alone."""
    usual = WithProduct(kind, is_kept=True, has_bias=has_bias)
    expected = usual.gradients(usual(*usual.leaves))
    ours, saved = WithProduct(kind, is_kept=False, has_bias=has_bias), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        output = ours(*ours.leaves)
    assert sum(tensor.numel() for tensor in saved) == sum(
        tensor.numel() for tensor in (*ours.leaves, ENDS, ENDS)
    )
    (alone,) = torch.autograd.grad(output, ours.leaves[2], ours._grad, retain_graph=True)
    assert torch.equal(alone, expected[2])
    for is_last in (False, True):
        for now, before in zip(ours.gradients(output, is_last=is_last), expected, strict=True):
            assert torch.equal(now, before)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_recomputed_with_the_product_behind(is_reentrant: bool) -> None:
    """Its checkpoint lets a saved tensor be unpacked once only."""
    usual, ours = (WithProduct("swiglu", is_kept=is_kept) for is_kept in (True, False))
    expected = usual.gradients(usual(*usual.leaves))
    output = checkpoint(ours, *ours.leaves, use_reentrant=is_reentrant)
    output.backward(ours._grad)
    for leaf, before in zip(ours.leaves, expected, strict=True):
        assert torch.equal(leaf.grad, before)


def test_a_frozen_product_behind() -> None:
    usual, ours = (WithProduct("swiglu", is_kept=is_kept) for is_kept in (True, False))
    found = []
    for case in (usual, ours):
        case.leaves[2] = case.leaves[2].detach()
        output = case(*case.leaves)
        found.append(torch.autograd.grad(output, case.leaves[:2], case._grad))
    for now, before in zip(*found, strict=True):
        assert torch.equal(now, before)
