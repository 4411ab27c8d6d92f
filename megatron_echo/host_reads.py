"""Which operators make the host read a device value: one table for graph and tripwire.

Every tensor counts as one of a CUDA device, so that a CPU gives the same answer.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_TAGS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_OF_AN_ARGUMENT = (
    *("aten.masked_fill.Tensor", "aten.masked_fill_.Tensor", "aten._linalg_check_errors.default"),
    *("aten.index_fill.int_Tensor", "aten.index_fill_.int_Tensor"),
)
"""Operators without a tag whose CUDA kernels read a tensor argument on the host."""

_INDEXING = ("aten.index.", "aten.index_put", "aten._index_put_impl", "aten._unsafe_index")


def is_cpu(device: Any) -> bool:
    """True for the CPU, by name or as a ``torch.device``."""
    return isinstance(device, str | torch.device) and str(device).split(":")[0] == "cpu"


def is_mask(index: Any) -> bool:
    """True for a tensor whose number of True decides how much is taken."""
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def reads_on_host(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """True if an operator needs a device value on the host, or waits for a copy.

    The arguments are those with which a ``TorchDispatchMode`` is called.
    """
    name = str(func)
    if name in _OF_AN_ARGUMENT:
        return True
    if name.startswith(_INDEXING):  # tagged whatever the index; only a mask becomes a list
        return any(map(is_mask, args[1]))
    if name == "aten.copy_.default":
        blocking = not kwargs.get("non_blocking", args[2:] == (True,))
        return blocking and args[0].is_cpu != args[1].is_cpu
    if name == "aten._to_copy.default":
        device = kwargs.get("device") or args[0].device
        return not kwargs.get("non_blocking") and is_cpu(device) != args[0].is_cpu
    if name == "aten.repeat_interleave.Tensor" and kwargs.get("output_size") is not None:
        return False
    return any(tag in func.tags for tag in _TAGS)


def _is_everything(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


@contextlib.contextmanager
def masked_stores_of_cuda() -> Iterator[None]:
    """Within it ``tensor[mask] = number`` is ``masked_fill_``, as CUDA makes it; a CPU counts.

    So is ``tensor[mask, :] = number``, which Megatron's embedding does under tensor parallelism.
    """
    original = Tensor.__setitem__

    def store(self: Tensor, index: Any, value: Any) -> None:
        is_number = isinstance(value, bool | int | float | complex)
        if isinstance(index, tuple) and index and all(map(_is_everything, index[1:])):
            index = index[0]
        if is_number and is_mask(index) and index.dim() <= self.dim():
            rest = (1,) * (self.dim() - index.dim())
            self.masked_fill_(index.bool().view(*index.shape, *rest), value)
        else:
            original(self, index, value)

    with mock.patch.object(Tensor, "__setitem__", store):
        yield
