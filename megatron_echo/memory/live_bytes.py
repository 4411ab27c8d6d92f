"""Counts the bytes of all tensors alive, real or fake, operator by operator."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_VALUE_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)


class LiveBytes(TorchDispatchMode):
    """Within the block, every storage that an operator makes counts until it is gone.

    Values are not looked at: where the code asks for one (``.item()`` of a gradient norm), a
    fake tensor answers 1. ``skip_collectives`` leaves every result of ``torch.distributed`` as
    it is: fake tensors need it, and a process group of the backend ``fake``.

    Attributes:
        live: bytes alive now.
        peak: the most so far, of the storages made in the block.
    """

    def __init__(self, skip_collectives: bool = False) -> None:
        super().__init__()
        self._skips_collectives = skip_collectives
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _VALUE_READS and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1
        if func.namespace == "c10d" and self._skips_collectives:
            return nothing_sent(func, args)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        # PyTorch keeps a storage's Python object as long as the storage itself: its end is the end.
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known or nbytes == 0:
            return

        def gone(_: weakref.ref) -> None:
            self.live -= nbytes
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.live += nbytes
        self.peak = max(self.peak, self.live)


def nothing_sent(func: Any, args: tuple) -> Any:
    """What a collective returns: its first argument, the outputs, and a finished work."""
    names = [argument.name for argument in func._schema.arguments]
    with no_dispatch():
        group = args[names.index("process_group")]
        work = torch.ops.c10d.barrier(torch.zeros(1), group, [], False, -1)
    returns = [work if "Work" in str(r.type) else args[0] for r in func._schema.returns]
    return returns[0] if len(returns) == 1 else tuple(returns)


def bytes_of(tensors: Iterable[Tensor], besides: Sequence[Tensor] = ()) -> int:
    """Bytes of the distinct storages; those of some other tensors do not count."""
    known = {tensor.untyped_storage()._cdata for tensor in besides}
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(nbytes for key, nbytes in found.items() if key not in known)
