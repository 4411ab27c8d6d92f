"""Which layers on which pipeline stage: memory- and time-aware, in Megatron's own notation.

Early ranks hold more microbatches than late ones, so a layer costs more memory on them. What a rank
holds, and how long a step takes, comes from replaying the schedule (``schedules.py``).
"""

import dataclasses
import json
from collections.abc import Sequence
from itertools import groupby, pairwise
from numbers import Real
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_echo.memory.layout_search import Costs, Measures, Search
from megatron_echo.memory.schedules import Pipeline

KINDS = ("E", "t", "m", "L")
Preference = Literal["time", "memory"]
_MOST = 1e100
"""Larger costs are no costs: their sums would leave float64."""


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What one item of the model costs on its rank.

    Its kind is Megatron's letter: ``E`` embedding, part of the first stage, ``t`` decoder layer,
    ``m`` MTP layer, ``L`` head and loss, part of the last one.
    """

    kind: str
    seconds: float  # forward and backward of a microbatch; any unit, if it is the same for all
    activation_bytes: float  # kept for backward, for each microbatch
    static_bytes: float  # weights, gradients and optimizer state
    workspace_bytes: float = 0  # the most that it uses besides, while it runs


def read_costs(path: str | Path) -> list[LayerCost]:
    """Costs from a file of JSON: ``{"layers": [{"kind": "t", "count": 58, "seconds": ...}, ...]}``.

    An entry has the fields of :class:`LayerCost` and, optionally, how many such layers follow each
    other. A ``ValueError`` says that the file does not hold that.
    """
    try:
        entries = json.loads(Path(path).read_text())["layers"]
        return [
            LayerCost(**{key: value for key, value in entry.items() if key != "count"})
            for entry in entries
            for _ in range(entry.get("count", 1))
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fields = ", ".join(field.name for field in dataclasses.fields(LayerCost))
        raise ValueError(
            f"{path} holds no layer costs ({error}). Write "
            f'{{"layers": [...]}} with the fields {fields} and count.'
        ) from error


@dataclasses.dataclass(frozen=True)
class PipelineLayout:
    """An assignment of layers to stages, and what it costs."""

    pipeline: Pipeline  # the schedule
    layers: tuple[LayerCost, ...]  # the costs it was made from
    cuts: tuple[int, ...]  # ``[P * V + 1]``: stage s has layers ``cuts[s]`` to ``cuts[s + 1]``
    ranks: tuple[Measures, ...]  # stage time, rank time and peak bytes of each rank
    step_seconds: float  # of a whole step, from replaying the schedule

    @property
    def measures(self) -> Measures:
        """The longest stage, the busiest rank and the highest peak."""
        return Measures(*(max(values) for values in zip(*self.ranks, strict=True)))

    @property
    def peak_bytes(self) -> float:
        """The highest peak of all ranks."""
        return self.measures.peak

    @property
    def even(self) -> "PipelineLayout":
        """The even split of the same model."""
        return evaluate_layout(
            self.layers, self.pipeline, even_split(self.layers, len(self.cuts) - 1)
        )

    @property
    def slowdown(self) -> float:
        """How much longer a step takes than with the even split: 0.05 is 5 %, below 0 is faster."""
        even = self.even.step_seconds
        return self.step_seconds / even - 1 if even else 0.0

    @property
    def stages(self) -> tuple[str, ...]:
        """The letters of each stage, in the order of the model."""
        letters = "".join(layer.kind for layer in self.layers)
        return tuple(letters[a:b] for a, b in pairwise(self.cuts))

    @property
    def string(self) -> str:
        """The value of ``--pipeline-model-parallel-layout``, ``Ettt|tttt|...|tttL``."""
        return "|".join(self.stages)

    def check_with_megatron(self) -> None:
        """Have Megatron's own parser read :attr:`string`; ``ValueError`` if it reads another."""
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        parsed = PipelineParallelLayerLayout(self.string, self.pipeline.ranks)
        count = "".join(self.stages).count
        parsed.validate_layer_layout(count("t"), count("m"))
        names = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
        for rank, chunks in enumerate(parsed.layout):
            for chunk, stage in enumerate(chunks):
                letters = "".join(names[item.name] for item in stage)
                if letters != self.stages[self.pipeline.stage(rank, chunk)]:
                    raise ValueError(
                        f"Megatron reads {letters} for chunk {chunk} of rank {rank} in "
                        f"{self.string}. Please report this layout."
                    )

    def table(self) -> str:
        """A line a rank: its stages, the microbatches it holds at the worst moment, time, peak."""
        lines = ["rank  stages                     held at the peak  seconds   peak GiB"]
        for rank, measured in enumerate(self.ranks):
            activation = [
                sum(layer.activation_bytes for layer in chunk) for chunk in self._chunks(rank)
            ]
            live = self.pipeline.live(rank)
            worst = max(live, key=lambda v: sum(a * b for a, b in zip(v, activation, strict=True)))
            held = " + ".join(map(str, worst))
            lines.append(
                f"{rank:4}  {self._named(rank):26} {held:16} {measured.rank_time:8.4g} "
                f"{measured.peak / 2**30:10.3f}"
            )
        return "\n".join(lines)

    def _chunks(self, rank: int) -> list[tuple[LayerCost, ...]]:
        """The layers of each chunk of a rank."""
        stages = (self.pipeline.stage(rank, chunk) for chunk in range(self.pipeline.chunks))
        return [self.layers[self.cuts[s] : self.cuts[s + 1]] for s in stages]

    def _named(self, rank: int) -> str:
        """The chunks of a rank, ``Et*4 + t*5`` for ``Etttt`` and ``ttttt``."""
        runs = [groupby(layer.kind for layer in chunk) for chunk in self._chunks(rank)]
        counts = ([(letter, len(list(run))) for letter, run in chunk] for chunk in runs)
        return " + ".join(
            "".join(letter if n == 1 else f"{letter}*{n}" for letter, n in chunk)
            for chunk in counts
        )


