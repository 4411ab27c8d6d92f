"""The main job with experts in FP8 beside the same without: the loss of each step.

    python benchmarks/fp8_loss.py [--seeds 3] [--steps 200] [--ranks 1] [--output DIR/fp8_loss]

Routing is chaotic: curves part by themselves, whatever the change. So runs come in pairs, in FP8
and without, from the same weights over the same data. What is said is the mean difference of the
pairs with its 95 % interval, and how far runs without FP8 part. The first three pairs differ in the
size of the initial weights, 1 % larger or smaller, the others in the seed. Then FP8 is there with
every token sent where it went in the first run, whose bits a run without FP8 has again then. On a
CPU parameters are in fp32, and FP8 is its reference: operands are rounded as on a GPU and
multiplied in fp32. Each finished run is kept in ``.json``; the same command goes on where it was
stopped, and with more seeds makes those alone. Writes ``.png`` too, after each run.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
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
SCALES = (1.0, 1.01, 0.99)
"""Of the initial weights of the first pairs; the others have another seed."""
COLORS = {REFERENCE: "C0", FP8: "C1"}
WINDOW = 20
SAVE_INTERVAL = 20
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
"""The 97.5 % point of Student's t with so many degrees of freedom."""

Curves = dict[str, dict[str, list[list[float]]]]
"""Losses: of a way of routing, of a precision, of each run."""


def finished(args: argparse.Namespace) -> Curves:
    """What runs of the same command kept."""
    path = args.output.with_suffix(".json")
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    if (results.get("steps"), results.get("ranks")) == (args.steps, args.ranks):
        curves: Curves = results["curves"]
        return curves
    return {FREE: {REFERENCE: [], FP8: []}, REPLAYED: {FP8: []}}


