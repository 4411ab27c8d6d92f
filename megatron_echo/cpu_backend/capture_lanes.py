"""The streams of a capture: what CUDA refuses about them, and accesses that nothing orders.

As in CUDA, a stream belongs to the capture once it waits for an event of it, and all must be joined
before the capture ends. What CUDA does not check is found here too: accesses to the same memory
from two streams without an event between them, and memory that is freed while another stream may
still use it. The caching allocator gives such memory to the next allocation on the stream that
allocated it; the memory of a capture is kept apart, but the rule is the same.
"""

from collections.abc import Callable, Hashable
from typing import ClassVar

import torch
from torch import Tensor

from megatron_echo.cpu_backend.access_order import Access, AccessOrder, Clock


class CaptureError(RuntimeError):
    """Something that a graph cannot hold."""


def span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one behind its last; both 0 if empty."""
    if tensor.numel() == 0:
        return 0, 0
    steps = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = int(tensor.storage_offset())
    return begin * tensor.itemsize, (begin + steps + 1) * tensor.itemsize


class CaptureLanes:
    """Streams and memory of one capture, which began on the stream ``origin``.

    ``own_references(key)`` counts those to a storage that are the recorder's alone.
    """

    current: ClassVar["CaptureLanes | None"] = None
    """Of the capture under way in this process."""

    def __init__(self, origin: Hashable, own_references: Callable[[int], int]) -> None:
        self._origin = origin
        self._members = {origin}
        self._order = AccessOrder()
        self._own_references = own_references
        self._home: dict[int, Hashable] = {}
        self._visited: set[int] = set()

    def check_member(self, stream: Hashable, name: str) -> None:
        """Refuse work on a stream that waited for nothing of the capture; replays would lack it."""
        if stream not in self._members:
            raise CaptureError(
                f"{name} runs on a stream that is not part of the capture. Let the stream wait for "
                "an event of the captured one first."
            )

    def record(self, stream: Hashable) -> Clock | None:
        """What an event recorded in the stream knows; None if it is no event of this capture."""
        return self._order.record(stream) if stream in self._members else None

    def wait(self, stream: Hashable, seen: Clock | None) -> None:
        """Let a stream wait for an event, and so become part of the capture.

        A ``CaptureError`` says that the stream is part of it and the event is not.
        """
        if seen is not None:
            self._members.add(stream)
            self._order.wait(stream, seen)
        elif stream in self._members:
            raise CaptureError(
                "A captured stream waits for an event from outside of the capture. Record the "
                "event inside, or wait before the capture begins."
            )

    def allocate(self, stream: Hashable, tensor: Tensor) -> None:
        """New memory: it may be any that this stream allocated before and that is free.

        A ``CaptureError`` says that another stream may still use such memory.
        """
        for key in [key for key in self._visited if self._home.get(key) == stream]:
            if torch._C._storage_Use_Count(key) <= self._own_references(key):
                self._visited.remove(key)
                races = self._order.access(stream, key, 0, 2**63, writes=True)
                self._refuse(races, "Memory is freed")
        self._home[tensor.untyped_storage()._cdata] = stream
        self.access(stream, tensor, writes=True, name="The allocation")

    def access(self, stream: Hashable, tensor: Tensor, writes: bool, name: str) -> None:
        """Use a tensor; refused if nothing orders it behind an earlier use in another stream."""
        key = tensor.untyped_storage()._cdata
        if self._home.get(key, stream) != stream:
            self._visited.add(key)
        races = self._order.access(stream, key, *span(tensor), writes)
        self._refuse(races, f"{name} {'writes' if writes else 'reads'} memory")

    def keep(self, tensor: Tensor) -> None:
        """``record_stream``: the memory is not used again while the capture lasts."""
        self._home.pop(tensor.untyped_storage()._cdata, None)

    def end(self) -> None:
        """Refuse to end while a stream has work that the one it began on does not wait for."""
        if self._order.not_behind(self._origin):
            raise CaptureError(
                "The capture ends while another stream has work that the captured one does not "
                "wait for. Join every stream that was forked."
            )

    @staticmethod
    def _refuse(races: list[Access], what: str) -> None:
        if races:
            use = "writes" if races[0].writes else "reads"
            raise CaptureError(
                f"{what} while another stream still {use} it. Let the stream wait for an event "
                "that is recorded behind that."
            )
