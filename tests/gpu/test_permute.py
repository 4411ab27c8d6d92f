"""The Triton copies on a GPU against the torch references, bit for bit."""

import pytest
import torch
from torch import Tensor

from megatron_echo.dispatch import permute
from megatron_echo.dispatch.kernels import sum_rows, take_rows
from megatron_echo.dispatch.layout import RowMap, build_layout

pytestmark = pytest.mark.gpu
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
OPERATIONS = (permute.tokens_to_rows, permute.rows_to_tokens, permute.pairs_to_rows)


def check_same_bits(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype
    integers = INTEGERS[result.element_size()]
    assert torch.equal(result.view(integers), expected.view(integers))


def draw(index: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes near 1 and down to subnormals, -0, and NaN in rows that no index names."""
    kind = FP64 if dtype == FP64 else FP32
    lowest = torch.finfo(dtype).smallest_normal
    values = torch.randn(rows, columns, dtype=kind, device=index.device)
    values[:, ::3] *= lowest
    values[torch.rand_like(values) < 0.1] = -0.0
    named = torch.zeros(rows + 1, dtype=torch.bool, device=index.device)
    named[index.flatten().long()] = True
    values[~named[:rows]] = float("nan")
    return values.to(dtype)


def draw_index(shape: tuple[int, ...], rows: int) -> Tensor:
    index = torch.randint(rows + 1, shape, dtype=torch.int32, device="cuda")
    return torch.where(torch.rand(shape, device="cuda") < 0.2, rows, index)


@pytest.mark.parametrize(
    ("tokens", "columns", "terms", "dtype"),
    [
        (4096, 7168, 8, BF16),
        (8192, 2048, 8, BF16),
        (8192, 4096, 2, FP32),
        (4096, 2880, 4, FP16),
        (1000, 1001, 5, BF16),
        (513, 300, 3, FP64),
        (8192, 1, 8, FP32),
        (4096, 8, 64, FP32),
        (700, 520, 130, BF16),
        (3000, 1024, 1, BF16),
    ],
)
def test_the_kernels_equal_the_references(
    tokens: int, columns: int, terms: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows = tokens * min(terms, 8) * 5 // 4
    index = draw_index((tokens, terms), rows)
    buffer = draw(index, rows, columns, dtype)
    result = sum_rows(buffer, index)
    check_same_bits(result, permute.sum_rows_reference(buffer, index))
    assert not result.isnan().any()

    index = draw_index((rows,), tokens)
    source = draw(index, tokens, columns, dtype)
    result = take_rows(source, index)
    check_same_bits(result, permute.take_rows_reference(source, index))
    nothing = torch.full_like(index, tokens)
    for result in (take_rows(source, nothing), sum_rows(source, nothing[:, None])):
        check_same_bits(result, torch.zeros_like(result))


def test_more_than_two_to_the_31_elements() -> None:
    """As the source and as the result of each kernel."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of GPU memory")
    torch.manual_seed(0)
    rows, columns = 300_001, 7168
    assert rows * columns > 2**31
    buffer = torch.randn(rows, columns, dtype=BF16, device="cuda")
    index = torch.randint(rows - 2000, rows + 1, (1024, 4), dtype=torch.int32, device="cuda")
    check_same_bits(sum_rows(buffer, index), permute.sum_rows_reference(buffer, index))
    last = index[:, 0].clamp(max=rows - 1)
    check_same_bits(take_rows(buffer, last), buffer.index_select(0, last))
    source = buffer[:3000].clone()
    del buffer

    index = torch.randint(3001, (rows, 2), dtype=torch.int32, device="cuda")
    for kernel, reference, given in (
        (take_rows, permute.take_rows_reference, index[:, 0].contiguous()),
        (sum_rows, permute.sum_rows_reference, index),
    ):
        result = kernel(source, given)
        for start in range(0, rows, 50_000):
            part = slice(start, start + 50_000)
            check_same_bits(result[part], reference(source, given[part]))


def inputs(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], RowMap]:
    """Tokens, a buffer, probabilities, and their map, on the CPU; a fifth is elsewhere."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randint(20, (512, 6), generator=generator).clamp_(max=16)
    rows = build_layout(groups, 16, 3072, alignment=16).rows
    tokens = torch.randn(512, 1032, generator=generator).to(dtype)
    buffer = torch.randn(3072, 1032, generator=generator).to(dtype)
    probs = torch.rand(512, 6, generator=generator)
    return (tokens, buffer, probs), rows


def on_gpu(rows: RowMap) -> RowMap:
    assert rows.used is not None
    return RowMap(rows.row_src.cuda(), rows.row_of.cuda(), rows.pairs_per_token, rows.used.cuda())


def forward_and_backward(operation, given: Tensor, rows: RowMap, gradient: Tensor) -> list[Tensor]:
    leaf = given.detach().requires_grad_()
    output = operation(leaf, rows)
    (result,) = torch.autograd.grad(output, leaf, gradient)
    return [output.detach(), result]


def gradients(given: tuple[Tensor, ...], rows: RowMap) -> list[Tensor]:
    """A gradient for the output of each operation."""
    generator = torch.Generator().manual_seed(1)
    outputs = [operation(value, rows) for operation, value in zip(OPERATIONS, given)]
    return [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64])
def test_forward_and_backward_equal_the_cpu(dtype: torch.dtype) -> None:
    given, rows = inputs(dtype)
    for operation, value, gradient in zip(OPERATIONS, given, gradients(given, rows)):
        expected = forward_and_backward(operation, value, rows, gradient)
        results = forward_and_backward(operation, value.cuda(), on_gpu(rows), gradient.cuda())
        for result, reference in zip(results, expected):
            in_use = slice(int(rows.used) if len(result) == len(rows.row_src) else None)
            check_same_bits(result.cpu()[in_use], reference[in_use])


def test_nothing_waits_for_the_device() -> None:
    given, rows = inputs(BF16)
    cases = [
        (operation, value.cuda(), on_gpu(rows), gradient.cuda())
        for operation, value, gradient in zip(OPERATIONS, given, gradients(given, rows))
    ]
    for case in cases:  # compiles
        forward_and_backward(*case)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for case in cases:
            forward_and_backward(*case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
