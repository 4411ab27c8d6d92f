"""Where copies run: on side streams, or at once.

A backend only copies, records and waits; which order is needed is decided by its callers, for
activations only in ``offload/transfers.py``, so that what the simulated backend proves holds on a
device too.
"""

import contextlib
import enum
import fractions
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

_PROBE_BYTES = 64 << 20
_SUSTAINED = fractions.Fraction(4, 5)
"""Share of an idle link's speed to plan with: other traffic uses it too."""


class Lane(enum.Enum):
    """A queue of work that runs in order."""

    COMPUTE = "compute"
    TO_HOST = "to host"
    TO_DEVICE = "to device"
    BESIDE = "beside compute"


class Link(NamedTuple):
    """Bytes per tick of each direction, which do not share."""

    to_host: fractions.Fraction
    to_device: fractions.Fraction

    def ticks(self, nbytes: int, *, to_host: bool) -> int:
        """How long a copy takes, rounded up."""
        return math.ceil(nbytes / (self.to_host if to_host else self.to_device))


class Backend:
    """The eager backend: every copy is done when the call returns. Base class of the others."""

    def accepts(self, tensor: Tensor) -> bool:
        """True for a tensor on a device that this backend copies from."""
        return tensor.is_cpu

    def allocate_host(self, nbytes: int) -> Tensor:
        """Uint8 ``[nbytes]``, pinned if that means anything; a power of two."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def allocate_device(self, nbytes: int, device: torch.device) -> Tensor:
        """Uint8 ``[nbytes]`` of the compute stream's pool; earlier work may still use it."""
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """Copy uint8 to uint8 of the same length in that lane."""
        target.copy_(source)

    def inside(self, lane: Lane) -> contextlib.AbstractContextManager[Any]:
        """Give the lane what is launched in the block."""
        return contextlib.nullcontext()

    def record(self, lane: Lane) -> Any:
        """An event: everything that the lane was given so far is done."""

    def wait(self, lane: Lane, event: Any) -> None:
        """What the lane is given from now on runs after the event. The host does not wait."""

    def note(self, tensor: Tensor, access: Literal["write", "read", "free"]) -> None:
        """Hear that the compute lane wrote or will read the tensor, or that its memory goes."""

    def timestamp(self) -> Any:
        """A moment of the compute lane for :meth:`ticks`, None where time is not measured."""

    def synchronize(self) -> None:
        """Make all timestamps readable."""

    def ticks(self, start: Any, end: Any) -> int:
        """Ticks between two timestamps."""
        return 0

    @property
    def link(self) -> Link | None:
        """How fast copies are, None where time is not measured."""
        return None


class StreamBackend(Backend):
    """Lanes are streams of the default priority, ordered by events; for CUDA's stand-ins too.

    Nothing calls ``record_stream``: memory is freed, in the compute stream's order, only after
    the compute stream waited for the copy. A block with ``record_stream`` would come back only when
    a capture is over (torch 2.11 without ``graph_capture_record_stream_reuse``), so that a graph
    would hold every original for good.

    In a capture a side stream joins by its first wait for the captured stream, and its copies
    become nodes of the graph with their addresses: in the graph's pool, since all memory is
    allocated on the captured stream, and in the host's arena. CUDA refuses events of a capture
    outside of it, and the other way round. So whoever begins or ends one forgets its events.
    """

    def __init__(self) -> None:
        self._streams = {lane: torch.cuda.Stream() for lane in Lane if lane is not Lane.COMPUTE}

    def _stream(self, lane: Lane) -> torch.cuda.Stream:
        return torch.cuda.current_stream() if lane is Lane.COMPUTE else self._streams[lane]

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """Enqueue the copy."""
        with self.inside(lane):
            target.copy_(source, non_blocking=True)

    def inside(self, lane: Lane) -> contextlib.AbstractContextManager[Any]:
        """Make the lane's stream the current one."""
        return torch.cuda.stream(self._stream(lane))

    def record(self, lane: Lane) -> torch.cuda.Event:
        """Record on the lane's stream."""
        return self._stream(lane).record_event()

    def wait(self, lane: Lane, event: torch.cuda.Event) -> None:
        """Enqueue the wait."""
        self._stream(lane).wait_event(event)


class CudaBackend(StreamBackend):
    """Copies between a GPU and pinned memory. A tick is a nanosecond."""

    def accepts(self, tensor: Tensor) -> bool:
        """True for a CUDA tensor."""
        return tensor.is_cuda

    def allocate_host(self, nbytes: int) -> Tensor:
        """Pinned memory; PyTorch would round up to a power of two."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def timestamp(self) -> torch.cuda.Event:
        """An event with time on the compute stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def ticks(self, start: torch.cuda.Event, end: torch.cuda.Event) -> int:
        """Nanoseconds."""
        return round(start.elapsed_time(end) * 1e6)

    @functools.cached_property
    def link(self) -> Link:
        """Measured with one pinned copy in each direction, the first time it is asked for."""
        device = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device="cuda")
        host = self.allocate_host(_PROBE_BYTES)
        rates = []
        for target, source in ((host, device), (device, host)):
            target.copy_(source, non_blocking=True)  # the first touches the pages
            start = self.timestamp()
            target.copy_(source, non_blocking=True)
            end = self.timestamp()
            self.synchronize()
            rates.append(_SUSTAINED * _PROBE_BYTES / self.ticks(start, end))
        return Link(*rates)


class Errand:
    """Work beside what compute is given next, until compute waits for it.

    It begins behind all that compute was given before. What it uses is kept meanwhile: memory that
    is let go of may be handed out again, in compute's order, while the errand still uses it. Its
    ``result`` is good behind :meth:`wait`.
    """

    def __init__(self, backend: Backend, work: Callable[[], Any]) -> None:
        """Launch ``work``, which launches operations; with the eager backend it is done at once."""
        backend.wait(Lane.BESIDE, backend.record(Lane.COMPUTE))
        with backend.inside(Lane.BESIDE):
            self.result = work()
        self._backend, self._done = backend, backend.record(Lane.BESIDE)
        self._work: Callable[[], Any] | None = work

    def wait(self) -> Any:
        """Put it before what compute is given next, and give its result."""
        self._backend.wait(Lane.COMPUTE, self._done)
        self._work = None
        return self.result


def stream_backend() -> Backend:
    """Lanes of this process: streams where there are any.

    Where CUDA is pretended on a CPU its streams are too, so that a capture sees the order.
    """
    return StreamBackend() if torch.cuda.is_initialized() else Backend()


def backend_for(parameters: Iterable[Tensor]) -> Backend:
    """Where copies of a model run: on CUDA's streams if a part of it is on a GPU."""
    if any(parameter.is_cuda for parameter in parameters):
        return CudaBackend()
    return stream_backend()
