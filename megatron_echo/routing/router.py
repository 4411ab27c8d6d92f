"""Megatron's router with exact losses, and a fixed skew for tests and benchmarks."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_utils import (
    apply_router_token_dropping,
    group_limited_topk,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplayAction
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.call_roles import Role, role_of_call
from megatron_echo.compatibility import has_layer_graphs
from megatron_echo.config import echo_setting
from megatron_echo.routing.aux_loss import count_tokens, router_scores
from megatron_echo.routing.injection import attach_losses
from megatron_echo.routing.losses import LayerLosses, RouterLossSettings
from megatron_echo.routing.replay import ReplayedLayer, ReplayedRouting
from megatron_echo.step.counts import CountExchange
from megatron_echo.step.step_end import StepEnd


class _Gather(torch.autograd.Function):
    """``scores.gather(1, chosen)``, which itself would save the scores for its backward pass."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, chosen: Tensor) -> Tensor:
        ctx.save_for_backward(chosen)
        ctx.shape = scores.shape
        return scores.gather(1, chosen)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        return grad.new_zeros(ctx.shape).scatter_(1, chosen, grad), None


@contextlib.contextmanager
def _replayed_again(replay: Any, role: Role) -> Iterator[None]:
    """Let a recomputation under Megatron's ``RouterReplay`` take the ids of its first pass.

    Those of the latest call would be another microbatch's, where several are in flight.
    """
    is_forward = getattr(replay, "router_replay_action", None) is RouterReplayAction.REPLAY_FORWARD
    if is_forward and role.is_again:
        replay.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)
        try:
            yield
        finally:  # a recomputation stops at the last tensor that is needed
            replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    else:
        yield


_HAS_COUNTS = "moe_echo_previous_counts"
"""The key of a checkpoint's content metadata that says whether it has ``previous_counts``."""

_WITHOUT_TOPK = ("sinkhorn", "quantile_balancing")
"""Ways of routing that leave no room for a load-balancing loss; Megatron's code serves them."""


