"""Step time and memory of one layout, by arithmetic: products, bytes over links, what is kept.

A layer call takes as long as its slowest rank::

    compute   6 x an expert's parameters x rows of the fullest rank / rate; forward and backward
    tokens    4 passes of the rows, max(inside / NVLink, across / network)
    clones    weights to the slots (twice: again for backward), gradients home in fp32
    rest      attention, Mamba, shared expert, router; the same on every rank
    shards    what TP and CP exchange

Inside and across run at the same time on their links. A step is all microbatches of the slowest
pipeline rank; on top come one microbatch of the others, divided by VPP (the bubble of 1F1B and of
the interleaved schedule), and what the last microbatch's backward does not hide of the gradients'
reduction and the weights' gathering. Offloading takes what the host's link moves during a forward
pass, and no time.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from megatron_echo.memory.schedules import BACKWARD_SHARE
from megatron_echo.observe.simulation.layout import Layout, Run, held
from megatron_echo.observe.simulation.placement import Placement
from megatron_echo.planner import ClonePrice, balance_bound

GIB = 2**30
IN_TRANSIT = 2
"""Layers whose offloaded bytes are on the device at once, on their way."""


class StepTime(NamedTuple):
    """Seconds of a step: of the slowest pipeline rank, then what comes on top."""

    compute: float  # products of routed experts on the fullest rank
    tokens: float  # their traffic
    clones: float  # weights and gradients of clones, and planning
    rest: float  # all other products
    shards: float  # exchanges of tensor and context parallelism
    bubble: float  # of the pipeline
    exposed: float  # reduction of gradients and gathering of weights that nothing hides
    error: float  # standard error of the total, from the layer calls that were looked at

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self[:-1])


class Memory(NamedTuple):
    """GiB of the fullest rank of the fullest pipeline stage."""

    states: float  # weights, gradients and optimizer
    activations: float  # kept for backward, of all microbatches in flight
    clones: float  # the pool of clones and the gradients that travel
    working: float  # buffers of one layer call
    reserve: float  # context, NCCL and fragmentation, assumed
    host: float  # offloaded; on the host, not in the total

    @property
    def total(self) -> float:
        """All of it on the device."""
        return sum(self[:-1])


class Cost(NamedTuple):
    """One layer, the embedding or the output, for one microbatch on the slowest rank."""

    seconds: float  # forward and backward
    kept: float  # bytes on the device for backward
    states: float  # bytes of weights, gradients and optimizer
    working: float  # bytes while it runs
    gone: float  # bytes kept on the host for backward


TRAVELS_BY_PLAN = ("symmetric_memory", "hybrid_ep")
"""Of tokens: those that send just the rows that leave."""


def clone_price(run: Run, ranks: int, tokens_by: str, by_node: bool) -> ClonePrice:
    """What a clone costs by these figures, as in training (``dispatch/transports/automatic.py``).

    Where the planner is not told of nodes, each clone costs what it costs between them.
    """
    cluster, model = run.cluster, run.model
    row = 4 * 2 * model.hidden if tokens_by in TRAVELS_BY_PLAN else 0
    node = cluster.ranks_per_node(ranks)
    clone = 8 * model.expert_parameters
    price = ClonePrice.of_layer(cluster.speeds, model.expert_parameters, row, clone, ranks, node)
    return price if by_node or node == ranks else dataclasses.replace(price, inside=price.across)


class Costs:
    """What a layout, whose sizes fit, costs at the mean of its layer calls.

    Attributes:
        calls: seconds of each layer call on the slowest rank in experts' products, tokens' traffic
            and clones, float64 ``[C]`` each.
        capacity: ``--moe-received-token-capacity`` for the loads seen; None (``auto``) never
            overflows.
        buffer_rows: rows that one layer call keeps on the fullest rank.
        kinds: the cost of each kind of layer: those of :class:`.Model`, ``embedding``, ``output``.
    """

    def __init__(self, run: Run, layout: Layout, placed: Placement) -> None:
        self.run, self.layout, self.placed = run, layout, placed
        self.tokens = layout.tokens(run.work)
        speeds = run.cluster.speeds
        self._rate, self._nvlink, self._network = speeds.flops, speeds.inside, speeds.across
        self._again = 1 + (1 - BACKWARD_SHARE) if layout.recompute else 1.0
        experts = self._again * 6 * run.model.expert_parameters * placed.placed / self._rate
        self.calls = experts, self._row_traffic(), self._clone_traffic()
        self.capacity, self.buffer_rows = self._buffer()
        self.kinds = {kind: self._cost(kind) for kind in {*run.model.kinds, "output"}}
        self.kinds["embedding"] = Cost(0.0, 0.0, self.kinds["output"].states, 0.0, 0.0)
        stages, schedule = layout.stages(run.model), layout.schedule(run.work)
        self._ranks = [
            [stages[schedule.stage(rank, chunk)] for chunk in range(layout.virtual)]
            for rank in range(layout.pipeline)
        ]

    def step_time(self) -> StepTime:
        """Seconds of a step."""
        microbatches = self.layout.microbatches(self.run.work)
        busy = [
            sum(self.kinds[kind].seconds for stage in chunks for kind in stage)
            for chunks in self._ranks
        ]
        slowest = busy.index(max(busy))
        here = [kind for stage in self._ranks[slowest] for kind in stage]
        layers = {kind: here.count(kind) for kind in {*here} - {"embedding"}}
        calls = sum(n for kind, n in layers.items() if "E" in kind) * microbatches
        experts, tokens, clones = (float(each.mean()) * calls for each in self.calls)
        whole = np.sum(self.calls, axis=0)
        deviation = float(whole.std(ddof=1)) if len(whole) > 1 else 0.0
        bubble = (sum(busy) - busy[slowest]) / self.layout.virtual
        stretch = 1 + bubble / (busy[slowest] * microbatches)
        return StepTime(
            compute=experts,
            tokens=tokens,
            clones=clones,
            rest=sum(self._rest(kind) * n for kind, n in layers.items()) * microbatches,
            shards=sum(self._shards(kind) * n for kind, n in layers.items()) * microbatches,
            bubble=bubble,
            exposed=max(map(self._exposed, self._ranks, busy)),
            error=stretch * calls * deviation / math.sqrt(len(whole)),
        )

    def memory(self) -> Memory:
        """GiB of the fullest rank."""
        moments = held(self.layout.schedule(self.run.work))
        found = map(self._memory_of, self._ranks, moments)
        return max(found, key=lambda memory: memory.total)

    def _memory_of(self, chunks: list[list[str]], moments: list[tuple[int, ...]]) -> Memory:
        """One pipeline rank."""
        costs = [[self.kinds[kind] for kind in stage] for stage in chunks]

        def highest(sizes: list[float]) -> float:
            return max(sum(n * size for n, size in zip(m, sizes, strict=True)) for m in moments)

        layers = [cost for chunk in costs for cost in chunk]
        in_transit = sum(sorted((cost.gone for cost in layers), reverse=True)[:IN_TRANSIT])
        kept = highest([sum(cost.kept for cost in chunk) for chunk in costs])
        return Memory(
            states=sum(cost.states for cost in layers) / GIB,
            activations=(kept + in_transit) / GIB,
            clones=self._clone_bytes() / GIB,
            working=max(cost.working for cost in layers) / GIB,
            reserve=self.run.cluster.reserve_gib,
            host=highest([sum(cost.gone for cost in chunk) for chunk in costs]) / GIB,
        )

    # Seconds.

    def _link(self, inside: np.ndarray, across: np.ndarray) -> np.ndarray:
        """Of bytes of one rank inside its node and to others, both links at work."""
        return np.maximum(inside / self._nvlink, across / self._network)

    def _link_of(self, ranks: int) -> float:
        """Bytes a second of one rank within a group of consecutive ranks."""
        return self._nvlink if ranks <= self.run.cluster.gpus_per_node else self._network

    def _row_traffic(self) -> np.ndarray:
        """Of layer calls: rows there and back, for backward too, and again if recomputed."""
        layout, placed, cluster = self.layout, self.placed, self.run.cluster
        ranks, width = layout.expert, 2 * self.run.model.hidden
        node = cluster.ranks_per_node(ranks)
        passes = (6 if layout.recompute else 4) if ranks > 1 else 0
        if layout.tokens_by == "megatron":
            inside, across = placed.pairs_inside * width, placed.pairs_across * width
        elif layout.tokens_by in TRAVELS_BY_PLAN:
            inside = placed.placed * (placed.leave_rank - placed.leave_node) * width
            across = placed.placed * placed.leave_node * width
        else:
            part = np.full_like(placed.mean, self._places() * width)
            # An all-gather's results travel in fp32 (2 of 4 passes): 1.5 times the bytes.
            part *= 1.5 if layout.tokens_by == "all_gather" else 1.0
            inside, across = (node - 1) * part, (ranks - node) * part
        return passes * (self._link(inside, across) + cluster.exchange_us * 1e-6)

    def _places(self) -> int:
        """Tokens that each rank sends to each rank, by ``all_gather`` or ``all_to_all``."""
        if self.layout.tokens_by == "all_gather":
            return self.tokens
        return math.ceil(self.layout.peer_capacity * self.tokens)

    def _clone_traffic(self) -> np.ndarray:
        """Of layer calls: bf16 weights forward, again for backward, fp32 gradients home."""
        layout, placed, cluster = self.layout, self.placed, self.run.cluster
        if not layout.weights_by:
            return np.zeros_like(placed.mean)
        pushes = 3 if layout.recompute else 2
        size = self.run.model.expert_parameters * (2 * pushes + 4)
        inside, across = placed.clones_inside, placed.clones_across
        exchanges = 2.0 * (pushes + 1)  # two projections
        if layout.weights_by == "collective":
            node = cluster.ranks_per_node(layout.expert)
            inside = np.full_like(placed.mean, placed.slots * (node - 1))
            across = np.full_like(placed.mean, placed.slots * (layout.expert - node))
            exchanges *= placed.slots
        fixed = exchanges * cluster.exchange_us + cluster.plan_us
        return self._link(inside * size, across * size) + fixed * 1e-6

    def _rest(self, kind: str) -> float:
        """Of a microbatch in products besides routed experts; attention is causal."""
        model = self.run.model
        if kind == "output":
            return 6 * model.vocab * model.hidden * self.tokens / self._rate
        width = model.head_dim + model.rope_dim + model.value_width
        scores = 3 * self.run.work.sequence * model.heads * width * kind.count("*")
        scan = 12 * model.mamba_widths[0] * model.mamba_state * kind.count("M")
        flops = self.tokens * (6 * model.dense_parameters(kind) + scores + scan)
        return self._again * flops / self._rate

    def _shards(self, kind: str) -> float:
        """Of a microbatch in exchanges of TP and CP.

        TP with sequence parallelism: around attention, Mamba and a dense MLP the rows are gathered
        and reduced, twice forward, three times backward, twice more if recomputed. CP: keys and
        values go round once forward and, with their gradients, twice backward; what Mamba exchanges
        is left out.
        """
        layout, model = self.layout, self.run.model
        if kind == "output":
            return 0.0
        found, latency = 0.0, self.run.cluster.exchange_us * 1e-6
        if layout.tensor > 1:
            parts = sum(letter != "E" or model.shared_ffn > 0 for letter in kind)
            passes = (7 if layout.recompute else 5) * parts
            moved = 2 * self.tokens * (layout.tensor - 1) * model.hidden
            found += passes * (moved / self._link_of(layout.tensor) + latency)
        if layout.context > 1 and "*" in kind:
            passes = 4 if layout.recompute else 3
            width = 2 * model.groups * model.head_dim
            if model.q_lora:
                width = model.heads * (model.head_dim + model.rope_dim + model.value_width)
            moved = 2 * self.tokens * (layout.context - 1) * width
            found += passes * (moved / self._link_of(layout.tensor * layout.context) + latency)
        return found

    def _exposed(self, chunks: list[list[str]], busy: float) -> float:
        """What the last backward pass does not hide of fp32 gradients and bf16 weights."""
        kinds = [kind for stage in chunks for kind in stage]
        expert, dense = np.sum([self._parameters(kind) for kind in kinds], axis=0)
        copies, others = self.layout.expert_copies, self.layout.dense_copies
        moved = expert * (copies - 1) / copies + dense * (others - 1) / others
        return max(0.0, float(6 * moved / self._link_of(self.layout.gpus)) - busy * BACKWARD_SHARE)

    # Bytes.

    def _cost(self, kind: str) -> Cost:
        seconds = self._rest(kind) + self._shards(kind)
        if "E" in kind:
            seconds += sum(float(each.mean()) for each in self.calls)
        kept, working = self._activations(kind)
        if self.layout.recompute and kind != "output":
            working += kept
            kept = 2.0 * self.tokens * self.run.model.hidden
        cluster, layout = self.run.cluster, self.layout
        link = 1e9 * cluster.host_gb_s * cluster.link_efficiency
        gone = min(layout.offload * kept, link * seconds * (1 - BACKWARD_SHARE))
        # bf16 weights, fp32 gradients, and this rank's shard of main weights and moments.
        expert, dense = self._parameters(kind)
        states = expert * (6 + 12 / layout.expert_copies) + dense * (6 + 12 / layout.dense_copies)
        return Cost(seconds, kept - gone, states, working, gone)

    def _parameters(self, kind: str) -> tuple[float, float]:
        """Of a rank in a layer, the embedding or the output: routed experts, and all else."""
        model, layout = self.run.model, self.layout
        if kind in ("embedding", "output"):
            return 0.0, model.vocab * model.hidden / layout.tensor
        expert = model.experts / layout.expert * model.expert_parameters if "E" in kind else 0.0
        return expert, model.dense_parameters(kind) / layout.tensor

    def _activations(self, kind: str) -> tuple[float, float]:
        """Kept for backward, and while it runs, for one microbatch.

        In bf16 the norms' inputs and outputs, queries, keys, values, attention's output (scores are
        not kept: flash attention), a dense or shared MLP's products and their activation; of Mamba
        what its projection gives, convolved too, and its output before and behind its norm.
        """
        model, layout, rows = self.run.model, self.layout, self.buffer_rows
        if kind == "output":
            return 0.0, 6.0 * self.tokens * model.vocab
        heads = 2 * (model.heads + model.groups) * model.head_dim
        if model.q_lora:
            width = 2 * (model.head_dim + model.rope_dim) + 2 * model.value_width
            heads = model.heads * width + model.q_lora + model.kv_lora
        inner, others = model.mamba_widths
        widths = {
            "*": heads,
            "-": model.matrices * model.ffn,
            "E": model.matrices * model.shared_ffn,
            "M": 5 * inner + 2 * others,
        }
        kept = float(2 * self.tokens * sum(2 * model.hidden + widths[part] for part in kind))
        if "E" not in kind:
            return kept, 0.0
        # Our experts make the activation again.
        products = model.matrices - bool(layout.weights_by)
        kept += rows * 2 * (model.hidden + products * model.moe_ffn)
        working = rows * 4 * (model.hidden + (model.matrices - 1) * model.moe_ffn)
        if layout.tokens_by in ("all_gather", "all_to_all"):
            working += layout.expert * self._places() * model.hidden * 6
        return kept, working

    def _buffer(self) -> tuple[float | None, float]:
        """Capacity, and rows: without clones those of the fullest rank, else the static buffer."""
        from megatron_echo.dispatch.layout import round_rows  # imports Megatron

        layout, placed, run = self.layout, self.placed, self.run
        if not layout.weights_by:
            return None, placed.fullest
        pairs, ranks = self.tokens * run.model.topk, layout.expert
        if placed.slots * ranks >= run.model.experts and placed.tolerance is not None:
            return None, round_rows(balance_bound(pairs * ranks, ranks, placed.tolerance))
        fullest = placed.placed.max() / pairs * run.cluster.capacity_margin
        capacity = math.ceil(fullest * 100) / 100
        return capacity, round_rows(math.ceil(capacity * pairs))

    def _clone_bytes(self) -> float:
        """The pool (home experts are copied into it) and one projection's gradients, wide."""
        layout, model, slots = self.layout, self.run.model, self.placed.slots
        if not layout.weights_by:
            return 0.0
        pool = model.experts // layout.expert + slots
        projection = (model.matrices - 1) * model.hidden * model.moe_ffn
        buffers = 2 * 4 * layout.expert if layout.weights_by == "collective" else 2 * slots * 4
        return pool * (2 * model.expert_parameters + (2 + 4) * projection) + buffers * projection
