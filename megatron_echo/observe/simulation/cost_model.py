"""Step time and memory of one layout, by arithmetic: products, bytes over links, what is kept.

A layer call takes as long as its slowest rank::

    compute   18 H F x rows of the fullest rank / rate         gate, up, down; forward and backward
    tokens    4 passes of the rows, max(inside / NVLink, across / network)
    clones    weights to the slots (twice: again for backward), gradients home in fp32
    rest      attention, shared expert, router; the same on every rank
    shards    what TP and CP exchange

Inside and across run at the same time on their links. A step is all microbatches of the slowest
pipeline rank; on top come one microbatch of the others, divided by VPP (the bubble of 1F1B and of
the interleaved schedule), and what the last microbatch's backward does not hide of the gradients'
reduction and the weights' gathering. Offloading takes what the host's link moves during a forward
pass, and no time.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_echo.memory.schedules import BACKWARD_SHARE
from megatron_echo.observe.simulation.cluster import Assumptions, Cluster
from megatron_echo.observe.simulation.layout import Layout, Stage, Work, held, stages
from megatron_echo.observe.simulation.models import Model
from megatron_echo.observe.simulation.placement import Placement
from megatron_echo.observe.simulation.traffic import Traffic
from megatron_echo.planner import balance_bound

GIB = 2**30
IN_TRANSIT = 2
"""Layers whose offloaded bytes are on the device at once, on their way."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: of the slowest pipeline rank, then what comes on top.

    Attributes:
        compute: products of routed experts on the fullest rank.
        tokens: their traffic.
        clones: weights and gradients of clones, and planning.
        rest: all other products.
        shards: exchanges of tensor and context parallelism.
        bubble: of the pipeline.
        exposed: reduction of gradients and gathering of weights that nothing hides.
        error: standard error of the total, from the layer calls that were looked at.
    """

    compute: float
    tokens: float
    clones: float
    rest: float
    shards: float
    bubble: float
    exposed: float
    error: float

    @property
    def total(self) -> float:
        """All of it."""
        busy = self.compute + self.tokens + self.clones + self.rest + self.shards
        return busy + self.bubble + self.exposed


@dataclass(frozen=True)
class Memory:
    """GiB of the fullest rank of the fullest pipeline stage.

    Attributes:
        states: weights, gradients and optimizer.
        activations: kept for backward, of all microbatches in flight.
        clones: the pool of clones and the gradients that travel.
        working: buffers of one layer call.
        reserve: context, NCCL and fragmentation, assumed.
        host: offloaded; on the host, not in the total.
    """

    states: float
    activations: float
    clones: float
    working: float
    reserve: float
    host: float = 0.0

    @property
    def total(self) -> float:
        """All of it on the device."""
        return self.states + self.activations + self.clones + self.working + self.reserve


@dataclass(frozen=True)
class Cost:
    """One layer, or the output, for one microbatch on the slowest rank.

    Attributes:
        seconds: forward and backward.
        kept: bytes on the device for backward.
        gone: bytes kept on the host.
        states: bytes of weights, gradients and optimizer.
        working: bytes while it runs.
    """

    seconds: float
    kept: float
    gone: float
    states: float
    working: float


class Costs:
    """What a layout's layers cost; ``dense``, ``moe`` and ``output`` in :attr:`layers`."""

    def __init__(self, model: "CostModel", layout: Layout, placed: Placement) -> None:
        """Set the layout.

        Args:
            model: the cost model.
            layout: sizes that fit (:meth:`Layout.check`).
            placed: its layer calls, as many as one likes: their mean counts.
        """
        self._of, self.layout, self.placed = model, layout, placed
        self.tokens = layout.tokens(model.work)
        self._again = 1 + (1 - BACKWARD_SHARE) if layout.recompute else 1.0
        rows = placed.mean if layout.tokens_by == "balanced" else placed.placed
        experts = self._again * 6 * model.model.expert_parameters * rows / model.flops
        traffic = model.traffic
        self.calls = experts, traffic.tokens(layout, placed), traffic.clones(layout, placed)
        self.buffer_rows = model.buffer_rows(layout, placed, model.capacity(layout, placed))

    def rest(self, layer: str) -> float:
        """Seconds of a microbatch in a layer's products besides routed experts."""
        model, work = self._of.model, self._of.work
        if layer == "output":
            return 6 * model.vocab * model.hidden * self.tokens / self._of.flops
        return self._again * model.layer_flops(layer, self.tokens, work.sequence) / self._of.flops

    def shards(self, layer: str) -> float:
        """Seconds of a microbatch in exchanges of TP and CP."""
        return 0.0 if layer == "output" else self._of.traffic.shards(self.layout, layer)

    @cached_property
    def layers(self) -> dict[str, Cost]:
        """Of each kind."""
        return {kind: self._layer(kind) for kind in ("dense", "moe", "output")}

    def _layer(self, kind: str) -> Cost:
        seconds = self.rest(kind) + self.shards(kind)
        if kind == "moe":
            seconds += sum(float(each.mean()) for each in self.calls)
        kept, working = self._bytes(kind)
        if self.layout.recompute and kind != "output":
            working += kept
            kept = 2.0 * self.tokens * self._of.model.hidden
        cluster, assumed = self._of.cluster, self._of.assumed
        link = 1e9 * cluster.host_gb_s * assumed.link_efficiency
        gone = min(self.layout.offload * kept, link * seconds * (1 - BACKWARD_SHARE))
        return Cost(seconds, kept - gone, gone, self._states(kind), working)

    def _bytes(self, kind: str) -> tuple[float, float]:
        """Kept for backward, and while it runs, for one microbatch."""
        model, layout = self._of.model, self.layout
        if kind == "output":
            return 0.0, 6.0 * self.tokens * model.vocab
        kept = float(model.kept_bytes(kind, self.tokens))
        if kind == "dense":
            return kept, 0.0
        kept += self.buffer_rows * 2 * (model.hidden + 3 * model.moe_ffn)
        working = self.buffer_rows * 4 * (model.hidden + 2 * model.moe_ffn)
        if layout.tokens_by in ("all_gather", "all_to_all"):
            working += layout.expert * self._of.traffic.places(layout) * model.hidden * 6
        return kept, working

    def _states(self, kind: str) -> float:
        """bf16 weights, fp32 gradients, and this rank's shard of main weights and moments."""
        expert, dense = self._of.parameters(self.layout, kind)
        layout = self.layout
        experts = expert * (6 + 12 / layout.expert_copies)
        return experts + dense * (6 + 12 / layout.dense_copies)

    def of_stage(self, stage: Stage) -> list[Cost]:
        """Its layers, the embedding's states among the first."""
        found = [self.layers["dense"]] * stage.dense + [self.layers["moe"]] * stage.moe
        if stage.first:
            found.append(Cost(0.0, 0.0, 0.0, self.layers["output"].states, 0.0))
        return [*found, self.layers["output"]] if stage.last else found


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
        self.flops = cluster.tflops * 1e12 * self.assumed.efficiency
        self.traffic = Traffic(cluster, model, work, self.assumed)

    def _ranks(self, layout: Layout) -> list[list[Stage]]:
        """The stages of each pipeline rank."""
        found, schedule = stages(self.model, layout), layout.schedule(self.work)
        return [
            [found[schedule.stage(rank, chunk)] for chunk in range(layout.virtual)]
            for rank in range(layout.pipeline)
        ]

    def step_time(self, layout: Layout, placed: Placement) -> StepTime:
        """Seconds of a step; the arguments are those of :class:`Costs`."""
        costs, microbatches = Costs(self, layout, placed), layout.microbatches(self.work)
        ranks = self._ranks(layout)
        busy = [
            sum(cost.seconds for stage in chunks for cost in costs.of_stage(stage))
            for chunks in ranks
        ]
        slowest = busy.index(max(busy))
        layers = {
            "dense": sum(stage.dense for stage in ranks[slowest]),
            "moe": sum(stage.moe for stage in ranks[slowest]),
            "output": sum(stage.last for stage in ranks[slowest]),
        }
        calls = layers["moe"] * microbatches
        experts, tokens, clones = (float(each.mean()) * calls for each in costs.calls)
        whole = np.sum(costs.calls, axis=0)
        deviation = float(whole.std(ddof=1)) if len(whole) > 1 else 0.0
        bubble = (sum(busy) - busy[slowest]) / layout.virtual
        stretch = 1 + bubble / (busy[slowest] * microbatches)
        return StepTime(
            compute=experts,
            tokens=tokens,
            clones=clones,
            rest=sum(costs.rest(kind) * n for kind, n in layers.items()) * microbatches,
            shards=sum(costs.shards(kind) * n for kind, n in layers.items()) * microbatches,
            bubble=bubble,
            exposed=max(map(self._exposed, [layout] * len(ranks), ranks, busy)),
            error=stretch * calls * deviation / math.sqrt(len(whole)),
        )

    def _exposed(self, layout: Layout, chunks: list[Stage], busy: float) -> float:
        """What the last backward pass does not hide of fp32 gradients and bf16 weights."""
        kinds = [
            kind
            for stage in chunks
            for kind, number in (
                ("dense", stage.dense),
                ("moe", stage.moe),
                ("output", stage.first + stage.last),
            )
            for _ in range(number)
        ]
        expert, dense = np.sum([self.parameters(layout, kind) for kind in kinds], axis=0)
        copies, others = layout.expert_copies, layout.dense_copies
        moved = expert * (copies - 1) / copies + dense * (others - 1) / others
        rate = 1e9 * self.assumed.link_efficiency
        fits = layout.gpus <= self.cluster.gpus_per_node
        link = self.cluster.nvlink_gb_s if fits else self.cluster.network_gb_s
        return max(0.0, float(6 * moved / (link * rate)) - busy * BACKWARD_SHARE)

    def parameters(self, layout: Layout, kind: str) -> tuple[float, float]:
        """Of a rank in a layer or the output: routed experts, and all else."""
        model = self.model
        if kind == "output":
            return 0.0, model.vocab * model.hidden / layout.tensor
        expert = model.experts / layout.expert * model.expert_parameters if kind == "moe" else 0.0
        return expert, model.dense_parameters(kind) / layout.tensor

    def buffer_rows(self, layout: Layout, placed: Placement, capacity: float | None) -> float:
        """Rows that one layer call keeps on the fullest rank.

        Without clones the mean of the fullest rank; with them the static buffer.

        Args:
            layout: whose.
            placed: its layer calls.
            capacity: ``--moe-received-token-capacity``, None for ``auto``.
        """
        from megatron_echo.dispatch.layout import round_rows  # imports Megatron

        if not layout.weights_by:
            return placed.fullest if layout.tokens_by == "megatron" else float(placed.mean.mean())
        pairs = layout.tokens(self.work) * self.model.topk
        if capacity is None:
            return round_rows(balance_bound(pairs * layout.expert, layout.expert, placed.tolerance))
        return round_rows(math.ceil(capacity * pairs))

    def capacity(self, layout: Layout, placed: Placement) -> float | None:
        """``--moe-received-token-capacity`` for the loads seen; None (``auto``) never overflows."""
        if not layout.weights_by or placed.slots * layout.expert >= self.model.experts:
            return None
        pairs = layout.tokens(self.work) * self.model.topk
        return math.ceil(placed.placed.max() / pairs * self.assumed.capacity_margin * 100) / 100

    def memory(self, layout: Layout, placed: Placement) -> Memory:
        """GiB of the fullest rank; the arguments are those of :class:`Costs`."""
        costs = Costs(self, layout, placed)
        clones = self.clone_bytes(layout, placed.slots) / GIB
        found = [
            self._memory_of([costs.of_stage(stage) for stage in chunks], moments, clones)
            for chunks, moments in zip(
                self._ranks(layout), held(layout.schedule(self.work)), strict=True
            )
        ]
        return max(found, key=lambda memory: memory.total)

    def _memory_of(
        self, chunks: list[list[Cost]], moments: list[tuple[int, ...]], clones: float
    ) -> Memory:
        """One pipeline rank."""

        def highest(name: str) -> float:
            sizes = [sum(getattr(cost, name) for cost in chunk) for chunk in chunks]
            return max(sum(n * size for n, size in zip(m, sizes, strict=True)) for m in moments)

        layers = [cost for chunk in chunks for cost in chunk]
        in_transit = sum(sorted((cost.gone for cost in layers), reverse=True)[:IN_TRANSIT])
        return Memory(
            states=sum(cost.states for cost in layers) / GIB,
            activations=(highest("kept") + in_transit) / GIB,
            clones=clones,
            working=max(cost.working for cost in layers) / GIB,
            reserve=self.assumed.reserve_gib,
            host=highest("gone") / GIB,
        )

    def clone_bytes(self, layout: Layout, slots: int) -> float:
        """The pool (home experts are copied into it) and one projection's gradients, wide."""
        if not layout.weights_by:
            return 0.0
        model = self.model
        pool = model.experts // layout.expert + slots
        projection = 2 * model.hidden * model.moe_ffn
        buffers = 2 * 4 * layout.expert if layout.weights_by == "collective" else 2 * slots * 4
        return pool * (2 * model.expert_parameters + (2 + 4) * projection) + buffers * projection
