"""Work on the rows of a buffer that are in use: what a kernel does on a GPU, an operator on a CPU.

Buffers have a shape that the configuration decides, and the routing says how many of their rows are
used. A kernel reads that number where it runs. So does this operator on a CPU, so that rows behind
cost nothing there; graphs and tripwires see it as they see a kernel, one call of a fixed shape.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_Work = Callable[..., Sequence[Tensor]]
_KNOWN: dict[Any, int] = {}
_WORKS: list[_Work] = []

_LIBRARY = torch.library.Library("megatron_echo", "FRAGMENT")
_LIBRARY.define("on_used_rows(int work, Tensor? used, Tensor[] rows, Tensor[] whole) -> Tensor[]")


def has_memory_of_cpu(tensor: Tensor) -> bool:
    """True for a tensor on a CPU with values."""
    return tensor.is_cpu and not isinstance(tensor, FakeTensor)


def _on_cpu(
    work: int, used: Tensor | None, rows: Sequence[Tensor], whole: Sequence[Tensor]
) -> list[Tensor]:
    total = len(rows[0])
    end = total if used is None else min(int(used[-1]), total)
    made = _WORKS[work](*(tensor[:end] for tensor in rows), *whole)
    if end == total:
        return list(made)
    outputs = [tensor.new_empty(total, *tensor.shape[1:]) for tensor in made]
    for output, tensor in zip(outputs, made, strict=True):
        output[:end] = tensor
    return outputs


_LIBRARY.impl("on_used_rows", _on_cpu, "CPU")


def on_used_rows(
    work: _Work, used: Tensor | None, rows: Sequence[Tensor], *whole: Tensor
) -> Sequence[Tensor]:
    """``work(*rows, *whole)``: new tensors ``[B, ...]``, anything in the rows behind those in use.

    Without gradients. On a CPU ``work`` is given the rows in use only; elsewhere, where there are
    no values, all of them.

    Args:
        work: what computes each row by itself, a function or a method of what compares by value;
            it is kept for good.
        used: integers, the last of them the number of rows in use; None for all.
        rows: ``[B, ...]`` each.
        whole: what it is given besides.
    """
    if not has_memory_of_cpu(rows[0]):
        return work(*rows, *whole)
    key = getattr(work, "__func__", work), getattr(work, "__self__", None)
    if key not in _KNOWN:
        _KNOWN[key] = len(_WORKS)
        _WORKS.append(work)
    operator: Any = torch.ops.megatron_echo.on_used_rows
    return operator(_KNOWN[key], used, rows, whole)
