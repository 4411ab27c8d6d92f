"""Step time and memory of one layout, by arithmetic: products, bytes over links, what is kept.

A layer call takes as long as its slowest rank::

    compute   18 H F x rows of the fullest rank / rate         gate, up, down; forward and backward
    tokens    4 passes of the rows, max(inside / NVLink, across / network)
    clones    weights to the slots (twice: again for backward), gradients home in fp32
    rest      attention, shared expert, router; the same on every rank

Inside and across run at the same time on their links. A step is all layer calls of a pipeline
stage, ``1 + (stages - 1) / microbatches`` times for the bubble, and what the last microbatch's
backward does not hide of the gradients' reduction and the weights' gathering.
"""

import math
from dataclasses import dataclass

import numpy as np

from megatron_echo.dispatch.layout import round_rows
from megatron_echo.observe.simulation.cluster import Cluster
from megatron_echo.observe.simulation.layout import Layout, Stage, Work, stages
from megatron_echo.observe.simulation.models import Model
from megatron_echo.observe.simulation.placement import Placement
from megatron_echo.planner import balance_bound

GIB = 2**30


@dataclass(frozen=True)
class Assumptions:
    """Figures that nobody measured here; each is printed with the results.

    Attributes:
        efficiency: products' rate over the peak.
        link_efficiency: bandwidth reached over that of the data sheet.
        exchange_us: latency of one collective, microseconds.
        plan_us: planning of a layer call, microseconds.
        reserve_gib: context, NCCL and fragmentation.
        peer_margin: room in an all-to-all's parts, over the fullest that was seen.
        capacity_margin: room in the receive buffer, over the fullest rank that was seen.
    """

    efficiency: float = 0.5
    link_efficiency: float = 0.8
    exchange_us: float = 20.0
    plan_us: float = 100.0
    reserve_gib: float = 4.0
    peer_margin: float = 1.25
    capacity_margin: float = 1.05


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: of the slowest stage, then what comes on top.

    Attributes:
        compute: products of routed experts on the fullest rank.
        tokens: their traffic.
        clones: weights and gradients of clones, and planning.
        rest: all other products.
        bubble: of the pipeline.
        exposed: reduction of gradients and gathering of weights that nothing hides.
        error: standard error of the total, from the layer calls that were looked at.
    """

    compute: float
    tokens: float
    clones: float
    rest: float
    bubble: float
    exposed: float
    error: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.compute + self.tokens + self.clones + self.rest + self.bubble + self.exposed


@dataclass(frozen=True)
class Memory:
    """GiB of the fullest rank of the fullest pipeline stage.

    Attributes:
        states: weights, gradients and optimizer.
        activations: kept for backward, of all microbatches in flight.
        clones: the pool of clones and the gradients that travel.
        working: buffers of one layer call.
        reserve: context, NCCL and fragmentation, assumed.
    """

    states: float
    activations: float
    clones: float
    working: float
    reserve: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.states + self.activations + self.clones + self.working + self.reserve


class CostModel:
    """Time and memory of layouts of one model on one cluster."""

    def __init__(
        self, cluster: Cluster, model: Model, work: Work, assumed: Assumptions | None = None
    ) -> None:
        """Set what does not change between layouts.

        Args:
            cluster: the machines.
            model: the model.
            work: batch and sequence.
            assumed: by default :class:`Assumptions` as they are.
        """
        self.cluster, self.model, self.work = cluster, model, work
        self.assumed = assumed or Assumptions()
        self._flops = cluster.tflops * 1e12 * self.assumed.efficiency

    def _seconds(self, inside: np.ndarray | float, across: np.ndarray | float) -> np.ndarray:
        """Of bytes of one rank inside its node and to others, both links at work."""
        rate = 1e9 * self.assumed.link_efficiency
        return np.maximum(
            np.asarray(inside, float) / (self.cluster.nvlink_gb_s * rate),
            np.asarray(across, float) / (self.cluster.network_gb_s * rate),
        )

    def _token_seconds(self, layout: Layout, placed: Placement) -> np.ndarray:
        """Of a layer call: rows there and back, for backward too, and again if recomputed."""
        ranks, width = layout.expert, 2 * self.model.hidden
        node = self.cluster.ranks_per_node(ranks)
        passes = (6 if layout.recompute else 4) if ranks > 1 else 0
        if layout.tokens_by == "megatron":
            inside, across = placed.rows_inside * width, placed.rows_across * width
        elif layout.tokens_by == "balanced":
            part = placed.mean * width / ranks
            inside, across = (node - 1) * part, (ranks - node) * part
        elif layout.tokens_by == "exact":
            inside = placed.placed * (placed.leave_rank - placed.leave_node) * width
            across = placed.placed * placed.leave_node * width
        else:
            rows = self._places(layout)
            # An all-gather's results travel in fp32 (2 of 4 passes): 1.5 times the bytes.
            part = np.full_like(placed.mean, rows * width)
            part *= 1.5 if layout.tokens_by == "all_gather" else 1.0
            inside, across = (node - 1) * part, (ranks - node) * part
        return passes * (self._seconds(inside, across) + self.assumed.exchange_us * 1e-6)

    def _places(self, layout: Layout) -> int:
        """Tokens that each rank sends to each rank."""
        if layout.tokens_by == "all_gather":
            return self.work.tokens
        return math.ceil(layout.peer_capacity * self.work.tokens)

    def _clone_seconds(self, layout: Layout, placed: Placement) -> np.ndarray:
        """A layer call's clones: bf16 weights forward, again for backward, fp32 gradients home."""
        if not layout.weights_by:
            return np.zeros_like(placed.mean)
        pushes = 3 if layout.recompute else 2
        size = self.model.expert_parameters * (2 * pushes + 4)
        inside, across = placed.clones_inside, placed.clones_across
        exchanges = 2.0 * (pushes + 1)  # two projections
        if layout.weights_by == "collective":
            node = self.cluster.ranks_per_node(layout.expert)
            inside = np.full_like(placed.mean, placed.slots * (node - 1))
            across = np.full_like(placed.mean, placed.slots * (layout.expert - node))
            exchanges *= placed.slots
        fixed = exchanges * self.assumed.exchange_us + self.assumed.plan_us
        return self._seconds(inside * size, across * size) + fixed * 1e-6

    def step_time(self, layout: Layout, placed: Placement) -> StepTime:
        """Seconds of a step.

        Args:
            layout: sizes that fit (:meth:`Layout.check`).
            placed: its layer calls, as many as one likes: their mean counts.
        """
        model, work = self.model, self.work
        again = 4 / 3 if layout.recompute else 1.0
        rows = placed.mean if layout.tokens_by == "balanced" else placed.placed
        compute = again * 6 * model.expert_parameters * rows / self._flops
        tokens = self._token_seconds(layout, placed)
        clones = self._clone_seconds(layout, placed)
        whole = compute + tokens + clones
        deviation = float(whole.std(ddof=1)) if len(whole) > 1 else 0.0
        microbatches = layout.microbatches(work)
        stretch = 1 + (layout.pipeline - 1) / microbatches

        def time_of(stage: Stage) -> StepTime:
            calls = stage.moe * microbatches
            rest = self._rest_flops(stage, again) * microbatches / self._flops
            busy = float(whole.mean()) * calls + rest
            return StepTime(
                compute=float(compute.mean()) * calls,
                tokens=float(tokens.mean()) * calls,
                clones=float(clones.mean()) * calls,
                rest=rest,
                bubble=busy * (stretch - 1),
                exposed=self._exposed(layout, stage, busy / microbatches * 2 / 3),
                error=stretch * calls * deviation / math.sqrt(len(whole)),
            )

        found = map(time_of, stages(model, layout, microbatches))
        return max(found, key=lambda time: time.total)

    def _rest_flops(self, stage: Stage, again: float) -> float:
        """Operations of a microbatch besides routed experts."""
        model, tokens = self.model, self.work.tokens
        flops = sum(
            layers * again * model.layer_flops(kind, tokens, self.work.sequence)
            for kind, layers in (("dense", stage.dense), ("moe", stage.moe))
        )
        return flops + (6 * model.vocab * model.hidden * tokens if stage.last else 0)

    def _exposed(self, layout: Layout, stage: Stage, hidden: float) -> float:
        """What the last backward pass does not hide of fp32 gradients and bf16 weights."""
        expert, dense = self._parameters(layout, stage)
        copies = layout.data // layout.expert
        moved = expert * (copies - 1) / copies + dense * (layout.data - 1) / layout.data
        rate = 1e9 * self.assumed.link_efficiency
        fits = layout.gpus <= self.cluster.gpus_per_node
        link = self.cluster.nvlink_gb_s if fits else self.cluster.network_gb_s
        return max(0.0, 6 * moved / (link * rate) - hidden)

    def _parameters(self, layout: Layout, stage: Stage) -> tuple[float, float]:
        """Of a rank: routed experts, and all else."""
        model = self.model
        expert = stage.moe * model.experts / layout.expert * model.expert_parameters
        dense = stage.dense * model.dense_parameters("dense")
        dense += stage.moe * model.dense_parameters("moe")
        return expert, dense + (stage.first + stage.last) * model.vocab * model.hidden

    def buffer_rows(self, layout: Layout, placed: Placement, capacity: float | None) -> float:
        """Rows that one layer call keeps on the fullest rank.

        Without clones the mean of the fullest rank; with them the static buffer.

        Args:
            layout: whose.
            placed: its layer calls.
            capacity: ``--moe-received-token-capacity``, None for ``auto``.
        """
        if not layout.weights_by:
            return placed.fullest if layout.tokens_by == "megatron" else float(placed.mean.mean())
        pairs = self.work.tokens * self.model.topk
        if capacity is None:
            return round_rows(balance_bound(pairs * layout.expert, layout.expert, placed.tolerance))
        return round_rows(math.ceil(capacity * pairs))

    def capacity(self, layout: Layout, placed: Placement) -> float | None:
        """``--moe-received-token-capacity`` for the loads seen; None (``auto``) never overflows."""
        if placed.slots * layout.expert >= self.model.experts:
            return None
        pairs = self.work.tokens * self.model.topk
        return math.ceil(placed.placed.max() / pairs * self.assumed.capacity_margin * 100) / 100

    def memory(self, layout: Layout, placed: Placement) -> Memory:
        """GiB of the fullest rank.

        Args:
            layout: sizes that fit.
            placed: its layer calls.
        """
        rows = self.buffer_rows(layout, placed, self.capacity(layout, placed))
        found = [
            self._memory_of(layout, stage, rows, placed.slots)
            for stage in stages(self.model, layout, layout.microbatches(self.work))
        ]
        return max(found, key=lambda memory: memory.total)

    def _memory_of(self, layout: Layout, stage: Stage, rows: float, slots: int) -> Memory:
        model, tokens = self.model, self.work.tokens
        expert, dense = self._parameters(layout, stage)
        copies = layout.data // layout.expert
        states = expert * (6 + 12 / copies) + dense * (6 + 12 / layout.data)
        one = {
            "dense": model.kept_bytes("dense", tokens),
            "moe": model.kept_bytes("moe", tokens) + rows * 2 * (model.hidden + 3 * model.moe_ffn),
        }
        if layout.recompute:
            inputs = 2 * tokens * model.hidden * (stage.dense + stage.moe)
            kept = stage.in_flight * inputs + one["moe" if stage.moe else "dense"]
        else:
            kept = stage.in_flight * (stage.dense * one["dense"] + stage.moe * one["moe"])
        working = rows * 4 * (model.hidden + 2 * model.moe_ffn)
        if layout.tokens_by in ("all_gather", "all_to_all"):
            working += layout.expert * self._places(layout) * model.hidden * 6
        logits = 6 * tokens * model.vocab if stage.last else 0
        return Memory(
            states=states / GIB,
            activations=kept / GIB,
            clones=self._clone_bytes(layout, slots) / GIB,
            working=max(logits, working) / GIB,
            reserve=self.assumed.reserve_gib,
        )

    def _clone_bytes(self, layout: Layout, slots: int) -> float:
        """The pool (home experts are copied into it) and one projection's gradients, wide."""
        if not layout.weights_by:
            return 0.0
        model = self.model
        held = model.experts // layout.expert + slots
        projection = 2 * model.hidden * model.moe_ffn
        buffers = 2 * 4 * layout.expert if layout.weights_by == "collective" else 2 * slots * 4
        return held * (2 * model.expert_parameters + (2 + 4) * projection) + buffers * projection
