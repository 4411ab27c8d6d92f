"""The main job with experts in FP8 beside the same without: the loss of each step.

    python benchmarks/fp8_loss.py [--steps 200] [--ranks 1] [--quick] [--output DIR/fp8_loss]

Routing is chaotic: curves part by themselves, whatever the change. So each precision is there with
initial weights that are 1 % larger or smaller as well, and how far runs of one precision are apart
is the floor. Then FP8 is there with every token sent where it went in the first run, whose bits a
run without FP8 has again then. On a CPU parameters are in fp32, and FP8 is its reference: operands
are rounded as on a GPU and multiplied in fp32. A command that was stopped goes on where it was, if
it is run again. Writes ``.json`` and ``.png``.
"""

import argparse
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from main_job import GLOBAL_BATCH_SIZE  # noqa: E402
from processes import (  # noqa: E402
    lean_main_job,
    main_job_corpus,
    results_parser,
    torchrun,
    write_results,
)

from megatron_echo.record.metrics import read_metrics  # noqa: E402

REFERENCE, FP8 = "params-dtype", "fp8-rowwise"
FREE, REPLAYED = "routed freely", "as the first run routed"
RUNS: dict[str, dict[str, tuple[float, ...]]] = {
    FREE: {REFERENCE: (1.0, 1.01, 0.99), FP8: (1.0, 1.01, 0.99)},
    REPLAYED: {FP8: (1.0,)},
}
"""Of a way of routing, of a precision, of each run: the scale of initial weights."""
COLORS = {REFERENCE: "C0", FP8: "C1"}
WINDOW = 20
SAVE_INTERVAL = 20

Curves = dict[str, dict[str, list[list[float]]]]
"""Losses: of a way of routing, of a precision, of each run."""


def all_runs(args: argparse.Namespace) -> Curves:
    """Train what is not trained yet."""
    corpus = main_job_corpus()
    curves: Curves = {routing: {} for routing in RUNS}
    for routing, precisions in RUNS.items():
        for precision, scales in precisions.items():
            for scale in scales:
                if scale == 1.0 or not args.quick:
                    losses = train(corpus, routing, precision, scale, args)
                    curves[routing].setdefault(precision, []).append(losses)
    return curves


def train(
    corpus: Path, routing: str, precision: str, scale: float, args: argparse.Namespace
) -> list[float]:
    """The loss at each step of one run, which begins where it was stopped before."""
    runs = args.output.with_suffix(".runs")
    folder = runs / f"{routing}-{precision}-{scale}".replace(" ", "-")
    saved, routes = folder / "checkpoints", str(runs / "routes")
    words = lean_main_job(corpus, folder, args.steps)
    words += ["--moe-enable-echo", "--moe-echo-expert-precision", precision]
    words += ["--init-method-std", str(0.02 * scale)]
    if routing == REPLAYED:
        words += ["--moe-echo-replay-routing", routes]
    elif precision == REFERENCE and scale == 1.0:
        words += ["--moe-echo-capture-routing", routes]
    share = str(GLOBAL_BATCH_SIZE // args.ranks)
    words += ["--expert-model-parallel-size", str(args.ranks), "--micro-batch-size", share]
    words += ["--save", str(saved), "--save-interval", str(SAVE_INTERVAL)]
    if (saved / "latest_checkpointed_iteration.txt").exists():
        words += ["--load", str(saved)]
    if len(_losses(folder)) < args.steps:
        torchrun(ROOT / "pretrain_gpt_moe.py", args.ranks, words)
    return _losses(folder)


def _losses(folder: Path) -> list[float]:
    if not (folder / "metrics.jsonl").exists():
        return []
    return [line["lm loss"] for line in read_metrics(folder) if "lm loss" in line]


def differences(curves: Curves) -> dict[str, dict[str, np.ndarray]]:
    """``[runs, steps]``: means of ``WINDOW`` steps, in percent over those of the first run."""
    first = curves[FREE][REFERENCE][0]
    weights = np.ones(min(WINDOW, len(first)))
    base = np.convolve(first, weights, "valid")

    def percent(runs: list[list[float]]) -> np.ndarray:
        of_runs = np.array([np.convolve(run, weights, "valid") for run in runs])
        return 100 * (of_runs / base[: of_runs.shape[1]] - 1)

    return {name: {p: percent(runs) for p, runs in some.items()} for name, some in curves.items()}


def plot(curves: Curves, title: str, path: Path) -> None:
    """The curves, and by how much they differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for precision, runs in curves[FREE].items():
        for number, run in enumerate(runs):
            label = None if number else precision
            panels[0].plot(
                range(1, len(run) + 1), run, color=COLORS[precision], linewidth=0.8, label=label
            )
    panels[0].set(ylabel="lm loss (nats per byte)", title=title)
    percent = differences(curves)
    first = min(WINDOW, len(curves[FREE][REFERENCE][0]))
    for axis, (routing, some) in zip(panels[1:], percent.items(), strict=True):
        for precision, runs in some.items():
            for number, run in enumerate(runs):
                label = None if number else precision
                at = range(first, first + len(run))
                axis.plot(at, run, color=COLORS[precision], linewidth=1.2, label=label)
        axis.axhspan(-1, 1, color="gray", alpha=0.15, label="within 1 %")
        axis.set(ylabel="% over the first run", title=f"Means of {WINDOW} steps, {routing}")
    panels[2].sharey(panels[1])
    for axis in panels:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(curves: Curves) -> None:
    """Print by how much runs differ from the first."""
    for routing, some in differences(curves).items():
        print(f"Means of {WINDOW} steps over those of the first run, {routing}:")
        for precision, runs in some.items():
            most, last = np.abs(runs).max(1).round(2), runs[:, -1].round(2)
            print(f"  {precision}: {most} % at most, {last} % at the end")


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "fp8_loss")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, help="2 with clones, 1 without")
    parser.add_argument("--quick", action="store_true", help="three runs of the seven")
    args = parser.parse_args()
    curves = all_runs(args)
    write_results(args.output, curves)
    plot(curves, f"Main job, EP={args.ranks}", args.output.with_suffix(".png"))
    report(curves)
    shutil.rmtree(args.output.with_suffix(".runs"))


if __name__ == "__main__":
    main()
