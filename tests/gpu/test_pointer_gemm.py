"""The grouped products of two stacks on a GPU against plain products in fp64."""

import pytest
import torch
from torch import Tensor

from megatron_echo.experts.pointer_gemm import pointer_outer, pointer_product

pytestmark = pytest.mark.gpu
LIMITS = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 5e-6}
ENDS = {
    "skewed, with empty groups": [700, 700, 1500, 1501, 1501, 1900],
    "one group": [0, 1900, 1900, 1900, 1900, 1900],
    "nothing": [0] * 6,
}
HOME, SLOTS, ROWS, TAKEN, MADE = 4, 2, 2048, 520, 392


def draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda") / shape[-1] ** 0.5).to(dtype)


def check(actual: Tensor, expected: Tensor, limit: float) -> None:
    assert actual.isfinite().all()
    error = (actual.double() - expected).norm() / expected.norm().clamp(min=1e-30)
    assert error < limit, error


def products(rows: Tensor, stack: Tensor, ends: list[int]) -> Tensor:
    starts = [0, *ends[:-1]]
    parts = [rows[a:b].double() @ w.double() for a, b, w in zip(starts, ends, stack)]
    return torch.cat(parts)


@pytest.mark.parametrize("name", ENDS)
@pytest.mark.parametrize("dtype", LIMITS)
def test_the_products(dtype: torch.dtype, name: str) -> None:
    """Rows behind the last group hold NaN, which must reach nothing."""
    torch.manual_seed(0)
    ends, limit = ENDS[name], LIMITS[dtype]
    on_device = torch.tensor(ends, dtype=torch.int32, device="cuda")
    inputs, grads = draw(dtype, ROWS, TAKEN), draw(dtype, ROWS, MADE)
    inputs[ends[-1] :], grads[ends[-1] :] = torch.nan, torch.nan
    stack = draw(dtype, HOME + SLOTS, MADE, TAKEN)
    home, slots = stack[:HOME].clone(), stack[HOME:].clone()

    output = pointer_product(inputs, home, slots, on_device, transpose=True)
    check(output[: ends[-1]], products(inputs, stack.mT, ends), limit)
    output = pointer_product(grads, home, slots, on_device, transpose=False)
    check(output[: ends[-1]], products(grads, stack, ends), limit)

    home_grad, slot_grad = torch.full_like(home, torch.nan), torch.full_like(slots, torch.nan)
    pointer_outer(grads, inputs, on_device, home_grad, slot_grad)
    starts = [0, *ends[:-1]]
    pairs = [(grads[a:b].double(), inputs[a:b].double()) for a, b in zip(starts, ends)]
    expected = torch.stack([left.mT @ right for left, right in pairs])
    check(torch.cat((home_grad, slot_grad)), expected, limit)


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    torch.manual_seed(0)
    rows, taken, made = 300_001, 7168, 64
    assert rows * taken > 2**31
    inputs = torch.zeros(rows, taken, dtype=torch.bfloat16, device="cuda")
    inputs[-1000:] = draw(torch.bfloat16, 1000, taken)
    home = draw(torch.bfloat16, 2, made, taken)
    ends = torch.tensor([rows - 1000, rows], dtype=torch.int32, device="cuda")
    output = pointer_product(inputs, home, None, ends, transpose=True)
    assert not output[:-1000].any()
    check(output[-1000:], inputs[-1000:].double() @ home[1].double().mT, 5e-3)


def test_nothing_waits_for_the_device() -> None:
    inputs, home = draw(torch.bfloat16, ROWS, TAKEN), draw(torch.bfloat16, HOME, MADE, TAKEN)
    ends = torch.tensor([1, 2, 3, ROWS], dtype=torch.int32, device="cuda")
    grads = pointer_product(inputs, home, None, ends, transpose=True)  # compiles
    pointer_outer(grads, inputs, ends, torch.empty_like(home), None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pointer_product(inputs, home, None, ends, transpose=True)
        pointer_outer(grads, inputs, ends, torch.empty_like(home), None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
