"""The planner against published ideas: balance, clones, traffic, locality, time.

    python benchmarks/planner.py [--quick] [--output benchmarks/results/planner]

Writes a table (``.md``), everything (``.json``) and a picture (``.png``), and prints which of the
project's targets are reached. Every row is the mean of five draws.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import planner_baselines as baselines  # noqa: E402
import torch  # noqa: E402
from processes import results_parser  # noqa: E402

from megatron_echo import environment  # noqa: E402
from megatron_echo.observe.simulation.workloads import WORKLOADS, synthetic  # noqa: E402
from megatron_echo.planner import ClonePlan, balance_bound, plan_clones  # noqa: E402
from megatron_echo.progress import track  # noqa: E402

DRAWS = 5
TOKENS_PER_RANK = 1024
RANKS_PER_NODE = 8
SKEWED = ("lognormal 0.5", "lognormal 1.0", "zipf 0.3", "zipf 0.6", "zipf 0.9", "zipf 1.2")


def draw_counts(workload: str, ranks: int, experts: int, topk: int, draw: int) -> torch.Tensor:
    """Counts int64 ``[R, E]`` of one draw, from the workload's name and the draw's number only."""
    counts = synthetic(workload).counts(ranks, experts, topk, TOKENS_PER_RANK, draw, 0)
    return torch.from_numpy(counts).to(torch.int64)


def plan_from(counts: torch.Tensor, moved: np.ndarray) -> ClonePlan:
    """A baseline's tokens moved as a plan, so that everything is measured by one function."""
    ranks, experts = counts.shape
    tokens = counts.sum(0)
    clones = torch.from_numpy(moved)
    home = torch.arange(experts)[:, None] // (experts // ranks) == torch.arange(ranks)
    allocation = clones + home * (tokens - clones.sum(1))[:, None]
    return ClonePlan(
        counts=counts,
        slot_expert=torch.empty(ranks, 0, dtype=torch.int64),
        allocation=allocation,
        load_before=tokens.reshape(ranks, -1).sum(1),
        load_after=allocation.sum(0),
        num_clones=(clones > 0).sum(),
    )


