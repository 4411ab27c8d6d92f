"""Who wants which expert: from a trace, from named synthetic workloads, from published figures."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np

from megatron_echo.record.trace import StepTrace, TraceError, read_traces

WORKLOADS = (
    "uniform", "lognormal 0.5", "lognormal 1.0", "zipf 0.3", "zipf 0.6", "zipf 0.9", "zipf 1.2",
    "one hot rank", "one hot expert", "spread hot experts", "ragged sources",
    "empty experts and ranks", "rotating hotspot", "burst",
)  # fmt: skip
"""Also the planner benchmark's; a name's place is part of its seed."""

PUBLISHED = {"ultraep-low": 1.30, "ultraep-high": 4.01}
"""Lowest and highest max/mean load of ranks that UltraEP (arXiv 2606.04101) reports of real runs.
The shape is not published: lognormal is assumed, at the spread that gives the figure."""


Popularity = Callable[[int, int, int, int], np.ndarray]
"""Of R, E, a layer and a microbatch: shares of the experts ``[E]``, not normalised, or a recorded
call's own counts ``[R, E]``."""


@dataclass(frozen=True)
class Loads:
    """Counts of layer calls for any number of ranks."""

    name: str  # for people
    basis: str  # whether it is measured, published or synthetic, in a few words
    popularity: Popularity  # who is wanted
    traces: tuple[StepTrace, ...] = ()  # the trace, where it is one

    def counts(
        self, ranks: int, experts: int, topk: int, tokens: int, layer: int, microbatch: int
    ) -> np.ndarray:
        """Pairs of each source rank, with ``tokens`` tokens, for each expert: int64 ``[R, E]``.

        A recorded call gives its own where it has this size; all else is drawn. A ``ValueError``
        says that a trace is of another number of experts.
        """
        share, pairs = self.popularity(ranks, experts, layer, microbatch), tokens * topk
        if share.shape[-1] != experts:
            raise ValueError(
                f"{self.name} has {share.shape[-1]} experts, the model {experts}. Use a model "
                "with as many."
            )
        if share.ndim == 2:
            if len(share) == ranks and (share.sum(1) == pairs).all():
                return share.astype(np.int64)
            share = share.sum(0) + 1e-9
        seed = [layer, ranks, experts, topk]
        if microbatch or self.name not in WORKLOADS:  # the planner's benchmark has no microbatches
            seed.append(microbatch)
        generator = np.random.default_rng(seed)
        budget = np.full(ranks, pairs)
        if self.name == "ragged sources":
            budget = (budget * generator.uniform(0.1, 1.9, ranks)).astype(np.int64)
        return np.stack([generator.multinomial(n, share / share.sum()) for n in budget])

    def draw(
        self, ranks: int, experts: int, topk: int, tokens: int, calls: list[tuple[int, int]]
    ) -> np.ndarray:
        """Counts int64 ``[C, R, E]`` of layer calls, pairs of (layer, microbatch) from 0."""
        return np.stack([self.counts(ranks, experts, topk, tokens, *call) for call in calls])


