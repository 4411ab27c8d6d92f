"""Megatron's token dispatcher interface with static shapes and no host read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from megatron.core.utils import get_pg_rank
from torch import Tensor

from megatron_echo.call_roles import Role
from megatron_echo.collectives import all_gather, gather, reduce_scatter
from megatron_echo.compatibility import has_layer_graphs
from megatron_echo.config import echo_setting, num_clone_slots, row_alignment
from megatron_echo.dispatch.clones_of_call import Clones, Homecoming
from megatron_echo.dispatch.layout import PairCounts, histogram, round_rows, share_of
from megatron_echo.dispatch.permute import stand_for_rows
from megatron_echo.dispatch.reroute import (
    compact_probs,
    compact_routing,
    pair_counts,
    physical_experts,
)
from megatron_echo.dispatch.transports import (
    AllGatherTransport,
    AllToAllTransport,
    CollectiveWeights,
    Delivery,
    HybridEPBuffers,
    HybridEPTransport,
    NcclEPContext,
    NcclEPTransport,
    NodeBuffers,
    PeerBuffers,
    PeerToPeerWeights,
    SymmetricMemoryTransport,
    SymmetricMemoryWeights,
    TokenTransport,
    Transports,
    WeightTransport,
)
from megatron_echo.environment import on_gpu
from megatron_echo.plan_settings import plan_tolerance, token_capacity
from megatron_echo.planner import ClonePlan, balance_bound, planner_backend
from megatron_echo.step.overflow import too_many_tokens
from megatron_echo.step.step_end import StepEnd


def _padded(rows: Tensor, more: int, value: int = 0) -> Tensor:
    """Rows ``[T, X]``, and so many more of one value behind them; fewer, if that is below 0."""
    return F.pad(rows, (0, 0, 0, more), value=value) if more else rows


def _millionths(part: Tensor, whole: int) -> Tensor:
    """``part / whole`` in millionths, rounded up."""
    return (part * 10**6 + whole - 1) // max(whole, 1)


@dataclass(frozen=True)
class _Call:
    """What one forward pass hands from stage to stage; replaced, never changed.

    The stages of a layer's forward passes come one pass after the other, in every schedule of
    Megatron's. What backward needs is in autograd's graph, of as many passes as there are.
    """

    shape: torch.Size
    dtype: torch.dtype
    experts: Tensor
    plan: ClonePlan | None = None
    clones: Clones | None = None
    counts: PairCounts | None = None
    receipt: Any = None
    ends: Tensor | None = None
    packed: Tensor | None = None


class EchoTokenDispatcher(MoETokenDispatcher):
    """Dispatches tokens to the experts of an expert-parallel group; see ``dispatch/layout.py``.

    Rows of the receive buffer: ``--moe-received-token-capacity`` times ``T * K`` (1.0 is perfect
    balance), plus what the row alignment may add, rounded up to one of a few sizes. ``auto`` is the
    planner's bound with at least E / R clone slots on a rank, and without clones the most that
    routing can bring: neither overflows. Between them it is ``token_capacity``. Evaluation, and a
    pass that trains nothing, take the most too, whatever was given: nothing is kept there.

    Ranks of an expert-tensor-parallel group hold slices of the same experts. They gather their
    tokens before everything else, so that T counts those of the group, make the same plan, and
    sum their parts of the result in the end; a clone's slice comes from the same slice of its home.

    With ``--moe-shared-expert-overlap`` the layer hands its shared expert over
    (``set_shared_experts``): its stages run on a side stream beside dispatch and combine, in the
    places that Megatron's dispatchers give them.

    With ``--overlap-moe-expert-parallel-comm`` dispatch and combine are on a stream of their own,
    beside the backward pass of another microbatch.

    Attributes:
        num_groups: experts and clone slots of a rank.
        role: of the calls to come, UNRECORDED in evaluation.
        layer_number: Megatron's, from 1.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        num_slots: int | None = None,
        pack: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Set up for one layer.

        Args:
            config: with the fields of this package, or a plain one for their defaults.
            pg_collection: ``ep``, ``expt_dp``, ``pp`` and ``expt_tp`` are used.
            num_slots: S, by default that of the configuration.
            pack: makes of tokens ``[T, H]`` what travels in their place, integers ``[T, X]``, by
                the transports that take them.
        """
        super().__init__(config=config, pg_collection=pg_collection)
        self._topk = config.moe_router_topk
        self._num_experts = config.num_moe_experts
        self._slots = num_clone_slots(config) if num_slots is None else num_slots
        self._per_rank = self._num_experts // self.ep_size
        self.num_groups = self._per_rank + self._slots
        self._alignment = row_alignment(config)
        self._capacity = token_capacity(config, self._slots)
        self._tolerance = plan_tolerance(config)
        self._min_tokens = echo_setting(config, "moe_echo_min_tokens_per_clone")
        self._ranks_per_node = echo_setting(config, "moe_echo_ranks_per_node")
        self._most_tokens = echo_setting(config, "moe_echo_max_tokens_per_rank")
        self._is_within_node = echo_setting(config, "moe_echo_clones_within_node")
        self.planner = planner_backend(echo_setting(config, "moe_echo_planner_backend"))
        self._ways = Transports.of(config, config, self.ep_group)
        self._overlaps = config.overlap_moe_expert_parallel_comm
        self._transport = self._make_transport(self._ways.tokens)
        self._weights = self._make_weight_transport(self._ways.weights)
        self._pack = pack if self._transport.moves_any_bits else None
        self._step_end = StepEnd.of(config)
        ranks_here = (self.ep_rank, self.tp_rank, get_pg_rank(pg_collection.expt_dp))
        self._is_traced = ranks_here == (0, 0, 0)
        self._stage = get_pg_rank(pg_collection.pp)
        self._call: _Call | None = None
        self.role = Role.RECORDED
        self.layer_number = 0

    def _make_transport(self, way: str) -> TokenTransport:
        sizes = (self.num_groups, self._alignment)
        if way == "all_gather":
            is_wide = echo_setting(self.config, "moe_echo_fp32_sums_on_the_wire")
            return AllGatherTransport(self.ep_group, *sizes, is_wide)
        if way == "hybrid_ep":
            return HybridEPTransport(HybridEPBuffers.of(self.config, self.ep_group), *sizes)
        if way == "nccl_ep":
            return NcclEPTransport(NcclEPContext.of(self.config, self.ep_group), *sizes)
        if way == "symmetric_memory":
            return SymmetricMemoryTransport(self._peer_buffers(self.ep_group), *sizes)
        peer_capacity = echo_setting(self.config, "moe_echo_peer_capacity")
        return AllToAllTransport(self.ep_group, *sizes, peer_capacity)

    def _peer_buffers(self, group: dist.ProcessGroup) -> PeerBuffers:
        kind = PeerBuffers if group.size() == self.ep_size else NodeBuffers
        return kind.of(self.config, group, has_layer_graphs(self.config))

    def _make_weight_transport(self, way: str) -> WeightTransport:
        group = self._ways.clone_group
        if way == "symmetric_memory" and self._slots > 0:
            return SymmetricMemoryWeights(
                self._peer_buffers(group), self._per_rank, not self._overlaps
            )
        return (PeerToPeerWeights if way == "p2p" else CollectiveWeights)(group, self._per_rank)

    def buffer_rows(self, tokens: int) -> int:
        """Rows of the receive buffer for T tokens on each rank."""
        most = self.ep_size * tokens * min(self._topk, self.num_groups)
        rows = most
        if self._capacity is None and self._slots * self.ep_size >= self._num_experts:
            total = tokens * self._topk * self.ep_size
            rows = balance_bound(total, self.ep_size, self._tolerance)
        elif self._capacity is not None and self._is_training:
            rows = share_of(self._capacity, tokens * self._topk)
        return round_rows(
            min(rows, most) + self.num_groups * (self._alignment - 1), self._alignment
        )

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Flatten the tokens and compact the routing.

        Args:
            hidden_states: ``[s, b, H]``.
            routing_map: bool ``[T, E]``, ``T = s * b``.
            probs: ``[T, E]``, fp32 or wider.

        Returns:
            Tokens ``[T, H]`` and the probabilities of the chosen experts ``[T, K]``; with
            ``--moe-echo-max-tokens-per-rank`` that is T from here on, the rows behind the tokens
            are zeros without an expert, and ``combine_postprocess`` takes them away. Of more
            tokens than that the last have no expert, and the end of the step stops all ranks.

        Raises:
            ValueError: more tokens than that in a pass that trains nothing: no step ends it.
        """
        own = compact_routing(routing_map, self._topk)
        more = self._missing(len(own))
        experts = gather(_padded(own, more, self._num_experts), self.tp_group)
        self._ways.announce(len(experts), self._slots)
        brought = len(experts) if self._most_tokens is None else max(len(own), self._most_tokens)
        self._step_end.overflow.record_tokens(brought, self.ep_group)
        call = _Call(hidden_states.shape, hidden_states.dtype, experts)
        self._call = call = self._with_plan(call)
        weights = compact_probs(probs, own)
        if self.role.counts:
            self._observe(call.plan, experts)
            self._step_end.record_routing(self.layer_number, own, weights)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        return _padded(tokens, more), _padded(weights, more)

    def _missing(self, tokens: int) -> int:
        """Rows from the tokens of this call to ``--moe-echo-max-tokens-per-rank``; or below 0."""
        most = self._most_tokens
        if most is not None and tokens > most and not self._is_training:
            raise ValueError(too_many_tokens(tokens, most))
        return 0 if most is None else most - tokens

    @property
    def _is_training(self) -> bool:
        return self.role is not Role.UNRECORDED

    def _observe(self, plan: ClonePlan | None, experts: Tensor) -> None:
        if plan is None:
            homes = experts.reshape(-1).to(torch.int64) // self._per_rank
            pairs = histogram(homes, self.ep_size + 1)[:-1]  # the last is for no expert
            self._step_end.statistics.record_local(pairs, self.ep_group)
            return
        self._step_end.statistics.record(plan)
        if self._is_traced and self._step_end.trace.is_on:
            self._step_end.trace.record(self.layer_number, self._stage, plan)

    @torch.no_grad()
    def _with_plan(self, call: _Call) -> _Call:
        """Gather the counts of all ranks, plan, and send each pair to an expert or its clone.

        The only exchange of counts, left out where nobody needs them. Every rank makes the same
        plan, bit by bit.
        """
        if self._slots == 0 and not self._transport.needs_counts:
            return call
        routed_here = histogram(call.experts.reshape(-1).to(torch.int64), self._num_experts + 1)
        routed = gather(routed_here[None, : self._num_experts], self.ep_group)
        if self._slots == 0:
            return replace(call, counts=PairCounts.of(routed, self.ep_rank))
        plan = self.planner(
            routed, self._slots, self._tolerance, self._min_tokens, self._ranks_per_node,
            self._is_within_node, self._ways.price,
        )  # fmt: skip
        below, up_to = plan.split_up_to(self.ep_rank)
        split = up_to - below
        slots = self._weights.slots(plan.slot_expert, self.ep_rank)
        return replace(
            call,
            experts=physical_experts(call.experts, plan, split),
            plan=plan,
            clones=Clones(slots, self._weights, self._weights.announce(slots)),
            counts=pair_counts(plan, below, split) if self._transport.needs_counts else None,
        )

    def expect(self, homecoming: Homecoming | None) -> None:
        """Let the gradients of the call in progress arrive there."""
        call = self._current()
        if call.clones is not None and homecoming is not None:
            self._call = replace(call, clones=replace(call.clones, homecoming=homecoming))

    @property
    def hides_clones(self) -> bool:
        """Whether weights and gradients of clones travel beside compute."""
        return self._slots > 0 and self._weights.is_hidden

    @property
    def plan(self) -> ClonePlan | None:
        """The plan of the call in progress, None if the layer makes no clones."""
        return self._current().plan

    @property
    def clones(self) -> Clones | None:
        """The clones of the call in progress, None if the layer makes none."""
        return self._current().clones

    @property
    def packed(self) -> Tensor | None:
        """The rows of the call in progress as ``pack`` made them, ``[B, X]``, if it did."""
        return self._current().packed

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Bring each token-expert pair into its row: ``[B, H]`` and ``[B]``, grouped by expert.

        Where rows are :attr:`packed`, NaN stands for them, and gets their gradients.
        """
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        probs = all_gather(probs, self.tp_group)
        moved = hidden_states if self._pack is None else self._pack(hidden_states.detach())
        moved = all_gather(moved, self.tp_group)
        call, tokens = self._current(), len(moved)
        self._use_here((call.experts, *(vars(call.counts).values() if call.counts else ())))
        delivery = self._transport.dispatch(
            moved, call.experts, probs, self.buffer_rows(tokens), self._is_training, call.counts
        )
        rows, packed = delivery.rows, None
        if self._pack is not None:  # gradients of rows go home as results do
            receipt, packed = delivery.receipt, rows
            rows = stand_for_rows(hidden_states, len(rows), lambda grad: self._home(grad, receipt))
        self._call = replace(call, receipt=delivery.receipt, ends=delivery.ends, packed=packed)
        if self._is_training:
            self._record(delivery, tokens)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc1_forward_and_act(rows)
        return rows, delivery.probs

    def _use_here(self, tensors: Iterable[Tensor]) -> None:
        """Let no other stream reuse their memory before the current one, if another made them."""
        for tensor in tensors if self._overlaps else ():
            if on_gpu(tensor):
                tensor.record_stream(torch.cuda.current_stream())

    def _record(self, delivery: Delivery, tokens: int) -> None:
        """Note on the device what would have sufficed; nothing is read."""
        pairs, padding = tokens * self._topk, self.num_groups * (self._alignment - 1)
        part = _millionths((delivery.need - padding).clamp(min=0), pairs)
        overflow = self._step_end.overflow
        overflow.record_rows(part, delivery.dropped, self.role.counts)
        if delivery.limit is not None:
            most, cut = delivery.limit
            overflow.record_wire(
                _millionths(most, tokens), _millionths(cut, pairs), cut, self.role.counts
            )

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Say where the groups are.

        Returns:
            The rows ``[B, H]``, int32 ``[G]`` the end of each group, and the rows' probabilities
            ``[B]``.
        """
        ends = self._current().ends
        assert ends is not None, "token_dispatch has not been called"
        self._use_here((hidden_states, ends, probs))
        return hidden_states, ends, probs

    @property
    def _comm_manager(self) -> SimpleNamespace:
        """What Megatron's schedule tells, and asks, a dispatcher that keeps its tensors itself."""
        return SimpleNamespace(get_number_of_tokens_per_expert=lambda: self._current().ends)

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing: the transport takes rows."""
        return hidden_states

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """Bring the experts' outputs ``[B, H]`` home and sum them: ``[T, H]``, wide dtype."""
        if self.shared_experts is not None:
            self.shared_experts.wait_current_stream()
        total = self._home(hidden_states, self._current().receipt)
        if self.shared_experts is not None:
            self.shared_experts.linear_fc2_forward(total)
            self.shared_experts.post_forward_comm()
        return total

    def _home(self, rows: Tensor, receipt: Any) -> Tensor:
        return reduce_scatter(self._transport.combine(rows, receipt), self.tp_group)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The layer's output in the dtype and shape of its input."""
        call = self._current()
        self._call = None
        if self._most_tokens is not None:
            hidden_states = _padded(hidden_states, call.shape[:-1].numel() - self._most_tokens)
        output = hidden_states.to(call.dtype).view(call.shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()

    def _current(self) -> _Call:
        assert self._call is not None, "dispatch_preprocess has not been called"
        return self._call
