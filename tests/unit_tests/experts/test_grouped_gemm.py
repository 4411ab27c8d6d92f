"""--moe-echo-grouped-gemm: the layer with Triton's products, in the interpreter."""

from collections.abc import Iterator
from pathlib import Path

import launch
import pytest
import torch
import triton_interpreter
from moe_cases import ShapeRecorder
from torch import Tensor

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.dispatch.clones_of_call import Clones
from megatron_echo.dispatch.transports import WeightTransport
from megatron_echo.experts import clones as clones_module
from megatron_echo.experts import grouped_linear as grouped_linear_module
from megatron_echo.experts import projection
from megatron_echo.experts.clones import WeightPool, cloned_linear
from megatron_echo.experts.grouped_linear import GroupedGemm, TorchGemm, grouped_linear
from megatron_echo.experts.pointer_gemm import PointerGemm
from megatron_echo.experts.projection import GROUPED_GEMMS, GroupedLinear, automatic_gemm
from megatron_echo.host_copy import HostCopy
from megatron_echo.memory.live_bytes import LiveBytes

WORKER = Path(__file__).resolve().parents[1] / "workers" / "grouped_gemm.py"
EXPERTS, SLOTS = 3, 2
WIDTHS = {"in": 24, "out": 16}
ROWS = 24


@pytest.fixture(autouse=True)
def mended_interpreter() -> Iterator[None]:
    with triton_interpreter.mended():
        yield


@launch.on_ranks(1, slow=(2,))
def test_the_layer_gives_the_results_of_torch(ranks: int) -> None:
    """fp32 and bf16; hot, empty and padding routings; with and without clones."""
    print(launch.run(["the_results_of_torch"], ranks, script=WORKER).check().output)


def test_the_layer_in_kernels_only() -> None:
    """Copies and activation too; the same bits, whatever uninitialised memory holds."""
    launch.run(["every_kernel"], 2, script=WORKER).check()


def test_the_layer_is_as_exact_as_torch() -> None:
    launch.run(["bf16"], 2, script=WORKER).check()


class OneRank(WeightTransport):
    """Clones of a rank's own experts."""

    def __init__(self) -> None:
        pass

    def push(
        self, weight: Tensor, slot_expert: Tensor, announced: HostCopy | None, slots: Tensor
    ) -> None:
        slots.copy_(weight[slot_expert[0]])

    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: HostCopy | None) -> Tensor:
        experts = len(grads) - slot_expert.shape[1]
        return grads[:experts].index_add_(0, slot_expert[0], grads[experts:])

    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        return 0


def integers(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def linear(
    gemm: GroupedGemm, dtype: torch.dtype, ends: list[int], has_clones: bool, keep: bool = False
) -> tuple[list[Tensor], WeightPool]:
    """Output and gradients of rows and weights; NaN in the rows behind the last group.

    The clones are of experts 2 and 0.
    """
    rows = integers(ROWS, WIDTHS["in"], seed=0, dtype=dtype)
    weight = integers(EXPERTS, WIDTHS["out"], WIDTHS["in"], seed=1, dtype=dtype).requires_grad_()
    grad = integers(ROWS, WIDTHS["out"], seed=2, dtype=dtype)
    rows[ends[-1] :] = grad[ends[-1] :] = float("nan")
    rows.requires_grad_()
    pool, offsets = WeightPool(), torch.tensor(ends, dtype=torch.int32)
    if has_clones:
        clones = Clones(torch.tensor([[2, 0]]), OneRank())
        output = cloned_linear(rows, weight, offsets, clones, pool, gemm, keep)
        for stack in pool.stacks:
            stack.fill_(float("nan"))
    else:
        output = grouped_linear(rows, weight, offsets[:EXPERTS], gemm)
    to_rows, to_weight = torch.autograd.grad(output, (rows, weight), grad)
    last = ends[-1] if has_clones else ends[EXPERTS - 1]
    return [output.detach()[:last], to_rows[:last], to_weight], pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ends", [[4, 9, 16, 20, 24], [0, 9, 9, 9, 20], [0, 0, 0, 24, 24]])
@pytest.mark.parametrize("has_clones", [True, False])
def test_exact_sums_are_the_bits_of_torch(
    dtype: torch.dtype, ends: list[int], has_clones: bool
) -> None:
    """Of small integers; the pool, spoiled between forward and backward, holds the slots alone."""
    expected, _ = linear(TorchGemm(), dtype, ends, has_clones)
    for keep in (True, False)[: 1 + has_clones]:
        results, pool = linear(PointerGemm(), dtype, ends, has_clones, keep)
        for result, reference in zip(results, expected, strict=True):
            assert torch.equal(result, reference)
        matrices = [len(stack) for stack in pool.stacks]
        assert matrices == ([SLOTS] if has_clones else [])


@pytest.mark.parametrize("ends", [[4, 9, 16, 20, 24], [0, 9, 9, 9, 20], [0, 0, 0, 24, 24]])
def test_clones_where_they_lie(ends: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: torch multiplies home rows, the kernel those of clones; no copy of the home."""
    expected, _ = linear(TorchGemm(), torch.bfloat16, ends, has_clones=True)
    monkeypatch.setattr(grouped_linear_module, "_has_kernel_for_clones", lambda weight: True)
    for keep in (True, False):
        results, pool = linear(TorchGemm(), torch.bfloat16, ends, has_clones=True, keep=keep)
        for result, reference in zip(results, expected, strict=True):
            assert torch.equal(result, reference)
        assert [len(stack) for stack in pool.stacks] == [SLOTS]


def test_gradients_of_clones_are_rounded_once() -> None:
    """Three parts of 257 are 771: 772 in bf16, but 768 if each part is rounded before."""
    rows = torch.ones(771, 8, dtype=torch.bfloat16)
    weight = torch.ones(1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([257, 514, 771], dtype=torch.int32)
    clones = Clones(torch.tensor([[0, 0]]), OneRank())
    cloned_linear(rows, weight, ends, clones, WeightPool(), PointerGemm()).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 772).all()


@pytest.mark.parametrize("gemm", [TorchGemm(), PointerGemm()])
def test_weight_gradients_in_parts(gemm: GroupedGemm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of those made at once: of 16 rows of a matrix, 12 and then 4."""
    ends = [4, 9, 16, 20, 24]
    expected, _ = linear(gemm, torch.bfloat16, ends, has_clones=True)
    monkeypatch.setattr(clones_module, "_WIDE_BYTES", 1)
    monkeypatch.setattr(clones_module, "_STEP", 12)
    results, _ = linear(gemm, torch.bfloat16, ends, has_clones=True)
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference)


def test_weight_gradients_need_no_second_stack() -> None:
    """fc1 of DeepSeek-V3, 32 experts and 32 slots on a rank, in shapes only."""
    experts, out, width, many = 32, 4096, 7168, 32768
    rows, weight, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for shape in ((many, width), (experts, out, width), (many, out))
    )
    ends = torch.empty(2 * experts, dtype=torch.int32, device="meta")
    slot_expert = torch.empty(1, experts, dtype=torch.int64, device="meta")
    pool, clones = WeightPool(), Clones(slot_expert, OneRank())
    output = cloned_linear(rows, weight, ends, clones, pool, TorchGemm())
    with LiveBytes() as live:
        torch.autograd.grad(output, (rows, weight), grad)
    there_before = pool.nbytes + weight.nbytes + rows.nbytes + grad.nbytes
    assert live.peak - there_before <= weight.nbytes + rows.nbytes + 2 * 2**30  # 12.0 GiB at once


