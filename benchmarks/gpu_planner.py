"""Time of the planner's Triton kernel on a GPU, R = 64, E = 256, and of the reference there.

python benchmarks/gpu_planner.py --output results.json
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from planner import draw_counts  # noqa: E402

from megatron_echo.planner import plan_clones  # noqa: E402
from megatron_echo.planner.balance import plan_clones_reference  # noqa: E402


def microseconds(function: Callable[[], object], rounds: int = 50) -> float:
    """Median time between two events around one call, after three warm-up calls."""
    samples = []
    for number in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        if number >= 3:
            samples.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(samples)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device.")
    results = {}
    for workload in ("lognormal 1.0", "one hot expert"):
        counts = draw_counts(workload, 64, 256, 8, 0).cuda()
        for slots in (1, 2, 4, 16):
            name = f"planner, {workload}, S={slots}"
            results[name] = {
                "kernel_us": microseconds(lambda: plan_clones(counts, slots)),  # noqa: B023
                "reference_us": microseconds(
                    lambda: plan_clones_reference(counts, slots),  # noqa: B023
                    rounds=3,
                ),
            }
            print(f"{name}: {results[name]['kernel_us']:.1f} us", flush=True)
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