class EchoRouter(TopKRouter):
    """Routes as ``TopKRouter`` does, to the bit, and attaches the losses of ``losses.py``.

    Stands in ``MoESubmodules.router``. The losses are Megatron's own flags:
    ``--moe-router-load-balancing-type``, ``--moe-aux-loss-coeff`` and ``--moe-z-loss-coeff``.
    Without any of them, with ``--moe-echo-aux-mcore-compat``, and in evaluation or a reference
    model's pass (``call_roles.py``) the forward pass is Megatron's and leaves no trace.
    """

    previous_counts: Tensor
    local_tokens_per_expert: Tensor | None

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
    ) -> None:
        """Build Megatron's router; settings of losses that contradict are a ``ValueError``."""
        super().__init__(config, pg_collection, is_mtp_layer)
        settings = RouterLossSettings.from_config(config)
        self.losses: LayerLosses | None = None
        if echo_setting(config, "moe_echo_replay_routing") is not None:
            replay = StepEnd.of(config).replay = ReplayedRouting.of(config, config)
            self.router_replay = ReplayedLayer(replay)
        self._tokens_vary = echo_setting(config, "moe_echo_max_tokens_per_rank") is not None
        self._skew = echo_setting(config, "moe_echo_force_skew")
        self._skew_bias: Tensor | None = None
        self._is_megatrons = settings.mcore_compat
        if self.local_tokens_per_expert is not None:  # integers: a model in bf16 leaves them alone
            self.local_tokens_per_expert = self.local_tokens_per_expert.long()
        if not settings.any or config.moe_router_load_balancing_type in _WITHOUT_TOPK:
            return
        if settings.keeps_previous:
            zeros = torch.zeros(2, config.num_moe_experts, device=torch.cuda.current_device())
            self.register_buffer("previous_counts", zeros)
        step = StepEnd.of(config)
        if step.exchange is None:  # all routers of a model share it
            of_sequences = self.tp_cp_group if settings.counts_sequences else None
            in_graphs = has_layer_graphs(config)
            step.exchange = CountExchange(of_sequences, self.tp_dp_cp_group, in_graphs)
        is_repeated = is_mtp_layer and config.mtp_use_repeated_layer
        calls_per_microbatch = (config.mtp_num_layers or 1) if is_repeated else 1
        previous = (lambda: self.previous_counts) if settings.keeps_previous else None
        self.losses = LayerLosses(
            settings, config, self, step.exchange, calls_per_microbatch, previous
        )

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's number of this layer, from 1; MTP layers come after the others."""
        super().set_layer_number(layer_number)
        before = self.config.num_layers if self.is_mtp_layer else 0
        if self.losses is not None:
            self.losses.layer_number = before + layer_number
        if isinstance(self.router_replay, ReplayedLayer):
            self.router_replay.layer_number = before + layer_number

    def gating(self, input: Tensor) -> Tensor:
        """Logits ``[..., E]``; of no tokens too, which Megatron's function cannot.

        ``--moe-echo-force-skew`` adds ``-alpha * log(position)``, the positions in an order of
        each layer's own, the same on every rank and in every run. Softmax turns that into Zipf's
        law, ``position ** -alpha``, on top of what the router has learnt.
        """
        if not input.numel():
            logits = super().gating(input.new_zeros(1, input.shape[-1]))
            return logits[:0].view(*input.shape[:-1], logits.shape[-1])
        logits = super().gating(input)
        if self._skew == 0:
            return logits
        if self._skew_bias is None or self._skew_bias.device != input.device:
            generator = torch.Generator().manual_seed(self.layer_number or 0)
            position = torch.randperm(logits.shape[-1], generator=generator).to(input.device) + 1
            self._skew_bias = -self._skew * position.float().log()
        return logits + self._skew_bias

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Choose experts from logits ``[s, b, E]``; padding is bool ``[s, b]``.

        Gives the probabilities ``[T, E]`` and the map of choices, bool ``[T, E]``.
        """
        role = role_of_call() if self.training else Role.UNRECORDED
        with _replayed_again(self.router_replay, role):
            if self.losses is None or role is Role.UNRECORDED:
                return super().routing(logits, padding_mask)
            return self._routing_with_losses(logits, padding_mask, role)

    def _routing_with_losses(
        self, logits: Tensor, padding_mask: Tensor | None, role: Role
    ) -> tuple[Tensor, Tensor]:
        assert self.losses is not None
        StepEnd.of(self.config).note(role)
        valid = None if padding_mask is None else ~padding_mask
        if valid is None and self._tokens_vary:  # how many there are in all is counted then
            valid = logits.new_ones(logits.shape[:2], dtype=torch.bool)
        call, is_new = self.losses.enter(role, logits.shape[:2].numel(), valid is not None)
        probs, routing_map = self._route(logits, valid, call)
        if is_new:
            counted = self._counted_map(logits, routing_map).view_as(logits)
            self.losses.write(call, count_tokens(counted, valid))
        if role.counts and not logits.requires_grad:
            self.losses.record_at_end(logits, valid, call)
        if self.config.moe_expert_capacity_factor is not None:
            probs, routing_map = apply_router_token_dropping(
                probs,
                routing_map,
                router_topk=self.topk,
                capacity_factor=self.config.moe_expert_capacity_factor,
                drop_policy=self.config.moe_token_drop_policy,
                pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
            )
        self._apply_expert_bias(routing_map, padding_mask)
        return probs, routing_map

    def _route(self, logits: Tensor, valid: Tensor | None, call: int) -> tuple[Tensor, Tensor]:
        """Probabilities and map of choices, with the losses attached where there are gradients."""
        assert self.losses is not None
        # One node can serve routing and losses, so that only one tensor is saved.
        from_scores = not self.config.moe_router_fusion and (
            self.score_function != "softmax" or self.config.moe_router_pre_softmax
        )
        dtype = logits.dtype
        if torch.is_grad_enabled():
            logits = attach_losses(logits, valid, self.losses, call, from_scores)
        elif from_scores:
            logits = router_scores(logits, self.score_function, torch.float32)
        if from_scores:
            return self._choose(logits.view(-1, logits.shape[-1]), dtype)
        return topk_routing_with_score_function(
            logits.view(-1, logits.shape[-1]),
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            expert_bias=self.expert_bias,
            fused=self.config.moe_router_fusion,
            router_replay=self.router_replay,
        )

    def _choose(self, scores: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What Megatron's ``topk_routing_with_score_function`` does after the score function."""
        ranked = scores.detach()
        if self.expert_bias is not None and self.score_function != "softmax":
            ranked = ranked + self.expert_bias.float()
        chosen = self._top_experts(ranked)
        probs = _Gather.apply(scores, chosen)
        if self.score_function != "softmax" and self.topk > 1:
            probs = probs / (probs.sum(-1, keepdim=True) + 1e-20)
        if self.config.moe_router_topk_scaling_factor:
            probs = probs * self.config.moe_router_topk_scaling_factor
        empty = torch.zeros_like(scores, dtype=dtype)
        routing_map = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)
        return empty.scatter(1, chosen, probs.to(dtype)), routing_map

    def _top_experts(self, ranked: Tensor) -> Tensor:
        groups, group_topk = self.config.moe_router_num_groups, self.config.moe_router_group_topk

        def choose(
            scores: Tensor, topk: int, num_groups: int | None = None, group_topk: int | None = None
        ) -> tuple[Tensor, Tensor]:
            if group_topk:
                return group_limited_topk(scores, topk, *scores.shape, num_groups, group_topk)
            values, chosen = scores.topk(topk, dim=1, sorted=torch.is_grad_enabled())
            return values, chosen

        if self.router_replay is None:
            return choose(ranked, self.topk, groups, group_topk)[1]
        return self.router_replay.get_replay_topk(ranked, self.topk, groups, group_topk, choose)[1]

    @torch.no_grad()
    def _counted_map(self, logits: Tensor, routing_map: Tensor) -> Tensor:
        """The choices that the losses count, bool ``[T, E]``."""
        assert self.losses is not None
        is_plain = (
            self.expert_bias is None
            and not self.config.moe_router_group_topk
            and self.router_replay is None
        )
        if is_plain or self.losses.settings.counted == "assigned":
            return routing_map
        # Every score function rises with the logit.
        chosen = logits.view(routing_map.shape).topk(self.topk, dim=1, sorted=False).indices
        return torch.zeros_like(routing_map).scatter_(1, chosen, True)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """Count the assignments for the update of the bias: valid tokens, each one once.

        The counter is int64: exact, and not a buffer that ``Float16Module`` rounds.
        """
        if self._is_megatrons:
            super()._apply_expert_bias(routing_map, padding_mask=padding_mask)
            return
        if not self.enable_expert_bias or not self.training or not role_of_call().counts:
            return
        assert self.local_tokens_per_expert is not None
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask.reshape(-1, 1)
            self.local_tokens_per_expert += routing_map.sum(dim=0)

    def _maintain_float32_expert_bias(self) -> None:
        """Keep the buffers that accumulate in fp32, whatever the model's dtype."""
        super()._maintain_float32_expert_bias()
        if hasattr(self, "previous_counts"):
            self.previous_counts.data = self.previous_counts.data.float()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Megatron's entries; with ``previous_counts`` where there are any.

        The checkpoints of Megatron's router have none. Which ones do stands in the content
        metadata of a checkpoint, which Megatron saves after this call and hands over in loading.
        """
        metadata = {} if metadata is None else metadata
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        if hasattr(self, "previous_counts"):
            if metadata.get(_HAS_COUNTS) or bool(self.previous_counts.any()):
                metadata[_HAS_COUNTS] = True
            else:
                del state[f"{prefix}previous_counts"]
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        if hasattr(self, "previous_counts"):
            state_dict.setdefault(f"{prefix}previous_counts", self.previous_counts)
        super()._load_from_state_dict(state_dict, prefix, *args)
