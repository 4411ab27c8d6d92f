"""The main job with experts in FP8 beside the same without: the loss of each step.

    python benchmarks/fp8_loss.py [--steps 200] [--output benchmarks/results/fp8_loss]

Both have clones and two microbatches a step, and parameters in bf16 where there are GPUs. On a CPU
they are in fp32, and FP8 is its reference: operands are rounded as on a GPU and multiplied in fp32.
Writes ``.json`` and ``.png``.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
from processes import (  # noqa: E402
    lean_main_job,
    main_job_corpus,
    torchrun,
    write_results,
)

from megatron_echo.record.metrics import read_metrics  # noqa: E402

COMMON = "--moe-enable-echo --moe-echo-force-skew 1.0 --micro-batch-size 4"
PRECISIONS = ("params-dtype", "fp8-rowwise")
WINDOW = 10
RANKS = 2


def train(corpus: Path, precision: str, steps: int) -> list[float]:
    """The loss at each step of one run."""
    with tempfile.TemporaryDirectory() as folder:
        words = lean_main_job(corpus, Path(folder), steps) + COMMON.split()
        words += ["--moe-echo-expert-precision", precision]
        torchrun(ROOT / "pretrain_gpt_moe.py", RANKS, words)
        return [line["lm loss"] for line in read_metrics(folder)]


def smooth(curve: list[float]) -> np.ndarray:
    """Means of ``WINDOW`` steps in a row."""
    return np.convolve(curve, np.ones(WINDOW) / WINDOW, "valid")


def plot(curves: dict[str, list[float]], path: Path) -> None:
    """The curves, and by how much they differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, ratio) = pyplot.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for name, curve in curves.items():
        losses.plot(range(1, len(curve) + 1), curve, label=f"experts: {name}", linewidth=1.2)
    losses.set(xlabel="step", ylabel="lm loss (nats per byte)", title="Main job, EP=2, clones")
    losses.legend()
    reference, ours = (np.asarray(curves[name]) for name in PRECISIONS)
    ratio.plot(range(1, len(ours) + 1), 100 * (ours / reference - 1), linewidth=0.8, label="a step")
    means = 100 * (smooth(ours) / smooth(reference) - 1)
    at = range(WINDOW, WINDOW + len(means))
    ratio.plot(at, means, linewidth=1.8, label=f"mean of {WINDOW} steps")
    ratio.set(xlabel="step", ylabel="FP8 over params-dtype, %", title="Difference")
    ratio.legend()
    for axis in (losses, ratio):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    default = ROOT / "benchmarks" / "results" / "fp8_loss"
    parser.add_argument("--output", type=Path, default=default)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)  # before minutes of work
    corpus = main_job_corpus()
    curves = {precision: train(corpus, precision, args.steps) for precision in PRECISIONS}
    write_results(args.output, curves)
    plot(curves, args.output.with_suffix(".png"))
    reference, ours = (smooth(curves[name]) for name in PRECISIONS)
    worst = abs(ours / reference - 1).max()
    print(f"{args.steps} steps: loss at the end {reference[-1]:.4f}, in FP8 {ours[-1]:.4f}")
    print(f"worst difference of means of {WINDOW} steps: {100 * worst:.2f} %")


if __name__ == "__main__":
    main()
