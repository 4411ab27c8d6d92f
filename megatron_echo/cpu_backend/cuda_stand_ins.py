"""Streams, events and a generator with CUDA's interface, for a machine that has only a CPU.

``cpu_backend`` puts them in the place of ``torch.cuda``'s.
"""

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_echo.cpu_backend.access_order import Clock
from megatron_echo.cpu_backend.capture_lanes import CaptureError, CaptureLanes

_numbers = itertools.count()
_thread = threading.local()


class Stream:
    """A stream on which every operation is already complete, but for a capture's bookkeeping."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stream_id = next(_numbers)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority: there is only one."""
        return (0, 0)

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record ``event``, or a new one, now."""
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: "Event") -> None:
        """CPU operations run in program order; only a capture takes note."""
        event.wait(self)

    def wait_stream(self, stream: "Stream") -> None:
        """Wait for an event that is recorded in ``stream`` now."""
        self.wait_event(stream.record_event())

    def query(self) -> bool:
        """True: nothing is ever outstanding."""
        return True

    def synchronize(self) -> None:
        """Nothing is outstanding."""

    def __enter__(self) -> "Stream":
        self._outer = current_stream()
        set_stream(self)
        return self

    def __exit__(self, *exc: object) -> None:
        set_stream(self._outer)


_default = Stream()


def current_stream(device: Any = None) -> Stream:
    """The stream of this thread."""
    return getattr(_thread, "stream", _default)


def default_stream(device: Any = None) -> Stream:
    """The one that a thread begins with."""
    return _default


def set_stream(stream: Stream) -> None:
    """Use another stream in this thread."""
    _thread.stream = stream


@contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    """Use a stream inside the block; None changes nothing."""
    outer = current_stream()
    set_stream(stream or outer)
    try:
        yield
    finally:
        set_stream(outer)


class Event:
    """An event that is complete as soon as it is recorded; keeps the host's clock.

    Recorded in a capture it has no time, and only the streams of that capture may wait for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time: float | None = None
        self._capture: CaptureLanes | None = None
        self._seen: Clock | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Remember the time, in seconds of ``time.perf_counter``."""
        self._capture, self._seen = CaptureLanes.current, None
        if self._capture is not None:
            self._seen = self._capture.record(stream or current_stream())
        if self._seen is None:
            self._capture = None
            self._time = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait, by default the current one.

        A ``CaptureError`` says that one of the two belongs to a capture, and the other does not.
        """
        current, is_recorded = CaptureLanes.current, self._seen is not None or self._time
        if current is not None and is_recorded:
            seen = self._seen if self._capture is current else None
            current.wait(stream or current_stream(), seen)
        elif self._seen is not None:
            self._refuse()

    def query(self) -> bool:
        """True: what was recorded is done."""
        self.synchronize()
        return True

    def synchronize(self) -> None:
        """Everything recorded is already complete; ``CaptureError`` for an event of a capture."""
        if self._seen is not None:
            self._refuse()

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to ``end``."""
        for event in (self, end):
            event.synchronize()
        if self._time is None or end._time is None:
            raise RuntimeError("Both events must be recorded before elapsed_time().")
        return (end._time - self._time) * 1e3

    @staticmethod
    def _refuse() -> None:
        raise CaptureError(
            "An event of a capture is used outside of it. Record another one behind the replay."
        )


class DefaultGenerator:
    """The CPU's default generator with the graph-safe calls of a CUDA generator.

    Megatron's graph-safe RNG tracker exchanges ``torch.Generator`` objects in place of state
    tensors; a CPU generator has ``clone_state`` but neither of the ``graphsafe`` calls.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.default_generator, name)

    def graphsafe_get_state(self) -> torch.Generator:
        """A generator that holds a copy of the current state."""
        return torch.default_generator.clone_state()

    def graphsafe_set_state(self, generator: torch.Generator) -> None:
        """Continue from the state that ``generator`` holds."""
        torch.default_generator.set_state(generator.get_state())
