"""Copies into rows and sums of rows: gradients, precision, and rows that nobody names."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_echo.dispatch.layout import RowMap, build_layout
from megatron_echo.dispatch.permute import (
    pairs_to_rows,
    rows_to_tokens,
    tokens_to_rows,
    wide_dtype,
)

WIDTH = 5
Move = Callable[[Tensor, RowMap], Tensor]
MOVES = {
    "tokens_to_rows": tokens_to_rows,
    "rows_to_tokens": rows_to_tokens,
    "pairs_to_rows": pairs_to_rows,
}


def experts_map(tokens: int = 9, topk: int = 3, num_rows: int = 24, seed: int = 0) -> RowMap:
    """Pairs in aligned groups; some are elsewhere and, with few rows, some are dropped."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.randint(0, 5, (tokens, topk), generator=generator)
    groups[0] = 4  # this token has no row
    return build_layout(groups, 4, num_rows, alignment=4).rows


def peers_map() -> RowMap:
    """A token is sent to each of C ranks once: two places a rank, the last one with room left."""
    row_of = torch.tensor([[0, 6, 4], [1, 2, 6], [6, 6, 6]], dtype=torch.int32)
    return RowMap(torch.tensor([0, 1, 1, 3, 0, 3], dtype=torch.int32), row_of, 1)


MAPS = {
    "padded": experts_map(),
    "dropped": experts_map(num_rows=13),
    "one choice": experts_map(topk=1),
    "one token": experts_map(tokens=1, num_rows=3),
    "peers": peers_map(),
}


def shape_of_input(name: str, rows: RowMap) -> tuple[int, ...]:
    tokens, num_rows = rows.row_of.shape[0], rows.row_src.shape[0]
    if name == "pairs_to_rows":
        return tokens, rows.pairs_per_token
    return (num_rows if name == "rows_to_tokens" else tokens), WIDTH


def cases(*names: str) -> list:
    """All moves, or the named ones, with all maps that fit; a sent token has no pairs."""
    return [
        pytest.param(name, rows, id=f"{name}-{kind}".replace(" ", "_"))
        for name in names or MOVES
        for kind, rows in MAPS.items()
        if (name, kind) != ("pairs_to_rows", "peers")
    ]


def sample(name: str, rows: RowMap, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = shape_of_input(name, rows)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(("name", "rows"), cases())
def test_gradcheck(name: str, rows: RowMap) -> None:
    values = sample(name, rows).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: MOVES[name](x, rows), (values,))