def runs_to_do(curves: Curves, args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """The first run, again if its routes are gone, and it replayed; then pair by pair."""
    free, replayed = curves[FREE], curves[REPLAYED][FP8]
    if not (free[REFERENCE] and (replayed or _routes(args).exists())):
        yield FREE, REFERENCE, 0
    if not replayed:
        yield REPLAYED, FP8, 0
    for number in range(args.seeds):
        for precision in (REFERENCE, FP8):
            if number >= len(free[precision]):
                yield FREE, precision, number


def train_all(args: argparse.Namespace) -> Curves:
    """Train what is not trained yet, and keep each run."""
    curves, corpus = finished(args), main_job_corpus()
    for routing, precision, number in runs_to_do(curves, args):
        curves[routing][precision][number : number + 1] = [
            train(corpus, routing, precision, number, args)
        ]
        results = {"steps": args.steps, "ranks": args.ranks, "curves": curves}
        write_results(args.output, results)
        if all(curves[FREE].values()):
            draw(curves, args)
    return curves


def _routes(args: argparse.Namespace) -> Path:
    folder: Path = args.output.with_suffix(".runs") / "routes"
    return folder


def train(
    corpus: Path, routing: str, precision: str, number: int, args: argparse.Namespace
) -> list[float]:
    """The loss at each step of one run, which begins where it was stopped before."""
    folder = _routes(args).parent / f"{routing}-{precision}-{number}".replace(" ", "-")
    saved = folder / "checkpoints"
    words = lean_main_job(corpus, folder, args.steps)
    words += ["--moe-enable-echo", "--moe-echo-expert-precision", precision]
    if number < len(SCALES):
        words += ["--init-method-std", str(0.02 * SCALES[number])]
    else:
        words += ["--seed", str(1234 + number)]
    if routing == REPLAYED:
        words += ["--moe-echo-replay-routing", str(_routes(args))]
    elif precision == REFERENCE and number == 0:
        words += ["--moe-echo-capture-routing", str(_routes(args))]
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


def percent(runs: list[list[float]], base: list[list[float]], window: int) -> np.ndarray:
    """``[runs, steps]``: means of a window of steps, in percent over those of the bases."""
    weights = np.ones(window)
    sums = [np.array([np.convolve(run, weights, "valid") for run in some]) for some in (runs, base)]
    differences: np.ndarray = 100 * (sums[0] / sums[1] - 1)
    return differences


def interval(differences: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over pairs, the first dimension, and half the width of its 95 % interval."""
    pairs = len(differences)
    if pairs < 2:
        return differences.mean(0), np.full_like(differences[0], np.nan)
    return differences.mean(0), STUDENT[pairs - 2] * differences.std(0, ddof=1) / pairs**0.5


def plot(curves: Curves, title: str, path: Path) -> None:
    """The curves, and by how much they differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for precision, runs in curves[FREE].items():
        for number, run in enumerate(runs):
            panels[0].plot(
                range(1, len(run) + 1), run, color=COLORS[precision], linewidth=0.8,
                label=None if number else precision,
            )  # fmt: skip
    panels[0].set(ylabel="lm loss (nats per byte)", title=title)
    without, within = (curves[FREE][precision] for precision in (REFERENCE, FP8))
    window, number = min(WINDOW, len(without[0])), min(len(without), len(within))
    at = range(window, len(without[0]) + 1)
    mean = np.mean(without, axis=0).tolist()
    panels[1].plot(
        at, percent(without, [mean], window).T, color="C0", linewidth=0.7,
        label=[f"{REFERENCE}, each over their mean", *[None] * (len(without) - 1)],
    )  # fmt: skip
    center, half = interval(percent(within[:number], without[:number], window))
    panels[1].plot(at, center, color="C1", label=f"{FP8} over {REFERENCE}, {number} pairs")
    panels[1].fill_between(at, center - half, center + half, color="C1", alpha=0.2)
    panels[1].set(title=f"Means of {WINDOW} steps, {FREE}, 95 % interval")
    for run in curves[REPLAYED][FP8]:
        panels[2].plot(at, percent([run], without[:1], window)[0], color="C1", label=FP8)
    panels[2].set(title=f"Means of {WINDOW} steps, {REPLAYED}")
    panels[2].sharey(panels[1])
    for axis in panels[1:]:
        axis.axhspan(-1, 1, color="gray", alpha=0.15, label="within 1 %")
        axis.set(ylabel="% over the run without FP8")
    for axis in panels:
        axis.set(xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def report(curves: Curves) -> None:
    """Print by how much runs differ, over all steps and over the last ones."""
    without, within = (curves[FREE][precision] for precision in (REFERENCE, FP8))
    number = min(len(without), len(within))
    for name, first in (("all steps", 0), (f"the last {WINDOW} steps", -WINDOW)):
        means = [np.array([np.mean(run[first:]) for run in runs]) for runs in (without, within)]
        apart = 100 * (max(means[0]) / min(means[0]) - 1)
        differences = 100 * (means[1][:number] / means[0][:number] - 1)
        mean, half = interval(differences[:, None])
        print(
            f"Mean of {name}: FP8 {mean[0]:+.2f} +- {half[0]:.2f} % in {number} pairs "
            f"({differences.round(2).tolist()}); runs without {apart:.2f} % apart."
        )
        for run in curves[REPLAYED][FP8]:
            print(f"  {REPLAYED}: {100 * (np.mean(run[first:]) / means[0][0] - 1):+.2f} %")


def draw(curves: Curves, args: argparse.Namespace) -> None:
    """Write the picture and print the figures."""
    plot(curves, f"Main job, EP={args.ranks}", args.output.with_suffix(".png"))
    report(curves)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "fp8_loss")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, help="2 with clones, 1 without")
    most = len(STUDENT) + 1
    parser.add_argument(
        "--seeds", type=int, default=3, choices=range(1, most + 1), metavar="N",
        help=f"pairs of runs, {most} at most",
    )  # fmt: skip
    args = parser.parse_args()
    draw(train_all(args), args)
    shutil.rmtree(args.output.with_suffix(".runs"), ignore_errors=True)


if __name__ == "__main__":
    main()
