"""A picture of a sweep."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_echo.observe.simulation.layout import Run
from megatron_echo.observe.simulation.search import (
    Candidate,
    Search,
    best_by_name,
    candidates,
    fastest,
)
from megatron_echo.observe.simulation.workloads import at_overload

PARTS = (
    ("experts", "tab:blue"), ("tokens' traffic", "tab:orange"), ("clones", "tab:red"),
    ("other products", "tab:gray"), ("TP and CP", "tab:brown"), ("bubble", "lightgray"),
    ("gradients", "tab:purple"),
)  # fmt: skip
"""Name and colour of the fields of a :class:`.StepTime`, in their order."""
OVERLOADS = (1.1, 1.5, 2.0, 3.0, 4.0)
"""Skews of the last panel."""


def save_plot(run: Run, search: Search, found: Sequence[Candidate], path: Path) -> None:
    """Step time and memory by EP, where the time goes, and the gain by skew, as a ``.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    hbm = run.cluster.hbm_gib
    figure, panels = pyplot.subplots(2, 2, figsize=(15, 10), layout="constrained")
    _by_size(panels[0], best_by_name(found, hbm), hbm, run.model.experts)
    best = [fastest((c for c in found if c.kind == k), hbm) for k in ("plain", "echo", "what if")]
    _breakdown(panels[1, 0], [one for one in best if one is not None])
    points = [] if best[1] is None else _gains(run, search, best[1])
    axes = panels[1, 1]
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot([x for x, _ in points], [100 * y for _, y in points], "o-", color="tab:green")
    axes.set(
        xlabel="max/mean load of ranks as routed (lognormal popularity)",
        ylabel="plain EP takes longer, %",
        title="When clones pay, at the sizes of the fastest with clones",
    )
    axes.grid(alpha=0.3)
    figure.suptitle(
        f"{run.model.name} on {run.cluster.gpus:,} GPUs of {run.cluster.name}, loads: "
        f"{search.loads.name}\nplanned exactly; times and memory by arithmetic, not measured"
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _gains(run: Run, search: Search, winner: Candidate) -> list[tuple[float, float]]:
    """How much longer plain EP takes than clones, by max/mean as routed, at the winner's sizes."""
    layout, points = winner.layout, []
    for overload in OVERLOADS:
        same = replace(
            search, loads=at_overload(f"overload {overload}", overload, "drawn"), calls=16,
            experts=(layout.expert,), pipelines=(layout.pipeline,), virtuals=(layout.virtual,),
            slots=(winner.placed.slots,), tolerances=(winner.placed.tolerance,),
        )  # fmt: skip
        try:
            tried, _ = candidates(run, same)
        except ValueError:  # so much skew is not possible at this size
            continue
        hbm = run.cluster.hbm_gib
        plain, echo = (fastest((c for c in tried if c.kind == k), hbm) for k in ("plain", "echo"))
        if plain and echo:
            routed = float(plain.placed.overload_routed.mean())
            points.append((routed, plain.time.total / echo.time.total - 1))
    return points


def _by_size(panels: Any, best: Sequence[Candidate], hbm: float, experts: int) -> None:
    time, memory = panels
    series: dict[str, list[Candidate]] = {}
    for one in best:
        full = one.name.replace(f"S={experts // one.layout.expert},", "S=E/R,")
        series.setdefault(full, []).append(one)
    for number, (name, mine) in enumerate(series.items()):
        line = ":" if mine[0].kind == "what if" else "-"
        style = {"marker": "os^vD<>ph*"[number % 10], "linestyle": line, "alpha": 0.8}
        sizes = [one.layout.expert for one in mine]
        fits = [one.time.total if one.memory.total <= hbm else float("nan") for one in mine]
        time.plot(sizes, fits, label=name, **style)
        memory.plot(sizes, [one.memory.total for one in mine], label=name, **style)
    memory.axhline(hbm, color="black", linestyle="--", label="memory of a GPU")
    for axes, unit, title in (
        (time, "seconds", "Step time, fastest layout that fits (dotted: what if)"),
        (memory, "GiB", "Memory of the fullest rank, same layouts"),
    ):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="EP", ylabel=unit, title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
    memory.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _breakdown(axes: Any, winners: Sequence[Candidate]) -> None:
    names = [f"{w.name}\nEP={w.layout.expert} PP={w.layout.pipeline}" for w in winners]
    below = [0.0] * len(winners)
    for part, (name, colour) in enumerate(PARTS):
        heights = [one.time[part] for one in winners]
        if any(heights):
            axes.bar(names, heights, bottom=below, label=name, color=colour, width=0.6)
            below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set(ylabel="seconds of a step", title="Where the time goes, fastest of each kind")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
