"""The main job with experts in FP8 beside the same without: the loss of each step.

    python benchmarks/fp8_loss.py [--steps 200] [--ranks 1] [--output benchmarks/results/fp8_loss]

Curves that begin alike part by themselves. So the reference is there twice more: under another
instruction set, and in bf16, which a CPU without instructions for it computes 20 times as slowly
(``--runs`` leaves it out). On a CPU FP8 is its reference: operands are rounded as on a GPU and
multiplied in fp32. A run that was stopped goes on where it saved last, in ``runs/fp8_loss``;
``--minutes`` stops each by itself. Writes ``.json`` and ``.png``.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from main_job import GLOBAL_BATCH_SIZE  # noqa: E402
from processes import (  # noqa: E402
    lean_main_job,
    main_job_corpus,
    torchrun,
    write_results,
)

from megatron_echo.record.metrics import read_metrics  # noqa: E402

COMMON = "--moe-enable-echo --moe-echo-force-skew 1.0"
RUNS: dict[str, tuple[str, dict[str, str]]] = {
    "fp32": ("", {}),
    "FP8": ("--moe-echo-expert-precision fp8-rowwise", {}),
    "fp32, other instructions": ("", {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "AVX"}),
    "bf16": ("--bf16", {}),
}
"""Flags and environment variables. On a GPU all are in bf16."""
REFERENCE = "fp32"
WINDOW = 10
SAVE_INTERVAL = 10


def train(corpus: Path, name: str, args: argparse.Namespace) -> list[float]:
    """The loss at each step of one run, as far as it came."""
    flags, settings = RUNS[name]
    plain = "".join(filter(str.isalnum, name))
    folder = ROOT / "runs" / "fp8_loss" / f"{plain}-{args.steps}-ranks{args.ranks}"
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    default = ROOT / "benchmarks" / "results" / "fp8_loss"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=2, help="2 with clones, 1 without")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--minutes", type=int, help="after which each run saves and stops")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)  # before minutes of work
    corpus = main_job_corpus()
    curves = {name: train(corpus, name, args) for name in args.runs}
    unfinished = {n: len(curve) for n, curve in curves.items() if len(curve) < args.steps}
    if unfinished:
        print(f"Not yet at step {args.steps}: {unfinished}. Run the same again to go on.")
    if not all(len(curve) >= WINDOW for curve in curves.values()) or REFERENCE not in curves:
        raise SystemExit(f"Nothing to compare {REFERENCE} with, over {WINDOW} steps, as yet.")
    write_results(args.output, curves)
    plot(curves, f"Main job, EP={args.ranks}, skewed routing", args.output.with_suffix(".png"))
    for name, percent in differences(curves).items():
        print(f"means of {WINDOW} of {len(curves[name])} steps, {name} over {REFERENCE}: ", end="")
        print(f"{abs(percent).max():.2f} % at most, {percent[-1]:+.2f} % at the end")


if __name__ == "__main__":
    main()
