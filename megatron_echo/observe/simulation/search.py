"""Which layout is the fastest that fits, of plain expert parallelism and of clones."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from megatron_echo.memory.pipeline_layout import LayerCost, even_split, plan_layout
from megatron_echo.observe.simulation.cost_model import GIB, CostModel, Costs, Memory, StepTime
from megatron_echo.observe.simulation.layout import Layout, stage_layers
from megatron_echo.observe.simulation.placement import Placement, check_ranks, fullest_part, place
from megatron_echo.observe.simulation.workloads import Loads, layer_calls
from megatron_echo.planner.bound import MAX_RANKS
from megatron_echo.progress import track

PIPELINES = (1, 2, 4, 8, 16)
TRANSPORTS = ("all_gather", "all_to_all", "symmetric_memory", "hybrid_ep")
"""Of tokens, with clones."""


@dataclass(frozen=True)
class Setting:
    """How many clones.

    Attributes:
        slots: S of a rank; None for as many as a rank has experts, 0 for plain EP.
        tolerance: of the planner.
    """

    slots: int | None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A layout with what it costs.

    Attributes:
        layout: sizes and transports.
        placed: its loads.
        capacity: ``--moe-received-token-capacity``, None for ``auto`` or without clones.
        time: seconds of a step.
        memory: GiB of the fullest rank.
    """

    layout: Layout
    placed: Placement
    capacity: float | None
    time: StepTime
    memory: Memory

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
    """What is tried.

    Attributes:
        loads: who wants which expert.
        gpus: of the run.
        experts: EP sizes.
        pipelines: PP sizes.
        settings: clones; plain EP is always tried.
        calls: layer calls to look at for each EP size, 0 for all of a step.
        by_node: whether the planner is told of nodes.
        virtuals: VPP sizes, for PP above 1.
        tensor: TP.
        context: CP.
        offloads: shares of what is kept that may go to the host.
        transports: some of :data:`TRANSPORTS`.
    """

    loads: Loads
    gpus: int
    experts: tuple[int, ...]
    pipelines: tuple[int, ...]
    settings: tuple[Setting, ...]
    calls: int = 64
    by_node: bool = False
    virtuals: tuple[int, ...] = (1, 2)
    tensor: int = 1
    context: int = 1
    offloads: tuple[float, ...] = (0.0, 1.0)
    transports: tuple[str, ...] = TRANSPORTS


def candidates(model: CostModel, search: Search) -> tuple[list[Candidate], list[str]]:
    """Everything that is tried, in the order of the search, and why some EP sizes are not.

    Raises:
        ValueError: no size can be tried; the sentence is the first one's.
    """
    found: list[Candidate] = []
    left_out: list[str] = []
    for ranks in track(search.experts, "Expert-parallel sizes"):
        try:
            check_ranks(ranks, model.model.experts, 0)
            found += list(_of_size(model, search, ranks, _layouts(model, search, ranks)))
        except ValueError as error:
            left_out.append(str(error))
        if ranks > MAX_RANKS:
            left_out.append(
                f"Clones at EP={ranks}: the planner takes up to {MAX_RANKS} ranks. Use fewer."
            )
    if not found:
        raise ValueError(left_out[0] if left_out else "No expert-parallel size. Give one.")
    return [*found, *_planned(model, found)], left_out


def _layouts(model: CostModel, search: Search, ranks: int) -> list[Layout]:
    layouts: list[Layout] = []
    refused: ValueError | None = None
    for pipeline in search.pipelines:
        for virtual in search.virtuals if pipeline > 1 else (1,):
            try:
                layout = Layout(
                    search.gpus, ranks, pipeline, virtual, search.tensor, search.context,
                    _even_layers(model, pipeline, virtual),
                )  # fmt: skip
                layout.check(model.model, model.work)
            except ValueError as error:
                refused = refused or error
                continue
            layouts += [replace(layout, offload=share) for share in search.offloads]
            layouts.append(replace(layout, recompute=True))
    if not layouts and refused is not None:
        raise refused
    return layouts


def _items(model: CostModel) -> str:
    return "E" + "t" * model.model.layers + "L"


def _counts(cuts: Sequence[int]) -> tuple[int, ...]:
    """Decoder layers of each stage: the first also has the embedding, the last the output."""
    sizes = [end - begin for begin, end in pairwise(cuts)]
    return (sizes[0] - 1, *sizes[1:-1], sizes[-1] - 1)


def _even_layers(model: CostModel, pipeline: int, virtual: int) -> tuple[int, ...] | None:
    """None where Megatron's flags say it; with chunks that do not divide an even split."""
    if virtual == 1 or model.model.layers % (pipeline * virtual) == 0:
        return None
    items = [LayerCost(kind, 0, 0, 0) for kind in _items(model)]
    return _counts(even_split(items, pipeline * virtual))