def even_split(layers: Sequence[LayerCost], stages: int) -> list[int]:
    """The cuts of an even split: as many decoder layers in each stage, whatever they cost.

    What does not divide goes to the inner stages from the left, to the first and last one at
    the end: those have the embedding and the loss. MTP layers sit with the loss. A
    ``ValueError`` says that there are fewer layers than stages to fill.
    """
    decoders = sum(layer.kind == "t" for layer in layers)
    if decoders < stages - 2:
        raise ValueError(
            f"{decoders} decoder layers leave some of the {stages} stages empty. Use fewer stages."
        )
    counts = [decoders // stages] * stages
    places = [*range(1, stages - 1), *({0, stages - 1} if stages > 1 else {0})]
    for place in places[: decoders % stages]:
        counts[place] += 1
    return [0, *(1 + sum(counts[: s + 1]) for s in range(stages - 1)), len(layers)]


def _check_layers(layers: Sequence[LayerCost]) -> None:
    for layer in layers:
        if layer.kind not in KINDS:
            raise ValueError(
                f"There is no kind {layer.kind!r} of layer. Use one of {', '.join(KINDS)}."
            )
        costs = (layer.seconds, layer.activation_bytes, layer.static_bytes, layer.workspace_bytes)
        if not all(isinstance(cost, Real) and 0 <= cost <= _MOST for cost in costs):
            raise ValueError(
                f"{layer} has a negative cost, or one that is no number. "
                "Give zero or more, and finite, numbers."
            )
    letters = "".join(layer.kind for layer in layers)
    decoders, mtp = letters.count("t"), letters.count("m")
    if letters != "E" + "t" * decoders + "m" * mtp + "L":
        raise ValueError(
            f"The model {letters!r} is not an embedding, decoder layers, MTP layers and a loss. "
            "Order the layers as E t ... t m ... m L."
        )


def _search(layers: Sequence[LayerCost], pipeline: Pipeline) -> Search:
    rows = [(*dataclasses.astuple(layer)[1:], layer.kind == "m") for layer in layers]
    return Search(Costs(*np.array(rows, dtype=np.float64).T), pipeline)


def evaluate_layout(
    layers: Sequence[LayerCost], pipeline: Pipeline, cuts: Sequence[int]
) -> PipelineLayout:
    """What a given assignment costs; ``cuts`` as in :class:`PipelineLayout`."""
    search = _search(layers, pipeline)
    ranks = tuple(Measures(*row) for row in search.rank_measures(cuts).tolist())
    step = float(search.step_time(cuts))
    return PipelineLayout(pipeline, tuple(layers), tuple(cuts), ranks, step)


def plan_layout(
    layers: Sequence[LayerCost],
    pipeline_size: int,
    virtual_size: int = 1,
    schedule: str | None = None,
    num_microbatches: int | None = None,
    group_size: int | None = None,
    budget_bytes: float | None = None,
    prefer: Preference = "time",
) -> PipelineLayout:
    """Assign layers to pipeline stages.

    Every stage holds at least one item, in the order of the model. Where there are up to 20,000
    layouts, the answer is the best of them. Of more, no move of an item from one stage to another
    improves it. Whether a budget can be kept is exact for one and two chunks a rank.

    Args:
        layers: ``E t ... t m ... m L`` with their costs.
        pipeline_size: P.
        virtual_size: V, chunks on each rank.
        schedule: one of ``SCHEDULES``; None for ``1f1b``, or ``interleaved`` where V > 1.
        num_microbatches: of a step; None for enough to fill the pipeline.
        group_size: microbatches a chunk runs in a row, when interleaved; None for P.
        budget_bytes: no rank's peak may exceed it. None for the even split's peak. With one,
            :attr:`PipelineLayout.slowdown` says how much longer a step takes; without, the layout
            is in none of the four measures worse than the even split.
        prefer: ``time`` minimises the replayed step, then the longest stage, the busiest rank and
            the peak. ``memory`` minimises the peak, then the same, among the layouts whose
            longest stage and busiest rank are no longer than the even split's. A step that is
            slower than the even split's comes after all that are not.

    Raises:
        ValueError: layers or sizes that make no pipeline, or a budget that nothing fits; the
            message names the rank that needs the most and what it needs.
    """
    if prefer not in ("time", "memory"):
        raise ValueError(f"plan_layout cannot prefer {prefer!r}. Use 'time' or 'memory'.")
    if budget_bytes is not None and not budget_bytes > 0:
        raise ValueError(f"A budget of {budget_bytes} bytes is no size. Give more than 0.")
    _check_layers(layers)
    schedule = schedule or ("1f1b" if virtual_size == 1 else "interleaved")
    pipeline = Pipeline.make(schedule, pipeline_size, virtual_size, num_microbatches, group_size)
    cuts = even_split(layers, pipeline_size * virtual_size)
    search = _search(layers, pipeline)
    even, enough = search.measures(cuts), 0.0
    limits = even if budget_bytes is None else Measures(np.inf, np.inf, budget_bytes)
    order = ["step", "stage_time", "rank_time", "peak"]
    if prefer == "memory":
        limits, enough = even._replace(peak=limits.peak), float(search.step_time(cuts))
        order = ["peak", *order[:-1]]
    if not even.keeps(limits):
        cuts = search.best(cuts, "peak", limits._replace(peak=even.peak))
        if not search.measures(cuts).keeps(limits):
            raise ValueError(_over_budget(evaluate_layout(layers, pipeline, cuts), limits.peak))
    return evaluate_layout(layers, pipeline, search.plan(cuts, order, limits, enough))


def _over_budget(least: PipelineLayout, budget: float) -> str:
    rank = max(range(len(least.ranks)), key=lambda r: least.ranks[r].peak)
    return (
        f"No layout fits {budget / 2**30:.3f} GiB a GPU: even in the smallest, rank {rank} "
        f"({least._named(rank)}) needs {least.peak_bytes / 2**30:.3f} GiB. Use more pipeline "
        "ranks, keep less for backward (recompute or offload), or raise the budget."
    )


def explain(layout: PipelineLayout) -> str:
    """Why this layout: its table, and what it changes against the even split."""
    even = layout.even
    binding = max(range(len(layout.ranks)), key=lambda r: layout.ranks[r].peak)
    slowest = max(range(len(layout.ranks)), key=lambda r: layout.ranks[r].stage_time)
    pipeline = layout.pipeline
    static = sum(layer.static_bytes for chunk in layout._chunks(binding) for layer in chunk)
    lines = [
        f"{pipeline.schedule}, {pipeline.ranks} ranks x {pipeline.chunks} chunks, "
        f"{pipeline.microbatches} microbatches",
        layout.table(),
        f"Memory: rank {binding} binds, {static / 2**30:.3f} GiB of it static. "
        f"Time: the longest stage is on rank {slowest}.",
        "                      this layout   even split",
    ]
    rows = [
        ("peak GiB", layout.peak_bytes / 2**30, even.peak_bytes / 2**30),
        ("longest stage, s", layout.measures.stage_time, even.measures.stage_time),
        ("busiest rank, s", layout.measures.rank_time, even.measures.rank_time),
        ("step, replayed, s", layout.step_seconds, even.step_seconds),
    ]
    for name, ours, theirs in rows:
        change = f"{ours / theirs - 1:+.1%}" if theirs else ""
        lines.append(f"{name:20} {ours:12.4g} {theirs:12.4g}  {change}")
    if layout.slowdown > 1e-9:
        lines.append(
            f"The budget makes a step {layout.slowdown:.1%} slower than the even split, which "
            f"needs {even.peak_bytes / 2**30:.3f} GiB a GPU."
        )
    return "\n".join(lines)
