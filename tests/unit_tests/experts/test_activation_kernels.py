"""The kernels of the weighted activation against fp64, in Triton's interpreter.

An exponential or an error function in fp32 is good to a few units in the last place of its terms,
and what the kernel stores is rounded once more: half a unit of the result's dtype.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from megatron.core.activations import quick_gelu, squared_relu
from torch import Tensor
from triton.runtime import interpreter
from unit_tests.dispatch.test_kernels import run_script

from megatron_echo.experts import activation as module
from megatron_echo.experts import activation_kernels, biases
from megatron_echo.experts.activation import (
    ExpertActivation,
    packed_activation,
    weighted_activation,
)
from megatron_echo.experts.fp8 import pack_rows, unpacked
from megatron_echo.precision import FORMATS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = {
    "swiglu": ExpertActivation(F.silu, True),
    "geglu": ExpertActivation(F.gelu, True),
    "gelu": ExpertActivation(F.gelu),
    "squared relu": ExpertActivation(squared_relu),
    "clamped swiglu": ExpertActivation(F.silu, True, limit=0.7),
    "gpt-oss": ExpertActivation(quick_gelu, True, limit=0.7, offset=1.0),
}
EPSILON = 8 * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def interpreted() -> Iterator[None]:
    with (
        triton_interpreter.mended(),
        mock.patch.object(module, "on_gpu", return_value=True),
        mock.patch.object(biases, "on_gpu", return_value=True),
    ):
        yield


@dataclasses.dataclass
class Case:
    """Inputs of B rows, of which some are in use; the others are NaN."""

    kind: str
    dtype: torch.dtype
    rows: int = 40
    width: int = 24
    last: int = 33
    seed: int = 0
    has_bias: bool = False

    def __post_init__(self) -> None:
        self.activation = KINDS[self.kind]
        self.used = min(self.last, self.rows)
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (self.rows, self.width * (1 + self.activation.is_gated)), (self.rows, self.width)
        hidden, grad = (torch.randn(shape, generator=generator) for shape in shapes)
        hidden *= torch.tensor([0.01, 1.0, 1.0, 5.0])[torch.arange(self.rows)[:, None] % 4]
        self.probs = torch.rand(self.rows, generator=generator)
        self.probs[::5] = 0
        self.hidden, self.grad = hidden.to(self.dtype), grad.to(self.dtype)
        for tensor in (self.hidden, self.grad, self.probs):
            tensor[self.last :] = float("nan")
        self.ends = torch.tensor([0, self.last // 2, self.last], dtype=torch.int32)
        self.bias = torch.randn(3, hidden.shape[1], generator=generator)

    def results(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Output and gradients of hidden and probs, in the rows in use; in the wide dtype exact."""
        hidden, probs, grad, bias = self.hidden, self.probs, self.grad, self.bias
        if dtype is not None:
            hidden, probs, grad, bias = (t.to(dtype) for t in (hidden, probs, grad, bias))
        given = (hidden, probs, *([bias] if self.has_bias else []))
        leaves = [t.detach().clone().requires_grad_() for t in given]
        output = weighted_activation(*leaves[:2], self.ends, self.activation, *leaves[2:])
        with mock.patch.object(biases, "on_gpu", return_value=dtype is None):
            grads = torch.autograd.grad(output, leaves, grad)
        found = [t.detach()[: self.used] for t in (output, *grads[:2])]
        return found + list(grads[2:])

    def sizes(self) -> list[Tensor]:
        """What bounds the terms of the results, in fp64."""
        hidden, probs, grad = (
            t[: self.used].double().abs() for t in (self.hidden, self.probs, self.grad)
        )
        probs = probs[:, None]
        if self.has_bias:
            hidden += biases.bias_of_rows(self.bias, self.groups()).double().abs()
        gate, up = hidden.chunk(2, 1) if self.activation.is_gated else (hidden, torch.tensor(1.0))
        up = up + self.activation.offset
        value = gate * (gate + 1) * up
        to_hidden = [grad * probs * up * (1 + gate)]
        to_hidden += [grad * probs * gate] * self.activation.is_gated
        sizes = [value * probs, torch.cat(to_hidden, 1), (value * grad).sum(1)]
        if self.has_bias:  # sums of gradients that were rounded to the rows' dtype
            of_hidden = sizes[1] * (1 + torch.finfo(self.dtype).eps / EPSILON)
            with mock.patch.object(biases, "on_gpu", return_value=False):
                like = self.bias.double()
                sizes.append(biases.group_sums(of_hidden, self.groups(), self.ends, like))
        return sizes

    def groups(self) -> Tensor:
        return biases.row_groups(self.ends, self.rows)[: self.used]


