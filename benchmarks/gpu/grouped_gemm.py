"""Rate of the grouped products beside torch's ``grouped_mm`` and a plain product.

bf16, a rank's share of a model's experts and some clones. The kernels read home weights and slots
where they lie; ``grouped_mm`` gets them in one stack, and the copy that makes it is timed apart.
TFLOP/s are those of the rows that are used: a quarter of the buffer is not. ``mm`` is one product
of as many rows with one matrix, what the chip can do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from record import Figures, Recorder, SkippedError
from timing import device, device_microseconds, on_gpu, release_memory
from torch import Tensor
from torch.nn.functional import grouped_mm

from megatron_echo.experts.pointer_gemm import pointer_outer, pointer_product

Shape = tuple[int, int, int, int, int]
SHAPES: dict[str, Shape] = {  # rows in use, home experts, slots, width of the input, of the output
    "DeepSeek-V3 fc1": (32768, 4, 4, 7168, 4096),
    "Qwen3-30B-A3B fc1": (65536, 16, 16, 2048, 1536),
    "many small groups": (8192, 128, 0, 2048, 1536),
    "DeepSeek-V3 fc2": (32768, 4, 4, 2048, 7168),
    "Qwen3-30B-A3B fc2": (65536, 16, 16, 768, 2048),
    "Mixtral-8x7B fc1": (16384, 1, 1, 4096, 28672),
    "Mixtral-8x7B fc2": (16384, 1, 1, 14336, 4096),
}
DRY_SHAPES: dict[str, Shape] = {"dry run": (48, 3, 2, 32, 16)}
DIRECTIONS = ("forward", "dgrad", "wgrad")
TARGETS = ("of_grouped_mm >= 0.9",)
LIMIT = 2**-6  # bf16 results of sums in another order, over the largest
SKEW = 1.0  # group g has rows in proportion to (g + 1) ** -SKEW; the last slot has none
TILES = [  # rows, columns, terms, warps, stages
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
    (256, 128, 64, 8, 3),
    (64, 256, 64, 4, 4),
]


def skewed_ends(rows: int, groups: int, slots: int) -> list[int]:
    """Ends of groups whose sizes fall; with slots, the last group is empty."""
    used = groups - (slots > 0)
    sizes = torch.arange(1, used + 1, dtype=torch.float64) ** -SKEW
    ends = (sizes.cumsum(0) / sizes.sum() * rows).round().int().tolist()
    return ends + [rows] * (groups - used)


def contenders(direction: str, shape: Shape) -> dict[str, Callable[[], Tensor]]:
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
    ends = torch.tensor(skewed_ends(rows, groups, slots), dtype=torch.int32, device=device())
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


@contextmanager
def tile(sizes: tuple[int, int, int, int, int]) -> Iterator[None]:
    """The kernels with this tile."""
    from megatron_echo.experts import kernels

    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    blocks = {**dict(zip(names, sizes, strict=False)), "SUPER": 8}
    options = {"num_warps": sizes[3], "num_stages": sizes[4]}
    with mock.patch.object(kernels, "_tile", return_value=(blocks, options)):
        yield


def measure_tile(sizes: tuple[int, int, int, int, int], shape: Shape) -> Figures:
    """TFLOP/s of each direction with one tile."""
    if not on_gpu():
        raise SkippedError("needs a GPU")
    rows, *_, taken, made = shape
    kernels = {direction: contenders(direction, shape)["kernel"] for direction in DIRECTIONS}
    with tile(sizes):
        times = device_microseconds(kernels, rounds=10)
    return {f"{n}_tflops": 2 * rows * taken * made / value / 1e6 for n, value in times.items()}


def run(recorder: Recorder, dry: bool) -> None:
    """Each shape in each direction."""
    for model, shape in (DRY_SHAPES if dry else SHAPES).items():
        for direction in DIRECTIONS:
            function = partial(measure, direction, shape)
            recorder.measure(f"{model}, {direction}", function, TARGETS)
            release_memory()


def run_tiles(recorder: Recorder, dry: bool) -> None:
    """Other tiles than those that the kernels choose."""
    for model, shape in (DRY_SHAPES if dry else SHAPES).items():
        for sizes in TILES:
            name = f"{model}, {'x'.join(map(str, sizes))}"
            recorder.measure(name, partial(measure_tile, sizes, shape))
            release_memory()