@pytest.mark.parametrize(("name", "rows"), cases())
def test_values_are_those_of_a_loop(name: str, rows: RowMap) -> None:
    values = sample(name, rows)
    num_rows, empty = len(rows.row_src), rows.row_of.shape[0] * rows.pairs_per_token
    result = MOVES[name](values, rows)
    if name == "rows_to_tokens":
        for token, named in enumerate(rows.row_of.tolist()):
            expected = sum((values[row] for row in named if row < num_rows), torch.zeros(WIDTH))
            torch.testing.assert_close(result[token], expected, check_dtype=False)
        return
    source = values.flatten() if name == "pairs_to_rows" else values
    per_source = 1 if name == "pairs_to_rows" else rows.pairs_per_token
    for row, pair in enumerate(rows.row_src.tolist()):
        expected = source[pair // per_source] if pair < empty else torch.zeros_like(source[0])
        assert torch.equal(result[row], expected)


@pytest.mark.parametrize(("name", "rows"), cases())
def test_backward_is_the_adjoint(name: str, rows: RowMap) -> None:
    """<move(x), y> = <x, backward(y)>: to the rounding of the two inner products."""
    values = sample(name, rows).requires_grad_()
    result = MOVES[name](values, rows)
    weight = torch.randn(result.shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad(result, values, weight)
    left, right = (result * weight).sum(), (values * grad).sum()
    torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("rows", [pytest.param(MAPS[k], id=k) for k in ("padded", "peers")])
def test_the_two_directions_are_each_others_backward(rows: RowMap) -> None:
    """The same bits, since both pull in the same order."""
    tokens = sample("tokens_to_rows", rows).requires_grad_()
    buffer = sample("rows_to_tokens", rows).requires_grad_()
    copied, summed = tokens_to_rows(tokens, rows), rows_to_tokens(buffer, rows)
    (to_tokens,) = torch.autograd.grad(copied, tokens, buffer.detach())
    (to_buffer,) = torch.autograd.grad(summed, buffer, tokens.detach())
    assert torch.equal(to_tokens, summed)
    assert torch.equal(to_buffer, copied)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_wide(dtype: torch.dtype) -> None:
    """Eight terms, each too small to change the running sum in half precision."""
    groups = torch.arange(8).repeat(4, 1)
    rows = build_layout(groups, 8, 32).rows
    buffer = torch.full((32, WIDTH), 2.0**-9, dtype=dtype)
    buffer[:4] = 1.0  # the first group holds each token's first pair
    buffer.requires_grad_()
    result = rows_to_tokens(buffer, rows)
    assert result.dtype == torch.float32
    assert (result == 1 + 7 * 2.0**-9).all()
    (grad,) = torch.autograd.grad(result.sum(), buffer)
    assert grad.dtype == dtype

    tokens = torch.zeros(4, WIDTH, dtype=dtype, requires_grad=True)
    copies = tokens_to_rows(tokens, rows)
    assert copies.dtype == dtype
    (grad,) = torch.autograd.grad(copies, tokens, buffer.detach())
    assert grad.dtype == dtype
    assert torch.equal(grad, result.detach().to(dtype))  # cast once, at the end


@pytest.mark.parametrize("rows", [pytest.param(rows, id=kind) for kind, rows in MAPS.items()])
def test_bf16_against_fp64(rows: RowMap) -> None:
    """The sum is as good as fp32 makes it, the cast of a gradient as good as bf16 makes it."""
    buffer = sample("rows_to_tokens", rows, dtype=torch.bfloat16)
    exact = rows_to_tokens(buffer.double(), rows)
    scale = rows_to_tokens(buffer.double().abs(), rows)
    error = (rows_to_tokens(buffer, rows).double() - exact).abs()
    assert (error <= 4 * 2.0**-24 * scale).all()
    tokens = sample("tokens_to_rows", rows, dtype=torch.bfloat16).requires_grad_()
    (grad,) = torch.autograd.grad(tokens_to_rows(tokens, rows), tokens, buffer)
    assert grad.dtype == torch.bfloat16
    error = (grad.double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 4 * 2.0**-24 * scale).all()


def test_wide_dtypes() -> None:
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        assert wide_dtype(narrow) == torch.float32
    assert wide_dtype(torch.float64) == torch.float64


def named_rows(rows: RowMap) -> Tensor:
    return rows.row_src < rows.row_of.shape[0] * rows.pairs_per_token


@pytest.mark.parametrize(("name", "rows"), cases())
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nan_in_unnamed_places_never_spreads(name: str, rows: RowMap, dtype: torch.dtype) -> None:
    """Padding and tails of a buffer, and tokens without a row, forward and backward."""
    values = sample(name, rows, dtype=dtype)
    named = named_rows(rows)
    has_row = rows.row_of < len(named)
    if name == "rows_to_tokens":
        read, written = named, has_row.any(1)
    elif name == "pairs_to_rows":
        read, written = has_row, named
    else:
        read, written = has_row.any(1), named
    values[~read] = float("nan")
    values.requires_grad_()
    result = MOVES[name](values, rows)
    assert result.isfinite().all()
    assert (result[~written] == 0).all()

    weight = torch.ones_like(result)
    weight[~written] = float("nan")
    (grad,) = torch.autograd.grad(result, values, weight)
    assert grad.isfinite().all()
    assert (grad[~read] == 0).all()


@pytest.mark.parametrize(("name", "rows"), cases())
def test_only_int32_maps_are_kept(name: str, rows: RowMap) -> None:
    """Backward needs no activation: what is saved is of the layout, and its own storage."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    values = sample(name, rows).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        MOVES[name](values, rows).sum().backward()
    assert saved
    assert all(tensor.dtype == torch.int32 for tensor in saved)
    maps = [rows.row_src, rows.row_of, *([] if rows.used is None else [rows.used])]
    assert {tensor.data_ptr() for tensor in saved} <= {tensor.data_ptr() for tensor in maps}
    assert values.grad is not None


@pytest.mark.parametrize("name", MOVES)
def test_the_same_bits_on_every_run(name: str) -> None:
    rows = experts_map(512, 8, 3000)

    def run() -> tuple[Tensor, Tensor]:
        values = sample(name, rows, dtype=torch.float32).requires_grad_()
        result = MOVES[name](values, rows)
        (grad,) = torch.autograd.grad(result.square().sum(), values)
        return result.detach(), grad

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)
