"""Small routers, Megatron's and ours, with the same weights."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_default_pg_collection,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.routing.router import EchoRouter
from megatron_echo.step.step_end import StepEnd

HIDDEN, EXPERTS, TOPK = 16, 8, 2

SCORES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "pre_softmax": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
    "sigmoid_scaled": {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
    },
    "sqrtsoftplus": {"moe_router_score_function": "sqrtsoftplus"},
    "groups": {
        "moe_router_pre_softmax": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
    },
    "sigmoid_groups": {
        "moe_router_score_function": "sigmoid",
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_enable_expert_bias": True,
    },
    "one_choice": {"moe_router_topk": 1, "moe_router_pre_softmax": True},
}
ALL_LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [1e-2, 2e-2, 3e-2],
    "moe_z_loss_coeff": 1e-3,
}
GPIPE, LAST_STAGE = "F F F F B B B B", "F B F B F B F B"
"""Orders of the forward and backward passes of four microbatches."""
KINDS = {"aux": "aux_loss", "seq": "seq_aux_loss", "global": "global_aux_loss"}


def only(kind: str, coefficient: float = 0.1) -> dict[str, Any]:
    """The settings of one loss: ``aux``, ``seq``, ``global`` or ``z``."""
    if kind == "z":
        return {"moe_router_load_balancing_type": "none", "moe_z_loss_coeff": coefficient}
    return {"moe_router_load_balancing_type": KINDS[kind], "moe_aux_loss_coeff": coefficient}


def config(**fields: Any) -> EchoTransformerConfig:
    """A configuration; the fields of this package that it lacks are set on the object."""
    ours = {name: fields.pop(name) for name in list(fields) if name.startswith("moe_echo")}
    settings: dict[str, Any] = {
        "num_layers": 2,
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK,
        "moe_router_dtype": "fp64",
        "params_dtype": torch.float64,
        "add_bias_linear": False,
        **fields,
    }
    made = EchoTransformerConfig(**settings)
    for name, value in ours.items():
        setattr(made, name, value)
    return made


def build(
    kind: type[TopKRouter], made: TransformerConfig, layer: int = 1, seed: int = 0
) -> TopKRouter:
    """A router with weights that depend on the seed and the layer only."""
    router = kind(made, get_default_pg_collection())
    router.set_layer_number(layer)
    generator = torch.Generator().manual_seed(1000 * seed + layer)
    with torch.no_grad():
        noise = torch.randn(router.weight.shape, generator=generator, dtype=torch.float64)
        router.weight.copy_(0.5 * noise)
        if router.expert_bias is not None:
            router.expert_bias.copy_(0.3 * torch.randn(EXPERTS, generator=generator))
    return router


def tokens(sequence: int, batch: int, seed: int = 0) -> Tensor:
    """Hidden states ``[S, B, H]``, fp64; sequences differ in what they are about."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randn(1, batch, HIDDEN, generator=generator, dtype=torch.float64)
    noise = torch.randn(sequence, batch, HIDDEN, generator=generator, dtype=torch.float64)
    return topic + noise


def padding(sequence: int, lengths: tuple[int, ...]) -> Tensor:
    """True for padding, ``[S, B]``."""
    return torch.arange(sequence)[:, None] >= torch.tensor(lengths)


def set_scale(scale: float) -> None:
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(scale)


def loss_gradient(router: TopKRouter, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
    """The losses' gradient by the weight, without that of a main loss."""
    router.weight.grad = None
    probs, _ = router(hidden, mask)
    (0 * probs).sum().backward()
    return torch.zeros_like(router.weight) if router.weight.grad is None else router.weight.grad


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def logged() -> dict[str, Tensor]:
    """What the tracker has, per layer, summed as it would be; then it is gone."""
    tracker, found = get_moe_metrics_tracker(), {}
    for name, entry in tracker.metrics.items():
        found[name] = entry.values.clone()
        if entry.reduce_group is not None:
            dist.all_reduce(found[name], group=entry.reduce_group)
    destroy_moe_metrics_tracker()
    return found


def end_step(router: EchoRouter) -> None:
    exchange = StepEnd.of(router.config).exchange
    assert exchange is not None
    exchange.end_step()