def check(case: Case) -> None:
    exact = case.results(torch.float64)
    terms = (1, 1, max(case.width / 4, 1), 1)[: len(exact)]
    for result, value, size, count in zip(case.results(), exact, case.sizes(), terms, strict=True):
        smallest = torch.finfo(result.dtype).smallest_normal * torch.finfo(result.dtype).eps
        unit = torch.finfo(result.dtype).eps
        allowed = count * EPSILON * size + unit / 2 * value.abs() + smallest
        assert ((result.double() - value).abs() <= allowed).all()


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_within_half_a_unit_of_the_exact_result(kind: str, name: str) -> None:
    case = Case(kind, DTYPES[name])
    check(case)
    kinds = [(t.dtype, t.shape[1:]) for t in case.results()]
    assert kinds[0] == (case.dtype, (case.width,))
    assert kinds[1] == (case.dtype, case.hidden.shape[1:])
    assert kinds[2] == (torch.float32, ())


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", ["gpt-oss", "gelu"])
def test_with_a_bias(kind: str, name: str) -> None:
    """Of each row's group, before the clamp; its gradient is a sum over the group's rows."""
    for last in (33, 0, 45):
        check(Case(kind, DTYPES[name], last=last, has_bias=True))


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = int(draw.choice([1, 7, 16, 17, 50]))
    check(
        Case(
            kind=draw.choice(list(KINDS)), dtype=DTYPES[draw.choice(list(DTYPES))], rows=rows,
            width=int(draw.choice([1, 3, 8, 255, 256, 257, 520])),
            last=int(draw.integers(rows + 5)), seed=seed, has_bias=bool(seed % 2),
        )
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_not_farther_from_the_exact_result_than_the_reference(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 the reference rounds after each operator: root mean square of the errors."""
    case = Case(kind, torch.bfloat16, rows=64, width=64, last=64)
    exact, kernel = case.results(torch.float64), case.results()
    monkeypatch.setattr(module, "on_gpu", lambda tensor: False)
    for ours, theirs, value in zip(kernel, case.results(), exact, strict=True):
        errors = [(result.double() - value).square().sum().sqrt() for result in (ours, theirs)]
        assert errors[0] <= 1.01 * errors[1]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "dtype", "width", "precision"),
    [
        ("swiglu", "bf16", 272, "fp8-rowwise"), ("gpt-oss", "fp16", 48, "fp8-rowwise"),
        ("squared relu", "fp32", 16, "fp8-rowwise"), ("swiglu", "bf16", 32 * 9, "mxfp8"),
        ("squared relu", "fp32", 32, "mxfp8"), ("gpt-oss", "bf16", 3 * 128, "fp8-blockwise"),
    ],
)  # fmt: skip
def test_rows_in_fp8(kind: str, dtype: str, width: int, precision: str, has_bias: bool) -> None:
    """The bits of the output quantised by row, and its gradients; nothing behind the last end."""
    form = FORMATS[precision]
    case = Case(kind, DTYPES[dtype], width=width, has_bias=has_bias)
    case.hidden[2, 1] = torch.nan
    given = (case.hidden, case.probs, *([case.bias] if has_bias else []))
    leaves = [tensor.clone().requires_grad_() for tensor in given]
    rows = weighted_activation(*leaves[:2], case.ends, case.activation, *leaves[2:])
    stand, packed = packed_activation(*leaves[:2], case.ends, case.activation, form, *leaves[2:])
    assert (stand.shape, stand.dtype) == (rows.shape, rows.dtype)
    both = packed, pack_rows(rows.detach(), form)
    found, expected = (unpacked(each[: case.used], form) for each in both)
    assert torch.equal(found.scales.float(), expected.scales.float())
    bits = [each.values.contiguous().view(torch.uint8) & 0x7F for each in (found, expected)]
    assert torch.equal(*bits)
    assert torch.equal(found.dequantised().nan_to_num(), expected.dequantised().nan_to_num())
    grads = (torch.autograd.grad(each, leaves, case.grad) for each in (stand, rows))
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours[: case.used].nan_to_num(), theirs[: case.used].nan_to_num())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("kind", ["swiglu", "gpt-oss", "squared relu"])
def test_extreme_values(kind: str) -> None:
    """What overflows in exp is 0 or the value itself, not NaN; clamped ones have no gradient."""
    case = Case(kind, torch.float32, rows=4, width=6, last=4)
    case.hidden[0], case.hidden[1], case.hidden[2] = -200.0, 200.0, 0.0
    results = case.results()
    assert all(result.isfinite().all() for result in results)
    check(case)


@pytest.fixture
def nan_for_uninitialised() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("last", [0, 1, 16, 17, 80, 90])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_the_work_is_that_of_the_rows(kind: str, last: int, nan_for_uninitialised: None) -> None:
    """Rows behind the last end are not written, and programs behind it store nothing."""
    case = Case(kind, torch.float32, rows=80, width=260, last=last)
    hidden, probs, grad = (t.nan_to_num(1.0) for t in (case.hidden, case.probs, case.grad))
    settings = case.activation.kernel_settings(hidden, probs)
    assert settings is not None
    store = interpreter.InterpreterBuilder.create_masked_store
    with mock.patch.object(
        interpreter.InterpreterBuilder, "create_masked_store", autospec=True, side_effect=store
    ) as stores:
        output = activation_kernels.forward(hidden, probs, case.ends, settings)
        assert stores.call_count == -(-case.used // 16) * 2
        stores.reset_mock()
        grads = activation_kernels.backward(hidden, probs, case.ends, grad, settings)
        halves = 1 + case.activation.is_gated
        assert stores.call_count == -(-case.used // 8) * (2 * halves + 1)
    for result in (output, *grads):
        assert result[: case.used].isfinite().all()
        assert result[case.used :].isnan().all()


@pytest.mark.parametrize(("kind", "has_bias"), [("swiglu", False), ("gpt-oss", True)])
def test_the_output_again(kind: str, has_bias: bool) -> None:
    """Has the bits of the output, and leaves those of the gradients."""
    case = Case(kind, torch.bfloat16, has_bias=has_bias)
    leaves = [case.hidden, case.probs, *([case.bias] if has_bias else [])]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = weighted_activation(*leaves[:2], case.ends, case.activation, *leaves[2:])
    again = output.grad_fn.output_again(output.grad_fn)
    assert torch.equal(again[: case.used], output[: case.used])
    grads = torch.autograd.grad(output, leaves, case.grad)
    found = [tensor[: case.used] for tensor in grads[:2]] + list(grads[2:])
    for now, before in zip(found, case.results()[1:], strict=True):
        assert torch.equal(now, before)


def test_strides_do_not_matter() -> None:
    case = Case("swiglu", torch.float32)
    expected = case.results()
    case.hidden, case.grad = (t.t().contiguous().t() for t in (case.hidden, case.grad))
    case.probs = case.probs[:, None].expand(-1, 2).contiguous()[:, 0]
    for result, before in zip(case.results(), expected, strict=True):
        assert torch.equal(result, before)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_to_launch(shape: tuple[int, int]) -> None:
    hidden = torch.ones(shape, requires_grad=True)
    probs = torch.ones(shape[0], requires_grad=True)
    output = weighted_activation(hidden, probs, torch.tensor([0]).int(), KINDS["gelu"])
    output.sum().backward()
    assert output.shape == shape
    assert probs.grad is not None
    assert (probs.grad == 0).all()


@pytest.mark.parametrize(
    ("function", "dtype", "probs"),
    [
        (torch.tanh, torch.float32, torch.float32),
        (F.silu, torch.float64, torch.float64),
        (F.silu, torch.bfloat16, torch.float64),
    ],
    ids=["another function", "fp64", "probabilities in fp64"],
)
def test_what_the_kernels_do_not_know(
    function: object, dtype: torch.dtype, probs: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference computes it."""
    monkeypatch.setitem(sys.modules, "megatron_echo.experts.activation_kernels", None)
    hidden = torch.randn(5, 6).to(dtype).requires_grad_()
    weights = torch.rand(5).to(probs).requires_grad_()
    activation = ExpertActivation(function)
    output = weighted_activation(hidden, weights, torch.tensor([5]).int(), activation)
    assert torch.equal(output, (activation(hidden) * weights[:, None]).to(dtype))
    output.sum().backward()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_echo.experts import activation_kernels

for name, dtype, constants in {cases}:
    kernel = getattr(activation_kernels, name)
    types = dict.fromkeys(kernel.arg_names, "*" + dtype)
    types |= {{"probs": "*fp32", "to_probs": "*fp32", "used": "*i32", "num_rows": "i32"}}
    of_scales = "*u8" if constants.get("SCALE_BLOCK") else "*fp32"
    types |= {{"bias": "*fp32", "groups": "*i32", "values": "*fp8e4nv", "scales": of_scales}}
    types |= {{"value_stride": "i32", "scale_stride": "i32"}}
    types |= dict.fromkeys(constants, "constexpr")
    types = {{name: types[name] for name in kernel.arg_names}}
    pointers = [n for n, arg in enumerate(kernel.arg_names) if types[arg][0] == "*"]
    pointers += [n for n, arg in enumerate(kernel.arg_names) if arg == "value_stride"]
    aligned = {{(n,): [["tt.divisibility", 16]] for n in pointers if kernel.arg_names[n] != "used"}}
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={{"num_warps": 4}})
    ptx = compiled.asm["ptx"]
    counts = [len(re.findall(word, ptx)) for word in ({loads!r}, {stores!r}, "ld[.]local")]
    print("COMPILED", *counts)
"""


@pytest.mark.parametrize(
    "kinds",
    [
        [("bf16", "swiglu", 768)],
        pytest.param([("bf16", "swiglu", 2048)], marks=pytest.mark.slow),
        pytest.param([("bf16", "gelu", 768), ("fp32", "gpt-oss", 768)], marks=pytest.mark.slow),
    ],
    ids=["swiglu", "wide swiglu", "others"],
)
def test_they_compile_for_a_gpu_that_is_not_here(kinds: list[tuple], tmp_path: Path) -> None:
    """For an H100: loads and stores of 16 bytes, nothing spilled."""
    cases = []
    for name, kind, width in kinds:
        with mock.patch.object(module, "on_gpu", return_value=True):
            settings = KINDS[kind].kernel_settings(
                torch.empty(1, dtype=DTYPES[name]), torch.empty(1)
            )
        assert settings is not None
        for kernel in ("_forward_kernel", "_backward_kernel", "_packed_kernel"):
            constants = activation_kernels.constants(width, settings, kernel != "_forward_kernel")
            blocks = ({"SCALE_BLOCK": None}, {"SCALE_BLOCK": 32}) if "packed" in kernel else ({},)
            cases += [(kernel, name, constants | block) for block in blocks]
    wide = r"{}[.]global[^;]*[.]v4[.]b32"
    script = "import re" + COMPILE.format(
        cases=cases, loads=wide.format("ld"), stores=wide.format("st")
    )
    lines = run_script(script, tmp_path).splitlines()
    figures = [list(map(int, line.split()[1:])) for line in lines if line.startswith("COMPILED")]
    assert len(figures) == len(cases)
    for loads, stores, spilled in figures:
        assert loads > 0
        assert stores > 0
        assert spilled == 0
