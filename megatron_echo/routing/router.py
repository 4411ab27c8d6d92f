"""Megatron's router with a fixed skew, for tests and benchmarks."""

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class SkewedRouter(TopKRouter):
    """Adds ``-alpha * log(place)`` to the logits, the places in a fixed order for each layer.

    Softmax turns that into Zipf's law, ``place ** -alpha``, on top of what the router has learnt.
    The order depends on the layer's number only: the same on every rank and in every run.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Logits ``[..., E]``."""
        return super().gating(input) + self._bias(input.device)

    def _bias(self, device: Any) -> Tensor:
        experts = self.config.num_moe_experts
        generator = torch.Generator().manual_seed(self.layer_number or 0)
        place = torch.randperm(experts, generator=generator).to(device) + 1
        return -self.config.moe_echo_force_skew * place.float().log()
