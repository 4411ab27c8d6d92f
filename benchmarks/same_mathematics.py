"""How far our layer is from its reference, in the main job: step by step, and free-running.

    python benchmarks/same_mathematics.py [--steps 50] [--output results/same_mathematics]

Step by step, each step starts from the reference's parameters (``step_by_step.py``). Free-running,
rounding differences grow by themselves, so the reference is also compared with itself under
another instruction set. Writes ``.json`` and ``.png``.
"""

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

from processes import (  # noqa: E402
    lean_main_job,
    main_job_corpus,
    results_parser,
    torchrun,
    write_results,
)

from megatron_echo.record.metrics import read_metrics  # noqa: E402

OTHER_ROUNDING = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
TOLERANCE = 1e-5
FREE_STEPS = 15


@dataclass(frozen=True)
class Comparison:
    """What is compared with what: flags of the reference, and of ours beyond them."""

    name: str
    flags: str
    ours: dict[str, Any]
    ranks: int = 2


LAYER = {"moe_enable_echo": True, "moe_num_echo_experts": 0}
SKEWED = "--moe-enable-echo --moe-num-echo-experts 0 --moe-echo-force-skew 1.0"
CLONES = {"moe_num_echo_experts": 8, "moe_echo_tolerance": 0.0}
COMPARISONS = (
    Comparison("sync-free layer against stock, EP=2", "", LAYER),
    Comparison("clones against none, skew 1.0, EP=2", SKEWED, CLONES),
    Comparison(
        "clones against none, skew 1.0, EP=4",
        f"{SKEWED} --expert-model-parallel-size 4 --micro-batch-size 4",
        CLONES,
        ranks=4,
    ),
    Comparison(
        "clones against none, skew 1.0, EP=2, PP=2, distributed optimizer, recomputation",
        f"{SKEWED} --pipeline-model-parallel-size 2 --micro-batch-size 2 "
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        CLONES,
        ranks=4,
    ),
)


def as_flags(fields: dict[str, Any]) -> list[str]:
    """Configuration fields as command-line words."""
    words: list[str] = []
    for name, value in fields.items():
        words.append("--" + name.replace("_", "-"))
        words += [] if value is True else [str(value)]
    return words


def step_by_step(comparison: Comparison, corpus: Path, steps: int) -> list[dict[str, float]]:
    """Differences of loss and gradients at each step."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lines.jsonl"
        settings = {
            "STEP_BY_STEP_FIELDS": json.dumps(comparison.ours),
            "STEP_BY_STEP_FILE": str(file),
        }
        words = lean_main_job(corpus, Path(folder), steps) + comparison.flags.split()
        torchrun(ROOT / "benchmarks/step_by_step.py", comparison.ranks, words, settings)
        return [json.loads(line) for line in file.read_text().splitlines()]


def free_running(comparison: Comparison, corpus: Path, steps: int) -> dict[str, list[float]]:
    """Relative difference of the loss at each step: ours, and the reference's own rounding."""
    curves = {}
    for name, extra, settings in (
        ("reference", [], {}),
        ("ours", as_flags(comparison.ours), {}),
        ("reference, other rounding", [], OTHER_ROUNDING),
    ):
        with tempfile.TemporaryDirectory() as folder:
            words = lean_main_job(corpus, Path(folder), steps) + comparison.flags.split() + extra
            torchrun(ROOT / "pretrain_gpt_moe.py", comparison.ranks, words, settings)
            curves[name] = [line["lm loss"] for line in read_metrics(folder)]
    reference = curves.pop("reference")
    return {
        name: [abs(a / b - 1) for a, b in zip(curve, reference, strict=True)]
        for name, curve in curves.items()
    }


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """One panel a comparison."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(2, len(results))
    rows = -(-len(results) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(7 * columns, 4.2 * rows), layout="constrained", squeeze=False
    )
    for result, axis in zip(results, axes.flat, strict=False):
        stepwise = result["step by step"]
        for name, curve, style in (
            ("free-running: ours against the reference", result["free"]["ours"], "-"),
            ("free-running: the reference against itself, other rounding",
             result["free"]["reference, other rounding"], "--"),
            ("step by step: loss", [line["loss"] for line in stepwise], "-"),
            ("step by step: worst gradient", [line["grad"] for line in stepwise], "-"),
        ):  # fmt: skip
            axis.plot(range(1, len(curve) + 1), [max(v, 1e-12) for v in curve], style, label=name)
        axis.axhline(TOLERANCE, color="grey", linewidth=0.8)
        axis.set(yscale="log", xlabel="step", ylim=(5e-13, None))
        axis.set_title(result["name"], fontsize=10)
        axis.set_ylabel("relative difference (0 drawn at 1e-12)")
        axis.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.08))
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "same_mathematics")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of comparisons, from 0")
    args = parser.parse_args()
    corpus = main_job_corpus()
    results = []
    chosen = args.only if args.only is not None else range(len(COMPARISONS))
    for comparison in (COMPARISONS[number] for number in chosen):
        stepwise = step_by_step(comparison, corpus, args.steps)
        free = free_running(comparison, corpus, args.steps)
        ours, own = free["ours"], free["reference, other rounding"]
        worst = {key: max(line[key] for line in stepwise) for key in ("loss", "grad")}
        holds = (
            max(worst.values()) <= TOLERANCE
            and max(ours[:FREE_STEPS]) <= TOLERANCE
            and max(ours) <= max(max(own), TOLERANCE)
        )
        print(
            f"{comparison.name}: {args.steps} steps, worst loss {worst['loss']:.1e}, worst "
            f"gradient {worst['grad']:.1e}; free-running {max(ours[:FREE_STEPS]):.1e} over "
            f"{FREE_STEPS} steps, {max(ours):.1e} over all (the reference under other rounding "
            f"{max(own):.1e}): "
            f"{'holds' if holds else 'DOES NOT HOLD'}",
            flush=True,
        )
        results.append(
            {"name": comparison.name, "holds": holds, "step by step": stepwise, "free": free}
        )
    write_results(args.output, results)
    plot(results, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
