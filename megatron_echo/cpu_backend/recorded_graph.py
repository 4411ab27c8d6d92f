"""A CUDA graph's stand-in on a CPU: the operations of a step, recorded once and replayed.

What holds for a CUDA graph holds here, so that what would break on a GPU breaks on a laptop:

- Python runs at capture only. A replay repeats the operations, on the tensors of the capture.
- A capture has no effect: what its operations wrote into tensors from outside is put back. The
  first replay has the effect.
- The host must not read a value in a capture; that is an error, as on a GPU.
- Streams must be forked from the captured one and joined to it, and what two of them do to the same
  memory must be ordered by events (``capture_lanes.py``). A replay runs in program order.

What a CPU cannot show: random numbers (refused here), collectives beside other work, speed.
``cpu_backend`` puts :class:`RecordedGraph` in the place of ``torch.cuda.CUDAGraph``.
"""

import atexit
import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (  # type: ignore[attr-defined]
    _create_work_from_future,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from megatron_echo.cpu_backend.capture_lanes import CaptureError, CaptureLanes
from megatron_echo.cpu_backend.cuda_stand_ins import Stream, current_stream, use_stream
from megatron_echo.host_reads import masked_stores_of_cuda, reads_on_host

_POINT_TO_POINT = ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")
_EMPTY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")

_OF_PYTHON = ("aten::set_",)
"""They bind a tensor to other memory and touch none, so that a replay has nothing to repeat."""

_graphs: "weakref.WeakSet[RecordedGraph]" = weakref.WeakSet()

_groups: set[dist.ProcessGroup] = set()
"""Those of recorded collectives. The operations' own handles end a group with Python's lock held,
for which gloo's threads may wait while the group waits for them; these objects let go of it."""


@atexit.register
def _reset_all() -> None:
    """Let process groups go while the interpreter lives: gloo's threads hang in a later end."""
    for graph in list(_graphs):
        graph.reset()
    _groups.clear()


@dataclass(frozen=True)
class _Operation:
    """One recorded call."""

    function: Any  # the operator
    arguments: tuple[tuple, dict]  # by position and keyword; tensors share the originals' memory
    stream: Stream  # on which it was captured
    storages: frozenset[int]  # keys of the memory that it touches
    fresh: tuple[Tensor | None, ...]  # for each output what a replay fills; None for a view


class _Recorder(TorchDispatchMode):
    def __init__(self, record: Callable[..., Any]) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self._record(func, args, kwargs or {})


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def _written(function: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    """The tensors that a call may write into."""
    schema, is_collective = function._schema, function.namespace == "c10d"
    for index, argument in enumerate(schema.arguments):
        if is_collective:  # without marks of what it writes
            writes = schema.name != "c10d::send" and not argument.name.startswith("input")
        else:
            writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


class RecordedGraph:
    """``torch.cuda.CUDAGraph``'s methods for operations on a CPU."""

    _current: ClassVar["RecordedGraph | None"] = None

    def __init__(self, keep_graph: bool = False) -> None:
        """An empty graph; the argument is CUDA's and has no meaning here."""
        self._operations: list[_Operation] = []
        self._inside: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._of_host: dict[int, Tensor] = {}
        self._sizes: dict[int, tuple[torch.UntypedStorage, int]] = {}
        self._aliases: dict[int, list[Tensor]] = {}
        self._lanes: CaptureLanes | None = None
        self._state_shape = torch.default_generator.get_state().shape
        self._modes: contextlib.ExitStack | None = None
        _graphs.add(self)

    @classmethod
    def is_capturing(cls) -> bool:
        """Whether this process is in a capture: ``torch.cuda.is_current_stream_capturing``."""
        return cls._current is not None

    def __len__(self) -> int:
        """How many operations a replay repeats."""
        return len(self._operations)

    def register_generator_state(self, generator: Any) -> None:
        """Nothing: random operations are refused."""

    def pool(self) -> tuple[int, int]:
        """An identifier as CUDA's memory pools have one."""
        return (0, 0)

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start recording; a ``CaptureError`` if another graph is being captured."""
        if RecordedGraph._current is not None:
            raise CaptureError("A graph is being captured already. End that capture first.")
        RecordedGraph._current = self
        self._lanes = CaptureLanes.current = CaptureLanes(current_stream(), self._references)
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(masked_stores_of_cuda())
        self._modes.enter_context(_Recorder(self._record))

    def capture_end(self) -> None:
        """Stop recording, and undo what the operations did to memory from outside.

        A ``CaptureError`` says that a stream is not joined.
        """
        assert self._modes is not None, "capture_begin has not been called"
        assert self._lanes is not None
        self._modes.close()
        self._modes = RecordedGraph._current = CaptureLanes.current = None
        for storage, size in self._sizes.values():
            if storage.nbytes() < size:
                storage.resize_(size)
        for memory, before in self._before.values():
            memory.copy_(before)
        lanes, self._lanes = self._lanes, None
        for kept in (self._before, self._of_host, self._aliases):
            kept.clear()
        lanes.end()

    def reset(self) -> None:
        """Forget everything."""
        self._operations.clear()
        self._inside.clear()
        self._sizes.clear()

    @torch.no_grad()
    def replay(self) -> None:
        """Repeat the recorded operations."""
        in_flight: list[tuple[frozenset[int], dist.Work]] = []
        for operation in self._operations:
            for transfer in [each for each in in_flight if each[0] & operation.storages]:
                transfer[1].wait()
                in_flight.remove(transfer)
            args, kwargs = operation.arguments
            result = operation.function(*args, **kwargs)
            if operation.function.namespace == "c10d":
                work = _work(result)
                if operation.function._schema.name in _POINT_TO_POINT:
                    in_flight.append((operation.storages, work))
                else:
                    work.wait()
            for old, new in zip(operation.fresh, _tensors(result), strict=True):
                if old is not None:
                    old.copy_(new)
        for _, work in in_flight:
            work.wait()

    def _record(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Run one operation of the capture and keep it."""
        if self._is_of_host(args, kwargs):
            result = function(*args, **kwargs)
            self._of_host |= {_key(tensor): tensor for tensor in _tensors(result)}
            return result
        name = function._schema.name
        if name in _OF_PYTHON:
            return function(*args, **kwargs)
        assert self._lanes is not None
        self._lanes.check_member(current_stream(), name)
        if reads_on_host(function, args, kwargs):
            raise CaptureError(
                f"{name} cannot be captured: the host would read a value of the device. Move it "
                "out of the captured part."
            )
        for tensor in _written(function, args, kwargs):
            self._keep(tensor)
        is_random = torch.Tag.nondeterministic_seeded in function.tags
        generator = torch.default_generator.get_state() if is_random else None
        # Later changes of a tensor's own size or data leave what is recorded as it is now.
        aliases = tree_map_only(Tensor, torch.ops.aten.detach.default, (args, kwargs))
        result = function(*args, **kwargs)
        if generator is not None and not torch.equal(
            generator, torch.default_generator.get_state()
        ):
            raise CaptureError(
                f"{name} draws random numbers, which a graph on a CPU cannot replay. Use "
                "--attention-dropout 0 --hidden-dropout 0, or a GPU."
            )
        self._add(function, aliases, result)
        return arrived(function, result)

    def _is_of_host(self, *arguments: Any) -> bool:
        """Whether a call computes with states of generators only, as Megatron's tracker does.

        They would be in the host's memory on a GPU machine too, so they are not part of a graph.
        """
        tensors = list(_tensors(arguments))
        return bool(tensors) and all(
            _key(tensor) in self._of_host
            or (tensor.dtype == torch.uint8 and tensor.shape == self._state_shape)
            for tensor in tensors
        )

    def _add(self, function: Any, arguments: tuple[tuple, dict], result: Any) -> None:
        touched = {_key(tensor): tensor for tensor in _tensors(arguments)}
        fresh: list[Tensor | None] = []
        for tensor in _tensors(result):
            fresh.append(None)
            if _key(tensor) not in touched:
                alias = torch.ops.aten.detach.default(tensor)
                fresh[-1] = self._inside[_key(tensor)] = alias
                self._hold(alias)
        for tensor in (*touched.values(), *(each for each in fresh if each is not None)):
            storage = tensor.untyped_storage()
            size = max(storage.nbytes(), self._sizes.get(_key(tensor), (storage, 0))[1])
            self._sizes[_key(tensor)] = storage, size
        is_view = (
            function.namespace != "c10d"
            and all(each is None for each in fresh)
            and not any(True for _ in _written(function, *arguments))
        )
        is_empty = function._schema.name in _EMPTY
        if not is_view:
            self._order(function, arguments, [each for each in fresh if each is not None])
        if not is_view and not is_empty:
            storages = frozenset(touched) | {_key(each) for each in fresh if each is not None}
            operation = _Operation(function, arguments, current_stream(), storages, tuple(fresh))
            self._operations.append(operation)
            if function.namespace == "c10d":
                _groups.update(_process_groups(arguments))
            for tensor in _tensors(arguments):
                self._hold(tensor)

    def _order(self, function: Any, arguments: tuple[tuple, dict], fresh: list[Tensor]) -> None:
        """Check what an operation does to memory against what other streams do to it."""
        assert self._lanes is not None
        stream, name = current_stream(), function._schema.name
        written = {id(tensor) for tensor in _written(function, *arguments)}
        for tensor in _tensors(arguments):
            self._lanes.access(stream, tensor, id(tensor) in written, name)
        for tensor in fresh:
            self._lanes.allocate(stream, tensor)

    def _hold(self, tensor: Tensor) -> None:
        self._aliases.setdefault(_key(tensor), []).append(tensor)

    def _references(self, key: int) -> int:
        """How many references to a storage are this object's: its aliases, and in ``_sizes``."""
        return len(self._aliases.get(key, ())) + (key in self._sizes)

    def keep(self, tensor: Tensor) -> None:
        """``record_stream`` in the capture."""
        if self._lanes is not None:
            self._lanes.keep(tensor)

    def _keep(self, tensor: Tensor) -> None:
        """Remember memory from outside as it was before the capture first writes it."""
        key = _key(tensor)
        if key not in self._inside and key not in self._before:
            memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            self._before[key] = memory, memory.clone()


@contextlib.contextmanager
def capture(graph: RecordedGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """``torch.cuda.graph`` for a :class:`RecordedGraph`; pools have no meaning here."""
    with use_stream(kwargs.get("stream") or Stream()):
        graph.capture_begin()
        try:
            yield
        except BaseException:
            with contextlib.suppress(CaptureError):  # what failed comes first
                graph.capture_end()
            raise
        graph.capture_end()


def record_stream(tensor: Tensor, stream: Any) -> None:
    """``Tensor.record_stream``: it matters in a capture only."""
    if RecordedGraph._current is not None:
        RecordedGraph._current.keep(tensor)


def _process_groups(tree: Any) -> Iterator[dist.ProcessGroup]:
    for leaf in tree_iter(tree):
        if isinstance(leaf, torch.ScriptObject) and str(leaf._type()).endswith(".ProcessGroup"):
            yield dist.ProcessGroup.unbox(leaf)


def _work(result: Any) -> dist.Work:
    """The handle in what a collective of the dispatcher returned."""
    script = next(leaf for leaf in tree_iter(result) if isinstance(leaf, torch.ScriptObject))
    return dist.Work.unbox(script)


def arrived(function: Any, result: Any) -> Any:
    """What an operator returned, with a handle that is done if it was a collective.

    Gloo computes part of a collective when its handle is waited for, with operators that belong to
    the collective and must not be recorded. A message is waited for where the program does so.
    """
    if function.namespace != "c10d" or function._schema.name in _POINT_TO_POINT:
        return result
    _work(result).wait()
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(None)
    done = dist.Work.boxed(_create_work_from_future(future))
    return tree_map_only(torch.ScriptObject, lambda _: done, result)
