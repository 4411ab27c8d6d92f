"""Each kernel against its reference at two shapes and more, and for the same bits every time.

The list also says what ``tools/compile_kernels.py`` compiles.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from capture_safety import cuda_reports_waits, same_bits
from fp8_checks import FP8_CHECKS
from megatron.core.activations import quick_gelu, squared_relu
from record import Case, Figures, SkippedError
from timing import device, on_gpu, release_memory
from torch import Tensor

from megatron_echo.dispatch import permute
from megatron_echo.dispatch.layout import RowMap, build_layout, round_rows
from megatron_echo.dispatch.transports.peer_memory import PeerRows
from megatron_echo.experts.activation import ExpertActivation, weighted_activation
from megatron_echo.experts.biases import with_weighted_bias
from megatron_echo.experts.pointer_gemm import pointer_outer, pointer_product
from megatron_echo.planner import ClonePrice, plan_clones
from megatron_echo.planner.balance import plan_clones_reference

PART = "Kernels against their references"
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMITS = {BF16: 5e-3, FP16: 1e-3, FP32: 5e-6}
"""The largest error of a result over its size, where sums are in another order."""

PLAN_FIELDS = ("slot_expert", "allocation", "load_before", "load_after", "num_clones")


@dataclass(frozen=True)
class KernelCheck:
    """A kernel with inputs.

    Attributes:
        name: of the row.
        inputs: makes them, on the device.
        kernel: what is checked; its results may be longer than the reference's, with anything
            in the rest.
        reference: of the same arguments.
        limit: the largest error; 0 wants the same bits.
        repeats: of the kernel, each with the bits of the first.
    """

    name: str
    inputs: Callable[[], tuple[Any, ...]]
    kernel: Callable[..., Sequence[Tensor]]
    reference: Callable[..., Sequence[Tensor]]
    limit: float = 0.0
    repeats: int = 2

    def __call__(self) -> Figures:
        """Compare.

        Raises:
            AssertionError: other bits in a repetition, or a result that is wrong.
        """
        torch.manual_seed(0)
        given = self.inputs()
        results = self.kernel(*given)
        expected = [tensor.to(device()) for tensor in self.reference(*given)]
        with cuda_reports_waits():
            repeated = [self.kernel(*given) for _ in range(self.repeats)]
        errors = []
        for number, reference in enumerate(expected):
            ours, *others = (r[number][: len(reference)] if reference.dim() else r[number]
                             for r in (results, *repeated))  # fmt: skip
            if not all(same_bits(ours, other) for other in others):
                raise AssertionError(f"result {number} has other bits in a repetition")
            if not self.limit and not same_bits(ours, reference):
                raise AssertionError(f"result {number} has not the bits of the reference")
            exact = reference.double()
            errors.append(((ours.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item())
        if self.limit and not all(error <= self.limit for error in errors):
            raise AssertionError(f"errors of {errors}, more than {self.limit:.0e}")
        return {"results": len(expected), "error": max(errors)}


# ------------------------------------------------------------------------- rows and tokens


def odd_values(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes near 1 and down to subnormals, and -0."""
    values = torch.randn(rows, columns, dtype=FP64 if dtype == FP64 else FP32, device=device())
    values[:, ::3] *= torch.finfo(dtype).smallest_normal
    return torch.where(torch.rand_like(values) < 0.1, -0.0, values).to(dtype)


def row_inputs(
    tokens: int, columns: int, topk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, RowMap]:
    """Tokens, a buffer and their map; a fifth of the pairs is elsewhere, other rows hold NaN."""
    chosen = torch.randint(20, (tokens, topk), device=device()).clamp_(max=16)
    rows = build_layout(chosen, 16, round_rows(tokens * topk), alignment=16).rows
    buffer = odd_values(len(rows.row_src), columns, dtype)
    in_use = rows.row_src < tokens * topk
    buffer = torch.where(in_use[:, None], buffer, torch.nan)
    return odd_values(tokens, columns, dtype), buffer, rows


def move_rows(tokens: Tensor, buffer: Tensor, rows: RowMap) -> Sequence[Tensor]:
    """Both copies."""
    taken = permute.take_rows(tokens, rows.token_of_row, rows.used)
    return taken, permute.rows_to_tokens(buffer, rows)


def move_rows_reference(tokens: Tensor, buffer: Tensor, rows: RowMap) -> Sequence[Tensor]:
    """Of :func:`move_rows`; rows behind those in use are left out."""
    taken = permute.take_rows_reference(tokens, rows.token_of_row)
    assert rows.used is not None
    return taken[: int(rows.used)], permute.sum_rows_reference(buffer, rows.row_of)


