"""Clones on against off and against stock: step time, bytes of both weight transports.

    python benchmarks/echo.py [--output benchmarks/results/echo] [--rounds 3] [--iterations 12]

Training runs in the shape of the main job, a real ``pretrain()`` each, take turns as whole
processes, one thread a rank; times are medians over iterations, ratios are of one round. More
ranks than cores are marked as oversubscribed. Bytes are counted from the run's own traces.
"""

import json
import os
import statistics
import sys
import tempfile
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
from megatron_echo.record.trace import read_traces  # noqa: E402

LAYER, SKEW = "--moe-enable-echo", "--moe-echo-force-skew 1.0"
NONE, AUTO = "--moe-num-echo-experts 0", "--moe-echo-tolerance auto"
RUNS = {
    "stock, natural": "",
    "no clones, natural": f"{LAYER} {NONE}",
    "clones, natural": LAYER,
    "clones that pay, natural": f"{LAYER} {AUTO}",
    "no clones, skew 1.0": f"{LAYER} {SKEW} {NONE}",
    "clones, skew 1.0": f"{LAYER} {SKEW}",
    "clones that pay, skew 1.0": f"{LAYER} {SKEW} {AUTO}",
    "clones by collective, skew 1.0": (
        f"{LAYER} {SKEW} --moe-echo-expert-dispatcher-type collective"
    ),
}
RATIOS = (
    ("no clones, natural", "stock, natural"),
    ("clones, natural", "stock, natural"),
    ("clones that pay, natural", "stock, natural"),
    ("clones, natural", "no clones, natural"),
    ("clones that pay, natural", "no clones, natural"),
    ("clones that pay, natural", "clones, natural"),
    ("clones, skew 1.0", "stock, natural"),
    ("clones, skew 1.0", "no clones, skew 1.0"),
    ("clones that pay, skew 1.0", "no clones, skew 1.0"),
    ("clones that pay, skew 1.0", "clones, skew 1.0"),
    ("clones by collective, skew 1.0", "clones, skew 1.0"),
)
"""(This, over that). The stock layer cannot be skewed: its router is Megatron's own."""

SIZES = {2: "", 4: "--expert-model-parallel-size 4 --micro-batch-size 4"}


def train(corpus: Path, ranks: int, extra: str, iterations: int) -> dict[str, Any]:
    """One run: seconds of its iterations, and what its metrics and traces say."""
    with tempfile.TemporaryDirectory() as folder:
        words = lean_main_job(corpus, Path(folder), iterations)
        words += ["--lr-warmup-iters", "0", *SIZES[ranks].split(), *extra.split()]
        torchrun(ROOT / "pretrain_gpt_moe.py", ranks, words)
        lines = read_metrics(folder)[2:]
        record = json.loads((Path(folder) / "run.json").read_text())
    seconds = [line["iteration-time"] for line in lines]
    names = ("overload_routed", "overload_placed", "clones")
    means = {
        name: statistics.mean(line[f"moe_echo/{name}"] for line in lines)
        for name in names
        if f"moe_echo/{name}" in lines[0]
    }
    return {"seconds": statistics.median(seconds), "flags": record["flags"], **means}


def sent_bytes(corpus: Path, ranks: int) -> dict[str, float]:
    """MiB that all ranks send for the clones of one layer call, by transport, forward and back."""
    with tempfile.TemporaryDirectory() as folder:
        trace = f"{LAYER} {SKEW} --moe-echo-trace-dir {folder}/traces"
        flags = train(corpus, ranks, trace, 6)["flags"]
        traces = read_traces(Path(folder) / "traces")
    matrices = 3 if flags["swiglu"] else 2
    expert = matrices * flags["hidden_size"] * flags["moe_ffn_hidden_size"] * 4
    slots = traces[0].slot_expert.shape[2]
    # Weights twice, again for backward, and gradients once; all in fp32 here.
    used = statistics.mean(
        float((trace.slot_expert >= 0).sum()) / len(trace.layer) for trace in traces
    )
    passes = 3 * expert / 2**20
    return {"collective": ranks * (ranks - 1) * slots * passes, "p2p": used * passes}


def measure(corpus: Path, ranks: int, rounds: int, iterations: int) -> dict[str, Any]:
    """All runs, one after the other, several times."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in RUNS}
    for number in range(rounds):
        for name, extra in RUNS.items():
            results[name].append(train(corpus, ranks, extra, iterations))
            print(f"EP={ranks} {number + 1}/{rounds} {name}: "
                  f"{results[name][-1]['seconds'] * 1e3:.0f} ms", flush=True)  # fmt: skip
    times = {name: [run["seconds"] for run in runs] for name, runs in results.items()}
    return {
        "ranks": ranks,
        "oversubscribed": ranks > (os.cpu_count() or 1),
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratios": {
            f"{one} / {other}": statistics.median(
                a / b for a, b in zip(times[one], times[other], strict=True)
            )
            for one, other in RATIOS
        },
        "balance": {
            name: {key: runs[0][key] for key in runs[0] if key not in ("seconds", "flags")}
            for name, runs in results.items()
        },
        "MiB of clones sent in a layer call": sent_bytes(corpus, ranks),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = []
    for result in results:
        crowded = ", more ranks than cores" if result["oversubscribed"] else ""
        lines += [f"## EP={result['ranks']}{crowded}", "", "| step time | ratio |", "|---|---|"]
        lines += [f"| {name} | {ratio:.2f} |" for name, ratio in result["ratios"].items()]
        lines += ["", "| run | ms | max/mean routed | placed | clones of a layer call |"]
        lines += ["|---|---|---|---|---|"]
        for name, seconds in result["seconds"].items():
            balance = result["balance"][name]
            keys = ("overload_routed", "overload_placed", "clones")
            figures = " | ".join(f"{balance[key]:.2f}" if key in balance else "" for key in keys)
            lines.append(f"| {name} | {seconds * 1e3:.0f} | {figures} |")
        sent = result["MiB of clones sent in a layer call"]
        lines += [
            "",
            "Sent for the clones of one layer call, all ranks, forward and backward: "
            f"{sent['collective']:.2f} MiB by collective, {sent['p2p']:.2f} MiB by p2p.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "echo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    args = parser.parse_args()
    corpus = main_job_corpus()
    results = [measure(corpus, ranks, args.rounds, args.iterations) for ranks in args.ranks]
    write_results(args.output, results)
    args.output.with_suffix(".md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