FIELDS = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "add_bias_linear": False}


@pytest.mark.parametrize(
    ("capability", "dtype", "widths", "groups", "expected"),
    [
        (None, torch.bfloat16, (64, 32), 8, "torch"),
        (None, torch.float16, (63, 32), 2000, "torch"),
        ((9, 0), torch.bfloat16, (64, 32), 1023, "torch"),
        ((10, 0), torch.bfloat16, (64, 32), 8, "torch"),
        ((9, 0), torch.bfloat16, (64, 32), 1024, "triton"),
        ((9, 0), torch.bfloat16, (64, 36), 8, "triton"),
        ((9, 0), torch.bfloat16, (7, 64), 8, "triton"),
        ((9, 0), torch.float16, (64, 32), 8, "triton"),
        ((10, 0), torch.float32, (64, 32), 8, "triton"),
        ((8, 0), torch.bfloat16, (64, 32), 8, "triton"),
        ((8, 9), torch.float16, (64, 32), 8, "triton"),
        ((12, 0), torch.bfloat16, (64, 32), 8, "triton"),
        ((7, 5), torch.float16, (64, 32), 8, "torch"),
        ((9, 0), torch.float64, (64, 32), 8, "torch"),
    ],
)
def test_what_auto_takes(
    capability: tuple[int, int] | None, dtype: torch.dtype, widths: tuple[int, int], groups: int,
    expected: str,
) -> None:  # fmt: skip
    assert automatic_gemm(capability, dtype, widths, groups) == expected


def test_the_kernels_become_the_default_by_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_KERNELS_WIN", True)
    assert automatic_gemm((9, 0), torch.bfloat16, (64, 32), 8) == "triton"
    assert automatic_gemm(None, torch.bfloat16, (64, 32), 8) == "torch"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_auto_does_not_multiply_all_rows_for_each_group(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended A100: no product of torch's, forward and backward."""
    monkeypatch.setattr(grouped_linear_module, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(projection, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    config = EchoTransformerConfig(**FIELDS, params_dtype=dtype, use_cpu_initialization=True)
    layer = GroupedLinear(EXPERTS, WIDTHS["in"], WIDTHS["out"], config)
    torch.nn.init.ones_(layer.weight)
    rows = torch.ones(ROWS, WIDTHS["in"], dtype=dtype, requires_grad=True)
    with ShapeRecorder() as recorder:
        output, bias = layer(rows, torch.tensor([4, 4, ROWS], dtype=torch.int32))
        output.sum().backward()
    assert not [name for name, _ in recorder.made if "mm" in name]
    assert bias is None
    assert (output == WIDTHS["in"]).all()
    assert rows.grad is not None
    assert (rows.grad == WIDTHS["out"]).all()
    assert layer.weight.grad is not None
    assert layer.weight.grad[:, 0, 0].tolist() == [4, 0, ROWS - 4]


def test_the_flag() -> None:
    kinds = {word: type(gemm) for word, gemm in GROUPED_GEMMS.items()}
    assert kinds == {"torch": TorchGemm, "triton": PointerGemm}
    assert EchoTransformerConfig(**FIELDS, moe_echo_grouped_gemm="triton")
    assert EchoTransformerConfig(**FIELDS).moe_echo_grouped_gemm == "auto"


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"triton needs a GPU\. Use auto or torch\.$"):
        EchoTransformerConfig(**FIELDS, moe_echo_grouped_gemm="triton")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert EchoTransformerConfig(**FIELDS, moe_echo_grouped_gemm="triton")
