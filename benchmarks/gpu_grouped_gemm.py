"""Rate of the grouped products on a GPU, beside torch's ``grouped_mm`` and a plain product.

    python benchmarks/gpu_grouped_gemm.py --output results.json
    python benchmarks/gpu_grouped_gemm.py --dry-run     # small shapes on a CPU, references only

bf16, a rank's share of a model's experts and some clones. The kernels read home weights and slots
where they lie; ``grouped_mm`` gets them in one stack, and the copy that makes it is timed apart.
TFLOP/s are those of the rows that are used: a quarter of the buffer is not. ``mm`` is one product
of as many rows with one matrix, what the chip can do. Weight gradients are fp32 from the kernel
and bf16 from ``grouped_mm``. ``--sweep`` tries other tiles than the ones that the kernels choose.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.functional import grouped_mm  # noqa: E402

from megatron_echo.experts.pointer_gemm import pointer_outer, pointer_product  # noqa: E402

SHAPES = {  # rows in use, home experts, slots, width of the input, width of the output
    "DeepSeek-V3 fc1": (32768, 4, 4, 7168, 4096),
    "DeepSeek-V3 fc2": (32768, 4, 4, 2048, 7168),
    "Qwen3-30B-A3B fc1": (65536, 16, 16, 2048, 1536),
    "Qwen3-30B-A3B fc2": (65536, 16, 16, 768, 2048),
    "Mixtral-8x7B fc1": (16384, 1, 1, 4096, 28672),
    "Mixtral-8x7B fc2": (16384, 1, 1, 14336, 4096),
    "many small groups": (8192, 128, 0, 2048, 1536),
}
DRY_SHAPES = {"dry run": (48, 3, 2, 32, 16)}
SKEW = 1.0  # group g has rows in proportion to (g + 1) ** -SKEW; the last slot has none
TILES = [  # rows, columns, terms, warps, stages
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (64, 256, 64, 4, 4),
]
Functions = dict[str, Callable[[], Tensor]]


def microseconds(functions: Functions, device: str, rounds: int = 20) -> dict[str, float]:
    """Median time of each function, called in turns, after three warm-up rounds."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    if device == "cpu":
        for _ in range(2):
            for name, function in functions.items():
                begin = time.perf_counter()
                function()
                samples[name].append((time.perf_counter() - begin) * 1e6)
        return {name: statistics.median(times) for name, times in samples.items()}
    pairs = []
    for _ in range(rounds + 3):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            function()
            end.record()
            pairs.append((name, begin, end))
    torch.cuda.synchronize()
    for name, begin, end in pairs[3 * len(functions) :]:
        samples[name].append(begin.elapsed_time(end) * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}


def skewed_ends(rows: int, groups: int, slots: int) -> list[int]:
    """Ends of groups whose sizes fall; with slots, the last group is empty."""
    used = groups - (slots > 0)
    sizes = torch.arange(1, used + 1, dtype=torch.float64) ** -SKEW
    ends = (sizes.cumsum(0) / sizes.sum() * rows).round().int().tolist()
    return ends + [rows] * (groups - used)


