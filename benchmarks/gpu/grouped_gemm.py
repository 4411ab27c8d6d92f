"""Rate of the grouped products beside torch's ``grouped_mm`` and a plain product.

bf16, a rank's share of a model's experts and some clones. The kernels read home weights and slots
where they lie; ``grouped_mm`` gets them in one stack, and the copy that makes it is timed apart.
TFLOP/s are those of the rows that are used: a quarter of the buffer is not. ``mm`` is one product
of as many rows with one matrix, what the chip can do.
"""

import itertools
from collections.abc import Callable
from functools import partial

import torch
from record import Case, Figures
from timing import device, device_microseconds, release_memory
from torch import Tensor
from torch.nn.functional import grouped_mm

from megatron_echo.experts.pointer_gemm import pointer_outer, pointer_product

PART = "Grouped products"
Shape = tuple[int, int, int, int, int]
SHAPES: dict[str, Shape] = {  # rows in use, home experts, slots, width of the input, of the output
    "DeepSeek-V3 fc1": (32768, 4, 4, 7168, 4096),
    "Qwen3-30B-A3B fc1": (65536, 16, 16, 2048, 1536),
    "DeepSeek-V3 fc2": (32768, 4, 4, 2048, 7168),
    "Qwen3-30B-A3B fc2": (65536, 16, 16, 768, 2048),
    "Mixtral-8x7B fc2": (16384, 1, 1, 14336, 4096),
}
DRY_SHAPES: dict[str, Shape] = {"dry run": (48, 3, 2, 32, 16)}
DIRECTIONS = ("forward", "dgrad", "wgrad")
TARGETS = ("of_grouped_mm >= 0.9",)
LIMIT = 2**-6  # bf16 results of sums in another order, over the largest
SKEW = 1.0  # group g has rows in proportion to (g + 1) ** -SKEW; the last slot has none


def skewed_ends(rows: int, groups: int, slots: int, skew: float) -> list[int]:
    """Ends of groups whose sizes fall; with slots, the last group is empty."""
    used = groups - (slots > 0)
    sizes = [place**-skew for place in range(1, used + 1)]
    ends = [round(total / sum(sizes) * rows) for total in itertools.accumulate(sizes)]
    return ends + [rows] * (groups - used)


def contenders(direction: str, shape: Shape, skew: float = SKEW) -> dict[str, Callable[[], Tensor]]:
    """What is timed: three products, and the copy that puts home weights into a stack."""
    rows, experts, slots, taken, made = shape
    torch.manual_seed(0)
    groups = experts + slots

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device()) / shape[-1] ** 0.5

    inputs, grads = draw(rows * 4 // 3, taken), draw(rows * 4 // 3, made)
    stack = draw(groups, made, taken)
    home = stack[:experts].clone()
    pool = stack[experts:].clone() if slots else None
    ends = torch.tensor(skewed_ends(rows, groups, slots, skew), dtype=torch.int32)
    ends = ends.to(device())
    parts = torch.empty_like(stack)
    clones = parts[experts:] if slots else None

    def weight_gradient() -> Tensor:
        pointer_outer(grads, inputs, ends, parts[:experts], clones)
        return parts

    products: dict[str, dict[str, Callable[[], Tensor]]] = {
        "forward": {
            "kernel": lambda: pointer_product(inputs, home, pool, ends, transpose=True)[:rows],
            "grouped_mm": lambda: grouped_mm(inputs, stack.mT, offs=ends)[:rows],
            "mm": lambda: inputs[:rows] @ stack[0].T,
        },
        "dgrad": {
            "kernel": lambda: pointer_product(grads, home, pool, ends, transpose=False)[:rows],
            "grouped_mm": lambda: grouped_mm(grads, stack, offs=ends)[:rows],
            "mm": lambda: grads[:rows] @ stack[0],
        },
        "wgrad": {
            "kernel": weight_gradient,
            "grouped_mm": lambda: grouped_mm(grads.t(), inputs, offs=ends),
            "mm": lambda: grads[:rows].t() @ inputs[:rows],
        },
    }
    return {**products[direction], "copy": lambda: stack[:experts].copy_(home)}


def measure(direction: str, shape: Shape) -> Figures:
    """TFLOP/s, and the largest difference from ``grouped_mm`` over the largest number.

    Raises:
        ValueError: the results differ by more than rounding.
    """
    rows, *_, taken, made = shape
    functions = contenders(direction, shape)
    ours, theirs = (functions[name]().clone() for name in ("kernel", "grouped_mm"))
    difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not difference <= LIMIT:
        raise ValueError(f"the results differ by {difference:.1e} of the largest")
    times = device_microseconds(functions, rounds=12)
    copied = times.pop("copy")
    return {
        "kernel_us": times["kernel"],
        **{f"{name}_tflops": 2 * rows * taken * made / times[name] / 1e6 for name in times},
        "copy_of_home_us": copied,
        "of_grouped_mm": times["grouped_mm"] / times["kernel"],
        "of_mm": times["mm"] / times["kernel"],
        "difference": difference,
    }


def cases(dry: bool) -> list[Case]:
    """Each shape in each direction."""

    def alone(direction: str, shape: Shape) -> Figures:
        release_memory()
        return measure(direction, shape)

    return [
        Case(PART, f"{model}, {direction}", partial(alone, direction, shape), TARGETS)
        for model, shape in (DRY_SHAPES if dry else SHAPES).items()
        for direction in DIRECTIONS
    ]
