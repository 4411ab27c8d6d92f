"""Which layout is the fastest that fits, of plain expert parallelism and of clones."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np

from megatron_echo.memory.pipeline_layout import LayerCost, even_split, plan_layout
from megatron_echo.observe.simulation.cost_model import GIB, Costs, Memory, StepTime
from megatron_echo.observe.simulation.layout import Layout, Run
from megatron_echo.observe.simulation.placement import Placement, fullest_part, place
from megatron_echo.observe.simulation.workloads import Loads, layer_calls
from megatron_echo.planner.bound import MAX_RANKS
from megatron_echo.progress import track

TRANSPORTS = ("all_gather", "all_to_all", "symmetric_memory", "hybrid_ep")
"""Of tokens, with clones."""


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs."""

    layout: Layout  # sizes and transports
    placed: Placement  # its loads
    capacity: float | None  # ``--moe-received-token-capacity``, None for ``auto`` or without clones
    time: StepTime  # seconds of a step
    memory: Memory  # GiB of the fullest rank

    @classmethod
    def of(cls, run: Run, layout: Layout, placed: Placement) -> "Candidate":
        """Count what a layout costs; the arguments are those of :class:`.Costs`."""
        costs = Costs(run, layout, placed)
        return cls(layout, placed, costs.capacity, costs.step_time(), costs.memory())

    @property
    def kind(self) -> str:
        """``plain``, ``echo``, or ``what if`` where no program does it."""
        if self.layout.tokens_by == "balanced":
            return "what if"
        return "echo" if self.layout.weights_by else "plain"

    @property
    def name(self) -> str:
        """One phrase."""
        if not self.layout.weights_by:
            return "plain EP" if self.kind == "plain" else "plain EP, balanced"
        return f"ECHO S={self.placed.slots}, {self.placed.tolerance:.0%}"


@dataclass(frozen=True)
class Search:
    """What is tried; plain expert parallelism always is."""

    loads: Loads  # who wants which expert
    experts: tuple[int, ...]  # EP sizes
    pipelines: tuple[int, ...]  # PP sizes
    slots: tuple[int | None, ...]  # of a rank; None: as many as it has experts
    tolerances: tuple[float, ...]  # of the planner
    calls: int  # layer calls to look at for each EP size, 0 for all of a step
    by_node: bool = False  # whether the planner is told of nodes
    virtuals: tuple[int, ...] = (1, 2)  # VPP sizes, for PP above 1
    tensor: int = 1  # TP
    context: int = 1  # CP
    offloads: tuple[float, ...] = (0.0, 1.0)  # shares of what is kept that may go to the host
    transports: tuple[str, ...] = TRANSPORTS  # some of :data:`TRANSPORTS`


def candidates(run: Run, search: Search) -> tuple[list[Candidate], list[str]]:
    """Everything that is tried, in the order of the search, and why some EP sizes are not.

    Raises:
        ValueError: no size can be tried; the sentence is the first one's.
    """
    found: list[Candidate] = []
    left_out: list[str] = []
    for ranks in track(search.experts, "Expert-parallel sizes"):
        layouts, refused = _layouts(run, search, ranks)
        try:
            if not layouts:
                raise refused[0]
            found += _of_size(run, search, layouts)
        except ValueError as error:
            left_out.append(str(error))
        if ranks > MAX_RANKS:
            left_out.append(
                f"Clones at EP={ranks}: the planner takes up to {MAX_RANKS} ranks. Use fewer."
            )
    if not found:
        nothing = f"No EP size divides {run.model.experts} experts. Give --ep 1."
        raise ValueError(left_out[0] if left_out else nothing)
    return [*found, *_planned(run, found)], left_out


def _layouts(run: Run, search: Search, ranks: int) -> tuple[list[Layout], list[ValueError]]:
    """Those of one EP size that can run, and what is wrong with the others."""
    layouts: list[Layout] = []
    refused: list[ValueError] = []
    sizes = product(search.pipelines, search.virtuals)
    for pipeline, virtual in dict.fromkeys((p, v if p > 1 else 1) for p, v in sizes):
        try:
            layout = Layout(
                run.cluster.gpus, ranks, pipeline, virtual, search.tensor, search.context,
                _even_layers(run.model.layers, pipeline, virtual),
            )  # fmt: skip
            layout.check(run.model, run.work)
        except ValueError as error:
            refused.append(error)
            continue
        layouts += [replace(layout, offload=share) for share in search.offloads]
        layouts.append(replace(layout, recompute=True))
    return layouts, refused


def _counts(cuts: Iterable[int]) -> tuple[int, ...]:
    """Decoder layers of each stage: the first also has the embedding, the last the output."""
    sizes = [end - begin for begin, end in pairwise(cuts)]
    return (sizes[0] - 1, *sizes[1:-1], sizes[-1] - 1)


