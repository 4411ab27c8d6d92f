"""The Triton planner against the torch reference, bit for bit, in Triton's interpreter."""

from pathlib import Path

import pytest
import torch
from planner_cases import EDGES
from unit_tests.dispatch.test_kernels import run_script

from megatron_echo.planner.balance import plan_clones_reference
from megatron_echo.planner.kernels import plan_tensors
from megatron_echo.planner.price import MAX_ROWS, ClonePrice

SLOW = pytest.mark.slow


def check_same(counts: torch.Tensor, slots: int, *settings: object) -> None:
    expected = plan_clones_reference(counts, slots, *settings)
    for name, tensor in plan_tensors(counts, slots, *settings).items():
        assert torch.equal(tensor, getattr(expected, name)), (name, slots, settings)


@pytest.mark.parametrize(
    "seed", [*range(1, 11), *(pytest.param(seed, marks=SLOW) for seed in (0, *range(11, 240)))]
)
def test_random_inputs(seed: int) -> None:
    """Small shapes, many skews, sizes past 2^31, every option."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices: object) -> object:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    ranks, per_rank = pick(2, 3, 4, 5, 8), pick(1, 2, 3, 4)
    popularity = torch.rand(ranks * per_rank, generator=generator, dtype=torch.float64)
    popularity = popularity ** pick(0, 1, 4, 12)
    largest = pick(3, 500, 2**20, 2**40)
    shape = (ranks, ranks * per_rank)
    counts = torch.rand(shape, generator=generator, dtype=torch.float64) * popularity * largest
    node = pick(None, *(n for n in range(1, ranks + 1) if ranks % n == 0))
    tolerance, minimum = pick(0.0, 0.0, 0.02, 0.5), pick(0, 0, largest // 10, 10**9)
    slots = pick(1, 2, per_rank, per_rank + 1)
    is_within = node is not None and pick(False, True)
    rows = pick(0, 1, largest // 50, largest)
    price = pick(None, ClonePrice(min(rows, MAX_ROWS), min(4 * rows, MAX_ROWS)))
    check_same(counts.long(), slots, tolerance, minimum, node, is_within, price)


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_edges(name: str, slots: int) -> None:
    counts = EDGES[name].long()
    ranks, experts = counts.shape
    if ranks > 1 and experts % ranks == 0:
        check_same(counts, slots, 0.0, 0, None)


@pytest.mark.parametrize(
    ("ranks", "experts", "slots"),
    [
        (16, 64, 4),
        pytest.param(16, 64, 1, marks=SLOW),
        pytest.param(64, 256, 4, marks=SLOW),
        pytest.param(64, 256, 1, marks=SLOW),
        pytest.param(40, 240, 6, marks=SLOW),
    ],
)
def test_large_shapes(ranks: int, experts: int, slots: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    popularity = torch.rand(experts, generator=generator) ** 6
    counts = (torch.rand(ranks, experts, generator=generator) * popularity * 4096).long()
    check_same(counts, slots, 0.0, 0, 8)


COMPILE = """
import re
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_echo.planner import kernels

def barriers_of_a_step(ptx):
    "The most in a loop that contains no other."
    lines, labels, loops = ptx.splitlines(), {{}}, []
    for number, line in enumerate(lines):
        if label := re.match(r"([$]L__BB[0-9_]+):", line):
            labels[label[1]] = number
        jump = re.search(r"bra.*([$]L__BB[0-9_]+)", line)
        if jump and jump[1] in labels:
            loops.append((labels[jump[1]], number))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max("\\n".join(lines[start:end]).count("bar.sync") for start, end in inner)


types = {{"scale": "i64", **dict.fromkeys(
    ("minimum", "node_size", "price_inside", "price_across"), "i32"
)}}
for shape in {shapes}:
    fixed = kernels.constants(*shape)
    for kernel in (kernels._plan_kernel, kernels._best_kernel)[: 2 if fixed["TRIALS"] > 1 else 1]:
        constants = {{name: value for name, value in fixed.items() if name in kernel.arg_names}}
        signature = {{name: types.get(name, "*i64") for name in kernel.arg_names}}
        signature |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        target = GPUTarget("cuda", 90, 32)
        compiled = triton.compile(source, target=target, options={{"num_warps": 8}})
        print("SHARED", compiled.metadata.shared, barriers_of_a_step(compiled.asm["ptx"]))
"""


@pytest.mark.parametrize(
    "shapes",
    [
        pytest.param([(64, 256, 1, False, False)], marks=SLOW),
        [(8, 64, 8, True, False, True, 4)],
        pytest.param(
            [
                (64, 256, 4, False, False),
                (256, 1024, 3, False, True),
                (256, 1024, 3, True, True, True),
            ],
            marks=SLOW,
        ),
    ],
    ids=["greedy", "with a price, within nodes", "exact, and large"],
)
def test_it_compiles_for_a_gpu_that_is_not_here(shapes: list[tuple], tmp_path: Path) -> None:
    """For an H100, within its 227 KiB of shared memory: both algorithms, small and large.

    A step of the greedy had 31 barriers.
    """
    lines = run_script(COMPILE.format(shapes=shapes), tmp_path).splitlines()
    figures = [line.split()[1:] for line in lines if "SHARED" in line]
    assert len(figures) >= len(shapes)
    assert max(int(shared) for shared, _ in figures) <= 227 * 1024
    assert max(int(barriers) for _, barriers in figures[:1]) <= 14