def measure(plan: ClonePlan) -> dict[str, float]:
    """The benchmark's columns for one plan; shares are those of the most local split."""
    counts, allocation = plan.counts, plan.allocation
    ranks, experts = counts.shape
    total = counts.sum().item()
    home = torch.arange(experts) // (experts // ranks)
    away = allocation * (home[:, None] != torch.arange(ranks))
    used = away > 0
    nodes = max(1, ranks // RANKS_PER_NODE)
    supply = counts.reshape(nodes, -1, experts).sum(1).t()
    demand = allocation.reshape(experts, nodes, -1).sum(2)
    rank_node = torch.arange(ranks) // (ranks // nodes)
    inside = (used & (rank_node[home][:, None] == rank_node)).sum().item()
    return {
        "max/mean": plan.load_after.max().item() * ranks / total,
        "excess over ceil(mean)": plan.load_after.max().item() - balance_bound(total, ranks),
        "clones": used.sum().item(),
        "most sent": used.reshape(ranks, -1).sum(1).max().item(),
        "most received": used.sum(0).max().item(),
        "weighted cost": 3 * used.sum().item() - 2 * inside,
        "moved": away.sum().item() / total,
        "leave rank": 1 - torch.minimum(counts.t(), allocation).sum().item() / total,
        "leave node": 1 - torch.minimum(supply, demand).sum().item() / total,
    }


def ours(slots: int, tolerance: float = 0.0, node: int | None = None) -> Callable:
    """Our planner with fixed settings, as a function of counts."""
    return lambda counts: plan_clones(counts, slots, tolerance, ranks_per_node=node)


def baseline(function: Callable, slots: int) -> Callable:
    """A baseline with a fixed number of slots, as a function of counts."""
    return lambda counts: plan_from(counts, function(counts.sum(0).numpy(), counts.shape[0], slots))


def planners(ranks: int, experts: int) -> dict[str, Callable]:
    """Every planner of the comparison, by name; S is slots a rank."""
    full = experts // ranks
    node = RANKS_PER_NODE if ranks > RANKS_PER_NODE else None
    return {
        "no clones": ours(0),
        "ours S=E/R": ours(full),
        "ours S=E/R, 2 %": ours(full, 0.02),
        "ours S=E/R, nodes": ours(full, 0.0, node),
        "ours S=2": ours(2),
        "ours S=1": ours(1),
        "alias table S=E/R": baseline(baselines.alias_table, full),
        "alias table S=2": baseline(baselines.alias_table, 2),
        "alias table S=1": baseline(baselines.alias_table, 1),
        "interval overlap S=2": baseline(baselines.interval_overlap, 2),
        "interval overlap S=1": baseline(baselines.interval_overlap, 1),
        "bin packing S=1": baseline(baselines.bucketed_bin_packing, 1),
        "threshold quota S=2": baseline(baselines.threshold_quota, 2),
        "threshold quota S=1": baseline(baselines.threshold_quota, 1),
        "least-loaded spill S=2": baseline(baselines.least_loaded_spill, 2),
    }


def configurations(quick: bool) -> Iterator[tuple[int, int, int]]:
    """Ranks, experts and top-k of the grid."""
    for ranks in (8, 64) if quick else (8, 16, 32, 64, 128):
        for experts in (64, 256) if quick else (64, 128, 256, 512):
            for topk in (8,) if quick else (4, 8):
                if experts >= ranks:
                    yield ranks, experts, topk


def run(quick: bool) -> list[dict[str, Any]]:
    """One row for each configuration, workload and planner: means, and the worst draw's balance."""
    rows = []
    grid = list(itertools.product(configurations(quick), WORKLOADS))
    for (ranks, experts, topk), workload in track(grid, "Workloads"):
        draws = [draw_counts(workload, ranks, experts, topk, d) for d in range(DRAWS)]
        for name, planner in planners(ranks, experts).items():
            begin = time.perf_counter()
            plans = [planner(counts) for counts in draws]
            milliseconds = (time.perf_counter() - begin) / DRAWS * 1e3
            figures = [measure(plan) for plan in plans]
            row: dict[str, Any] = {
                key: statistics.fmean(f[key] for f in figures) for key in figures[0]
            }
            row["worst max/mean"] = max(f["max/mean"] for f in figures)
            row |= {"R": ranks, "E": experts, "K": topk, "workload": workload}
            rows.append({**row, "planner": name, "ms": milliseconds})
    return rows


def time_reference() -> dict[str, float]:
    """Median milliseconds of the torch reference, R = 64, E = 256, by number of slots."""
    counts = draw_counts("lognormal 1.0", 64, 256, 8, 0)
    medians = {}
    for slots in (1, 2, 4, 16):
        samples = []
        for _ in range(15):
            begin = time.perf_counter()
            plan_clones(counts, slots)
            samples.append((time.perf_counter() - begin) * 1e3)
        medians[f"S={slots}"] = statistics.median(samples)
    return medians


def split_gap() -> float:
    """Share of tokens that leave their node above the best split's, worst row, R = 64, E = 256."""
    gaps = []
    for workload in SKEWED:
        excess = []
        for draw in range(DRAWS):
            plan = ours(4, 0.0, RANKS_PER_NODE)(draw_counts(workload, 64, 256, 8, draw))
            node = torch.arange(64) // RANKS_PER_NODE
            stay = sum(int(plan.split_for(r)[:, node == node[r]].sum()) for r in range(64))
            excess.append(1 - stay / int(plan.counts.sum()) - measure(plan)["leave node"])
        gaps.append(statistics.fmean(excess))
    return max(gaps)


def clones_by_tolerance() -> dict[int, list[float]]:
    """Mean clones over the skewed workloads at rising tolerances, by slots, R = 64, E = 256."""
    counts = [draw_counts(w, 64, 256, 8, draw) for w in SKEWED for draw in range(DRAWS)]
    return {
        slots: [
            statistics.fmean(int(plan_clones(c, slots, tolerance).num_clones) for c in counts)
            for tolerance in (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
        ]
        for slots in (1, 2, 4)
    }


def optimum_gap() -> float:
    """Mean excess over the exact optimum's max/mean, R <= 8, S = 1 and 2."""
    from planner_oracle import optimum

    sizes = ((4, 16), (4, 32), (8, 32), (8, 64))
    workloads = ("lognormal 0.5", "lognormal 1.0", "zipf 0.6", "one hot rank", "burst")
    gaps = []
    for (ranks, experts), workload, slots in track(
        list(itertools.product(sizes, workloads, (1, 2))), "Exact optima"
    ):
        counts = draw_counts(workload, ranks, experts, 8, 0)
        best = optimum(counts.numpy(), slots).max_load
        reached = plan_clones(counts, slots).load_after.max().item()
        gaps.append((reached - best) * ranks / counts.sum().item())
    return statistics.fmean(gaps)


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure to reach, what was reached, and whether that is enough."""

    text: str
    reached: str
    holds: bool


def targets(rows: list[dict[str, Any]], milliseconds: dict[str, float]) -> list[Target]:
    """The project's figures for the planner, from the measured rows."""

    def select(planner: str, **wanted: Any) -> list[dict[str, Any]]:
        return [
            row
            for row in rows
            if row["planner"] == planner and all(row[k] == v for k, v in wanted.items())
        ]

    exact, alias = select("ours S=E/R"), select("alias table S=E/R")
    off = max(row["excess over ceil(mean)"] for row in exact)
    more = [
        a[key] - b[key]
        for a, b in zip(exact, alias, strict=True)
        for key in ("clones", "most sent")
    ]
    skewed = [row for row in select("ours S=E/R", R=64) if row["workload"] in SKEWED]
    relaxed = [row for row in select("ours S=E/R, 2 %", R=64) if row["workload"] in SKEWED]
    fewer = statistics.fmean(
        1 - b["clones"] / a["clones"] for a, b in zip(skewed, relaxed, strict=True)
    )
    wide = [row for row in rows if row["R"] >= 32 and row["workload"] in SKEWED]
    one = max(row["max/mean"] for row in wide if row["planner"] == "ours S=1")
    two = max(row["worst max/mean"] for row in wide if row["planner"] == "ours S=2")
    nodes = [r for r in select("ours S=E/R, nodes", R=64, E=256) if r["workload"] in SKEWED]
    leave = statistics.fmean(row["leave node"] for row in nodes)
    even = [
        a["leave node"] - b["leave node"]
        for a, b in zip(select("ours S=E/R, nodes"), select("no clones"), strict=True)
        if a["workload"] != "ragged sources" and a["R"] > RANKS_PER_NODE
    ]
    cost = [
        a["weighted cost"] / b["weighted cost"] - 1
        for a, b in zip(select("ours S=E/R, nodes"), select("ours S=E/R"), strict=True)
        if a["R"] > RANKS_PER_NODE
    ]
    curves = clones_by_tolerance().values()
    falling = all(a >= b for curve in curves for a, b in itertools.pairwise(curve))
    shown = "; ".join("-".join(f"{clones:.0f}" for clones in curve) for curve in curves)
    split, gap, four = split_gap(), optimum_gap(), milliseconds["S=4"]
    return [
        Target(
            "S = E/R, tolerance 0: max load is ceil(mean)", f"{off:g} over, worst row", off == 0
        ),
        Target(
            "S = E/R: clones and most sent not above the alias table, any row",
            f"{max(more):+g} at most",
            max(more) <= 0,
        ),
        Target("tolerance 0.02: 30 % fewer clones, R = 64", f"{fewer:.1%}", fewer >= 0.30),
        Target("more tolerance, no more clones (S = 1; 2; 4; R = 64, E = 256)", shown, falling),
        Target(
            "nodes: weighted cost not above that without nodes, each row",
            f"{statistics.fmean(cost):+.0%}, worst row {max(cost):+.0%}",
            max(cost) <= 0,
        ),
        Target("S = 1, R >= 32: max/mean <= 1.05 in each row", f"{one:.4f}", one <= 1.05),
        Target("S = 2, R >= 32: max/mean <= 1.01 in the worst draw", f"{two:.4f}", two <= 1.01),
        Target("gap to the optimum <= 0.03, R <= 8, S = 1, 2", f"{gap:.4f}", gap <= 0.03),
        Target("tokens leaving their node <= 0.80, R = 64, E = 256", f"{leave:.3f}", leave <= 0.80),
        Target("the same, above the best split, worst row <= 0.01", f"{split:.4f}", split <= 0.01),
        Target(
            "never above no clones, where sources are even", f"{max(even):+.4f}", max(even) <= 0
        ),
        Target("torch reference, R = 64, E = 256, S = 4: <= 20 ms", f"{four:.1f} ms", four <= 20),
    ]


def as_table(rows: list[dict[str, Any]], ranks: int, experts: int, topk: int) -> str:
    """One configuration as a Markdown table: max/mean / clones / most sent, by workload."""
    names = list(dict.fromkeys(row["planner"] for row in rows))
    lines = [
        f"R = {ranks}, E = {experts}, K = {topk}: max/mean / clones / most sent by one rank",
        "",
        "| workload | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for workload in WORKLOADS:
        cells = []
        for name in names:
            (row,) = [
                r
                for r in rows
                if (r["R"], r["E"], r["K"], r["workload"], r["planner"])
                == (ranks, experts, topk, workload, name)
            ]
            cells.append(f"{row['max/mean']:.3f} / {row['clones']:.0f} / {row['most sent']:.0f}")
        lines.append(f"| {workload} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


COLUMNS = (
    "max/mean",
    "worst max/mean",
    "clones",
    "weighted cost",
    "most sent",
    "most received",
    "moved",
    "leave rank",
    "leave node",
    "ms",
)


def summary_table(rows: list[dict[str, Any]], ranks: int, experts: int, topk: int) -> str:
    """Every column by planner, averaged over the lognormal and zipf workloads, as Markdown."""
    chosen = [
        row
        for row in rows
        if (row["R"], row["E"], row["K"]) == (ranks, experts, topk) and row["workload"] in SKEWED
    ]
    lines = [
        f"R = {ranks}, E = {experts}, K = {topk}, mean over {', '.join(SKEWED)} (weighted cost: "
        f"1 a clone inside a node of {RANKS_PER_NODE}, 3 across; moved and leaving: share of all "
        "tokens, with the most local split; ms: the baselines are NumPy, times do not compare)",
        "",
        "| planner | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name in dict.fromkeys(row["planner"] for row in chosen):
        mine = [row for row in chosen if row["planner"] == name]
        means = [statistics.fmean(row[column] for row in mine) for column in COLUMNS]
        lines.append(f"| {name} | " + " | ".join(f"{mean:.4g}" for mean in means) + " |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Balance and clones of each planner over the skewed workloads, R = 64, E = 256, K = 8."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = {
        "ours S=1": ("tab:blue", "o"),
        "ours S=2": ("tab:blue", "s"),
        "ours S=E/R, 2 %": ("tab:cyan", "D"),
        "interval overlap S=1": ("tab:orange", "o"),
        "interval overlap S=2": ("tab:orange", "s"),
        "bin packing S=1": ("tab:red", "o"),
        "threshold quota S=1": ("tab:green", "o"),
        "threshold quota S=2": ("tab:green", "s"),
        "least-loaded spill S=2": ("tab:purple", "s"),
    }
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), layout="constrained")
    chosen = [r for r in rows if (r["R"], r["E"], r["K"]) == (64, 256, 8)]
    for name, (colour, marker) in shown.items():
        mine = {r["workload"]: r for r in chosen if r["planner"] == name}
        style = {"color": colour, "marker": marker, "label": name, "alpha": 0.8}
        excess = [100 * (mine[w]["max/mean"] - 1) + 1e-3 for w in SKEWED]
        left.plot(SKEWED, excess, **style)
        right.plot(SKEWED, [mine[w]["clones"] for w in SKEWED], **style)
    label = "highest load above the mean, % (exact balance drawn at 0.001)"
    left.set(yscale="log", ylabel=label, title="Balance after")
    right.set(ylabel="clones over 64 ranks", title="Clones (weights sent)")
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=25)
        axes.grid(alpha=0.3)
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    figure.suptitle("R = 64, E = 256, K = 8, mean of 5 draws")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "planner")
    parser.add_argument("--quick", action="store_true", help="a corner of the grid")
    args = parser.parse_args()
    torch.set_num_threads(1)
    milliseconds = time_reference()
    rows = run(args.quick)
    reached = targets(rows, milliseconds)
    lines = [as_table(rows, 64, 256, 8), "", summary_table(rows, 64, 256, 8), ""]
    lines += ["| figure | reached | |", "|---|---|---|"]
    lines += [f"| {t.text} | {t.reached} | {'yes' if t.holds else 'NO'} |" for t in reached]
    times = ", ".join(f"{name} {value:.1f} ms" for name, value in milliseconds.items())
    lines += [
        "",
        f"Torch reference, R = 64, E = 256, one core of {environment.device_name()}: {times}.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    args.output.with_suffix(".md").write_text(text)
    record = {
        "versions": environment.versions(),
        "machine": environment.device_name(),
        "reference_milliseconds": milliseconds,
        "targets": [dataclasses.asdict(target) for target in reached],
        "columns": list(rows[0]),
        "rows": [
            [round(v, 5) if isinstance(v, float) else v for v in row.values()] for row in rows
        ],
    }
    args.output.with_suffix(".json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
