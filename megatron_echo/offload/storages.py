"""Saved tensors and the storages behind them, each with its own state and no lookup by name."""

import enum
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_echo.environment import is_capturing
from megatron_echo.offload.host_arena import Lease


class State(enum.Enum):
    """Where a storage is: one state follows the other."""

    RESIDENT = "on the device"
    COPYING = "on the device, on its way to the host"
    HOST = "on the host"
    RELOADING = "on the host, on its way back"
    RELOADED = "on the device again"


class Outbound:
    """A copy to the host that nobody waited for yet; it keeps its ``source`` alive, not the blob.

    ``source`` is the whole storage, uint8; ``copied`` the event at the end of the copy.
    """

    def __init__(self, source: Tensor, copied: Any, blob: "Blob") -> None:
        self.source, self.copied, self.blob = source, copied, weakref.ref(blob)


class Blob:
    """One storage with saved tensors in it. It lives as long as one of their handles."""

    def __init__(self, transfers: Any, name: str, handle: "Handle") -> None:
        """The storage of a handle's tensor; ``transfers`` are asked to adopt and drop it."""
        assert handle.tensor is not None
        storage = handle.tensor.untyped_storage()
        self.transfers = transfers
        self.name = name  # its region's
        self.index = -1  # its number in the step
        self.nbytes = storage.nbytes()
        self.identity = StorageWeakRef(storage)
        self.address = storage.data_ptr()
        self.home = handle.tensor.device
        # The original, uint8 ``[nbytes]``, while this object keeps it.
        self.source: Tensor | None = torch.empty(0, dtype=torch.uint8, device=self.home)
        self.source.set_(storage)
        self.state = State.RESIDENT
        self.lease: Lease | None = None
        self.outbound: Outbound | None = None  # the copy to the host, until compute waited for it
        self.copied: Any = None  # event at its end
        self.device: Tensor | None = None  # the reloaded copy, uint8 ``[nbytes]``
        self.loaded: Any = None  # event at its end
        self.is_captured = is_capturing()  # and so are its events
        self.is_held = False  # something else keeps the original, or emptied it: freeing is in vain
        self.needed = False  # backward asked for it
        self.on_drop: Callable[[Blob], None] | None = None
        transfers.adopt(self)

    def advance(self, state: State) -> None:
        """Go on to the next state; a ``RuntimeError`` if this is another one."""
        order = list(State)
        if order.index(state) != order.index(self.state) + 1:
            raise RuntimeError(
                f"A storage of {self.name} that is {self.state.value} cannot be {state.value}. "
                "This is a defect of the offloader; please report it."
            )
        self.state = state

    def notice_emptying(self) -> None:
        """Check whether somebody emptied the original, which is still kept here."""
        assert self.source is not None
        self.is_held |= self.source.untyped_storage().data_ptr() != self.address

    def present(self) -> Tensor:
        """The bytes on the device, uint8 ``[nbytes]``."""
        tensor = self.device if self.source is None else self.source
        assert tensor is not None
        return tensor

    @property
    def fate(self) -> str | None:
        """What became of the copy on the host; None if there is none."""
        if self.lease is None:
            return None
        if self.state in (State.RELOADING, State.RELOADED):
            return "reloaded"
        return "forwarded" if self.needed else "dropped"

    def __del__(self) -> None:
        self.transfers.drop(self)
        if self.on_drop is not None:
            self.on_drop(self)


class Handle:
    """What autograd keeps in place of a saved tensor.

    It notices, as autograd does, that the tensor was changed in place after it was saved: an empty
    alias of the tensor shares its version counter and none of its memory.
    """

    __slots__ = ("_alias", "_version", "blob", "nbytes", "owner", "tensor", "view")

    def __init__(self, tensor: Tensor, owner: Any) -> None:
        self.tensor: Tensor | None = tensor
        self.owner = owner
        self.blob: Blob | None = None
        self.nbytes = tensor.nbytes
        self._alias = tensor.detach()
        self._alias.data = tensor.new_empty(0)
        self._version = tensor._version
        self.view = (tensor.storage_offset(), tensor.size(), tensor.stride())

    @property
    def key(self) -> tuple[int, int]:
        """Equal for saved tensors that share a storage, and its content, and are both alive."""
        assert self.tensor is not None
        return self.tensor.untyped_storage()._cdata, self._version

    @property
    def storage_bytes(self) -> int:
        """Size of the tensor's storage now; 0 if somebody emptied it."""
        assert self.tensor is not None
        return self.tensor.untyped_storage().nbytes()

    def restore(self) -> Tensor:
        """The saved tensor, same bits, shape, strides and offset; an error if it was changed."""
        if self._alias._version != self._version:
            raise RuntimeError(
                "One of the variables needed for gradient computation has been modified by an "
                f"inplace operation: a tensor of shape {tuple(self.view[1])} saved at version "
                f"{self._version} is at version {self._alias._version}. Do not change tensors in "
                "place that backward needs."
            )
        if self.blob is None:
            assert self.tensor is not None
            return self.tensor
        data = self.owner.need(self.blob)
        restored = torch.empty(0, dtype=self._alias.dtype, device=data.device)
        return restored.set_(data.untyped_storage(), *self.view)


class OpenRegion:
    """A region while it is open: everything that autograd saves in it gets a handle.

    ``span`` and ``chunk`` say where in the model and in which forward pass; ``owner`` has
    ``need(blob)`` and ``transfers``.
    """

    def __init__(self, span: Any, chunk: Any, owner: Any) -> None:
        self.span, self.chunk = span, chunk
        self._handles: list[Handle] = []
        handles, backend = self._handles, owner.transfers.backend

        def pack(tensor: Tensor) -> Handle | Tensor:
            if not (_is_plain(tensor) and backend.accepts(tensor)):
                return tensor
            handles.append(Handle(tensor, owner))
            return handles[-1]

        self._hooks = saved_tensors_hooks(pack, _restore)
        self._hooks.__enter__()

    def close(self) -> list[Handle]:
        """Take the hooks off and hand the handles over; autograd keeps ``pack`` and its list."""
        self._hooks.__exit__()
        handles = self._handles.copy()
        self._handles.clear()
        return handles


def _is_plain(tensor: Tensor) -> bool:
    """False for subclasses, sparse and lazily conjugated or negated tensors."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
    )


def _restore(saved: Handle | Tensor) -> Tensor:
    return saved.restore() if isinstance(saved, Handle) else saved
