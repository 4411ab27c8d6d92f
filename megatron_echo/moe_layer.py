"""The MoE layer: route, plan, dispatch, compute, combine; no host read, static shapes."""

import copy
import dataclasses
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_echo.call_roles import Role, role_of_call
from megatron_echo.compatibility import config_refusal
from megatron_echo.config import fp8_format
from megatron_echo.dispatch import EchoTokenDispatcher
from megatron_echo.dispatch.clones_of_call import Homecoming
from megatron_echo.dispatch.transports import Transports
from megatron_echo.experts import EchoGroupedMLP
from megatron_echo.experts.fp8 import FP8, pack_rows
from megatron_echo.experts.projection import FetchInBackward
from megatron_echo.free_ticket import FreeQueue
from megatron_echo.routing.router import EchoRouter
from megatron_echo.step.step_end import StepEnd


class _KeepsConfig(BaseMoELayer):
    """Stands between ``MoELayer`` and its base class, which gets the layer's own configuration.

    ``MoELayer`` reads from its argument which dispatcher to build, and takes ``self.config``, which
    the base class sets, for everything else.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **rest: Any) -> None:
        super().__init__(self.config, *args, **rest)


class EchoMoELayer(MoELayer, _KeepsConfig):
    """Megatron's ``MoELayer`` with this package's dispatcher and experts.

    A token's way: ``route`` (Megatron's router) -> ``preprocess`` (project tokens, with
    ``--moe-latent-size``, and plan the clones) -> ``dispatch`` (into a row on each rank that
    computes it) -> ``routed_experts_compute`` -> ``combine`` (home, and summed) -> ``postprocess``
    (plus the shared expert). Megatron's ``forward`` calls them in this order, as its recomputation
    does. With ``--overlap-moe-expert-parallel-comm`` its schedule calls them, each as a stage with
    a graph of its own, and holds what passes between stages until backward. What nobody reads again
    is freed through tickets.

    Attributes:
        frees: of those tickets.
        schedule_state: of the microbatch that this schedule routes, where that has a
            ``padding_mask``, bool ``[b, s]``; else None.
    """

    token_dispatcher: EchoTokenDispatcher

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules | None = None,
        layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        """Build the layer; the arguments are those of Megatron's.

        Args:
            config: with this package's fields, or Megatron's plain one for their defaults.
            submodules: shared experts and a router of the user's are used, experts are ours.
            layer_number: arrives later through ``set_layer_number``.
            pg_collection: the process groups, Megatron's global ones by default.
            is_mtp_layer: in a multi-token-prediction layer.
            name: Megatron's name of this module.

        Raises:
            ValueError: a setting that the layer cannot work with, and what to do.
        """
        problem = config_refusal(config)
        if problem is not None:
            raise ValueError(f"The ECHO MoE layer {problem}")
        groups = pg_collection or get_default_pg_collection()
        Transports.of(config, config, groups.ep)  # what it decides is read off the configuration
        submodules = dataclasses.replace(submodules or MoESubmodules(None), experts=EchoGroupedMLP)
        if submodules.router is TopKRouter:
            submodules = dataclasses.replace(submodules, router=EchoRouter)
        self.config = config
        without_packages = copy.copy(config)  # flex would need DeepEP, for nothing
        without_packages.moe_token_dispatcher_type = "allgather"
        super().__init__(without_packages, submodules, layer_number, groups, is_mtp_layer, name)
        self.frees = FreeQueue("off")
        if config.overlap_moe_expert_parallel_comm:
            self.frees = FreeQueue("free")
            # The schedule frees what the dispatcher of these words needs no more, as ours.
            config.moe_token_dispatcher_type = "flex"
            config.moe_flex_dispatcher_backend = "hybridep"
        self.schedule_state: Any = None
        self._made: dict[str, Tensor] = {}
        self._groups = groups
        self.token_dispatcher = self._dispatcher()
        if self.shared_expert_overlap and self.shared_experts is not None:
            self.token_dispatcher.set_shared_experts(self.shared_experts)
        self._step_end = StepEnd.of(config)
        self._self_check = self._step_end.self_check
        self._build_number = self._self_check.register()
        self._checked_call: tuple[Tensor, Tensor, Tensor] | None = None
        self._homecoming: Homecoming | None = None

    def _dispatcher(self, num_slots: int | None = None) -> EchoTokenDispatcher:
        form, pack = fp8_format(self.config), None
        if form is not None and not self.config.moe_apply_probs_on_input:
            pack = partial(pack_rows, form=form)
        return EchoTokenDispatcher(self.config, self._groups, num_slots, pack)

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron's number of this layer, from 1; MTP layers come after the others."""
        super().set_layer_number(layer_number)
        before = self.config.num_layers if self.is_mtp_layer else 0
        self.token_dispatcher.layer_number = before + layer_number

    def route(
        self, hidden_states: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Choose experts; padding is sent to none.

        Args:
            hidden_states: ``[s, b, H]``.
            padding_mask: bool ``[s, b]``, True for padding.

        Returns:
            Probabilities ``[T, E]`` and the map of choices, bool ``[T, E]``, ``T = s * b``.
        """
        if self.schedule_state is not None:
            padding_mask = self.schedule_state.padding_mask.transpose(0, 1).bool()
        probs, routing_map = super().route(hidden_states, padding_mask)
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask.reshape(-1, 1)
        return probs, routing_map

    def await_gradients(self, hidden_states: Tensor) -> Tensor:
        """Let gradients of clones travel while backward passes through what follows.

        The experts' parameters get theirs behind it: see :class:`Homecoming`.

        Args:
            hidden_states: that of which the next call of this layer is computed.

        Returns:
            What to use in its place.
        """
        self._homecoming = None
        if not (self.token_dispatcher.hides_clones and torch.is_grad_enabled()):
            return hidden_states
        experts = self.experts
        weights = experts.linear_fc1.weight, experts.linear_fc2.weight
        self._homecoming = Homecoming()
        return self._homecoming.attach(hidden_states, weights)

    def preprocess(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Plan the clones and say which copy of an expert computes each token.

        See ``EchoTokenDispatcher.dispatch_preprocess``.
        """
        role = role_of_call() if self.training else Role.UNRECORDED
        if role is not Role.UNRECORDED:
            self._step_end.note(role)
        self.token_dispatcher.role = role
        self._checked_call = None  # of a call that did not reach combine
        if self._homecoming is None:
            hidden_states = self.await_gradients(hidden_states)
        tokens, weights = super().preprocess(hidden_states, probs, routing_map)
        self.token_dispatcher.expect(self._homecoming)
        self._homecoming = None
        if role.counts and self._self_check.is_due(self._build_number):
            latent = tokens.detach().view(*hidden_states.shape[:-1], -1)
            self._checked_call = latent, probs.detach(), routing_map
        return tokens, weights

    def dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the tokens to their experts, and clones of the first projection meanwhile."""
        self.experts.fetch_fc1(self.token_dispatcher.clones)
        return super().dispatch(hidden_states, probs)

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Through home experts and clones.

        Args:
            hidden_states: ``[B, H]``, the rows that ``dispatch`` delivered.
            probs: ``[B]``.

        Returns:
            ``[B, H]``, and no bias.
        """
        dispatcher = self.token_dispatcher
        rows, ends, row_probs = dispatcher.dispatch_postprocess(hidden_states, probs)
        experts = self.experts
        output, _ = experts(rows, ends, row_probs, dispatcher.clones, dispatcher.packed)
        self._made["rows"] = dispatcher.combine_preprocess(output)
        return self._made["rows"], None

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """Megatron's, ``[s, b, H]``; None without, or where it overlaps."""
        output: Tensor | None = super().shared_experts_compute(hidden_states)
        if output is not None:
            self._made["shared"] = output
        return output

    def postprocess(self, output: Tensor, shared_expert_output: Tensor | None) -> Tensor:
        """Megatron's: ``[T, H]`` in the wide dtype to ``[s, b, H]``, plus the shared expert."""
        if shared_expert_output is None:
            return super().postprocess(output, None)
        made = self._made.pop("shared", shared_expert_output)
        ticket = self.frees.ticket(shared_expert_output, made)
        with ticket.consumer():
            output = super().postprocess(output, shared_expert_output)
        ticket.free()
        return output

    def combine(self, output: Tensor) -> Tensor:
        """Bring the sums back to the tokens' own ranks; see ``--moe-echo-check-every``."""
        clones = self.token_dispatcher.clones
        ticket = self.frees.ticket(output, self._made.pop("rows", output))
        with ticket.consumer():
            combined = super().combine(output)
        ticket.free()
        if self.token_dispatcher.hides_clones:
            combined = FetchInBackward.apply(combined, self.experts.linear_fc2, clones)
        if self._checked_call is not None:
            expected = self._without_clones(*self._checked_call)
            plan, self._checked_call = self.token_dispatcher.plan, None
            assert plan is not None
            dtype = FP8 if fp8_format(self.config) else self.config.params_dtype
            self._self_check.record(combined, expected, plan, self.ep_group, dtype)
        return combined

    @torch.no_grad()
    def _without_clones(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Tensor:
        dispatcher = self._dispatcher(num_slots=0)
        dispatcher.role = Role.UNRECORDED  # the largest buffer, and no record
        tokens = dispatcher.dispatch_preprocess(hidden_states, routing_map, probs)
        rows, ends, row_probs = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*tokens))
        output, _ = self.experts(rows, ends, row_probs, None, dispatcher.packed)
        return dispatcher.token_combine(dispatcher.combine_preprocess(output))