def layer_calls(layers: int, microbatches: int, most: int) -> list[tuple[int, int]]:
    """Layer calls of a step, ``(layer, microbatch)``, at most some of them, evenly spread."""
    total = layers * microbatches
    step = max(1.0, total / most) if most else 1.0
    chosen = dict.fromkeys(int(i * step) for i in range(math.ceil(total / step)))
    return [(i % layers, i // layers) for i in chosen if i < total]


def _popularity(
    workload: str, ranks: int, experts: int, layer: int, _microbatch: int
) -> np.ndarray:
    generator = np.random.default_rng([layer, experts, WORKLOADS.index(workload)])
    per_rank = experts // ranks
    kind, _, parameter = workload.partition(" ")
    if kind == "lognormal":
        return generator.lognormal(0.0, float(parameter), experts)
    if kind == "zipf":
        return generator.permutation(np.arange(1, experts + 1) ** -float(parameter))
    share = generator.lognormal(0.0, 0.2, experts)
    if workload == "one hot rank":
        first = int(generator.integers(ranks)) * per_rank
        share[first : first + per_rank] *= 4
    elif workload == "one hot expert":
        share[generator.integers(experts)] *= experts / 8
    elif workload == "spread hot experts":
        share[generator.choice(experts, ranks // 4, replace=False)] *= 8
    elif workload == "empty experts and ranks":
        share[generator.random(experts) < 0.3] = 0
        share[: per_rank * max(1, ranks // 8)] = 0
    elif workload == "rotating hotspot":
        share[(layer * per_rank) % experts : (layer * per_rank) % experts + 2] *= 12
    elif workload == "burst":
        share *= np.where(generator.random(experts) < 0.05, 10, 1)
    return share


def synthetic(workload: str) -> Loads:
    """A named workload: an expert's popularity belongs to the layer, microbatches are draws."""
    return Loads(workload, "synthetic, drawn", partial(_popularity, workload))


@cache
def _spread_for(overload: float, ranks: int, experts: int) -> float:
    """The lognormal's sigma whose mean max/mean load of ranks, over 16 draws, is ``overload``."""
    normal = np.random.default_rng([ranks, experts]).standard_normal((16, ranks, experts // ranks))

    def reached(sigma: float) -> float:
        load = np.exp(sigma * normal).sum(2)
        return float((load.max(1) / load.mean(1)).mean())

    low, high = 0.0, 8.0
    if reached(high) < overload:
        raise ValueError(
            f"{ranks} ranks of {experts} experts cannot have a mean max/mean of {overload}. "
            "Use more ranks or a lower figure."
        )
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < overload else (low, middle)
    return high


def at_overload(name: str, overload: float, basis: str) -> Loads:
    """Lognormal popularity at a given mean max/mean load of ranks before planning."""

    def popularity(ranks: int, experts: int, layer: int, _microbatch: int) -> np.ndarray:
        sigma = _spread_for(overload, ranks, experts)
        return np.random.default_rng([layer, experts]).lognormal(0.0, sigma, experts)

    return Loads(name, basis, popularity)


def traced(folder: str) -> Loads:
    """A run's routing trace: its own counts at its own size, elsewhere its shares, drawn again.

    A ``ValueError`` says that a file is cut short, foreign, or does not fit the others.
    """
    try:
        traces = read_traces(folder)
    except TraceError as error:
        raise ValueError(
            f"{folder} holds a file that is cut short or not a routing trace: {error}"
        ) from error
    ranks, experts = traces[0].counts.shape[1:]
    calls: dict[tuple[int, int, int], np.ndarray] = {}
    for trace in traces:
        fits = trace.counts.shape[1:] == (ranks, experts) and (trace.counts >= 0).all()
        if not fits or (trace.load_after.sum(1) != trace.counts.sum((1, 2))).any():
            raise ValueError(
                f"{folder} holds a trace of iteration {trace.iteration} whose arrays do not fit "
                "each other or the other files. Keep the traces of one run in one folder."
            )
        keys = zip(trace.layer.tolist(), trace.microbatch.tolist(), trace.counts, strict=True)
        calls |= {(layer, trace.iteration, number): counts for layer, number, counts in keys}
    by_layer: dict[int, list[np.ndarray]] = {}
    for key in sorted(calls):
        by_layer.setdefault(key[0], []).append(calls[key])
    layers = list(by_layer.values())

    def popularity(_ranks: int, _experts: int, layer: int, microbatch: int) -> np.ndarray:
        recorded = layers[layer % len(layers)]
        return recorded[microbatch % len(recorded)]

    basis = (
        f"measured, a trace of EP={ranks} with {experts} experts; at another EP or number of "
        "tokens drawn from its shares"
    )
    return Loads(folder, basis, popularity, tuple(traces))


def load_workload(name: str) -> Loads:
    """Loads by name: a workload, a published figure, ``overload X``, or a trace's folder.

    A ``ValueError`` says that a name is unknown or a file bad, a ``FileNotFoundError`` that a
    folder has no traces.
    """
    if name in WORKLOADS:
        return synthetic(name)
    if name in PUBLISHED:
        basis = f"published max/mean {PUBLISHED[name]} (UltraEP), lognormal assumed, drawn"
        return at_overload(name, PUBLISHED[name], basis)
    kind, _, figure = name.partition(" ")
    if kind == "overload":
        if not re.fullmatch(r"[0-9]+([.][0-9]+)?", figure) or float(figure) < 1:
            raise ValueError(f"{name} is not a number from 1 on. Use 2.0 for twice the mean.")
        return at_overload(name, float(figure), "assumed max/mean, lognormal, drawn")
    if Path(name).is_dir():
        return traced(name)
    names = ", ".join((*WORKLOADS, *PUBLISHED, "overload X"))
    raise ValueError(f"{name} is no workload or folder of traces. Use one of: {names}.")
