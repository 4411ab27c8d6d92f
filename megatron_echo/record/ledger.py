"""What each module keeps for backward: a ledger of autograd's saved tensors.

    with SavedTensorLedger(model) as ledger:
        model(x).sum().backward()
    print(ledger.peak_bytes())
    ledger.plot("ledger.png")

Every storage is counted once, at the module that saved it first, however many views and aliases are
saved of it. It is live until autograd has dropped the last of them. Shapes are all that is needed:
a model on the meta device, or of fake tensors, gives the same ledger as a real one.

Other saved-tensor hooks, inside the block and outside, keep working; see ``saved_tensors.py``.
Not seen: tensors that a custom function keeps as attributes of its ``ctx``, and what a compiled
region keeps.
"""

import dataclasses
import json
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Module

from megatron_echo.record.ledger_plot import plot_ledger, total_curve
from megatron_echo.record.saved_tensors import (
    kept_storages,
    plain_tensors,
    storage_key,
    watch_saved_tensors,
)

KEPT = ("activation", "index")
"""The kinds that exist because of backward; weights and buffers would be there anyway."""

_WRAPPERS = re.compile(r"^(module\.)+")
_LAYER = re.compile(r"(.*?layers\.\d+)(?:\.|$)(.*)")
_OUTSIDE = "(outside)"


@dataclasses.dataclass
class Entry:
    """One storage that was kept for backward; dtype and shape are of the first tensor saved."""

    layer: str  # path of its layer, ``decoder.layers.3``, or of the module outside of layers
    module: str  # path below the layer of the innermost module that saved it
    microbatch: int | None  # number of the model's forward pass, from 0; None outside of one
    kind: str  # ``activation``, ``index``, ``weight`` or ``buffer``
    dtype: str  # such as ``bfloat16``
    shape: tuple[int, ...]
    nbytes: int  # of the whole storage
    saved_at: int  # number of the event, from 0
    saves: int = 1  # tensors saved of it
    freed_at: int | None = None  # number of the event, None while it is live
    taken: bool = False  # another hook keeps something else for it (a copy on the host, nothing)


class SavedTensorLedger:
    """Records what is saved for backward within a ``with`` block. Enter it once.

    Saves of the block are followed to their end even where backward runs after it. ``entries``
    are in the order in which they were saved. Given several models, the chunks of a virtual
    pipeline, their layers are named ``chunk0.``, ``chunk1.`` ...
    """

    def __init__(self, model: Module | Sequence[Module]) -> None:
        chunks = [model] if isinstance(model, Module) else list(model)
        self._chunks = {f"chunk{i}." if len(chunks) > 1 else "": m for i, m in enumerate(chunks)}
        self.entries: list[Entry] = []
        self._kinds: dict[int, str] = {}
        self._known: list[Tensor] = []  # keeps the addresses in _kinds from being used again
        self._live: dict[int, tuple[Entry, list[int]]] = {}
        self._events = 0
        self._stack: list[tuple[str, int | None]] = []
        self._forwards = dict.fromkeys(self._chunks, 0)
        self._lock = threading.RLock()
        self._hooks: list[Any] = []
        self._watch: watch_saved_tensors | None = None

    def __enter__(self) -> Self:
        if self._watch is not None:
            raise RuntimeError("This ledger was used before. Make another one for this block.")
        for prefix, chunk in self._chunks.items():
            self._class(chunk.parameters(), "weight")
            self._class(chunk.buffers(), "buffer")
            for name, module in chunk.named_modules():
                self._watch_module(module, prefix, name)
        self._watch = watch_saved_tensors(self._note).__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._watch is not None
        self._watch.__exit__(*exc)
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _class(self, tensors: Iterable[Tensor], kind: str) -> None:
        for tensor in tensors:
            for plain in plain_tensors(tensor):
                self._kinds.setdefault(storage_key(plain), kind)
                self._known.append(plain)

    def _watch_module(self, module: Module, prefix: str, name: str) -> None:
        path = (prefix + _WRAPPERS.sub("", name + ".")).rstrip(".") or "(model)"

        def enter(module: Module, args: Any) -> None:
            microbatch = self._stack[-1][1] if self._stack else None
            if name == "" and torch.is_grad_enabled():
                microbatch = self._forwards[prefix]
                self._forwards[prefix] += 1
            self._stack.append((path, microbatch))

        def leave(module: Module, args: Any, output: Any) -> None:
            self._stack.pop()

        self._hooks.append(module.register_forward_pre_hook(enter, prepend=True))
        self._hooks.append(module.register_forward_hook(leave, always_call=True))

    def _note(self, tensor: Tensor, packed: Any) -> Callable[[], None]:
        kept = kept_storages(packed)
        saves = [self._save(p, storage_key(p) not in kept) for p in plain_tensors(tensor)]
        return lambda: self._release(saves)

    def _save(self, tensor: Tensor, taken: bool) -> int | Entry:
        """Count a save; what :meth:`_release` needs."""
        with self._lock:
            key = storage_key(tensor)
            if not taken and key in self._live:
                entry, saves = self._live[key]
                entry.saves += 1
                saves[0] += 1
                return key
            entry = self._new_entry(tensor, taken)
            if taken:
                return entry
            self._live[key] = (entry, [1])
            return key

    def _new_entry(self, tensor: Tensor, taken: bool) -> Entry:
        path, microbatch = self._stack[-1] if self._stack else (_OUTSIDE, None)
        parts = _LAYER.fullmatch(path)
        layer, module = parts.groups() if parts else (path.split(".")[0], path.partition(".")[2])
        is_number = tensor.is_floating_point() or tensor.is_complex()
        kind = self._kinds.get(storage_key(tensor), "activation" if is_number else "index")
        entry = Entry(
            layer, module, microbatch, kind, str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape), tensor.untyped_storage().nbytes(), self._events, taken=taken,
        )  # fmt: skip
        self._events += 1
        self.entries.append(entry)
        return entry

    def _release(self, saves: list[int | Entry]) -> None:
        with self._lock:
            for save in saves:
                if isinstance(save, Entry):
                    ended = save
                else:
                    ended, count = self._live[save]
                    count[0] -= 1
                    if count[0] > 0:
                        continue
                    del self._live[save]
                ended.freed_at = self._events
                self._events += 1

    def live_bytes(self, kinds: Sequence[str] = KEPT) -> int:
        """Bytes kept now; by default without weights and buffers. Taken storages do not count."""
        return sum(entry.nbytes for entry, _ in self._live.values() if entry.kind in kinds)

    def peak_bytes(self) -> int:
        """The most bytes of :data:`KEPT` kinds at a time."""
        return int(max(total_curve(self._kept(), self._events)))

    def _kept(self) -> list[Entry]:
        return [entry for entry in self.entries if entry.kind in KEPT and not entry.taken]

    def write_json(self, path: str | Path) -> None:
        """Every entry, and the totals in bytes."""
        written = {
            "peak_bytes": self.peak_bytes(),
            "live_bytes": self.live_bytes(),
            "events": self._events,
            "entries": [dataclasses.asdict(entry) for entry in self.entries],
        }
        Path(path).write_text(json.dumps(written) + "\n")

    def plot(self, path: str | Path) -> None:
        """Draw the bytes kept over the block, stacked by module, into a file such as ``.png``."""
        plot_ledger(self._kept(), self._events, path)
