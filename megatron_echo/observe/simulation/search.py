"""Which layout is the fastest that fits, of plain expert parallelism and of clones."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise, product
from typing import Any

import numpy as np

from megatron_echo.flags import flag, flag_name, within
from megatron_echo.memory.pipeline_layout import LayerCost, even_split, plan_layout
from megatron_echo.observe.simulation.cost_model import GIB, Costs, Memory, StepTime, clone_price
from megatron_echo.observe.simulation.inputs import CLUSTERS, MODELS, load
from megatron_echo.observe.simulation.layout import Layout, Run, Work
from megatron_echo.observe.simulation.placement import Placement, fullest_part, place
from megatron_echo.observe.simulation.workloads import (
    PUBLISHED,
    WORKLOADS,
    Loads,
    layer_calls,
    load_workload,
)
from megatron_echo.planner.bound import MAX_RANKS, MAX_TOLERANCE
from megatron_echo.progress import track

TRANSPORTS = ("all_gather", "all_to_all", "symmetric_memory", "hybrid_ep")
"""Of tokens, with clones."""

_flag = partial(flag, group="simulator")


_size = within(1, math.inf, "is below 1. Use 1 or more.")
_calls = within(0, math.inf, "is negative. Use 0 for all.")
_share = within(0, 1, "is no share. Use 0 to 1.")
_tolerance = within(0, MAX_TOLERANCE, f"is not between 0 and {MAX_TOLERANCE}. Use 0.02.")


def _slots(word: str, _: Any) -> str | None:
    is_number = word.isdecimal() and int(word) > 0
    return None if is_number or word == "all" else "is not a number of slots. Use 1, 2, ... or all."


@dataclass(frozen=True)
class Search:
    """What is tried, each field a flag, besides plain EP; a ``ValueError`` for one out of range."""

    loads: str = _flag(
        "lognormal 1.0",
        f"{', '.join((*WORKLOADS, *PUBLISHED))}, 'overload X' (max/mean of ranks), or a folder of "
        "traces",
        metavar="NAME|DIR",
    )
    model: str = _flag("deepseek-v3", f"{', '.join(MODELS)}, or a .json file")
    cluster: str = _flag("h100-nvl8", f"{', '.join(CLUSTERS)}, or a .json file")
    gpus: int | None = _flag(None, "in place of the cluster's own")
    ep: tuple[int, ...] | None = _flag(None, "expert-parallel sizes; all that divide", check=_size)
    pp: tuple[int, ...] = _flag((1, 2, 4, 8, 16), "pipeline sizes", check=_size)
    vpp: tuple[int, ...] = _flag((1, 2), "chunks of a pipeline rank", check=_size)
    tp: int = _flag(1, "tensor parallelism, not of experts", check=_size)
    cp: int = _flag(1, "context parallelism", check=_size)
    offload_fraction: tuple[float, ...] = _flag(
        (0.0, 1.0), "shares of what is kept for backward that may go to the host", check=_share
    )
    token_transports: tuple[str, ...] = _flag(
        TRANSPORTS, "how tokens travel with clones", choices=TRANSPORTS
    )
    slots: tuple[str, ...] = _flag(
        ("all", "1", "2"),
        "clone slots of a rank; all: as many as it has experts",
        metavar="S",
        check=_slots,
    )
    tolerance: tuple[float | None, ...] = _flag(
        (0.02,),
        "of balance; auto: clones only where they win (weights by p2p)",
        check=_tolerance,
        none_word="auto",
    )
    by_node: bool = _flag(False, "tell the planner of nodes")
    seq_length: int = _flag(4096, "tokens of a sequence", check=_size)
    micro_batch_size: int = _flag(1, "sequences", check=_size)
    global_batch_size: int | None = _flag(
        None, "sequences; 8 microbatches a rank at PP=1", check=_size
    )
    calls: int = _flag(48, "layer calls to plan for each EP size, 0 for all", check=_calls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, check = getattr(self, field.name), field.metadata["check"]
            for each in value if isinstance(value, list | tuple) else (value,):
                problem = check(each, self) if check and each is not None else None
                if problem is not None:
                    raise ValueError(f"{flag_name(field.name)} {each} {problem}")

    @cached_property
    def workload(self) -> Loads:
        """Who wants which expert; raises as :func:`.load_workload`."""
        return load_workload(self.loads)

    @cached_property
    def run(self) -> Run:
        """What is run where; raises as :func:`.load`."""
        cluster, model = load(CLUSTERS, self.cluster), load(MODELS, self.model)
        if self.gpus is not None:
            cluster = replace(cluster, gpus=self.gpus)
        data = max(1, cluster.gpus // (self.tp * self.cp))
        batch = self.global_batch_size or 8 * data * self.micro_batch_size
        return Run(cluster, model, Work(self.seq_length, self.micro_batch_size, batch))


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
        """``plain`` or ``echo``."""
        return "echo" if self.layout.weights_by else "plain"

    @property
    def name(self) -> str:
        """One phrase."""
        if self.kind == "plain":
            return "plain EP"
        tolerance = self.placed.tolerance
        word = "auto" if tolerance is None else f"{tolerance:.0%}"
        return f"ECHO S={self.placed.slots}, {word}"


def candidates(search: Search) -> tuple[list[Candidate], list[str]]:
    """Everything that is tried, in the order of the search, and why some EP sizes are not.

    A ``ValueError`` says that no size can be tried; the sentence is the first one's.
    """
    run, found, left_out = search.run, list[Candidate](), list[str]()
    powers = (2**n for n in range(1, 11))
    sizes = search.ep or [n for n in powers if run.model.experts % n == 0 and n <= run.cluster.gpus]
    for ranks in track(sizes, "Expert-parallel sizes"):
        layouts, refused = _layouts(search, ranks)
        try:
            if not layouts:
                raise refused[0]
            found += _of_size(search, layouts)
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


def _layouts(search: Search, ranks: int) -> tuple[list[Layout], list[ValueError]]:
    """Those of one EP size that can run, and what is wrong with the others."""
    run, layouts, refused = search.run, list[Layout](), list[ValueError]()
    sizes = product(search.pp, search.vpp)
    for pipeline, virtual in dict.fromkeys((p, v if p > 1 else 1) for p, v in sizes):
        try:
            layout = Layout(
                run.cluster.gpus, ranks, pipeline, virtual, search.tp, search.cp,
                _even_layers(run.model.layers, pipeline, virtual),
            )  # fmt: skip
            layout.check(run.model, run.work)
        except ValueError as error:
            refused.append(error)
            continue
        layouts += [
            replace(layout, offload=share) for share in dict.fromkeys(search.offload_fraction)
        ]
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
        if one.layout.pipeline > 1:
            key = one.kind, one.layout.pipeline, one.layout.virtual
            groups.setdefault(key, []).append(one)
    model, hbm = run.model, run.cluster.hbm_gib
    for group in groups.values():
        best = fastest(group, hbm) or smallest(group)
        layout, costs = best.layout, Costs(run, best.layout, best.placed).kinds
        layers = [("t", kind) for kind in model.kinds]
        items = [
            LayerCost(letter, *costs[kind][:4])
            for letter, kind in [("E", "embedding"), *layers, ("L", "output")]
        ]
        budget = (hbm - (run.cluster.reserve_gib + best.memory.clones)) * GIB
        microbatches = layout.microbatches(run.work)
        try:
            plan = plan_layout(
                items, layout.pipeline, layout.virtual, None, microbatches, budget_bytes=budget
            )
        except ValueError:  # nothing fits
            continue
        counts = _counts(plan.cuts)
        if counts != layout.counts(model):
            yield Candidate.of(run, replace(layout, layers=counts), best.placed)


def _of_size(search: Search, layouts: list[Layout]) -> list[Candidate]:
    """All candidates of one EP size; plans do not depend on the rest of the layout."""
    run, model, ranks = search.run, search.run.model, layouts[0].expert
    node = run.cluster.ranks_per_node(ranks)
    microbatches = max(layout.microbatches(run.work) for layout in layouts)
    calls = layer_calls(model.moe_layers, microbatches, search.calls)
    tokens = layouts[0].tokens(run.work)
    counts = search.workload.draw(ranks, model.experts, model.topk, tokens, calls)
    plain = place(counts, 0, 0.0, node)
    found = [Candidate.of(run, layout, plain) for layout in layouts]
    if ranks == 1 or ranks > MAX_RANKS:
        return found
    full = model.experts // ranks
    numbers = (full if word == "all" else int(word) for word in search.slots)
    for slots, tolerance in dict.fromkeys(product(numbers, search.tolerance)):
        priced = tolerance is None
        for tokens_by in [TRANSPORTS] if not priced else [TRANSPORTS[:2], TRANSPORTS[2:]]:
            price = clone_price(run, ranks, tokens_by[0], search.by_node) if priced else None
            placed = place(counts, slots, tolerance, node, search.by_node, price)
            part = min(fullest_part(counts, placed), tokens) / tokens * run.cluster.peer_margin
            ways = transports(search, ranks, float(np.ceil(part * 1000) / 1000))
            chosen = [item for item in ways.items() if item[0] in tokens_by]
            by_words = ("p2p",) if priced else ("collective", "p2p")
            for layout, (way, peer), by in product(layouts, chosen, by_words):
                moved = replace(layout, tokens_by=way, weights_by=by, peer_capacity=peer)
                found.append(Candidate.of(run, moved, placed))
    return found


def transports(search: Search, ranks: int, capacity: float) -> dict[str, float]:
    """Those of tokens that make sense at this size, with their ``peer_capacity``."""
    in_a_node = search.run.cluster.ranks_per_node(ranks) == ranks
    makes_sense = {
        "all_gather": True,
        "all_to_all": capacity < 1,
        "symmetric_memory": in_a_node,
        "hybrid_ep": not in_a_node or "symmetric_memory" not in search.token_transports,
    }
    ways = [way for way in search.token_transports if makes_sense[way]]
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