def _even_layers(layers: int, pipeline: int, virtual: int) -> tuple[int, ...] | None:
    """None where Megatron's flags say it; with chunks that do not divide an even split."""
    if virtual == 1 or layers % (pipeline * virtual) == 0:
        return None
    items = [LayerCost(kind, 0, 0, 0) for kind in "E" + "t" * layers + "L"]
    return _counts(even_split(items, pipeline * virtual))


def _planned(run: Run, found: list[Candidate]) -> Iterator[Candidate]:
    """The fastest of each kind and pipeline again, with its layers placed by ``plan_layout``."""
    groups: dict[tuple[str, int, int], list[Candidate]] = {}
    for one in found:
        if one.layout.pipeline > 1 and one.kind != "what if":
            key = one.kind, one.layout.pipeline, one.layout.virtual
            groups.setdefault(key, []).append(one)
    model, hbm = run.model, run.cluster.hbm_gib
    for group in groups.values():
        best = fastest(group, hbm) or smallest(group)
        layout, costs = best.layout, Costs(run, best.layout, best.placed).kinds
        dense, moe = [("t", "dense")] * model.dense_layers, [("t", "moe")] * model.moe_layers
        items = [
            LayerCost(letter, *costs[kind][:4])
            for letter, kind in [("E", "embedding"), *dense, *moe, ("L", "output")]
        ]
        budget = (hbm - (run.cluster.reserve_gib + best.memory.clones)) * GIB
        microbatches = layout.microbatches(run.work)
        try:
            plan = plan_layout(
                items, layout.pipeline, layout.virtual, None, microbatches, budget_bytes=budget
            )
        except ValueError:  # nothing fits
            continue
        layers = _counts(plan.cuts)
        if layers != layout.counts(model):
            yield Candidate.of(run, replace(layout, layers=layers), best.placed)


def _of_size(run: Run, search: Search, layouts: list[Layout]) -> list[Candidate]:
    """All candidates of one EP size; plans do not depend on the rest of the layout."""
    model, ranks = run.model, layouts[0].expert
    node = run.cluster.ranks_per_node(ranks)
    microbatches = max(layout.microbatches(run.work) for layout in layouts)
    calls = layer_calls(model.moe_layers, microbatches, search.calls)
    tokens = layouts[0].tokens(run.work)
    counts = search.loads.draw(ranks, model.experts, model.topk, tokens, calls)
    plain = place(counts, 0, 0.0, node)
    found = [
        Candidate.of(run, replace(layout, tokens_by=way), plain)
        for layout, way in product(layouts, ("megatron", "balanced"))
    ]
    if ranks == 1 or ranks > MAX_RANKS:
        return found
    full = model.experts // ranks
    settings = product((s or full for s in search.slots), search.tolerances)
    for slots, tolerance in dict.fromkeys(settings):
        placed = place(counts, slots, tolerance, node, search.by_node)
        part = min(fullest_part(counts, placed), tokens) / tokens * run.cluster.peer_margin
        ways = transports(run, search, ranks, float(np.ceil(part * 1000) / 1000))
        for layout, (way, peer), by in product(layouts, ways.items(), ("collective", "p2p")):
            moved = replace(layout, tokens_by=way, weights_by=by, peer_capacity=peer)
            found.append(Candidate.of(run, moved, placed))
    return found


def transports(run: Run, search: Search, ranks: int, capacity: float) -> dict[str, float]:
    """Those of tokens that make sense at this size, with their ``peer_capacity``."""
    in_a_node = run.cluster.ranks_per_node(ranks) == ranks
    makes_sense = {
        "all_gather": True,
        "all_to_all": capacity < 1,
        "symmetric_memory": in_a_node,
        "hybrid_ep": not in_a_node or "symmetric_memory" not in search.transports,
    }
    ways = [way for way in search.transports if makes_sense[way]]
    return {way: capacity if way == "all_to_all" else 1.0 for way in ways}


def smallest(found: Iterable[Candidate]) -> Candidate:
    """The one that needs the least memory."""
    return min(found, key=lambda one: one.memory.total)


def fastest(found: Iterable[Candidate], hbm: float) -> Candidate | None:
    """The shortest step of those that fit the memory; in a tie to the microsecond the smaller."""
    return min(
        (one for one in found if one.memory.total <= hbm),
        key=lambda one: (round(one.time.total, 6), one.memory.total),
        default=None,
    )


def best_by_name(found: Iterable[Candidate], hbm: float) -> list[Candidate]:
    """For each EP size and number of clones the fastest that fits, or else the smallest."""
    groups: dict[tuple[int, str], list[Candidate]] = {}
    for one in found:
        groups.setdefault((one.layout.expert, one.name), []).append(one)
    return [fastest(group, hbm) or smallest(group) for group in groups.values()]