def _planned(model: CostModel, found: Iterable[Candidate]) -> Iterator[Candidate]:
    """The fastest of each kind and pipeline again, with its layers placed by ``plan_layout``."""
    groups: dict[tuple[str, int, int], list[Candidate]] = {}
    for one in found:
        if one.layout.pipeline > 1 and one.kind != "what if":
            key = one.kind, one.layout.pipeline, one.layout.virtual
            groups.setdefault(key, []).append(one)
    for group in groups.values():
        best = fastest(group, model.cluster.hbm_gib) or min(group, key=_size)
        layers = _plan(model, best)
        if layers is not None and layers != stage_layers(model.model, best.layout):
            yield _candidate(model, replace(best.layout, layers=layers), best.placed)


def _plan(model: CostModel, one: Candidate) -> tuple[int, ...] | None:
    """Layers of each stage by ``plan_layout``; None where no assignment fits."""
    costs, layout = Costs(model, one.layout, one.placed), one.layout
    dense, number = model.model.dense_layers, 0
    items = []
    for letter in _items(model):
        number += letter == "t"
        kind = ("dense" if number <= dense else "moe") if letter == "t" else "output"
        cost = costs.layers[kind]
        is_embedding = letter == "E"
        items.append(
            LayerCost(
                letter,
                0.0 if is_embedding else cost.seconds,
                cost.kept,
                cost.states,
                0.0 if is_embedding else cost.working,
            )
        )
    fixed = model.assumed.reserve_gib + one.memory.clones
    schedule = layout.schedule(model.work)
    try:
        plan = plan_layout(
            items, layout.pipeline, layout.virtual, schedule.schedule, schedule.microbatches,
            budget_bytes=(model.cluster.hbm_gib - fixed) * GIB,
        )  # fmt: skip
    except ValueError:
        return None
    return _counts(plan.cuts)


def _of_size(
    model: CostModel, search: Search, ranks: int, layouts: list[Layout]
) -> Iterator[Candidate]:
    """All candidates of one EP size; plans do not depend on the rest of the layout."""
    shape, node = model.model, model.cluster.ranks_per_node(ranks)
    microbatches = max(layout.microbatches(model.work) for layout in layouts)
    calls = layer_calls(shape.moe_layers, microbatches, search.calls)
    tokens = layouts[0].tokens(model.work)
    counts = search.loads.draw(ranks, shape.experts, shape.topk, tokens, calls)
    plain = place(counts, 0, 0.0, node)
    for layout in layouts:
        for way in ("megatron", "balanced"):
            yield _candidate(model, replace(layout, tokens_by=way), plain)
    if ranks == 1 or ranks > MAX_RANKS:
        return
    full = shape.experts // ranks
    settings = [
        (full if setting.slots is None else setting.slots, setting.tolerance)
        for setting in search.settings
    ]
    for slots, tolerance in dict.fromkeys(settings):
        placed = place(counts, slots, tolerance, node, search.by_node)
        part = min(fullest_part(counts, placed), tokens) / tokens * model.assumed.peer_margin
        ways = _ways(model, search, ranks, float(np.ceil(part * 1000) / 1000))
        yield from _with_clones(model, layouts, placed, ways)


def _ways(model: CostModel, search: Search, ranks: int, capacity: float) -> list[tuple[str, float]]:
    """Transports of tokens that make sense at this size, with their ``peer_capacity``."""
    in_a_node = model.cluster.ranks_per_node(ranks) == ranks
    makes_sense = {
        "all_gather": True,
        "all_to_all": capacity < 1,
        "symmetric_memory": in_a_node,
        "hybrid_ep": not in_a_node or "symmetric_memory" not in search.transports,
    }
    return [
        (way, capacity if way == "all_to_all" else 1.0)
        for way in search.transports
        if makes_sense[way]
    ]


def _with_clones(
    model: CostModel, layouts: Iterable[Layout], placed: Placement, ways: list[tuple[str, float]]
) -> Iterator[Candidate]:
    for layout in layouts:
        for tokens_by, peer in ways:
            for weights_by in ("collective", "p2p"):
                yield _candidate(
                    model,
                    replace(layout, tokens_by=tokens_by, weights_by=weights_by, peer_capacity=peer),
                    placed,
                )


def _candidate(model: CostModel, layout: Layout, placed: Placement) -> Candidate:
    return Candidate(
        layout,
        placed,
        model.capacity(layout, placed),
        model.step_time(layout, placed),
        model.memory(layout, placed),
    )


def _size(one: Candidate) -> float:
    return one.memory.total


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
    return [fastest(group, hbm) or min(group, key=_size) for group in groups.values()]
