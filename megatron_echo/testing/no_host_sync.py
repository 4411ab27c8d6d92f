"""A tripwire for host synchronisation: code that makes the host wait for, or read, a device value.

    with no_host_sync():                    # raises HostSyncError at the line that reads
        layer(x).sum().backward()

    with no_host_sync("record") as sync:    # lists them
        layer(x).sum().backward()
    assert sync.hits == []

Every tensor counts as a device tensor: a CPU tensor stands for the CUDA tensor that it would be.
Patched on entry are methods of ``torch.Tensor`` that hand a value to Python (in backward and other
threads too), ``torch.cuda``'s waits, not called without CUDA, and ``torch.distributed``'s barriers
and collectives of Python objects. A ``TorchDispatchMode`` sees operators whose result or output
shape is data, in the entering thread and the backward that starts there.

What none of them can see:

* a wait inside one operator's C++ (``grouped_mm`` where it falls back to a loop on CUDA; tensors in
  ``tensor_split``; ``histc`` without bounds) or inside a custom operator's own operators, and the
  copy of pageable host memory by ``torch.tensor(..., device="cuda")``. ``host_reads.py`` lists the
  known cases that look at a tensor argument;
* operators called in a thread that the code itself started;
* names bound before entry (``from torch.cuda import synchronize``), pickling, ``data_ptr``, NCCL
  and extensions. ``torch.cuda.set_sync_debug_mode`` on a GPU is the complement, not a substitute:
  it misses event waits.

Deliberately strict: a copy to the CPU counts even with ``non_blocking=True``.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Literal, NamedTuple, Self
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_echo import host_reads
from megatron_echo.host_reads import is_cpu, masked_stores_of_cuda, reads_on_host

_TORCH = str(Path(torch.__file__).parent) + "/"
_NOT_CALLERS = (
    _TORCH,
    __file__,
    str(Path(__file__).with_name("capturable.py")),
    host_reads.__file__,
    str(Path(__file__).parent.parent / "cpu_backend" / "__init__.py"),
)


class Hit(NamedTuple):
    """One place where the host reads or waits: what it did (``"Tensor.item"``), ``file:line``."""

    kind: str
    where: str


class HostSyncError(RuntimeError):
    """The host read a device value, or waited for the device, under :class:`no_host_sync`."""


def caller() -> tuple[CodeType | None, int]:
    """Code and line of the innermost frame outside torch, the CPU backend and the tripwires."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith(_NOT_CALLERS):
            return frame.f_code, frame.f_lineno
        frame = frame.f_back
    return None, 0


def _moves_to_cpu(tensor: Any, /, *args: Any, **kwargs: Any) -> bool:
    """True if ``tensor.to(*args, **kwargs)`` names the CPU, or a CPU tensor from elsewhere."""
    return any(
        not tensor.is_cpu and other.is_cpu if isinstance(other, torch.Tensor) else is_cpu(other)
        for other in (*args, *kwargs.values())
    )


def _builds_from_tensors(data: Any = None, *args: Any, **kwargs: Any) -> bool:
    """True if ``torch.tensor(data, ...)`` reads tensors in a list, or moves one to the CPU."""
    if isinstance(data, torch.Tensor):
        return _moves_to_cpu(data, *args, **kwargs)
    return isinstance(data, list | tuple) and any(
        isinstance(item, torch.Tensor) or _builds_from_tensors(item) for item in data
    )


_WATCHED: tuple[tuple[str, str, Callable[..., bool] | None], ...] = (
    ("Tensor", "tolist numpy cpu item is_nonzero __array__ __contains__ __format__", None),
    ("Tensor", "__bool__ __int__ __float__ __complex__ __index__ __repr__", None),
    ("Tensor", "to", _moves_to_cpu),
    ("Tensor", "new_tensor", lambda self, *args, **kwargs: _builds_from_tensors(*args, **kwargs)),
    ("torch", "tensor as_tensor asarray", _builds_from_tensors),
    ("torch.accelerator", "synchronize", None),
    ("torch.cuda", "synchronize", None),
    ("torch.cuda.Event", "synchronize query", None),
    ("torch.cuda.Stream", "synchronize query", None),
    ("torch.distributed", "barrier monitored_barrier all_gather_object gather_object", None),
    ("torch.distributed", "broadcast_object_list scatter_object_list", None),
    ("torch.distributed", "send_object_list recv_object_list", None),
)
"""Where, which names, and which of their calls read (``None``: all)."""


