"""The grouped products of two stacks against the references, in Triton's interpreter."""

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton_interpreter
from torch import Tensor
from triton.runtime import interpreter
from unit_tests.dispatch.test_kernels import run_script

from megatron_echo.experts import kernels, pointer_gemm
from megatron_echo.experts.grouped_linear import grouped_outer_reference, grouped_product_reference
from megatron_echo.experts.pointer_gemm import pointer_outer, pointer_product
from megatron_echo.precision import FORMATS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
EPSILON = 2.0**-24


@pytest.fixture(autouse=True)
def mended_interpreter() -> Iterator[None]:
    with triton_interpreter.mended():
        yield


ENDS = {
    "full": [70, 71, 199, 230, 300],
    "tail": [64, 70, 128, 200, 201],
    "empty ones": [0, 0, 130, 130, 290],
    "one group": [0, 0, 0, 300, 300],
    "first group": [300, 300, 300, 300, 300],
    "no rows": [0, 0, 0, 0, 0],
}
ROWS = 300


class Case:
    """Rows of width i, gradients of width o, home weights and slots; NaN behind the last group."""

    def __init__(
        self, dtype: torch.dtype, widths: tuple[int, int], ends: list[int], rows: int = ROWS,
        slots: int = 2, integers: bool = True, seed: int = 0,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            if integers:
                return torch.randint(-3, 4, shape, generator=generator).to(dtype)
            return torch.randn(shape, generator=generator).to(dtype)

        made, taken = widths
        self.rows, self.grad = draw(rows, taken), draw(rows, made)
        self.weights = draw(len(ends), made, taken)
        self.rows[ends[-1] :] = self.grad[ends[-1] :] = float("nan")
        self.home, self.slots = self.weights, None
        if slots:
            self.home, self.slots = self.weights.split((len(ends) - slots, slots))
        self.ends, self.last = torch.tensor(ends, dtype=torch.int32), ends[-1]

    def products(self) -> list[Tensor]:
        """Output and gradient of the rows."""
        stacks = (self.home, self.slots, self.ends)
        output = pointer_product(self.rows, *stacks, transpose=True)
        to_rows = pointer_product(self.grad, *stacks, transpose=False)
        return [output[: self.last], to_rows[: self.last]]

    def outer(self, dtype: torch.dtype) -> Tensor:
        """Gradient of the weights, written over NaN."""
        grads = torch.full_like(self.weights, float("nan"), dtype=dtype)
        parts = grads.split((len(self.home), len(grads) - len(self.home)))
        pointer_outer(
            self.grad, self.rows, self.ends, parts[0], parts[1] if len(parts[1]) else None
        )
        return grads

    def references(self, dtype: torch.dtype, absolute: bool = False) -> list[Tensor]:
        """What the three are, in this dtype; or sums of absolute values."""
        rows, grad, weights = (
            (tensor.abs() if absolute else tensor).to(dtype)
            for tensor in (self.rows, self.grad, self.weights)
        )
        return [
            grouped_product_reference(rows, weights.mT, self.ends)[: self.last],
            grouped_product_reference(grad, weights, self.ends)[: self.last],
            grouped_outer_reference(grad, rows, self.ends),
        ]


def quick_or_slow(widths: tuple[int, int], kind: str, name: str) -> Any:
    """Without the mark: full in either dtype with odd widths, and each other way once."""
    quick = {"full": (33, 7), "tail": (33, 7), "empty ones": (33, 7), "no rows": (72, 64)}
    is_quick = quick.get(kind) == widths and (name == "bf16" or kind == "full")
    marks = [] if is_quick else [pytest.mark.slow]
    return pytest.param(
        widths, kind, name, marks=marks, id=f"{widths[0]}x{widths[1]}-{kind}-{name}"
    )


@pytest.mark.parametrize(
    ("widths", "kind", "name"),
    [quick_or_slow(*case) for case in itertools.product([(72, 64), (33, 7)], ENDS, DTYPES)],
)
def test_exact_sums_are_the_references_bits(widths: tuple[int, int], kind: str, name: str) -> None:
    """Of small integers, in any order; an empty group's gradient is zero."""
    case = Case(DTYPES[name], widths, ENDS[kind])
    expected = case.references(torch.float32)
    for result, reference in zip(case.products(), expected):
        assert result.dtype == case.rows.dtype
        assert torch.equal(result, reference.to(result.dtype))
    assert torch.equal(case.outer(torch.float32), expected[2])
    assert torch.equal(case.outer(case.rows.dtype), expected[2].to(case.rows.dtype))


@pytest.mark.parametrize("widths", [(72, 64), (33, 7)])
def test_exact_sums_in_fp16(widths: tuple[int, int]) -> None:
    """Small ones: fp16 ends at 65,504."""
    case = Case(torch.float16, widths, ENDS["tail"])
    results = [*case.products(), case.outer(torch.float32)]
    for result, reference in zip(results, case.references(torch.float32)):
        assert torch.equal(result, reference.to(result.dtype))


def test_small_tiles_where_shared_memory_is_small() -> None:
    """As many results as with large ones: the grid follows the tiles."""
    case = Case(torch.bfloat16, (260, 200), [129, 140], slots=1)
    with mock.patch.object(kernels, "_shared_memory", return_value=99 * 1024):
        results = [*case.products(), case.outer(torch.float32)]
    for result, reference in zip(results, case.references(torch.float32)):
        assert torch.equal(result, reference.to(result.dtype))


@pytest.mark.parametrize(("setting", "precision"), [("highest", "ieee"), ("high", "tf32")])
def test_fp32_is_rounded_where_torch_rounds_it(setting: str, precision: str) -> None:
    torch.set_float32_matmul_precision(setting)
    try:
        constants, _ = kernels.outer_constants(1, (8, 8), 4)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert constants["PRECISION"] == precision


def random_case(seed: int, dtype: torch.dtype) -> Case:
    draw = np.random.default_rng(seed)
    groups = int(draw.integers(1, 9))
    rows = int(draw.choice([0, 1, 63, 64, 65, 257, 400]))
    last = int(draw.integers(rows + 1))
    ends = sorted(draw.integers(last + 1, size=groups - 1).tolist()) + [last]
    widths = (int(draw.choice([1, 8, 40, 65])), int(draw.choice([1, 16, 50])))
    slots = int(draw.integers(groups))
    return Case(dtype, widths, ends, rows, slots, integers=False, seed=seed)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize(
    "seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))]
)
def test_random_values_are_rounded_once(seed: int, name: str) -> None:
    """Within half a unit in the last place and the error bound of a sum in fp32."""
    case = random_case(seed, DTYPES[name])
    unit = torch.finfo(case.rows.dtype).eps
    results = [*case.products(), case.outer(case.rows.dtype)]
    exact, size = case.references(torch.float64), case.references(torch.float64, absolute=True)
    terms = (case.rows.shape[1], case.grad.shape[1], max(case.last, 1))
    for result, value, magnitude, count in zip(results, exact, size, terms):
        sum_error = count * EPSILON * magnitude
        allowed = sum_error + unit / 2 * (value.abs() + sum_error)
        assert ((result.double() - value).abs() <= allowed).all()


def test_the_gradients_of_clones_are_not_rounded() -> None:
    """257 ones are 257 in fp32, and 256 or 258 in bf16: each stack has its dtype."""
    ones, ends = torch.ones(514, 8, dtype=torch.bfloat16), torch.tensor([257, 514]).int()
    home, slots = torch.empty(1, 8, 8, dtype=torch.bfloat16), torch.empty(1, 8, 8)
    pointer_outer(ones, ones, ends, home, slots)
    assert (slots == 257).all()
    assert (home == 256).all()


@pytest.mark.parametrize("name", DTYPES)
def test_nan_weights_stay_in_their_group(name: str) -> None:
    case = Case(DTYPES[name], (72, 64), ENDS["tail"])
    expected = case.products()
    case.home[1] = case.slots[0] = float("nan")
    for result, before in zip(case.products(), expected):
        for rows in (slice(0, 64), slice(70, 128), slice(200, 201)):
            assert torch.equal(result[rows], before[rows])
        assert result[64:70].isnan().all()
        assert result[128:200].isnan().all()


def test_the_kernels_get_the_stacks_themselves() -> None:
    """No copy of weights is made, and none of rows."""
    case = Case(torch.bfloat16, (72, 64), ENDS["tail"])
    with mock.patch.object(kernels, "_product_kernel") as kernel:
        case.products()
    for call, rows in zip(kernel.__getitem__.return_value.call_args_list, (case.rows, case.grad)):
        given = [tensor.data_ptr() for tensor in call.args[:4]]
        assert given == [t.data_ptr() for t in (rows, case.home, case.slots, case.ends)]


@pytest.mark.parametrize("last", [0, 1, 10, 70, 640])
def test_the_work_is_that_of_the_rows(last: int) -> None:
    """Products of tiles in a buffer of 640 rows, of which some are used."""
    case = Case(torch.float32, (72, 40), [last, last], rows=640, slots=1)
    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", autospec=True) as dot:
        dot.side_effect = triton_interpreter.dot
        output, _ = case.products()
        row_tiles = -(-last // 64)
        assert dot.call_count == row_tiles * (2 * 2 + 1 * 3)  # tiles of 64 columns, 32 terms
        dot.reset_mock()
        case.outer(torch.float32)
        assert dot.call_count == 2 * 1 * -(-last // 32)
    assert len(output) == last


@pytest.fixture
def nan_for_uninitialised() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_rows_behind_the_last_group_are_not_written(nan_for_uninitialised: None) -> None:
    case = Case(torch.float32, (40, 24), ENDS["tail"])
    output = pointer_product(case.grad, case.home, case.slots, case.ends, transpose=False)
    assert output[case.last :].isnan().all()
    assert output[: case.last].isfinite().all()


def test_ends_behind_the_buffer_are_its_end() -> None:
    memory = torch.ones(128, 16)
    memory[100:] = float("nan")
    weights, ends = torch.ones(2, 8, 16), torch.tensor([60, 128], dtype=torch.int32)
    output = pointer_product(memory[:100], weights, None, ends, transpose=True)
    assert (output == 16).all()
    grads = torch.empty(2, 8, 16)
    pointer_outer(torch.ones(100, 8), memory[:100], ends, grads, None)
    assert grads[:, 0, 0].tolist() == [60, 40]


def test_several_tiles_of_columns() -> None:
    """Of the largest tile, 128 by 256, with a long sum."""
    case = Case(torch.bfloat16, (260, 200), [129, 140], slots=1)
    for result, expected in zip(case.products(), case.references(torch.float32)):
        assert torch.equal(result, expected.to(result.dtype))
    assert torch.equal(case.outer(torch.float32), case.references(torch.float32)[2])


def test_many_groups() -> None:
    """Most of them smaller than a tile, some empty."""
    counts = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(0))
    case = Case(torch.bfloat16, (8, 16), counts.cumsum(0).tolist(), rows=200, slots=12)
    for result, expected in zip(case.products(), case.references(torch.float32)):
        assert torch.equal(result, expected.to(result.dtype))


@pytest.mark.parametrize("name", [*DTYPES, "fp64"])
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in fp64 with one."""
    dtype = DTYPES.get(name, torch.float64)
    if name != "fp64":
        monkeypatch.setattr(pointer_gemm, "runs_triton", lambda tensor: False)
    monkeypatch.setitem(sys.modules, "megatron_echo.experts.kernels", None)
    case = Case(dtype, (72, 64), ENDS["tail"])
    results = [*case.products(), case.outer(torch.float64)]
    for result, expected in zip(results, case.references(torch.float64)):
        assert torch.equal(result.double(), expected.to(result.dtype).double())


STACK = torch.zeros(2, 3, 4)
THREE = torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("home", "slots", "ends", "message"),
    [
        (STACK.transpose(1, 2).contiguous(), STACK[:1], THREE, "width"),
        (STACK, STACK[:1], THREE[:2], "ends"),
        (STACK, None, THREE, "ends"),
        (STACK, STACK[:1], THREE.long(), "ends"),
        (STACK, STACK[:1, :2], THREE, "clones"),
        (STACK.mT.contiguous().mT, STACK[:1], THREE, "contiguous"),
        (STACK, STACK[:1].mT.contiguous().mT, THREE, "contiguous"),
        (STACK.half(), STACK[:1], THREE, "dtype"),
    ],
)
def test_what_does_not_fit(home: Tensor, slots: Tensor, ends: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pointer_product(torch.zeros(5, 4), home, slots, ends, transpose=True)
    if message != "dtype":
        with pytest.raises(ValueError, match=message):
            pointer_outer(torch.zeros(5, 3), torch.zeros(5, 4), ends, home, slots)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_echo.experts import kernels

for name, dtype, stacks, (constants, options) in {cases}:
    kernel = getattr(kernels, name)
    types = dict.fromkeys(kernel.arg_names, "*" + dtype)
    types |= {{"home": "*" + stacks[0], "slots": "*" + stacks[1]}}
    types |= {{"ends": "*i32", "num_rows": "i32"}}
    if "left_scales" in kernel.arg_names and dtype != "fp8e4nv":
        constants |= {{"left_scales": None, "right_scales": None}}
    of_scales = "*u8" if constants.get("IN_BLOCKS") else "*fp32"
    types |= {{"left_scales": of_scales, "right_scales": of_scales}}
    types |= {{"output": "*bf16"}} if dtype == "fp8e4nv" else {{}}
    types |= dict.fromkeys(constants, "constexpr")
    types = {{name: types[name] for name in kernel.arg_names}}
    aligned = {{(number,): [["tt.divisibility", 16]] for number in range(5)}}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx = compiled.asm["ptx"]
    copies = ptx.count("cp.async.cg.shared.global")
    words = "wgmma.mma_async", "tf32", "ld.local", "ld.global.b8"
    print("COMPILED", compiled.metadata.shared, copies, *map(ptx.count, words))
"""
SLOW = pytest.mark.slow
SHARED_MEMORY = 227 * 1024  # bytes that a block can have on sm_90


@pytest.mark.parametrize(
    "precision",
    ["fp8-rowwise", *(pytest.param(p, marks=SLOW) for p in ("mxfp8", "fp8-blockwise", "others"))],
)
def test_they_compile_for_a_gpu_that_is_not_here(precision: str, tmp_path: Path) -> None:
    """For an H100: warp-group products, copies of 16 bytes into shared memory, no tf32."""
    cases = others() if precision == "others" else in_fp8(precision)
    lines = run_script(COMPILE.format(cases=cases), tmp_path).splitlines()
    figures = [list(map(int, line.split()[1:])) for line in lines if line.startswith("COMPILED")]
    assert len(figures) == len(cases)
    for (*kernel, _, (constants, _)), (shared, copies, *counts) in zip(cases, figures):
        warp_group, tf32, spilled, single_bytes = counts
        name, kernel = kernel[1], tuple(kernel)
        assert shared <= SHARED_MEMORY
        # Rows of 2,002 bytes cannot be copied by 16.
        assert (copies > 0) == (name != "fp16")
        assert (warp_group > 0) == (name != "fp32")
        assert tf32 == spilled == 0
        assert single_bytes == 0 or constants.get("IN_BLOCKS")  # scales of blocks are bytes


def in_fp8(precision: str) -> list[tuple]:
    form, widths = FORMATS[precision], (7168, 4096)
    product = kernels.product_constants(40960, 32, 36, widths, 1, is_transposed=True, form=form)
    outer = kernels.outer_constants(32, widths[::-1], 1, form=form)
    return [
        ("_product_kernel", "fp8e4nv", ("fp8e4nv", "fp8e4nv"), product),
        ("_outer_kernel", "fp8e4nv", ("bf16", "bf16"), outer),
    ]


def others() -> list[tuple]:
    cases = []
    for name, size in (("bf16", 2), ("fp32", 4)):
        product = (40960, 32, 36, (7168, 4096), size)
        for is_transposed in (True, False)[: 4 // size]:
            constants = kernels.product_constants(*product, is_transposed=is_transposed)
            cases.append(("_product_kernel", name, (name, name), constants))
        constants = kernels.outer_constants(32, (4096, 7168), size)
        cases.append(("_outer_kernel", name, (name, "fp32"), constants))
    small = kernels.product_constants(1000, 32, 36, (2048, 1536), 2, is_transposed=True)
    cases.append(("_product_kernel", "bf16", ("bf16", "bf16"), small))
    odd = kernels.product_constants(1000, 32, 36, (1001, 333), 2, is_transposed=True)
    cases.append(("_product_kernel", "fp16", ("fp16", "fp16"), odd))
    return cases
