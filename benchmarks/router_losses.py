"""Load-balancing losses in training: the main job without one, sequence-wise and batch-wise.

    python benchmarks/router_losses.py [--steps 100] [--output benchmarks/results/router_losses]

Each with one pipeline stage and with two. The load of experts is counted from the runs' own
traces: tokens of the fullest expert over the mean, in a step of all microbatches and ranks, the
mean over layers. Writes ``.json`` and ``.png`` and prints a table.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from processes import (  # noqa: E402
    lean_main_job,
    main_job_corpus,
    results_parser,
    torchrun,
    write_results,
)

from megatron_echo.record.metrics import read_metrics  # noqa: E402
from megatron_echo.record.trace import read_traces  # noqa: E402

BALANCE = "--moe-aux-loss-coeff 1e-2 --moe-router-load-balancing-type"
LOSSES = {
    "no loss": "--moe-router-load-balancing-type none",
    "sequence-wise": f"{BALANCE} seq_aux_loss",
    "batch-wise, late counts": f"{BALANCE} global_aux_loss",
}
LAYOUTS = {"PP=1": (2, ""), "PP=2": (4, "--pipeline-model-parallel-size 2")}
COMMON = "--moe-enable-echo --micro-batch-size 2"
LAST = 10


def train(corpus: Path, layout: str, loss: str, steps: int) -> dict[str, list[float]]:
    """One run: the loss and the overload of experts at each step."""
    ranks, flags = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        words = lean_main_job(corpus, Path(folder), steps)
        words += f"{COMMON} {flags} {LOSSES[loss]} --moe-echo-trace-dir {folder}/traces".split()
        torchrun(ROOT / "pretrain_gpt_moe.py", ranks, words)
        curve = [line["lm loss"] for line in read_metrics(folder)]
        return {"lm loss": curve, "overload": expert_overload(Path(folder) / "traces")}


def expert_overload(folder: Path) -> list[float]:
    """Max over mean load of a layer's experts in each step, the mean over layers."""
    counts: dict[int, dict[int, Any]] = defaultdict(lambda: defaultdict(int))
    for trace in read_traces(folder):
        for layer, call in zip(trace.layer.tolist(), trace.counts, strict=True):
            counts[trace.iteration][layer] += call.sum(0)
    return [
        float(np.mean([load.max() / load.mean() for load in layers.values()]))
        for _, layers in sorted(counts.items())
    ]


def plot(results: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """A row a layout: loss, and overload."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 7), layout="constrained")
    for row, (layout, runs) in zip(axes, results.items(), strict=True):
        for axis, key in zip(row, ("lm loss", "overload"), strict=True):
            for name, curves in runs.items():
                axis.plot(range(1, len(curves[key]) + 1), curves[key], label=name, linewidth=1.4)
            axis.set(xlabel="step", title=f"{layout}: {key}")
            axis.grid(alpha=0.3)
        row[1].set_ylabel("max / mean tokens of an expert")
        row[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "router_losses")
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    corpus = main_job_corpus()
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    print(f"| | loss | lm loss, mean of last {LAST} steps | max/mean load of experts, the same |")
    print("|---|---|---|---|")
    for layout in LAYOUTS:
        results[layout] = {}
        for name in LOSSES:
            curves = results[layout][name] = train(corpus, layout, name, args.steps)
            ends = [float(np.mean(curves[key][-LAST:])) for key in ("lm loss", "overload")]
            print(f"| {layout} | {name} | {ends[0]:.4f} | {ends[1]:.3f} |", flush=True)
    write_results(args.output, results)
    plot(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
