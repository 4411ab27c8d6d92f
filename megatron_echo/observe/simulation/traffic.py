"""Seconds on the links: rows of tokens, weights of clones, and what TP and CP exchange."""

import math

import numpy as np

from megatron_echo.observe.simulation.cluster import Assumptions, Cluster
from megatron_echo.observe.simulation.layout import Layout, Work
from megatron_echo.observe.simulation.models import Model
from megatron_echo.observe.simulation.placement import Placement


class Traffic:
    """Of one model on one cluster."""

    def __init__(self, cluster: Cluster, model: Model, work: Work, assumed: Assumptions) -> None:
        """Set what does not change between layouts; see :class:`.CostModel`."""
        self.cluster, self.model, self.work, self.assumed = cluster, model, work, assumed

    def seconds(self, inside: np.ndarray | float, across: np.ndarray | float) -> np.ndarray:
        """Of bytes of one rank inside its node and to others, both links at work."""
        rate = 1e9 * self.assumed.link_efficiency
        return np.maximum(
            np.asarray(inside, float) / (self.cluster.nvlink_gb_s * rate),
            np.asarray(across, float) / (self.cluster.network_gb_s * rate),
        )

    def _of_group(self, size: int, nbytes: float) -> float:
        """Of bytes of one rank within a group of consecutive ranks, and one exchange's latency."""
        fits = size <= self.cluster.gpus_per_node
        seconds = self.seconds(nbytes, 0) if fits else self.seconds(0, nbytes)
        return float(seconds) + self.assumed.exchange_us * 1e-6

    def tokens(self, layout: Layout, placed: Placement) -> np.ndarray:
        """Of a layer call: rows there and back, for backward too, and again if recomputed."""
        ranks, width = layout.expert, 2 * self.model.hidden
        node = self.cluster.ranks_per_node(ranks)
        passes = (6 if layout.recompute else 4) if ranks > 1 else 0
        if layout.tokens_by == "megatron":
            inside, across = placed.rows_inside * width, placed.rows_across * width
        elif layout.tokens_by == "balanced":
            part = placed.mean * width / ranks
            inside, across = (node - 1) * part, (ranks - node) * part
        elif layout.tokens_by in ("symmetric_memory", "hybrid_ep"):
            inside = placed.placed * (placed.leave_rank - placed.leave_node) * width
            across = placed.placed * placed.leave_node * width
        else:
            # An all-gather's results travel in fp32 (2 of 4 passes): 1.5 times the bytes.
            part = np.full_like(placed.mean, self.places(layout) * width)
            part *= 1.5 if layout.tokens_by == "all_gather" else 1.0
            inside, across = (node - 1) * part, (ranks - node) * part
        return passes * (self.seconds(inside, across) + self.assumed.exchange_us * 1e-6)

    def places(self, layout: Layout) -> int:
        """Tokens that each rank sends to each rank, by ``all_gather`` or ``all_to_all``."""
        tokens = layout.tokens(self.work)
        if layout.tokens_by == "all_gather":
            return tokens
        return math.ceil(layout.peer_capacity * tokens)

    def clones(self, layout: Layout, placed: Placement) -> np.ndarray:
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
        return self.seconds(inside * size, across * size) + fixed * 1e-6

    def shards(self, layout: Layout, layer: str) -> float:
        """A layer's exchanges of tensor and context parallelism, for a microbatch.

        TP with sequence parallelism: around attention and around a dense MLP the rows are gathered
        and reduced, twice forward, three times backward, twice more if recomputed. CP: keys and
        values go round once forward and, with their gradients, twice backward.
        """
        rows, found = layout.tokens(self.work), 0.0
        if layout.tensor > 1:
            passes = (7 if layout.recompute else 5) * (1 + self.model.has_dense_mlp(layer))
            moved = 2 * rows * (layout.tensor - 1) * self.model.hidden
            found += passes * self._of_group(layout.tensor, moved)
        if layout.context > 1:
            passes = 4 if layout.recompute else 3
            moved = 2 * rows * (layout.context - 1) * self.model.key_value_width
            found += passes * self._of_group(layout.tensor * layout.context, moved)
        return found
