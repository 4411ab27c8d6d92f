"""The Triton copies to and from peers against the torch references, in Triton's interpreter.

Ranks are pretended: ordinary tensors of this process, at addresses of their own.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import triton_interpreter
from torch import Tensor
from unit_tests.dispatch.test_kernels import DTYPES, check_same_bits, run_script

from megatron_echo.dispatch.kernels import sum_constants
from megatron_echo.dispatch.transports.kernels import matrix_constants
from megatron_echo.dispatch.transports.peer_memory import PeerRows

RANK = 1


@pytest.fixture(autouse=True)
def mended_interpreter() -> Iterator[None]:
    with triton_interpreter.mended():
        yield


def pretended(ranks: int, rows: int, columns: int, dtype: torch.dtype) -> tuple[PeerRows, ...]:
    """The same rows twice: for the references, and for the kernels with each rank elsewhere."""
    generator = torch.Generator().manual_seed(rows)
    everyone = torch.randn(ranks * (rows + 1), columns, generator=generator).to(dtype)
    parts = [part.clone() for part in everyone.chunk(ranks)]
    for part in (parts[RANK], everyone.chunk(ranks)[RANK]):
        part[-1] = 0
    first = parts[RANK].data_ptr()
    offsets = torch.tensor([(part.data_ptr() - first) // dtype.itemsize for part in parts])
    own = everyone.chunk(ranks)[RANK]
    return PeerRows(own, everyone), PeerRows(parts[RANK], None, offsets), *parts


def places_of(shape: tuple[int, int], ranks: int, rows: int, none: float) -> Tensor:
    """Places that differ, and this rank's last row for some."""
    generator = torch.Generator().manual_seed(shape[1])
    order = torch.randperm(ranks * rows, generator=generator)[: shape[0] * shape[1]]
    place = (order // rows * (rows + 1) + order % rows).view(shape)
    without = torch.rand(shape, generator=generator) < none
    return torch.where(without, RANK * (rows + 1) + rows, place).int()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "copies", "columns"),
    [(0, 1, 7), (1, 19, 7), (60, 1, 1), (9, 2, 130), (5, 8, 100), (2, 3, 1030)],
)
def test_as_the_references(name: str, tokens: int, copies: int, columns: int) -> None:
    reference, peers, *parts = pretended(3, 20, columns, DTYPES[name])
    for none in (0.0, 0.4, 1.0):
        places = places_of((tokens, copies), 3, 20, none)
        check_same_bits(peers.pull(places), reference.pull(places))
        into = torch.empty(tokens, columns, dtype=DTYPES[name])
        assert peers.pull(places[:, :1], into) is into
        check_same_bits(into, reference.pull(places[:, :1]).to(into.dtype))
        values = torch.randn(tokens, columns).to(DTYPES[name])
        peers.put(values, places)
        reference.put(values, places)
        for number, (part, expected) in enumerate(zip(parts, reference.everyone.chunk(3))):
            check_same_bits(part[:-1], expected[:-1])
            if number != RANK or none == 0:
                check_same_bits(part[-1], expected[-1])
        reference.own[-1] = 0


def test_counts_and_values_that_are_not_contiguous() -> None:
    """Integers are pushed too; what stands for none is not read, even if it is NaN."""
    _, peers, *parts = pretended(2, 3, 4, torch.int64)
    peers.put(torch.arange(8).view(4, 2).t(), torch.tensor([[0, 4], [2, 7]], dtype=torch.int32))
    assert parts[0][0].tolist() == parts[1][0].tolist() == [0, 2, 4, 6]
    assert parts[0][2].tolist() == [1, 3, 5, 7]
    _, peers, *parts = pretended(2, 3, 4, torch.float32)
    parts[RANK][-1] = float("nan")
    places = torch.tensor([[7, 7], [7, 0]], dtype=torch.int32)
    assert torch.equal(peers.pull(places), torch.stack((torch.zeros(4), parts[0][0])))


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("width", [5, 1400])
def test_matrices_as_the_references(name: str, width: int) -> None:
    """Pushed to slots and added from slots; what is not named is neither written nor read."""
    ranks, slots, out, dtype = 3, 2, 4, DTYPES[name]
    generator = torch.Generator().manual_seed(width)
    reference, peers, *parts = pretended(ranks, slots * out, width, dtype)
    matrices = torch.randn(4, out, width, generator=generator).to(dtype)
    source = torch.tensor([[2, -1], [-1, 0], [-1, -1]], dtype=torch.int32)
    before = [part.clone() for part in parts]
    for memory in (reference, peers):
        memory.put_matrices(matrices, source)
    slot = [[part[:-1].view(slots, out, width) for part in of] for of in (parts, before)]
    for number, (part, expected) in enumerate(zip(parts, reference.everyone.chunk(ranks))):
        check_same_bits(part[:-1], expected[:-1])
        check_same_bits(slot[0][number][1 - number % 2], slot[1][number][1 - number % 2])
    assert torch.equal(slot[0][0][0], matrices[2])
    assert torch.equal(slot[0][1][1], matrices[0])

    home = torch.randn(3, out, width, generator=generator).to(dtype)
    home[1] = float("nan")  # nothing is added to it
    expected = home.clone()
    places = torch.tensor([[0, 3, -1], [-1, -1, -1], [-1, -1, 5]], dtype=torch.int32)
    reference.add_matrices(places, slots, expected)
    peers.add_matrices(places, slots, home)
    check_same_bits(home[::2], expected[::2])
    assert home[1].isnan().all()


