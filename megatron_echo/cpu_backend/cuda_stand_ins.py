"""Streams, events and a generator with CUDA's interface, for a machine that has only a CPU.

``cpu_backend`` puts them in the place of ``torch.cuda``'s.
"""

import time
from typing import Any

import torch


class Stream:
    """A stream on which every operation is already complete."""

    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stream_id = 0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority: there is only one."""
        return (0, 0)

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Record ``event``, or a new one, now."""
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        """True: nothing is ever outstanding."""
        return True

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        """CPU operations run in program order; there is nothing to wait for."""

    wait_event = wait_stream = synchronize = _do_nothing

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class Event:
    """An event that is complete as soon as it is recorded; keeps the host's clock."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._time: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Remember the time, in seconds of ``time.perf_counter``."""
        self._time = time.perf_counter()

    def query(self) -> bool:
        """True: what was recorded is done."""
        return True

    def elapsed_time(self, end: "Event") -> float:
        """Milliseconds from this event to ``end``."""
        if self._time is None or end._time is None:
            raise RuntimeError("Both events must be recorded before elapsed_time().")
        return (end._time - self._time) * 1e3

    def _do_nothing(self, *args: Any, **kwargs: Any) -> None:
        """Everything recorded is already complete."""

    wait = synchronize = _do_nothing


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
