"""The main job with experts in FP8 beside the same without: the loss of each step.

    python benchmarks/fp8_loss.py [--steps 200] [--ranks 1] [--output benchmarks/results/fp8_loss]

Curves that begin alike part by themselves: so the reference is there once more, under another
instruction set. On a CPU parameters are in fp32, and FP8 is its reference: operands are rounded as
on a GPU and multiplied in fp32. ``--minutes`` saves and stops each run after so many; the same
command then goes on. Writes ``.json`` and ``.png``.
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

COMMON = "--moe-enable-echo --moe-echo-force-skew 1.0"
REFERENCE, FP8 = "params-dtype", "fp8-rowwise"
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    REFERENCE: ("", {}),
    FP8: (f"--moe-echo-expert-precision {FP8}", {}),
    f"{REFERENCE}, other instructions": (
        "",
        {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "AVX"},
    ),
}
"""Flags and environment variables."""
WINDOW = 10
SAVE_INTERVAL = 10


def train(corpus: Path, name: str, args: argparse.Namespace) -> list[float]:
    """The loss at each step of one run, as far as it came."""
    flags, settings = RUNS[name]
    folder = args.output.with_suffix(".runs") / name.replace(", ", "-").replace(" ", "-")
    saved = folder / "checkpoints"
    words = lean_main_job(corpus, folder, args.steps) + COMMON.split() + flags.split()
    share = str(GLOBAL_BATCH_SIZE // args.ranks)
    words += ["--expert-model-parallel-size", str(args.ranks), "--micro-batch-size", share]
    words += ["--save", str(saved), "--save-interval", str(SAVE_INTERVAL)]
    words += ["--exit-duration-in-mins", str(args.minutes)] if args.minutes else []
    if (saved / "latest_checkpointed_iteration.txt").exists():
        words += ["--load", str(saved)]
    if len(_losses(folder)) < args.steps:
        torchrun(ROOT / "pretrain_gpt_moe.py", args.ranks, words, settings)
    return _losses(folder)


def _losses(folder: Path) -> list[float]:
    if not (folder / "metrics.jsonl").exists():
        return []
    return [line["lm loss"] for line in read_metrics(folder) if "lm loss" in line]


def smooth(curve: list[float]) -> np.ndarray:
    """Means of ``WINDOW`` steps in a row."""
    return np.convolve(curve, np.ones(WINDOW) / WINDOW, "valid")


def differences(curves: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Of means of ``WINDOW`` steps to those of the reference, in percent, as far as each goes."""
    means = {name: smooth(curve) for name, curve in curves.items()}
    reference = means.pop(REFERENCE)
    return {n: 100 * (mean / reference[: len(mean)] - 1) for n, mean in means.items()}


def plot(curves: dict[str, list[float]], title: str, path: Path) -> None:
    """The curves, and by how much they differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, ratio) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for name, curve in curves.items():
        losses.plot(range(1, len(curve) + 1), curve, label=name, linewidth=1.2)
    losses.set(xlabel="step", ylabel="lm loss (nats per byte)", title=title)
    for number, (name, percent) in enumerate(differences(curves).items(), 1):
        at = range(WINDOW, WINDOW + len(percent))
        label = f"{name} over {REFERENCE}"
        ratio.plot(at, percent, linewidth=1.5, color=f"C{number}", label=label)
    ratio.set(xlabel="step", ylabel="%", title=f"Difference of means of {WINDOW} steps")
    for axis in (losses, ratio):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "fp8_loss")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, help="2 with clones, 1 without")
    parser.add_argument("--minutes", type=int, help="after which each run saves and stops")
    args = parser.parse_args()
    corpus = main_job_corpus()
    curves = {name: train(corpus, name, args) for name in RUNS}
    unfinished = {n: len(curve) for n, curve in curves.items() if len(curve) < args.steps}
    if unfinished:
        sys.exit(f"Not yet at step {args.steps}: {unfinished}. Run the same again to go on.")
    write_results(args.output, curves)
    plot(curves, f"Main job, EP={args.ranks}, skewed routing", args.output.with_suffix(".png"))
    for name, percent in differences(curves).items():
        print(f"means of {WINDOW} of {len(curves[name])} steps, {name} over {REFERENCE}: ", end="")
        print(f"{abs(percent).max():.2f} % at most, {percent[-1]:+.2f} % at the end")
    shutil.rmtree(args.output.with_suffix(".runs"))


if __name__ == "__main__":
    main()