def contenders(
    rows: int, experts: int, slots: int, taken: int, made: int, device: str
) -> tuple[dict[str, Functions], Callable[[], Tensor]]:
    """What is timed, for each direction; and the copy that puts home weights into a stack."""
    torch.manual_seed(0)
    groups = experts + slots

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device) / shape[-1] ** 0.5

    inputs, grads = draw(rows * 4 // 3, taken), draw(rows * 4 // 3, made)
    stack = draw(groups, made, taken)
    home = stack[:experts].clone()
    pool = stack[experts:].clone() if slots else None
    ends = torch.tensor(skewed_ends(rows, groups, slots), dtype=torch.int32, device=device)
    parts = torch.empty(groups, made, taken, device=device)
    clones = parts[experts:] if slots else None

    def weight_gradient() -> Tensor:
        pointer_outer(grads, inputs, ends, parts[:experts], clones)
        return parts

    used, used_grads = inputs[:rows], grads[:rows]
    functions: dict[str, Functions] = {
        "forward": {
            "kernel": lambda: pointer_product(inputs, home, pool, ends, transpose=True)[:rows],
            "grouped_mm": lambda: grouped_mm(inputs, stack.mT, offs=ends)[:rows],
            "mm": lambda: used @ stack[0].T,
        },
        "dgrad": {
            "kernel": lambda: pointer_product(grads, home, pool, ends, transpose=False)[:rows],
            "grouped_mm": lambda: grouped_mm(grads, stack, offs=ends)[:rows],
            "mm": lambda: used_grads @ stack[0],
        },
        "wgrad": {
            "kernel": weight_gradient,
            "grouped_mm": lambda: grouped_mm(grads.t(), inputs, offs=ends),
            "mm": lambda: used_grads.t() @ used,
        },
    }
    return functions, lambda: stack[:experts].copy_(home)


def measure(shape: tuple[int, int, int, int, int], device: str) -> dict[str, dict[str, float]]:
    """TFLOP/s of each direction, and the largest difference from ``grouped_mm``, of the largest."""
    rows, *_, taken, made = shape
    flops = 2 * rows * taken * made
    functions, copy = contenders(*shape, device)
    results = {}
    for direction, competitors in functions.items():
        ours, theirs = (competitors[name]() for name in ("kernel", "grouped_mm"))
        difference = (ours - theirs).abs().max() / theirs.abs().max()
        times = microseconds({**competitors, "copy": copy}, device)
        rates = {f"{name}_tflops": flops / times[name] / 1e6 for name in competitors}
        results[direction] = {
            **rates, "kernel_us": times["kernel"], "copy_of_home_us": times["copy"],
            "of_grouped_mm": times["grouped_mm"] / times["kernel"],
            "difference": difference.item(),
        }  # fmt: skip
    return results


@contextmanager
def tile(sizes: tuple[int, int, int, int, int]) -> Iterator[None]:
    """The kernels with this tile."""
    from megatron_echo.experts import kernels

    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    blocks = {**dict(zip(names, sizes, strict=False)), "SUPER": 8}
    options = {"num_warps": sizes[3], "num_stages": sizes[4]}
    with mock.patch.object(kernels, "_tile", return_value=(blocks, options)):
        yield


def sweep(shape: tuple[int, int, int, int, int]) -> dict[str, dict[str, float]]:
    """TFLOP/s of each direction with each tile."""
    rows, *_, taken, made = shape
    functions, _ = contenders(*shape, "cuda")
    rates: dict[str, dict[str, float]] = {}
    for sizes in TILES:
        with tile(sizes):
            kernels = {name: direction["kernel"] for name, direction in functions.items()}
            times = microseconds(kernels, "cuda", rounds=10)
        rates["x".join(map(str, sizes))] = {
            name: 2 * rows * taken * made / value / 1e6 for name, value in times.items()
        }
    return rates


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--dry-run", action="store_true", help="a small shape on a CPU")
    parser.add_argument("--sweep", action="store_true", help="other tiles too")
    args = parser.parse_args()
    if not args.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device. Use --dry-run to try the script without one.")
    shapes, device = (DRY_SHAPES, "cpu") if args.dry_run else (SHAPES, "cuda")
    results: dict[str, dict] = {}
    if not args.dry_run:
        results["device"] = {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name, shape in shapes.items():
        for direction, figures in measure(shape, device).items():
            results[f"{name}, {direction}"] = figures
            rates = {k[:-7]: v for k, v in figures.items() if k.endswith("_tflops")}
            text = ", ".join(f"{key} {rate:,.1f} TFLOP/s" for key, rate in rates.items())
            ratio, difference = figures["of_grouped_mm"], figures["difference"]
            print(f"{name}, {direction}: {text}; {ratio:.2f} x, differs {difference:.1e}")
        if args.sweep and not args.dry_run:
            results[f"{name}, tiles"] = sweep(shape)
            for sizes, of_tile in results[f"{name}, tiles"].items():
                print(f"  {sizes}: " + ", ".join(f"{k} {v:,.0f}" for k, v in of_tile.items()))
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