def test_only_slots_in_use_are_laid_open() -> None:
    _, peers, *parts = pretended(2, 6, 5, torch.float32)
    before = parts[RANK].clone()
    peers.offer_matrices(torch.ones(3, 2, 5), torch.tensor([-1, 1, -1], dtype=torch.int32))
    assert (parts[RANK][2:4] == 1).all()
    check_same_bits(parts[RANK][:2], before[:2])
    check_same_bits(parts[RANK][4:], before[4:])


def test_sums_of_matrices_are_rounded_once() -> None:
    """256 + 1 + 1 in bf16."""
    _, peers, *parts = pretended(2, 1, 8, torch.bfloat16)
    for part in parts:
        part.fill_(1)
    home = torch.full((1, 1, 8), 256, dtype=torch.bfloat16)
    peers.add_matrices(torch.tensor([[0, 1]], dtype=torch.int32), 1, home)
    assert (home == 258).all()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_echo.dispatch.transports import kernels

for name, stored, summed, constants in {cases}:
    kernel = getattr(kernels, name)
    types = {{"matrices": "*" + stored, "home": "*" + summed, "source": "*i32",
             "values": "*" + stored, "own": "*" + stored, "output": "*" + summed,
             "offsets": "*i64", "places": "*i32", "tokens": "i32", "stride": "i32"}}
    signature = {{argument: types.get(argument, "constexpr") for argument in kernel.arg_names}}
    pointers = [n for n, word in enumerate(signature.values()) if word.startswith("*")]
    divisible = {{(n,): [["tt.divisibility", 16]] for n in pointers}}
    source = ASTSource(kernel, signature, constants, divisible)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
    ptx = compiled.asm["ptx"]
    widths = ("v4.b32", "v2.b64")
    print("COMPILED", *(sum(ptx.count(f"{{verb}}.global.{{width}}") for width in widths)
                        for verb in ("ld", "st")), compiled.metadata.shared)
"""


@pytest.mark.slow
def test_they_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """For an H100: peers' rows are read and written in 16 bytes, with little shared memory."""
    cases: list[tuple[str, str, str, dict[str, int]]] = []
    for name, columns, terms in (("bf16", 7168, 8), ("fp32", 2048, 1)):
        constants = sum_constants(columns, DTYPES[name].itemsize, terms)
        cases.append(("_put_rows_kernel", name, "fp32", constants))
        cases.append(("_pull_rows_kernel", name, "fp32", constants))
    cases.append(("_put_matrices_kernel", "bf16", "bf16", matrix_constants(4096 * 7168, 2)))
    cases.append(("_add_matrices_kernel", "bf16", "bf16", matrix_constants(4096 * 7168, 2, 8)))
    with_full_rows = len(cases)
    cases.append(("_put_rows_kernel", "i64", "i64", sum_constants(40, 8, 64)))
    cases.append(("_pull_rows_kernel", "fp32", "fp32", sum_constants(1, 4, 1)))
    lines = run_script(COMPILE.format(cases=cases), tmp_path).splitlines()
    figures = [list(map(int, line.split()[1:])) for line in lines if line.startswith("COMPILED")]
    assert len(figures) == len(cases)
    assert all(loads > 0 and stores > 0 for loads, stores, _ in figures[:with_full_rows])
    assert all(shared <= 16 * 1024 for _, _, shared in figures)
