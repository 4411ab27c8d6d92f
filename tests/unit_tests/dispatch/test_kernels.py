"""The Triton copies against the torch references, bit for bit, in Triton's interpreter."""

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import launch
import pytest
import torch
import triton_interpreter
from torch import Tensor
from triton.runtime import interpreter

from megatron_echo.dispatch import permute
from megatron_echo.dispatch.kernels import sum_constants, sum_rows, take_constants, take_rows
from megatron_echo.dispatch.layout import build_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPES["fp64"] = torch.float64
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same_bits(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype
    integers = INTEGERS[result.element_size()]
    assert torch.equal(result.contiguous().view(integers), expected.contiguous().view(integers))


class Draw:
    """Random inputs: many magnitudes, signed zeros, rows of NaN that no index names."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def pick(self, *choices):
        return choices[int(torch.randint(len(choices), (), generator=self._generator))]

    def index(self, shape: tuple[int, ...], rows: int) -> Tensor:
        index = torch.randint(rows + 1, shape, generator=self._generator, dtype=torch.int32)
        none = torch.rand(shape, generator=self._generator) < self.pick(0.0, 0.3, 0.9, 1.0)
        return torch.where(none, rows, index)

    def source(self, rows: int, columns: int, dtype: torch.dtype, index: Tensor) -> Tensor:
        power = torch.randint(-4, 5, (rows, columns), generator=self._generator)
        values = torch.randn(rows, columns, generator=self._generator, dtype=torch.float64)
        values *= 10.0**power
        special = torch.randint(12, (rows, columns), generator=self._generator)
        # The interpreter, not the GPU, gets bf16's subnormals wrong: tests/gpu has those.
        tiny = torch.finfo(dtype).smallest_normal / (1 if dtype == torch.bfloat16 else 8)
        for number, value in enumerate((-0.0, 0.0, float("inf"), tiny, -tiny)):
            values[special == number] = value
        named = torch.zeros(rows + 1, dtype=torch.bool).index_fill_(0, index.flatten().long(), True)
        values[~named[:rows]] = float("nan")
        return values.to(dtype)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    "seed", [*range(15), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(15, 40))]
)
def test_random_inputs(seed: int, name: str) -> None:
    draw, dtype = Draw(seed), DTYPES[name]
    columns = draw.pick(1, 1, 2, 7, 8, 64, 100, 130, 1030)
    most = 600 if columns == 1 else 40
    rows = draw.pick(0, 1, 5, 16, most)
    index = draw.index((draw.pick(0, 1, 9, most),), rows)
    source = draw.source(rows, columns, dtype, index)
    check_same_bits(take_rows(source, index), permute.take_rows_reference(source, index))

    index = draw.index((draw.pick(0, 1, 9, most), draw.pick(1, 2, 3, 4, 5, 6, 7, 8, 19)), rows)
    source = draw.source(rows, columns, dtype, index)
    result = sum_rows(source, index)
    check_same_bits(result, permute.sum_rows_reference(source, index))
    assert not result.isnan().any()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("terms", [*range(1, 9), 16, 17, 25, 64])
def test_every_number_of_terms(name: str, terms: int) -> None:
    """The order of the sum shows: each term is a different power of ten."""
    draw = Draw(terms)
    index = draw.index((7, terms), 30)
    source = draw.source(30, 33, DTYPES[name], index)
    check_same_bits(sum_rows(source, index), permute.sum_rows_reference(source, index))


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_sums_are_rounded_once_to_what_is_asked_for(name: str) -> None:
    """256 + 1 + 1 + ... in bf16, 2048 in fp16: nothing is left of the ones if each is rounded."""
    source = torch.ones(9, 40, dtype=DTYPES[name])
    source[0] = first = 256 if name == "bf16" else 2048
    index = torch.arange(9, dtype=torch.int32)[None]
    with triton_interpreter.mended():
        into = source.new_empty(1, 40)
        result = sum_rows(source, index, into)
    assert result is into
    check_same_bits(result, permute.sum_rows_reference(source, index).to(DTYPES[name]))
    assert (result == first + 8).all()


@pytest.mark.parametrize("name", DTYPES)
def test_the_signs_of_zeros(name: str) -> None:
    """-0 alone stays -0; -0 and nothing is +0; nothing at all is +0."""
    source = torch.full((2, 3), -0.0, dtype=DTYPES[name])
    index = torch.tensor([[0, 1], [0, 2], [2, 0], [2, 2]], dtype=torch.int32)
    result = sum_rows(source, index)
    assert torch.signbit(result).all(1).tolist() == [True, False, False, False]
    check_same_bits(result, permute.sum_rows_reference(source, index))
    check_same_bits(take_rows(source, index[3]), source.new_zeros(2, 3))


@pytest.mark.parametrize("name", DTYPES)
def test_neighbours_of_the_source_are_not_read(name: str) -> None:
    """An index of ``len(source)`` points at memory that is there here, and NaN."""
    memory = torch.full((6, 5), float("nan"), dtype=DTYPES[name])
    source = memory[1:4]
    source.fill_(2.0)
    index = torch.tensor([3, 0, 3, 2], dtype=torch.int32)
    assert take_rows(source, index)[:, 0].tolist() == [0, 2, 0, 2]
    assert sum_rows(source, index.view(2, 2))[:, 4].tolist() == [2, 2]
    assert sum_rows(source, index[:3].view(3, 1)).isfinite().all()


@pytest.fixture
def nan_for_uninitialised() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("used", [0, 1, 31, 32, 33, 100, 200])
def test_rows_behind_those_in_use_are_not_written(
    name: str, used: int, nan_for_uninitialised: None
) -> None:
    """Also: no program but those of the rows in use stores anything."""
    draw = Draw(used)
    index = draw.index((100,), 9)
    source = draw.source(9, 300, DTYPES[name], index)
    constants = take_constants(300, source.element_size(), True)
    programs = -(-min(used, 100) // constants["ROWS"]) * -(-300 // constants["BLOCK"])
    store = interpreter.InterpreterBuilder.create_masked_store
    with mock.patch.object(
        interpreter.InterpreterBuilder, "create_masked_store", autospec=True, side_effect=store
    ) as stores:
        result = take_rows(source, index, torch.tensor([used], dtype=torch.int32))
    assert stores.call_count == programs
    check_same_bits(result[:used], permute.take_rows_reference(source, index)[:used])
    assert result[used:].isnan().all()


def test_inputs_need_not_be_contiguous() -> None:
    draw = Draw(0)
    index = draw.index((4, 12), 9).t()
    source = draw.source(9, 10, torch.float32, index)
    check_same_bits(
        sum_rows(source.t().contiguous().t(), index), permute.sum_rows_reference(source, index)
    )
    expanded = torch.ones(1, 1).expand(9, 10)
    check_same_bits(
        take_rows(expanded, index[:, 1]), permute.take_rows_reference(expanded, index[:, 1])
    )


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_to_launch(shape: tuple[int, int]) -> None:
    source, rows = torch.empty(shape, dtype=torch.bfloat16), shape[0]
    index = torch.full((5, 2), rows, dtype=torch.int32)
    check_same_bits(take_rows(source, index[:, 0]), source.new_zeros(5, shape[1]))
    check_same_bits(sum_rows(source, index), torch.zeros(5, shape[1]))
    assert take_rows(source, index[:0, 0]).shape == (0, shape[1])
    assert sum_rows(torch.ones(3, 2), index[:0]).shape == (0, 2)


@pytest.mark.parametrize("name", DTYPES)
def test_forward_and_backward_through_the_kernels(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients of ``permute`` are those of the references, in the rows in use."""
    dtype, generator = DTYPES[name], torch.Generator().manual_seed(0)
    groups = torch.randint(5, (24, 3), generator=generator)
    rows = build_layout(groups, 4, 72, alignment=4).rows  # the last group is elsewhere
    tokens = torch.randn(24, 20, generator=generator).to(dtype)
    buffer = torch.randn(72, 20, generator=generator).to(dtype)
    pairs = torch.rand(24, 3, generator=generator, dtype=torch.float64)
    results: list[list[Tensor]] = []
    for on_gpu in (False, True):
        monkeypatch.setattr(permute, "on_gpu", lambda tensor, on_gpu=on_gpu: on_gpu)
        results.append([])
        for function, given in (
            (permute.tokens_to_rows, tokens),
            (permute.rows_to_tokens, buffer),
            (permute.pairs_to_rows, pairs),
        ):
            leaf = given.clone().requires_grad_()
            with triton_interpreter.mended():
                output = function(leaf, rows)
                gradient = torch.linspace(-1, 1, output.numel(), dtype=torch.float64)
                output.backward(gradient.view(output.shape).to(output.dtype))
            results[-1] += [output.detach(), leaf.grad]
    assert rows.used is not None
    used = int(rows.used)
    assert used < 72
    for expected, result in zip(*results):
        in_use = slice(used if len(result) == 72 else None)
        check_same_bits(result[in_use], expected[in_use])


def test_the_reference_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_echo.dispatch.kernels", None)
    rows = build_layout(torch.zeros(3, 1, dtype=torch.int64), 1, 4).rows
    assert permute.tokens_to_rows(torch.ones(3, 2), rows).sum() == 6


FAKE_CUDA = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from megatron_echo import cpu_backend
from megatron_echo.dispatch.layout import build_layout
from megatron_echo.dispatch.permute import rows_to_tokens, tokens_to_rows
cpu_backend.disable()
with FakeTensorMode():
    layout = build_layout(torch.empty(6, 2, dtype=torch.int64, device="cuda"), 4, 16)
    tokens = torch.empty(6, 8, dtype=torch.bfloat16, device="cuda")
    buffer = tokens_to_rows(tokens, layout.rows)
    total = rows_to_tokens(buffer, layout.rows)
    print(buffer.device.type, tuple(buffer.shape), total.dtype, tuple(total.shape))
"""


WITH_COMPILER = """
import os
import sys

del os.environ["TRITON_INTERPRET"]
for name in [*sys.modules]:
    if name.startswith("triton") and not name.startswith("triton._C") or name.endswith("kernels"):
        del sys.modules[name]
"""


def run_script(script: str, folder: Path) -> str:
    """What a script prints where Triton compiles: a forked process imports it anew."""
    path = folder / "script.py"
    path.write_text(WITH_COMPILER + script)
    environment = {"TRITON_CACHE_DIR": str(folder / "cache")}
    return launch.run([], script=path, env=environment).check().output


def test_fake_tensors_of_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_CUDA)
    lines = launch.run([], script=script).check().output.splitlines()
    assert lines[-1] == "cuda (16, 8) torch.float32 (6, 8)"


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_echo.dispatch import kernels

for name, stored, summed, constants in {cases}:
    kernel = getattr(kernels, name)
    types = {{"source": "*" + stored, "index": "*i32", "output": "*" + summed, "used": "*i32"}}
    signature = {{argument: types.get(argument, "i32") for argument in kernel.arg_names}}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {{(number,): [["tt.divisibility", 16]] for number in range(3)}}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
    ptx = compiled.asm["ptx"]
    wide = ptx.count("ld.global.v4.b32") + ptx.count("ld.global.v2.b64")
    print("COMPILED", wide, ptx.count(".ftz"), compiled.metadata.shared)
"""


@pytest.mark.slow
def test_they_compile_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    """For an H100: 16-byte loads of full rows, no flush of subnormals, little shared memory."""
    cases: list[tuple[str, str, str, dict[str, int]]] = []
    for name, columns in (("bf16", 7168), ("fp16", 2880), ("fp32", 2048), ("fp64", 4096)):
        size = DTYPES[name].itemsize
        wide = "fp64" if name == "fp64" else "fp32"
        cases.append(("_take_rows_kernel", name, name, take_constants(columns, size, True)))
        for terms in (1, 2, 8, 64):
            constants = sum_constants(columns, size, terms)
            cases.append(("_sum_rows_kernel", name, wide, constants))
    with_full_rows = len(cases)
    cases.append(("_take_rows_kernel", "fp32", "fp32", take_constants(1, 4, False)))
    cases.append(("_sum_rows_kernel", "fp64", "fp64", sum_constants(1, 8, 8)))
    cases.append(("_sum_rows_kernel", "bf16", "fp32", sum_constants(1001, 2, 6)))
    lines = run_script(COMPILE.format(cases=cases), tmp_path).splitlines()
    figures = [list(map(int, line.split()[1:])) for line in lines if line.startswith("COMPILED")]
    assert len(figures) == len(cases)
    assert all(wide_loads > 0 for wide_loads, _, _ in figures[:with_full_rows])
    assert all(flushes == 0 and shared <= 16 * 1024 for _, flushes, shared in figures)