def matrix_inputs(
    ranks: int, slots: int, experts: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Slots of all ranks in one buffer, home matrices, and what is added to them: to some nothing.

    Ranks are pretended: one memory holds the slots of all.
    """
    out, width = shape
    rows = torch.randn(ranks * (slots * out + 1), width, device=device()).to(BF16)
    home = torch.randn(experts, out, width, device=device()).to(BF16)
    place = torch.randint(ranks * slots, (experts, ranks), device=device())
    return rows, home, torch.where(torch.rand_like(place, dtype=FP32) < 0.7, -1, place).int()


def move_matrices(rows: Tensor, home: Tensor, places: Tensor) -> Sequence[Tensor]:
    """Home matrices into the slots of the first ranks, and those of all ranks back."""
    return _moved(rows, home, places, permute.on_gpu(rows))


def move_matrices_reference(rows: Tensor, home: Tensor, places: Tensor) -> Sequence[Tensor]:
    """Of :func:`move_matrices`."""
    return _moved(rows, home, places, False)


def _moved(rows: Tensor, home: Tensor, places: Tensor, by_kernels: bool) -> Sequence[Tensor]:
    rows, home, ranks = rows.clone(), home.clone(), places.shape[1]
    stride = len(rows) // ranks
    slots = (stride - 1) // home.shape[1]
    offsets = torch.arange(ranks, device=rows.device) * (stride * rows.shape[1])
    peers = PeerRows(rows[:stride], rows, offsets if by_kernels else None)
    source = torch.full((ranks, slots), -1, dtype=torch.int32, device=rows.device)
    source[0, -1], source[-1, 0] = 1, 0
    peers.put_matrices(home, source)
    peers.add_matrices(places, slots, home)
    return rows.unflatten(0, (ranks, stride))[:, :-1], home


# ------------------------------------------------------------------------- activation


def activation_inputs(
    kind: ExpertActivation, dtype: torch.dtype, rows: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, ExpertActivation]:
    """Rows of which an eighth is behind the last group, with NaN."""
    last = rows - rows // 8
    hidden, grad = (
        torch.randn(rows, columns, device=device()).to(dtype)
        for columns in (width * (1 + kind.is_gated), width)
    )
    probs = torch.rand(rows, device=device())
    for tensor in (hidden, grad, probs):
        tensor[last:] = torch.nan
    ends = torch.tensor([0, last // 2, last], dtype=torch.int32, device=device())
    return hidden, probs, grad, ends, kind


def activate(
    hidden: Tensor, probs: Tensor, grad: Tensor, ends: Tensor, kind: ExpertActivation
) -> Sequence[Tensor]:
    """Output and both gradients."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, probs)]
    output = weighted_activation(*leaves, ends, kind)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def activate_reference(
    hidden: Tensor, probs: Tensor, grad: Tensor, ends: Tensor, kind: ExpertActivation
) -> Sequence[Tensor]:
    """In fp64, which the kernels do not take."""
    wide = (tensor.double() for tensor in (hidden, probs, grad))
    return [result[: int(ends[-1])] for result in activate(*wide, ends, kind)]


def biased_inputs(
    kind: ExpertActivation, dtype: torch.dtype, rows: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, ExpertActivation, Tensor]:
    """A gated activation with the biases of three groups."""
    given = activation_inputs(kind, dtype, rows, width)
    return *given, torch.randn(3, 2 * width, device=device())


def activate_biased(
    hidden: Tensor, probs: Tensor, grad: Tensor, ends: Tensor, kind: ExpertActivation, bias: Tensor
) -> Sequence[Tensor]:
    """Bias, activation and weighted bias; output and all gradients, that of the bias whole."""
    leaves = [tensor.detach().requires_grad_() for tensor in (hidden, probs, bias)]
    inner = weighted_activation(leaves[0], leaves[1], ends, kind, leaves[2])
    output = with_weighted_bias(inner, leaves[2][:, : grad.shape[1]], leaves[1], ends)
    grads = torch.autograd.grad(output, leaves, grad)
    return output.detach(), *grads


def activate_biased_reference(
    hidden: Tensor, probs: Tensor, grad: Tensor, ends: Tensor, kind: ExpertActivation, bias: Tensor
) -> Sequence[Tensor]:
    """In fp64 on the CPU."""
    wide = (tensor.double().cpu() for tensor in (hidden, probs, grad))
    *of_rows, to_bias = activate_biased(*wide, ends.cpu(), kind, bias.double().cpu())
    return *(result[: int(ends[-1])] for result in of_rows), to_bias


# ------------------------------------------------------------------------- products


def product_inputs(
    dtype: torch.dtype, ends: Sequence[int], slots: int, taken: int, made: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[int]]:
    """Rows, gradients, home weights and clones; rows behind the last group hold NaN."""

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device()) / shape[-1] ** 0.5).to(dtype)

    rows = ends[-1] + ends[-1] // 8 + 8
    inputs, grads = draw(rows, taken), draw(rows, made)
    inputs[ends[-1] :], grads[ends[-1] :] = torch.nan, torch.nan
    home, clones = draw(len(ends) - slots, made, taken), draw(slots, made, taken)
    on_device = torch.tensor(ends, dtype=torch.int32, device=device())
    return inputs, grads, home, clones, on_device, ends


