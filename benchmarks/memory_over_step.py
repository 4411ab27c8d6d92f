"""What a training step keeps for backward, over the step: Megatron's layer, ours, and offloaded.

    python benchmarks/memory_over_step.py [--output benchmarks/results/memory_over_step]

The first step of the main job, on the first of two ranks, from ``--memory-ledger``: every storage
that autograd saves counts where it is saved, until it is dropped. Weights, gradients and buffers
that only one operator uses are not in it, nor what goes to the host, on its way there and back.
Megatron's experts are its own without Transformer Engine, one after another. Writes ``.json`` (the
peaks) and ``.png``.
"""

import json
import sys
import tempfile
from pathlib import Path

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

from megatron_echo.record.ledger import KEPT, Entry  # noqa: E402
from megatron_echo.record.ledger_plot import total_curve  # noqa: E402

LAYER = "--moe-enable-echo --micro-batch-size 4"
OFFLOAD = "--fine-grained-activation-offloading --min-offloaded-tensor-size 1 --offload-modules"
RUNS = {
    "Megatron's layer": "--micro-batch-size 4",
    "ours, with clones": LAYER,
    "ours, offloaded": f"{LAYER} {OFFLOAD} core_attn attn_proj expert_fc1 moe_act",
}
PARTS = ("attention", "experts", "routing, exchange of tokens", "norms", "embedding, output, loss")


def part(entry: Entry) -> str:
    """Which of :data:`PARTS` saved it."""
    if "layers." not in entry.layer:
        return PARTS[4]
    if not entry.module.startswith("mlp"):
        return PARTS[0] if entry.module.startswith("self_attention.") else PARTS[3]
    return PARTS[1] if ".experts" in entry.module else PARTS[2]


def curves(corpus: Path, flags: str) -> dict[str, np.ndarray]:
    """MiB kept after each save and free of the step, by part."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.json"
        words = [*lean_main_job(corpus, Path(folder), 1), "--lr-warmup-iters", "0", *flags.split()]
        torchrun(ROOT / "pretrain_gpt_moe.py", 2, [*words, "--memory-ledger", str(file)])
        ledger = json.loads(file.read_text())
    entries = [Entry(**entry) for entry in ledger["entries"]]
    kept = [entry for entry in entries if entry.kind in KEPT and not entry.taken]
    return {
        name: total_curve([e for e in kept if part(e) == name], ledger["events"]) / 2**20
        for name in PARTS
    }


def plot(runs: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """A panel a run, on the same scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True)
    for axes, (name, of_part) in zip(panels, runs.items(), strict=True):
        total = sum(of_part.values())
        at = np.linspace(0, 100, len(of_part[PARTS[0]]))
        axes.stackplot(at, list(of_part.values()), labels=list(of_part), step="post")
        axes.set(xlim=(0, 100), xlabel="saves and frees of the step, %")
        axes.set_title(f"{name}: {np.max(total):.0f} MiB", fontsize=11)
    panels[0].set_ylabel("kept for backward, MiB")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(PARTS), fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "memory_over_step")
    args = parser.parse_args()
    corpus = main_job_corpus()
    runs = {name: curves(corpus, flags) for name, flags in RUNS.items()}
    peaks = {name: float(np.max(sum(of_part.values()))) for name, of_part in runs.items()}
    write_results(args.output, {"peak_mib": peaks})
    plot(runs, args.output.with_suffix(".png"))
    print("\n".join(f"{name}: {peak:.1f} MiB" for name, peak in peaks.items()))


if __name__ == "__main__":
    main()
