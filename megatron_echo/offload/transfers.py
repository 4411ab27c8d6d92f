"""The copies of storages and their order: the one place that knows which event guards what.

==========================================  =====================================================
first                                       then
==========================================  =====================================================
compute wrote the storage                   copy to the host
the block's last reader (its guard)         copy to the host into the block
copy to the host                            compute frees the original
copy to the host                            copy back
compute's last use of the new allocation    copy back into it
copy back                                   compute uses it, or frees it
all copies of a step                        the end of the step
==========================================  =====================================================
"""

from torch import Tensor

from megatron_echo.copy_lanes import Backend, Lane
from megatron_echo.environment import is_capturing
from megatron_echo.offload.host_arena import HostArena
from megatron_echo.offload.storages import Blob, Outbound, State


class Transfers:
    """Moves blobs, and counts their bytes on the device."""

    def __init__(self, backend: Backend, arena: HostArena) -> None:
        self.backend = backend
        self.arena = arena
        self.pending: dict[Outbound, None] = {}  # compute did not wait for yet, oldest first
        self._working: dict[Lane, None] = {}
        self.reloading_bytes = 0  # brought back or on the way, and not needed yet
        self.device_bytes = 0  # originals and reloaded ones, until they are let go of
        self.peak_device_bytes = 0

    def reset_peaks(self) -> None:
        """Look for the highest use of memory anew."""
        self.peak_device_bytes = self.device_bytes
        self.arena.peak_leased_bytes = self.arena.leased_bytes

    def adopt(self, blob: Blob) -> None:
        """Take note of a blob that compute has just produced."""
        self._on_device(blob.nbytes)
        self.backend.note(blob.present(), "write")

    def send(self, blob: Blob) -> bool:
        """Begin the copy to the host; False if the arena is full."""
        lease = self.arena.lease(blob.nbytes)
        if lease is None:
            return False
        self.backend.wait(Lane.TO_HOST, self.backend.record(Lane.COMPUTE))
        if lease.guard is not None:
            self.backend.wait(Lane.TO_HOST, lease.guard)
        source = blob.present()
        self.backend.copy(Lane.TO_HOST, lease.block[: blob.nbytes], source)
        blob.lease, blob.copied = lease, self.backend.record(Lane.TO_HOST)
        self._working[Lane.TO_HOST] = None
        blob.advance(State.COPYING)
        blob.outbound = Outbound(source, blob.copied, blob)
        self.pending[blob.outbound] = None
        return True

    def release(self, outbound: Outbound) -> None:
        """Let go of an original, in compute's order behind its copy."""
        del self.pending[outbound]
        self.backend.wait(Lane.COMPUTE, outbound.copied)
        blob = outbound.blob()
        if blob is None:
            self._free(outbound.source)
            return
        blob.outbound = None
        blob.notice_emptying()
        if not blob.needed and not blob.is_held:
            blob.source = None
            blob.advance(State.HOST)
            self._free(outbound.source)

    def notice_emptied(self) -> None:
        """See which originals were emptied while their copies may still have been under way.

        Their owner computes them again before backward uses them (Megatron's checkpoint without
        output; call this before), so they stay and the copies are not used.
        """
        for outbound in self.pending:
            blob = outbound.blob()
            if blob is not None:
                blob.notice_emptying()

    def trim(self, most_bytes: int) -> None:
        """Release the oldest originals until no more than ``most_bytes`` are pending."""
        total = sum(outbound.source.numel() for outbound in self.pending)
        for outbound in list(self.pending):
            if total <= most_bytes:
                return
            total -= outbound.source.numel()
            self.release(outbound)

    def join(self) -> None:
        """End a step: release all originals, and put all copies before what compute does next.

        A capture must not end before: streams that were forked in it have to be joined.
        """
        self.trim(0)
        for lane in self._working:
            self.backend.wait(Lane.COMPUTE, self.backend.record(lane))
        self._working.clear()
        self.arena.end_capture()

    def fetch(self, blob: Blob) -> None:
        """Begin the copy back."""
        assert blob.lease is not None
        like = blob.lease.block[: blob.nbytes]
        blob.device = self.backend.allocate_device(blob.nbytes, blob.home)
        self._on_device(blob.nbytes)
        self.backend.wait(Lane.TO_DEVICE, self.backend.record(Lane.COMPUTE))
        self.backend.wait(Lane.TO_DEVICE, blob.copied)
        self.backend.copy(Lane.TO_DEVICE, blob.device, like)
        blob.loaded = blob.lease.guard = self.backend.record(Lane.TO_DEVICE)
        self._working[Lane.TO_DEVICE] = None
        blob.advance(State.RELOADING)
        self.reloading_bytes += blob.nbytes

    def receive(self, blob: Blob) -> None:
        """Make compute wait for the copy back, if it is on its way."""
        if blob.state is not State.RELOADING:
            return
        self.backend.wait(Lane.COMPUTE, blob.loaded)
        blob.is_held = not blob.identity.expired()
        blob.advance(State.RELOADED)
        self.reloading_bytes -= blob.nbytes
        self.backend.note(blob.present(), "read")

    def drop(self, blob: Blob) -> None:
        """The last handle is gone: free the device's bytes and give the block back.

        An original whose copy is under way is freed later, by :meth:`release`. Behind a capture
        that failed nothing is under way, and its events are of no use.
        """
        if blob.state is State.RELOADING:
            if blob.is_captured == is_capturing():
                self.backend.wait(Lane.COMPUTE, blob.loaded)
            self.reloading_bytes -= blob.nbytes
        if blob.lease is not None:
            self.arena.give_back(blob.lease)
        if blob.state is not State.HOST and blob.outbound is None:
            self._free(blob.present())

    def _on_device(self, nbytes: int) -> None:
        self.device_bytes += nbytes
        self.peak_device_bytes = max(self.peak_device_bytes, self.device_bytes)

    def _free(self, tensor: Tensor) -> None:
        self.device_bytes -= tensor.numel()
        self.backend.note(tensor, "free")
