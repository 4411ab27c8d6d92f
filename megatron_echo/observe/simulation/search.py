"""Which layout is the fastest that fits, of plain expert parallelism and of clones."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from megatron_echo.observe.simulation.cost_model import CostModel, Memory, StepTime
from megatron_echo.observe.simulation.layout import Layout
from megatron_echo.observe.simulation.placement import Placement, check_ranks, fullest_part, place
from megatron_echo.observe.simulation.workloads import Loads, layer_calls
from megatron_echo.planner.balance import MAX_RANKS
from megatron_echo.progress import track

PIPELINES = (1, 2, 4, 8, 16)


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
        if self.layout.tokens_by in ("balanced", "exact"):
            return "what if"
        return "echo" if self.layout.weights_by else "plain"

    @property
    def name(self) -> str:
        """One phrase."""
        if not self.layout.weights_by:
            return "plain EP" if self.kind == "plain" else "plain EP, balanced"
        if self.kind == "what if":
            return "ECHO, exact"
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
    """

    loads: Loads
    gpus: int
    experts: tuple[int, ...]
    pipelines: tuple[int, ...]
    settings: tuple[Setting, ...]
    calls: int = 64
    by_node: bool = False


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
    if not found:
        raise ValueError(left_out[0] if left_out else "No expert-parallel size. Give one.")
    return found, left_out


def _layouts(model: CostModel, search: Search, ranks: int) -> list[Layout]:
    layouts: list[Layout] = []
    refused: ValueError | None = None
    for pipeline in search.pipelines:
        layout = Layout(search.gpus, ranks, pipeline)
        try:
            layout.check(model.model, model.work)
            layouts += [layout, replace(layout, recompute=True)]
        except ValueError as error:
            refused = refused or error
    if not layouts and refused is not None:
        raise refused
    return layouts


def _of_size(
    model: CostModel, search: Search, ranks: int, layouts: list[Layout]
) -> Iterator[Candidate]:
    """All candidates of one EP size; plans do not depend on the rest of the layout."""
    shape, node = model.model, model.cluster.ranks_per_node(ranks)
    microbatches = max(layout.microbatches(model.work) for layout in layouts)
    calls = layer_calls(shape.moe_layers, microbatches, search.calls)
    counts = search.loads.draw(ranks, shape.experts, shape.topk, model.work.tokens, calls)
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
        yield from _with_clones(model, layouts, placed, counts)


def _with_clones(
    model: CostModel, layouts: Iterable[Layout], placed: Placement, counts: np.ndarray
) -> Iterator[Candidate]:
    tokens = model.work.tokens
    part = min(fullest_part(counts, placed), tokens) / tokens * model.assumed.peer_margin
    capacity = min(1.0, np.ceil(part * 1000) / 1000)
    ways = [("all_gather", 1.0), ("exact", 1.0)]
    ways += [("all_to_all", float(capacity))] if capacity < 1 else []
    for layout in layouts:
        for tokens_by, peer in ways:
            for weights_by in ("collective", "p2p"):
                yield _candidate(
                    model,
                    replace(layout, tokens_by=tokens_by, weights_by=weights_by, peer_capacity=peer),
                    placed,
                )


def _candidate(model: CostModel, layout: Layout, placed: Placement) -> Candidate:
    capacity = model.capacity(layout, placed) if layout.weights_by else None
    return Candidate(
        layout, placed, capacity, model.step_time(layout, placed), model.memory(layout, placed)
    )


def fastest(found: Iterable[Candidate], hbm: float) -> Candidate | None:
    """The shortest step of those that fit the memory; the earlier in a tie."""
    return min(
        (one for one in found if one.memory.total <= hbm),
        key=lambda one: one.time.total,
        default=None,
    )


def best_by_name(found: Iterable[Candidate], hbm: float) -> list[Candidate]:
    """For each EP size and number of clones the fastest that fits, or else the smallest."""
    groups: dict[tuple[int, str], list[Candidate]] = {}
    for one in found:
        groups.setdefault((one.layout.expert, one.name), []).append(one)
    return [
        fastest(group, hbm) or min(group, key=lambda one: one.memory.total)
        for group in groups.values()
    ]
