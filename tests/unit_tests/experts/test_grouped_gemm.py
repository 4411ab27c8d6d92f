"""--moe-echo-grouped-gemm: the layer with Triton's products, in the interpreter."""

from collections.abc import Iterator
from pathlib import Path

import launch
import pytest
import torch
import triton_interpreter
from torch import Tensor

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.dispatch.reroute import Clones
from megatron_echo.dispatch.transports import WeightTransport
from megatron_echo.dispatch.transports.weights import HostCopy
from megatron_echo.experts.clones import WeightPool, cloned_linear
from megatron_echo.experts.grouped_linear import GroupedGemm, TorchGemm, grouped_linear
from megatron_echo.experts.grouped_mlp import GROUPED_GEMMS
from megatron_echo.experts.pointer_gemm import PointerGemm

WORKER = Path(__file__).resolve().parents[1] / "workers" / "grouped_gemm.py"
EXPERTS, SLOTS = 3, 2
WIDTHS = {"in": 24, "out": 16}
ROWS = 24


@pytest.fixture(autouse=True)
def mended_interpreter() -> Iterator[None]:
    with triton_interpreter.mended():
        yield


@pytest.mark.parametrize("ranks", [1, 2])
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
        return grads[:experts].index_add_(0, slot_expert[0], grads[experts:].clone())

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
        clones = Clones(torch.tensor([[2, 0]]), EXPERTS, OneRank())
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


def test_gradients_of_clones_are_rounded_once() -> None:
    """Three parts of 257 are 771: 772 in bf16, but 768 if each part is rounded before."""
    rows = torch.ones(771, 8, dtype=torch.bfloat16)
    weight = torch.ones(1, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([257, 514, 771], dtype=torch.int32)
    clones = Clones(torch.tensor([[0, 0]]), 1, OneRank())
    cloned_linear(rows, weight, ends, clones, WeightPool(), PointerGemm()).sum().backward()
    assert weight.grad is not None
    assert (weight.grad == 772).all()


FIELDS = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1}


def test_the_flag() -> None:
    """Auto is torch's."""
    kinds = {word: GROUPED_GEMMS[word] for word in ("auto", "torch", "triton")}
    assert kinds == {"auto": TorchGemm, "torch": TorchGemm, "triton": PointerGemm}
    assert EchoTransformerConfig(**FIELDS, moe_echo_grouped_gemm="triton")
    assert EchoTransformerConfig(**FIELDS).moe_echo_grouped_gemm == "auto"


def test_triton_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match=r"--moe-echo-grouped-gemm triton needs a GPU\. Use auto"):
        EchoTransformerConfig(**FIELDS, moe_echo_grouped_gemm="triton")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert EchoTransformerConfig(**FIELDS, moe_echo_grouped_gemm="triton")
