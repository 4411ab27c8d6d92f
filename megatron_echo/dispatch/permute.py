"""Copies of tokens into rows, and sums of rows into tokens: each is the other's backward pass.

Both directions pull: a row reads the token that it holds, a token reads its rows in the order of
k. Nothing is scattered, so the same inputs give the same bits on every run, and rows that no token
names are never read: what a grouped GEMM leaves in them does not matter. Backward needs the int32
maps only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.dispatch.layout import RowMap, wide_dtype
from megatron_echo.environment import on_gpu


def take_rows_reference(source: Tensor, index: Tensor) -> Tensor:
    """``source[index]``, with zeros where the index is ``len(source)``.

    Args:
        source: ``[N, H]``.
        index: int32 ``[B]``, up to and including N.
    """
    return _with_null_row(source).index_select(0, index)


def sum_rows_reference(source: Tensor, index: Tensor) -> Tensor:
    """``source[index].sum(1)`` in the wide dtype, in order; an index of ``len(source)`` adds 0.

    Args:
        source: ``[B, H]``.
        index: int32 ``[N, K]``, up to and including B.
    """
    return add_rows(_with_null_row(source), index)


def add_rows(source: Tensor, index: Tensor) -> Tensor:
    """``source[index].sum(1)`` in the wide dtype, in order; every index is one of a row."""
    total = source.index_select(0, index[:, 0]).to(wide_dtype(source.dtype))
    for column in range(1, index.shape[1]):
        total += source.index_select(0, index[:, column])
    return total


def _with_null_row(source: Tensor) -> Tensor:
    return torch.cat((source, source.new_zeros(1, source.shape[1])))


def take_rows(source: Tensor, index: Tensor, used: Tensor | None = None) -> Tensor:
    """:func:`take_rows_reference`, by a kernel on a GPU.

    With ``used``, int32 ``[1]``, it stops there, and the rows behind hold anything.
    """
    if on_gpu(source):
        from megatron_echo.dispatch import kernels

        return kernels.take_rows(source, index, used)
    return take_rows_reference(source, index)


def sum_rows(source: Tensor, index: Tensor, into: Tensor) -> Tensor:
    """:func:`sum_rows_reference`, rounded once, into contiguous ``[N, H]``; a kernel on a GPU."""
    if on_gpu(source):
        from megatron_echo.dispatch import kernels

        return kernels.sum_rows(source, index, into)
    return into.copy_(sum_rows_reference(source, index))


def _sum_rows(source: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    if on_gpu(source):
        return sum_rows(source, index, source.new_empty(len(index), source.shape[1], dtype=dtype))
    return sum_rows_reference(source, index).to(dtype)


class _TokensToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, rows: RowMap) -> Tensor:
        ctx.save_for_backward(rows.row_of)
        ctx.dtype = tokens.dtype
        return take_rows(tokens, rows.token_of_row, rows.used)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row_of,) = ctx.saved_tensors
        return _sum_rows(grad, row_of, ctx.dtype), None


class _RowsToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, buffer: Tensor, rows: RowMap, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(rows.row_src, rows.used)
        ctx.dtype, ctx.pairs_per_token = buffer.dtype, rows.pairs_per_token
        return _sum_rows(buffer, rows.row_of, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        row_src, used = ctx.saved_tensors
        token_of_row = row_src // ctx.pairs_per_token
        return take_rows(grad.to(ctx.dtype), token_of_row, used), None, None


class _PairsToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pairs: Tensor, rows: RowMap) -> Tensor:
        ctx.save_for_backward(rows.row_of)
        return take_rows(pairs.reshape(-1, 1), rows.row_src, rows.used).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (row_of,) = ctx.saved_tensors
        taken = take_rows(grad.unsqueeze(1), row_of.reshape(-1))
        return taken.view(row_of.shape), None


def tokens_to_rows(tokens: Tensor, rows: RowMap) -> Tensor:
    """Copy tokens ``[N, H]`` into rows ``[B, H]``; empty rows between others are zero.

    Rows behind those in use hold anything. Backward sums a token's rows in the wide dtype and
    casts once.
    """
    return _TokensToRows.apply(tokens, rows)


def rows_to_tokens(buffer: Tensor, rows: RowMap, dtype: torch.dtype | None = None) -> Tensor:
    """Sum the rows ``[B, H]`` of each token, in the order of k and the wide dtype: ``[N, H]``.

    A token without rows gets zeros. The sum is rounded once to ``dtype``; None keeps it wide.
    """
    return _RowsToTokens.apply(buffer, rows, dtype or wide_dtype(buffer.dtype))


def pairs_to_rows(pairs: Tensor, rows: RowMap) -> Tensor:
    """Copy a value of each pair ``[N, K]``, its probability, into its row: ``[B]``.

    Rows behind those in use hold anything.
    """
    return _PairsToRows.apply(pairs, rows)


class _Stand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, num_rows: int, back: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.back = back
        return stand_in(tokens, num_rows, tokens.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad).to(grad.dtype), None, None


def stand_in(like: Tensor, num_rows: int, width: int) -> Tensor:
    """What autograd sees of rows that are elsewhere, packed: NaN ``[B, i]``, without memory."""
    return like.new_full((1, 1), torch.nan).expand(num_rows, width)


def stand_for_rows(tokens: Tensor, num_rows: int, back: Callable[[Tensor], Tensor]) -> Tensor:
    """The :func:`stand_in` of rows that tokens ``[T, H]`` were copied to.

    Args:
        tokens: get the gradient.
        num_rows: B.
        back: brings gradients of rows ``[B, H]`` to the tokens, ``[T, H]``, and sums them.
    """
    return _Stand.apply(tokens, num_rows, back)
