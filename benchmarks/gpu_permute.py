"""Bandwidth of the copies of tokens into rows and back on a GPU, beside torch's own operations.

    python benchmarks/gpu_permute.py --output results.json

bf16, all experts on one GPU, rows padded to multiples of 16 an expert. GB/s are those of the bytes
that must move: each row that is read once, each that is written once. A token that is read K times
may come from the L2 cache, so that ``take_rows`` can be faster than a plain copy.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_echo.dispatch.kernels import sum_rows, take_rows  # noqa: E402
from megatron_echo.dispatch.layout import build_layout, round_rows  # noqa: E402
from megatron_echo.dispatch.permute import (  # noqa: E402
    sum_rows_reference,
    take_rows_reference,
)

SHAPES = {  # tokens, hidden size, experts of a token, experts
    "DeepSeek-V3": (4096, 7168, 8, 256),
    "Qwen3-30B-A3B": (8192, 2048, 8, 128),
    "Mixtral-8x7B": (8192, 4096, 2, 8),
}
ALIGNMENT = 16


def microseconds(functions: dict[str, Callable[[], object]], rounds: int = 40) -> dict[str, float]:
    """Median time of each function, called in turns, after three warm-up rounds.

    The host waits once, at the end, so that the device does not wait for launches.
    """
    samples: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
    samples = {name: [] for name in functions}
    for _ in range(rounds + 3):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            samples[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(begin.elapsed_time(end) * 1e3 for begin, end in pairs[3:])
        for name, pairs in samples.items()
    }


def measure(tokens: int, hidden: int, topk: int, experts: int) -> dict[str, dict[str, float]]:
    """Times and bandwidths of both directions for one shape."""
    torch.manual_seed(0)
    chosen = torch.rand(tokens, experts, device="cuda").topk(topk).indices
    num_rows = round_rows(tokens * topk + experts * (ALIGNMENT - 1))
    rows = build_layout(chosen, experts, num_rows, alignment=ALIGNMENT).rows
    token_of_row, row_of = rows.token_of_row, rows.row_of
    source = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="cuda")
    padded = torch.cat((source, source.new_zeros(1, hidden)))
    buffer = take_rows(source, token_of_row)
    other = torch.empty_like(buffer)

    def add_rows() -> torch.Tensor:
        total = torch.zeros(tokens + 1, hidden, device="cuda")
        return total.index_add_(0, token_of_row, buffer.float())

    contenders: dict[str, dict[str, Callable[[], object]]] = {
        "take_rows": {
            "kernel": lambda: take_rows(source, token_of_row),
            "index_select": lambda: padded.index_select(0, token_of_row),
            "reference": lambda: take_rows_reference(source, token_of_row),
        },
        "sum_rows": {
            "kernel": lambda: sum_rows(buffer, row_of),
            "index_add": add_rows,
            "reference": lambda: sum_rows_reference(buffer, row_of),
        },
    }
    row = 2 * hidden  # bytes
    moved = {
        "take_rows": (tokens * topk + num_rows) * row,
        "sum_rows": (tokens * topk + 2 * tokens) * row,  # writes fp32
    }
    results = {}
    for name, functions in contenders.items():
        times = microseconds({**functions, "copy": lambda: other.copy_(buffer)})
        copied = 2 * num_rows * row / times.pop("copy") / 1e3
        results[name] = {f"{key}_us": value for key, value in times.items()}
        speeds = {f"{key}_gb_s": moved[name] / value / 1e3 for key, value in times.items()}
        results[name] |= {**speeds, "copy_gb_s": copied}
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device.")
    results = {}
    for model, shape in SHAPES.items():
        for kernel, figures in measure(*shape).items():
            results[f"{kernel}, {model}"] = figures
            speeds = {k[:-5]: v for k, v in figures.items() if k.endswith("_gb_s")}
            text = ", ".join(f"{name} {speed:,.0f} GB/s" for name, speed in speeds.items())
            print(f"{kernel}, {model}: {text}", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
