"""Grouped products in rowwise FP8 beside ``grouped_mm`` in bf16, and what quantising costs.

A rank's share of DeepSeek-V3's experts and some clones; groups are multiples of 16 rows, and a
quarter of the buffer is not used. ``of_grouped_mm`` compares products; ``all_of_grouped_mm`` has
the quantisation of rows in it, which each call makes, and not that of weights, which a step makes
once.
"""

from collections.abc import Callable
from functools import partial

import torch
from grouped_gemm import SHAPES as ALL_SHAPES
from grouped_gemm import Shape, skewed_ends
from record import Case, Figures, SkippedError
from timing import device, device_microseconds, on_gpu, release_memory
from torch import Tensor
from torch.nn.functional import grouped_mm

from megatron_echo.experts.fp8 import (
    Quantised,
    quantise_columns,
    quantise_reference,
    quantise_rows,
    scaled_outer,
    scaled_product,
)
from megatron_echo.precision import FORMATS

PART = "Grouped products in FP8"
SHAPES = {name: shape for name, shape in ALL_SHAPES.items() if name.startswith("DeepSeek-V3")}
DRY_SHAPES: dict[str, Shape] = {"dry run in FP8": (96, 3, 2, 32, 16)}
DIRECTIONS = ("forward", "dgrad", "wgrad")
TARGETS = ("of_grouped_mm >= 1.4",)
ROWWISE = FORMATS["fp8-rowwise"]
ERROR = (0.03, 0.045)  # of a product of random values, from e4m3 alone


def contenders(direction: str, shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """The product in bf16 and in FP8, and in FP8 with the quantisation of what is no weight."""
    rows, experts, slots, taken, made = shape
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=device())

    inputs, grads = draw(rows * 4 // 3, taken), draw(rows * 4 // 3, made)
    stack = draw(experts + slots, made, taken)
    aligned = [end // ROWWISE.alignment for end in skewed_ends(rows, experts + slots, slots, 1.0)]
    ends = torch.tensor(aligned, dtype=torch.int32).mul(ROWWISE.alignment).to(device())
    if direction == "wgrad":

        def quantised() -> tuple[Quantised, Quantised]:
            return quantise_columns(grads, ends, ROWWISE), quantise_columns(inputs, ends, ROWWISE)

        both = quantised()
        return {
            "fp8": lambda: scaled_outer(*both, ends, grads.dtype),
            "all": lambda: scaled_outer(*quantised(), ends, grads.dtype),
            "grouped_mm": lambda: grouped_mm(grads.t(), inputs, offs=ends),
        }
    left, right = (inputs, stack) if direction == "forward" else (grads, stack.mT.contiguous())
    of_rows, of_weights = quantise_rows(left, ends, ROWWISE), quantise_reference(right, ROWWISE)
    last = aligned[-1] * ROWWISE.alignment
    return {
        "fp8": lambda: scaled_product(of_rows, of_weights, ends, left.dtype)[:last],
        "all": lambda: scaled_product(
            quantise_rows(left, ends, ROWWISE), of_weights, ends, left.dtype
        )[:last],
        "grouped_mm": lambda: grouped_mm(left, right.mT, offs=ends)[:last],
    }


def measure(direction: str, shape: Shape) -> Figures:
    """TFLOP/s, and the error of the format, which says that the operands are read as written.

    Raises:
        SkippedError: the GPU has no such product.
        ValueError: the error is not that of e4m3.
    """
    if on_gpu() and torch.cuda.get_device_capability() != (9, 0):
        raise SkippedError("needs compute capability 9.0")
    rows, *_, taken, made = shape
    functions = contenders(direction, shape)
    ours, theirs = (functions[name]().float() for name in ("fp8", "grouped_mm"))
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not ERROR[0] <= error <= ERROR[1]:
        raise ValueError(f"the error is {error:.1%}, not {ERROR[0]:.1%} to {ERROR[1]:.1%}")
    times = device_microseconds(functions, rounds=12)
    return {
        "fp8_us": times["fp8"],
        "quantise_us": times["all"] - times["fp8"],
        **{f"{n}_tflops": 2 * rows * taken * made / times[n] / 1e6 for n in ("fp8", "grouped_mm")},
        "of_grouped_mm": times["grouped_mm"] / times["fp8"],
        "all_of_grouped_mm": times["grouped_mm"] / times["all"],
        "error": error,
    }


def cases(dry: bool) -> list[Case]:
    """Both projections in each direction."""

    def alone(direction: str, shape: Shape) -> Figures:
        release_memory()
        return measure(direction, shape)

    return [
        Case(PART, f"{model}, {direction}", partial(alone, direction, shape), TARGETS)
        for model, shape in (DRY_SHAPES if dry else SHAPES).items()
        for direction in DIRECTIONS
    ]
