"""Forced routings and small MoE layers, shared by the tests of the layer and their workers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.moe_layer import EchoMoELayer

HIDDEN, FFN = 16, 8
ROUTINGS = ("balanced", "hot", "empty", "random", "padding")


def experts_for(ranks: int) -> int:
    """A number of experts with at least four on each rank."""
    return 12 if ranks < 4 else 4 * ranks


def routing_map(kind: str, tokens: int, experts: int, topk: int, seed: int = 0) -> Tensor:
    """A bool map ``[N, E]`` over the tokens of all ranks.

    Args:
        kind: ``balanced``; ``hot``: every token takes the first K experts, those of rank 0;
            ``empty``: odd experts get nothing; ``random``; ``padding``: random, some tokens with
            no choice and some with fewer than K; ``no tokens``.
        tokens: N.
        experts: E.
        topk: K.
        seed: for the random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(tokens, experts, generator=generator)
    if kind == "balanced":
        chosen = (torch.arange(tokens)[:, None] * topk + torch.arange(topk)) % experts
    elif kind == "hot":
        chosen = torch.arange(topk).expand(tokens, topk)
    else:
        if kind == "empty":
            noise[:, 1::2] = -1
        chosen = noise.topk(topk).indices
    chosen_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
    if kind == "padding":
        chosen_map[::3] = False
        chosen_map[1::3] &= torch.rand(tokens, experts, generator=generator)[1::3] < 0.5
    return chosen_map & (kind != "no tokens")


def router_probs(chosen: Tensor, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Probabilities of the choices: between 0.1 and 1, and 0 for one of a token's in every 8."""
    noise = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(seed)).double()
    probs = torch.where(chosen, 0.1 + 0.9 * noise, 0)
    first = chosen & (chosen.cumsum(1) == 1)
    zero = first & (torch.arange(len(chosen)) % 8 == 5)[:, None]
    return torch.where(zero, 0, probs).to(dtype)


def layer_config(ranks: int, topk: int, dtype: torch.dtype, **fields: Any) -> EchoTransformerConfig:
    """The configuration of a small layer of SwiGLU experts over ``ranks`` ranks."""
    settings: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": HIDDEN,
        "num_attention_heads": 1,
        "num_moe_experts": experts_for(ranks),
        "moe_ffn_hidden_size": FFN,
        "moe_router_topk": topk,
        "moe_router_pre_softmax": True,
        "expert_model_parallel_size": ranks,
        "moe_num_echo_experts": 0,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "params_dtype": dtype,
        "init_method_std": 0.5,
        **fields,
    }
    return EchoTransformerConfig(**settings)


class ForcedRouter(torch.nn.Module):
    """Answers with what it was built from."""

    def __init__(self, probs: Tensor, chosen: Tensor) -> None:
        super().__init__()
        self.probs, self.chosen = probs, chosen

    def forward(self, hidden: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.probs, self.chosen


def forced(layer: EchoMoELayer, probs: Tensor, chosen: Tensor) -> EchoMoELayer:
    """The layer with this routing in place of its router."""
    layer.router = ForcedRouter(probs, chosen)
    return layer


class ShapeRecorder(TorchDispatchMode):
    """Records every operator, in order, with shape, strides and dtype of what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, tuple]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [
            (str(func), (tuple(leaf.shape), leaf.stride(), leaf.dtype))
            for leaf in tree_leaves(result)
            if isinstance(leaf, Tensor)
        ]
        return result
