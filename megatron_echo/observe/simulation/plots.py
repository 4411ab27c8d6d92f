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

OVERLOADS = (1.1, 1.5, 2.0, 3.0, 4.0)
"""Skews of the last panel."""


def save_plot(run: Run, search: Search, found: Sequence[Candidate], path: Path) -> None:
    """Step time and memory by EP, and the gain of clones by skew, as a ``.png``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory, gain) = pyplot.subplots(1, 3, figsize=(18, 5), layout="constrained")
    _by_size(time, memory, best_by_name(found, run.cluster.hbm_gib), run)
    points = _gains(run, search, found)
    gain.axhline(0, color="black", linewidth=0.8)
    gain.plot([x for x, _ in points], [100 * y for _, y in points], "o-", color="tab:green")
    gain.set(
        xlabel="max/mean load of ranks as routed (lognormal popularity)",
        ylabel="plain EP takes longer, %",
        title="When clones pay, at the sizes of the fastest with clones",
    )
    for axes in (time, memory, gain):
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{run.model.name} on {run.cluster.gpus:,} GPUs of {run.cluster.name}, loads: "
        f"{search.loads.name}\nplanned exactly; times and memory by arithmetic, not measured"
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _by_size(time: Any, memory: Any, best: Sequence[Candidate], run: Run) -> None:
    hbm = run.cluster.hbm_gib
    series: dict[str, list[Candidate]] = {}
    for one in best:
        full = one.name.replace(f"S={run.model.experts // one.layout.expert},", "S=E/R,")
        series.setdefault(full, []).append(one)
    for number, (name, mine) in enumerate(series.items()):
        line = ":" if mine[0].kind == "what if" else "-"
        style = {"marker": "os^vD<>ph*"[number % 10], "linestyle": line, "alpha": 0.8}
        sizes = [one.layout.expert for one in mine]
        fits = [one.time.total if one.memory.total <= hbm else float("nan") for one in mine]
        time.plot(sizes, fits, label=name, **style)
        memory.plot(sizes, [one.memory.total for one in mine], label=name, **style)
    memory.axhline(hbm, color="black", linestyle="--", label="memory of a GPU")
    sizes = sorted({one.layout.expert for one in best})
    for axes, unit, title in (
        (time, "seconds", "Step time, fastest layout that fits (dotted: what if)"),
        (memory, "GiB", "Memory of the fullest rank, same layouts"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set(xlabel="EP", ylabel=unit, title=title)
    time.set_ylim(bottom=0)
    memory.legend(fontsize=8)


def _gains(run: Run, search: Search, found: Sequence[Candidate]) -> list[tuple[float, float]]:
    """How much longer plain EP takes than clones, by max/mean as routed, at the winner's sizes."""
    hbm = run.cluster.hbm_gib
    winner = fastest((one for one in found if one.kind == "echo"), hbm)
    if winner is None:
        return []
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
        plain, echo = (fastest((c for c in tried if c.kind == k), hbm) for k in ("plain", "echo"))
        if plain and echo:
            routed = float(plain.placed.overload_routed.mean())
            points.append((routed, plain.time.total / echo.time.total - 1))
    return points