def multiply(
    inputs: Tensor, grads: Tensor, home: Tensor, slots: Tensor, on_device: Tensor, _: Sequence[int]
) -> Sequence[Tensor]:
    """Forward, gradient of the rows, gradient of the weights."""
    to_home, to_slots = torch.full_like(home, torch.nan), torch.full_like(slots, torch.nan)
    pointer_outer(grads, inputs, on_device, to_home, to_slots)
    return (
        pointer_product(inputs, home, slots, on_device, transpose=True),
        pointer_product(grads, home, slots, on_device, transpose=False),
        torch.cat((to_home, to_slots)),
    )


def multiply_reference(
    inputs: Tensor, grads: Tensor, home: Tensor, slots: Tensor, _: Tensor, ends: Sequence[int]
) -> Sequence[Tensor]:
    """Plain products in fp64."""
    parts = [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    weights = torch.cat((home, slots)).double()
    left, right = inputs[: ends[-1]].double(), grads[: ends[-1]].double()
    return (
        torch.cat([left[part] @ weight.mT for part, weight in zip(parts, weights, strict=True)]),
        torch.cat([right[part] @ weight for part, weight in zip(parts, weights, strict=True)]),
        torch.stack([right[part].mT @ left[part] for part in parts]),
    )


# ------------------------------------------------------------------------- plans

PLANS: tuple[tuple[Any, ...], ...] = (
    (2, 4, 1, 0.0, 0, None),
    (8, 64, 8, 0.0, 0, None),
    (8, 64, 8, 0.02, 100, 4),
    (48, 240, 2, 0.02, 100, None),
    (64, 256, 4, 0.0, 0, None),
    (64, 256, 1, 0.0, 0, None),
    (64, 256, 2, 0.02, 0, 8),
    (16, 64, 4, 0.25, 0, 8, True, ClonePrice(2**30, 2**30)),
    (64, 256, 2, 0.25, 0, None, False, ClonePrice(2**30, 2**30)),
)
"""Ranks, experts, and the settings of ``plan_clones``; each a compilation: exact and greedy, with a
tolerance, a price and nodes at a small size only."""


def plan_inputs(ranks: int, experts: int, *settings: Any) -> tuple[Any, ...]:
    """Skewed counts, some past 2^31, which a race between warps would spoil."""
    popularity = torch.rand(experts, dtype=FP64, device=device()) ** 6
    counts = torch.rand(ranks, experts, dtype=FP64, device=device()) * popularity * 2**34
    return counts.long(), *settings


def plan(counts: Tensor, *settings: Any) -> Sequence[Tensor]:
    """The plan's tensors, and the split of one rank."""
    made = plan_clones(counts, *settings)
    return [*(getattr(made, name) for name in PLAN_FIELDS), made.split_for(1)]


def plan_reference(counts: Tensor, *settings: Any) -> Sequence[Tensor]:
    """On the CPU."""
    made = plan_clones_reference(counts.cpu(), *settings)
    return [*(getattr(made, name) for name in PLAN_FIELDS), made.split_for(1)]


# ------------------------------------------------------------------------- all

ACTIVATIONS = {
    "swiglu": (ExpertActivation(F.silu, True), BF16, 4096, 2048),
    "gpt-oss": (ExpertActivation(quick_gelu, True, limit=0.7, offset=1.0), FP32, 1024, 776),
    "squared relu": (ExpertActivation(squared_relu), FP16, 1024, 776),
}
ROWS = ((4096, 7168, 8, BF16), (1000, 1001, 5, FP16), (513, 300, 3, FP64), (700, 520, 130, FP32))
PRODUCTS: dict[str, tuple[Any, ...]] = {  # ends, slots, widths of the input and of the output
    "bf16": (BF16, [*range(480, 480 * 17, 480), 7680, 8000], 2, 2048, 1536),
    "bf16, skewed": (BF16, [700, 700, 1500, 1501, 1501, 1900], 2, 520, 392),
    "fp16, one group": (FP16, [0, 1900, 1900, 1900, 1900, 1900], 2, 520, 392),
    "fp32, skewed": (FP32, [700, 700, 1500, 1501, 1501, 1900], 2, 520, 392),
}


def kernel_checks(dry: bool = False) -> list[KernelCheck]:
    """All; in a dry run sixteen times smaller, without the largest plans."""
    size = 16 if dry else 1
    checks = [
        KernelCheck(f"rows, {tokens} x {columns} by {topk}, {str(dtype)[6:]}",
                    partial(row_inputs, max(8, tokens // size), columns // size, topk, dtype),
                    move_rows, move_rows_reference)
        for tokens, columns, topk, dtype in ROWS
    ]  # fmt: skip
    checks += [
        KernelCheck(f"matrices of {out} x {width}, R={ranks}, S={slots}",
                    partial(matrix_inputs, ranks, slots, experts, (out // size, width // size)),
                    move_matrices, move_matrices_reference)
        for ranks, slots, experts, out, width in ((8, 2, 16, 1536, 2048), (3, 1, 4, 400, 208))
    ]  # fmt: skip
    checks += [
        KernelCheck(f"{name}, {str(dtype)[6:]}",
                    partial(activation_inputs, kind, dtype, rows // size, width // size),
                    activate, activate_reference, LIMITS[dtype])
        for name, (kind, dtype, rows, width) in ACTIVATIONS.items()
    ]  # fmt: skip
    checks += [
        KernelCheck(f"{name} with biases",
                    partial(biased_inputs, kind, dtype, rows // size, width // size),
                    activate_biased, activate_biased_reference, LIMITS[dtype])
        for name, (kind, dtype, rows, width) in ACTIVATIONS.items() if kind.is_gated
    ]  # fmt: skip
    for name, (dtype, ends, slots, taken, made) in PRODUCTS.items():
        given = dtype, [end // size for end in ends], slots, taken // size // 8 * 8, made // size
        checks.append(KernelCheck(f"products, {name}", partial(product_inputs, *given),
                                  multiply, multiply_reference, LIMITS[dtype]))  # fmt: skip
    checks += [
        KernelCheck(f"FP8 {name}", partial(inputs, *(n // size for n in sizes), dtype), *both)
        for name, inputs, sizes, dtype, *both in FP8_CHECKS
    ]
    for sizes in PLANS[: 3 if dry else None]:
        ranks, experts, slots, tolerance, _, node, *rest = sizes
        name = f"plan, R={ranks}, E={experts}, S={slots}, tolerance {tolerance}, node {node}"
        name += ", with a price" if rest else ""
        given = partial(plan_inputs, *sizes)
        checks.append(KernelCheck(name, given, plan, plan_reference, repeats=30))
    return checks


def check_large(gigabytes: int = 32) -> Figures:
    """More than 2^31 elements, as the source and as the result of each kernel.

    Raises:
        AssertionError: a result is wrong.
        SkippedError: there is not so much memory.
    """
    if not on_gpu() or torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        raise SkippedError(f"needs {gigabytes} GiB of GPU memory")
    rows, columns = 300_001, 7168
    buffer = torch.randn(rows, columns, dtype=BF16, device=device())
    last = torch.randint(rows - 2000, rows, (1024,), dtype=torch.int32, device=device())
    weight = torch.randn(1, 64, columns, dtype=BF16, device=device()) / columns**0.5
    ends = torch.tensor([rows - 1000, rows], dtype=torch.int32, device=device())
    made = pointer_product(buffer, torch.cat((0 * weight, weight)), None, ends, transpose=True)
    exact = buffer[-1000:].double() @ weight[0].double().mT
    is_right = {
        "source": same_bits(permute.take_rows(buffer, last), buffer.index_select(0, last)),
        "rows of no weight": not made[:-1000].any(),
        "product": (made[-1000:] - exact).norm() <= LIMITS[BF16] * exact.norm(),
    }
    source = buffer[:3000].clone()
    del buffer
    index = torch.randint(3001, (rows,), dtype=torch.int32, device=device())
    taken = permute.take_rows(source, index)
    is_right["result"] = all(
        same_bits(taken[first : first + 50_000],
                  permute.take_rows_reference(source, index[first : first + 50_000]))
        for first in range(0, rows, 50_000)
    )  # fmt: skip
    wrong = [name for name, right in is_right.items() if not right]
    if wrong:
        raise AssertionError(f"wrong: {', '.join(wrong)}")
    return {"elements": rows * columns}


def cases(dry: bool) -> list[Case]:
    """A row for each check."""

    def alone(check: Callable[[], Figures]) -> Figures:
        release_memory()
        return check()

    checks: dict[str, Callable[[], Figures]] = {check.name: check for check in kernel_checks(dry)}
    checks["more than 2^31 elements"] = check_large
    return [Case(PART, name, partial(alone, check)) for name, check in checks.items()]