class _Operators(TorchDispatchMode):
    """Reports operators that read on the host; what one operator calls inside is not dispatched."""

    def __init__(self, report: Callable[[str], object]) -> None:
        super().__init__()
        self._report = report

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if reads_on_host(func, args, kwargs or {}):
            self._report(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


class no_host_sync:
    """Watch for host synchronisation within a ``with`` block, forward and backward.

    What a reported call itself calls is not reported again. Contexts nest (each sees everything
    inside it) and everything patched is put back on exit, innermost context first.

    Args:
        mode: ``"raise"`` raises :class:`HostSyncError` where it happens, and once more at the end
            of the block if something swallowed it (another thread, a broad ``except``);
            ``"record"`` only fills :attr:`hits`.
        allow: code that reads on purpose, as ``"end/of/file.py:function"`` (the plain or the
            qualified name). It is matched with the innermost frame outside torch, only.

    Attributes:
        hits: a list of :class:`Hit`, in order.
    """

    def __init__(
        self, mode: Literal["raise", "record"] = "raise", allow: Collection[str] = ()
    ) -> None:
        if mode not in ("raise", "record"):
            raise ValueError(f"no_host_sync has no mode {mode!r}. Use 'raise' or 'record'.")
        if isinstance(allow, str) or not all(":" in entry for entry in allow):
            raise ValueError(
                f"allow={allow!r} is not a collection of 'file:function'. "
                "Write for example allow=['capture.py:read_routing']."
            )
        self.hits: list[Hit] = []
        self._earlier_hits = 0
        self._raises = mode == "raise"
        self._allow = [tuple(entry.rsplit(":", 1)) for entry in allow]
        self._undo: contextlib.ExitStack | None = None
        self._thread = threading.local()

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise RuntimeError(
                "This no_host_sync is already active. Make another one for the inner block."
            )
        with contextlib.ExitStack() as stack:
            for path, names, reads in _WATCHED:
                parts = [part for part in path.split(".") if part != "torch"]
                owner = functools.reduce(getattr, parts, torch)
                for name in names.split():
                    if hasattr(owner, name):
                        watch = self._watch(getattr(owner, name), f"{path}.{name}", reads)
                        stack.enter_context(mock.patch.object(owner, name, watch))
            one_hot = self._watch_one_hot(torch.nn.functional.one_hot)
            stack.enter_context(mock.patch.object(torch.nn.functional, "one_hot", one_hot))
            stack.enter_context(masked_stores_of_cuda())
            stack.enter_context(_Operators(self._report))
            self._undo = stack.pop_all()
        self._earlier_hits = len(self.hits)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        assert self._undo is not None
        undo, self._undo = self._undo, None
        undo.close()
        swallowed = self.hits[self._earlier_hits :]
        if self._raises and swallowed and kind is None:
            raise HostSyncError(
                f"{len(swallowed)} host synchronisation(s) were raised but swallowed: {swallowed}. "
                "Keep the values on the device, or let HostSyncError through."
            )

    def _watch(self, original: Callable, kind: str, reads: Callable[..., bool] | None) -> Callable:
        """``original``, reporting its calls, or those for which ``reads`` is true."""
        # Without CUDA a wait is not called, unless it is an outer context's watch.
        is_wait = kind.startswith(("torch.cuda", "torch.accelerator"))
        needs_cuda = is_wait and not hasattr(original, "_host_sync")

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if reads is not None and not reads(*args, **kwargs):
                return original(*args, **kwargs)
            self._report(kind)
            if needs_cuda and not torch.accelerator.is_available():
                return kind.endswith("query") or None
            with self._unreported():
                return original(*args, **kwargs)

        vars(watched)["_host_sync"] = kind
        return watched

    def _watch_one_hot(self, original: Callable) -> Callable:
        """``one_hot``, which reads the number of classes; the check of a given one is the CPU's."""

        def one_hot(input: torch.Tensor, num_classes: int = -1) -> torch.Tensor:
            if num_classes == -1:
                self._report("torch.nn.functional.one_hot")
            with self._unreported():
                return original(input, num_classes)

        return one_hot

    @contextlib.contextmanager
    def _unreported(self) -> Iterator[None]:
        """Report nothing in this thread: what happens is part of a call that was judged."""
        depth = getattr(self._thread, "depth", 0)
        self._thread.depth = depth + 1
        try:
            yield
        finally:
            self._thread.depth = depth

    def _report(self, kind: str) -> None:
        if getattr(self._thread, "depth", 0):
            return
        code, line = caller()
        file, function = (code.co_filename, code.co_qualname) if code else ("unknown", "unknown")
        if any(
            file.endswith(suffix) and name in (function, function.rpartition(".")[2])
            for suffix, name in self._allow
        ):
            return
        self.hits.append(Hit(kind, f"{file}:{line}"))
        if self._raises:
            raise HostSyncError(
                f"{kind} at {file}:{line} makes the host wait for a device value. Keep the value "
                f"on the device, or, if the host is meant to read it there, pass "
                f'no_host_sync(allow=["{Path(file).name}:{function}"]).'
            )
