"""Watch what autograd saves, under whatever hooks are active.

Autograd asks only the innermost pair of saved-tensor hooks. So that an offloader, ``save_on_cpu``
or ``torch.utils.checkpoint`` works under the watch and the watch sees what they see, hooks that
are pushed inside the block are watched too, and those that are active outside are called.
"""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

Note = Callable[[Tensor, Any], Callable[[], None] | None]
_autograd: Any = torch._C._autograd


class _Handle:
    """Stands for a saved tensor in autograd's graph; its end is the end of the save."""

    def __init__(self, packed: Any, release: Callable[[], None] | None) -> None:
        self.packed, self._release = packed, release

    def __del__(self) -> None:
        if self._release is not None:
            self._release()


class watch_saved_tensors:
    """Call a function for each tensor that is saved for backward in a ``with`` block.

    ``note`` gets the tensor and what the active hooks keep of it (the tensor, detached, where
    there are none). What it returns, if anything, is called when autograd drops the save, also
    after the block and from any thread.
    """

    def __init__(self, note: Note) -> None:
        self._note = note
        self._push: Callable | None = None

    def __enter__(self) -> Self:
        outer = _autograd._top_saved_tensors_default_hooks(True)
        self._push = push = _autograd._push_saved_tensors_default_hooks
        # Detached: a saved output that knows its node would keep the node alive forever.
        push(*self._watched(*(outer or (Tensor.detach, lambda tensor: tensor))))
        _autograd._push_saved_tensors_default_hooks = lambda pack, unpack: push(
            *self._watched(pack, unpack)
        )
        return self

    def __exit__(self, *exc: object) -> None:
        _autograd._push_saved_tensors_default_hooks = self._push
        _autograd._pop_saved_tensors_default_hooks()

    def _watched(self, pack: Callable, unpack: Callable) -> tuple[Callable, Callable]:
        def watched_pack(tensor: Tensor) -> _Handle:
            packed = pack(tensor)
            return _Handle(packed, self._note(tensor, packed))

        return watched_pack, lambda handle: unpack(handle.packed)


def plain_tensors(tensor: Tensor) -> Iterable[Tensor]:
    """The tensor, or those that a wrapper such as DTensor consists of; sparse ones are left out."""
    if is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    elif tensor.layout == torch.strided:
        yield tensor


def storage_key(tensor: Tensor) -> int:
    """What tensors that share a storage have in common while one of them is alive."""
    return tensor.untyped_storage()._cdata


def kept_storages(packed: Any) -> set[int]:
    """Keys of the storages in what a hook returned, a watch's included."""
    while isinstance(packed, _Handle):
        packed = packed.packed
    tensors = [leaf for leaf in tree_leaves(packed) if isinstance(leaf, Tensor)]
    return {storage_key(plain) for tensor in tensors for plain in plain_tensors(tensor)}
