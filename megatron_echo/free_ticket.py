"""Free a tensor's storage early, once its last consumer is through, and never a moment too early.

A schedule that runs a layer in stages holds the arguments and outputs of every stage: its backward
pass needs the tensors' gradients, not their values. Python references then keep the values alive.
A ticket gives the storage back and leaves the tensor, with its shape and its ``.grad``::

    queue = FreeQueue("free")
    rows = output.detach().requires_grad_()   # the next stage's argument
    ticket = queue.ticket(rows, output)
    with ticket.consumer():                   # around each one that reads rows, on its stream
        result = experts(rows)
    ticket.free()                             # or ticket.free(work): after this communication
    ...
    queue.drain()                             # at the one place that waits for communication

Nothing is freed that somebody may read again. The ticket refuses, and says why, if a consumer saved
the tensor for backward or kept a reference to it, or if a tensor that it was not told of shares its
storage: a view, a slice of a padded buffer, the input that a dispatch on one rank handed through.

Reading a freed storage is undefined: on a CPU it ends the process. So try a schedule in the mode
``poison``, which overwrites the storage in place of freeing it: what reads it then gets NaN (in
whole numbers, -1).
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.distributed import Work
from torch.nn import Parameter

from megatron_echo.record.saved_tensors import plain_tensors, storage_key, watch_saved_tensors

Mode = Literal["off", "poison", "free"]
_ALL_BITS = 255
"""Written to every byte, it makes a NaN of each float and -1 of each signed integer."""


def storage_owners(tensor: Tensor) -> int:
    """Tensors in C++ and Python that share the tensor's storage, itself included."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) - 1


class FreeTicket:
    """The right to free one tensor's storage, once.

    Attributes:
        refusal: why the storage stays, in a few words; None if nothing speaks against freeing it.
        freed_bytes: bytes freed (or overwritten), 0 before.
    """

    def __init__(
        self,
        tensor: Tensor,
        *partners: Tensor,
        mode: Mode = "free",
        queue: "FreeQueue | None" = None,
    ) -> None:
        """Take a ticket before the tensor's consumers run.

        Args:
            tensor: what the consumers read.
            partners: other tensors with this storage that nobody reads any more, such as the
                output that a stage's argument was detached from.
            mode: ``off`` does nothing at all, ``poison`` overwrites, ``free`` frees.
            queue: where a free that must wait goes.

        Raises:
            ValueError: there is no such mode.
        """
        if mode not in ("off", "poison", "free"):
            raise ValueError(f"FreeTicket has no mode {mode!r}. Use 'off', 'poison' or 'free'.")
        self.refusal: str | None = None
        self.freed_bytes = 0
        self._tensor: Tensor | None = tensor
        self._partners = partners
        self._mode, self._queue = mode, queue
        self._streams: list[Any] = []
        self._consumers = 0
        if any(isinstance(owner, Parameter) for owner in (tensor, *partners)):
            self._refuse("it is a parameter")

    def _refuse(self, reason: str) -> None:
        self.refusal = self.refusal or reason

    @contextlib.contextmanager
    def consumer(self) -> Iterator[None]:
        """Run a consumer within: what it saves is watched, its stream is waited for."""
        if self._mode == "off":
            yield
            return
        tensor = self._tensor
        if tensor is None:
            raise RuntimeError("A consumer came after the free. Free after the last consumer.")
        # A leaf's gradient accumulator refers to it, and is no reader: have it before counting.
        accumulator = get_gradient_edge(tensor) if tensor.requires_grad else None
        key, references = storage_key(tensor), sys.getrefcount(tensor)

        def note(saved: Tensor, packed: Any) -> None:
            if any(storage_key(plain) == key for plain in plain_tensors(saved)):
                self._refuse("a consumer saves it for backward")

        with watch_saved_tensors(note):
            yield
        if sys.getrefcount(tensor) > references:
            self._refuse("a consumer keeps a reference")
        del accumulator
        if tensor.is_cuda:
            self._streams.append(torch.cuda.current_stream(tensor.device))
        self._consumers += 1

    def free(self, after: Work | None = None) -> bool:
        """Free the storage, or leave it to the queue's drain.

        Args:
            after: a communication that reads the tensor; needs a queue.

        Returns:
            True if the storage is gone (or overwritten); a later one is counted by the queue.

        Raises:
            RuntimeError: no consumer ran, or there is no queue to wait in.
        """
        if self._mode == "off" or self._tensor is None:
            return False
        if self._consumers == 0:
            raise RuntimeError("No consumer has run. Run each one within ticket.consumer().")
        if after is None:
            return self._free_now()
        if self._queue is None:
            raise RuntimeError("This ticket has no queue to wait in. Take it from a FreeQueue.")
        self._queue.waiting.append((self, after))
        return False

    def _free_now(self) -> bool:
        tensor, self._tensor = self._tensor, None
        if tensor is None:
            return False
        key, partners, self._partners = storage_key(tensor), self._partners, ()
        # One tensor given twice is one owner.
        expected = {id(p) for p in (tensor, *partners) if storage_key(p) == key}
        if storage_owners(tensor) > len(expected):
            self._refuse("another tensor shares its storage")
        if self.refusal is None:
            self._empty(tensor)
        if self._queue is not None:
            self._queue.freed_bytes += self.freed_bytes
            if self.refusal is not None:
                self._queue.refusals[self.refusal] += 1
        return self.refusal is None

    def _empty(self, tensor: Tensor) -> None:
        """Free or overwrite the storage, in order with the consumers' streams."""
        storage = tensor.untyped_storage()
        self.freed_bytes = storage.nbytes()
        current = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        for stream in self._streams:
            if self._mode == "free":
                tensor.record_stream(stream)
            elif current is not None and stream != current:
                current.wait_stream(stream)
        if self._mode == "free":
            storage.resize_(0)
        else:
            storage.fill_(_ALL_BITS)  # type: ignore[attr-defined]


class FreeQueue:
    """Tickets of one mode, and those whose free waits for a communication.

    Attributes:
        freed_bytes: bytes freed (or overwritten) so far.
        refusals: how many tickets were refused so far, by reason.
        waiting: tickets, and what each waits for.
    """

    def __init__(self, mode: Mode = "free") -> None:
        """Choose the mode of all tickets; see :class:`FreeTicket`."""
        self.mode = mode
        self.freed_bytes = 0
        self.refusals: Counter[str] = Counter()
        self.waiting: list[tuple[FreeTicket, Work]] = []

    def ticket(self, tensor: Tensor, *partners: Tensor) -> FreeTicket:
        """A ticket whose free may wait here; see :class:`FreeTicket`."""
        return FreeTicket(tensor, *partners, mode=self.mode, queue=self)

    def drain(self) -> int:
        """Wait for the communications, then free what waited for them, in order.

        Returns:
            Bytes freed.
        """
        before = self.freed_bytes
        waiting, self.waiting = self.waiting, []
        for ticket, work in waiting:
            work.wait()
            ticket._free_now()
        return self.freed_bytes - before
