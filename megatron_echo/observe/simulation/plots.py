"""Pictures of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_echo.observe.simulation.cost_model import CostModel
from megatron_echo.observe.simulation.search import Candidate, best_by_name, fastest

PARTS = {
    "compute": ("experts", "tab:blue"),
    "tokens": ("tokens' traffic", "tab:orange"),
    "clones": ("clones", "tab:red"),
    "rest": ("other products", "tab:gray"),
    "shards": ("TP and CP", "tab:brown"),
    "bubble": ("bubble", "lightgray"),
    "exposed": ("gradients", "tab:purple"),
}
"""Fields of a step's time: name and colour."""


def save_plot(
    model: CostModel,
    found: Sequence[Candidate],
    gains: Sequence[tuple[float, float]],
    loads: str,
    path: Path,
) -> None:
    """Step time and memory by EP, where the time goes, and the gain by skew.

    Args:
        model: the cost model.
        found: candidates.
        gains: pairs of max/mean as routed and the gain of clones over plain EP, 0.1 for 10 %.
        loads: their name.
        path: the ``.png``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(15, 10), layout="constrained")
    best = best_by_name(found, model.cluster.hbm_gib)
    _by_size(panels[0], best, model.cluster.hbm_gib, model.model.experts)
    _breakdown(panels[1, 0], found, model.cluster.hbm_gib)
    _gains(panels[1, 1], gains)
    figure.suptitle(
        f"{model.model.name} on {found[0].layout.gpus:,} GPUs of {model.cluster.name}, loads: "
        f"{loads}\nplanned exactly; times and memory by arithmetic, not measured"
    )
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


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
    sizes = sorted({one.layout.expert for one in best})
    for axes in (time, memory):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlabel("EP")
        axes.grid(alpha=0.3)
    time.set(ylabel="seconds", title="Step time, fastest layout that fits (dotted: what if)")
    time.set_ylim(bottom=0)
    memory.set(ylabel="GiB", title="Memory of the fullest rank, same layouts")
    memory.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _breakdown(axes: Any, found: Sequence[Candidate], hbm: float) -> None:
    winners = {}
    for kind in ("plain", "echo", "what if"):
        one = fastest((c for c in found if c.kind == kind), hbm)
        if one is not None:
            winners[f"{one.name}\nEP={one.layout.expert} PP={one.layout.pipeline}"] = one
    below = [0.0] * len(winners)
    for part, (name, colour) in PARTS.items():
        heights = [getattr(one.time, part) for one in winners.values()]
        if not any(heights):
            continue
        axes.bar(list(winners), heights, bottom=below, label=name, color=colour, width=0.6)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set(ylabel="seconds of a step", title="Where the time goes, fastest of each kind")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _gains(axes: Any, gains: Sequence[tuple[float, float]]) -> None:
    axes.axhline(0, color="black", linewidth=0.8)
    axes.plot([x for x, _ in gains], [100 * y for _, y in gains], "o-", color="tab:green")
    axes.set(
        xlabel="max/mean load of ranks as routed (lognormal popularity)",
        ylabel="plain EP takes longer, %",
        title="When clones pay, at the sizes of the fastest with clones",
    )
    axes.grid(alpha=0.3)
