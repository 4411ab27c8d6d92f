"""Activation offloading through hooks: no edit to model code, any module that has a name."""

import contextlib
import functools
import itertools
import logging
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from megatron_echo.copy_lanes import Backend, backend_for
from megatron_echo.environment import is_capturing
from megatron_echo.offload.config import OffloadConfig
from megatron_echo.offload.host_arena import HostArena
from megatron_echo.offload.recorder import Chunk, Entry, StepRecord
from megatron_echo.offload.regions import Edge, Span, find_spans
from megatron_echo.offload.report import StepSummary, as_table
from megatron_echo.offload.schedule import Scheduler
from megatron_echo.offload.storages import Blob, Handle, OpenRegion, State
from megatron_echo.offload.transfers import Transfers

logger = logging.getLogger(__name__)

_PENDING_BLOBS = 4
_AHEAD_BLOBS = 2


class ActivationOffloader:
    """Keeps saved tensors of chosen modules in host memory between forward and backward.

    A training step::

        offloader = ActivationOffloader(OffloadConfig(modules=("core_attn",))).attach(model)
        with offloader.step():
            for batch in microbatches:
                model(batch).sum().backward()
        optimizer.step()

    or ``step_end()`` between the last backward pass and the optimizer; a step begins by itself
    with the next forward pass. Passes without gradients are left alone. While nothing is known of
    the schedule everything eligible goes to the host and comes back one storage ahead of its use;
    after ``learning_steps`` equal steps a :class:`~megatron_echo.offload.schedule.Plan` says what
    goes and when. A step that departs from the plan goes on without one, and is learnt.

    A step with a plan can be captured in a CUDA graph, whole: its copies, waits and frees are then
    in the graph, and :meth:`statistics` are those of each replay. Keep the offloader, whose host
    memory the graph uses. Another schedule needs another capture.

    ``backend`` says where copies run, by default in CUDA's streams for a model on a GPU.
    """

    def __init__(self, config: OffloadConfig, backend: Backend | None = None) -> None:
        self.config = config
        self._backend = backend
        self._names = (*config.modules, *config.extra_regions)
        self._unused = set(self._names)
        self._models: list[nn.Module] = []
        self._hooks: list[Any] = []
        self._open: list[OpenRegion] = []
        self._chunks: dict[int, Chunk] = {}
        self._blobs = weakref.WeakValueDictionary[tuple[int, int], Blob]()
        self._excluded: set[int] = set()
        self._lock = threading.RLock()
        self._record: StepRecord | None = None
        self._largest = 0
        self._bytes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._uses: Counter[str] = Counter()
        self._last_step = StepSummary()

    def attach(self, model: nn.Module | Sequence[nn.Module]) -> Self:
        """Hook into a model, or into the model chunks of a virtual pipeline, in their order.

        Raises:
            ValueError: strict, and a configured name matches no module.
            RuntimeError: attached already.
        """
        if self._models:
            raise RuntimeError("This offloader is attached already. Use one for each model.")
        models = [model] if isinstance(model, nn.Module) else list(model)
        if self._backend is None:
            self._backend = backend_for(p for m in models for p in m.parameters())
        limits = self.config.max_host_bytes, self.config.slab_bytes
        arena = HostArena(self._backend.allocate_host, *limits)
        self.transfers = Transfers(self._backend, arena)
        self._scheduler = Scheduler(self.config, self._backend)
        if self.config.fraction > 0:
            self._attach_hooks(models)
        self._models = models
        return self

    def _attach_hooks(self, models: list[nn.Module]) -> None:
        spans = [
            (index, span)
            for index, model in enumerate(models)
            for span in find_spans(model, self.config.modules, self.config.extra_regions)
        ]
        missing = set(self._names) - {span.name for _, span in spans}
        if missing:
            self._complain(f"No module belongs to {', '.join(sorted(missing))}")
            self._unused -= missing
        whole, bind = list(enumerate(models)), functools.partial
        moments = [
            *((Edge(model, after=False), bind(self._begin_chunk, i)) for i, model in whole),
            # At one moment, regions close before others open.
            *((span.closes, bind(self._close, span)) for _, span in spans),
            *((span.opens, bind(self._enter, i, span)) for i, span in spans),
            *((Edge(model, after=True), bind(self._end_chunk, i)) for i, model in whole),
        ]
        self._hooks = [edge.hook(call) for edge, call in moments]

    def detach(self) -> None:
        """Take all hooks off the model; storages on the host stay until backward used them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._models = []

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """One training step: forward and backward passes of all its microbatches."""
        self.step_begin()
        try:
            yield
        except BaseException:
            self.step_abort()
            raise
        self.step_end()

    def step_begin(self) -> None:
        """Begin a step. Optional: the first forward pass with gradients begins one.

        One that is captured in a CUDA graph and not ready for that is a ``RuntimeError``.
        """
        if self._record is not None:
            self.step_abort()
        is_captured, plan = is_capturing(), self._scheduler.plan
        if is_captured and plan is None:
            raise RuntimeError(
                "The step is captured in a CUDA graph before offloading has a plan. Let at least "
                f"{self.config.learning_steps} steps of the same schedule run before, with "
                "--cuda-graph-warmup-steps."
            )
        if is_captured:
            self.transfers.arena.begin_capture()
        is_timed = self._scheduler.wants_times
        self._record = StepRecord(self.transfers.backend, is_timed, plan, is_captured)
        self._excluded = {
            tensor.untyped_storage()._cdata
            for model in self._models
            for tensor in itertools.chain(model.parameters(), model.buffers())
        }
        self.transfers.reset_peaks()
        self._bytes.clear()
        self._uses.clear()

    def step_end(self) -> None:
        """End a step, after its last backward pass and before the optimizer.

        Learns the schedule, and makes :meth:`statistics` and :meth:`report` say what happened.

        Raises:
            ValueError: strict, and a configured name saved nothing in the first step.
            RuntimeError: the step is captured and is not the one that was planned.
        """
        record = self._finish()
        if record is None:
            return
        if record.is_captured:
            record.check_complete()
        elif not record.is_broken and record.chunks:
            self._scheduler.learn(record.timeline())
            if self._unused:
                names, self._unused = ", ".join(sorted(self._unused)), set()
                self._complain(
                    f"Nothing was saved for backward in {names}, because the module is recomputed, "
                    "bypassed or an identity"
                )

    def step_abort(self) -> None:
        """End a step that failed: nothing is learnt from it."""
        self._close_all()
        self._finish()

    def _finish(self) -> StepRecord | None:
        record, self._record = self._record, None
        if record is not None:
            self.transfers.join()
            self._last_step = StepSummary.of(self.transfers, self._bytes, self._uses, record)
        return record

    def _complain(self, fault: str) -> None:
        message = f"{fault}. Leave such names out of the modules to offload."
        if self.config.strict:
            raise ValueError(message)
        logger.warning(message)

    @property
    def forecast_bytes(self) -> int | None:
        """What the plan of this or the next step says of ``offload/peak_device_bytes``."""
        plan = self._scheduler.plan if self._record is None else self._record.plan
        return None if plan is None else plan.peak_bytes

    def statistics(self) -> dict[str, float]:
        """Scalars of the last step.

        ``offload/bytes`` went to the host. ``offload/candidate_bytes`` is that and all
        ``offload/kept_REASON_bytes``; ``offload/bytes`` is the sum of ``offload/reloaded_bytes``,
        ``offload/forwarded_bytes`` (used while the original was still there) and
        ``offload/dropped_bytes`` (never used). ``offload/prefetched`` and ``offload/exposed``
        count storages whose way back began before they were needed, or only then;
        ``offload/hidden_bytes`` and ``offload/exposed_bytes`` are their sizes.
        ``offload/planned_bytes`` is what a plan sent, 0 while there is none.
        ``offload/host_bytes`` and ``offload/peak_device_bytes`` are high-water marks, the latter of
        the storages that the regions saved. ``offload/live_storages`` is 0 unless something
        kept a graph alive.
        """
        return self._last_step.as_scalars()

    def report(self) -> str:
        """A table of the last step by module."""
        return as_table(self._last_step)

    def _begin_chunk(self, index: int, failed: bool) -> None:
        self._close_all()  # of a forward pass that was interrupted
        if not _records_gradients():
            return
        if self._record is None:
            self.step_begin()
        assert self._record is not None
        self._chunks[index] = Chunk(len(self._record.chunks), index)
        self._record.chunks.append(self._chunks[index])

    def _end_chunk(self, index: int, failed: bool) -> None:
        if index in self._chunks and _records_gradients():
            self._close_all()
            self.transfers.notice_emptied()
            self._chunks.pop(index).is_ready = True
            if failed and self._record is not None:
                self._record.is_broken = True

    def _enter(self, index: int, span: Span, failed: bool) -> None:
        chunk = self._chunks.get(index)
        if failed or chunk is None or self._record is None or not _records_gradients():
            return
        self._open.append(OpenRegion(span, chunk, self))

    def _close(self, span: Span, failed: bool) -> None:
        if not any(region.span is span for region in self._open):
            return  # it did not open: no gradients are recorded
        if self._open[-1].span is not span:
            raise RuntimeError(
                f"The regions {span.name} and {self._open[-1].span.name} overlap and neither is "
                "inside the other. Offload one of them."
            )
        region = self._open.pop()
        handles = region.close()
        if not failed and handles and self._record is not None:
            self._unused.discard(span.name)
            with self._lock:
                self._settle(region, handles, self._record)

    def _close_all(self) -> None:
        while self._open:
            self._open.pop().close()

    def _settle(self, region: OpenRegion, saved: list[Handle], record: StepRecord) -> None:
        """Sort what a region saved into storages, and send those on their way."""
        storages: defaultdict[tuple[int, int], list[Handle]] = defaultdict(list)
        for handle in saved:
            storages[handle.key].append(handle)
        new = []
        for key, handles in storages.items():
            blob = self._blobs.get(key)
            if blob is None:
                reason = self._refusal(handles)
                if reason is not None:
                    self._bytes[region.span.name][reason] += handles[0].storage_bytes
                    continue
                blob = Blob(self.transfers, region.span.name, handles[0])
                self._blobs[key] = blob
                new.append(blob)
            for handle in handles:
                handle.blob, handle.tensor = blob, None
        if new:
            with record.mark(("close", region.chunk.model, region.span.name, len(new))) as position:
                for blob in new:
                    record.add(blob, region.chunk, position)
                    self._decide(blob)
                self._act(record, position)

    def _refusal(self, handles: list[Handle]) -> str | None:
        """Why the storage of these handles is no candidate, or None."""
        first = handles[0]
        if first.key[0] in self._excluded:
            return "parameter"
        if first.storage_bytes < max(1, self.config.min_tensor_bytes):
            return "small"
        covered = {handle.view: handle.nbytes for handle in handles}
        return "view" if 2 * sum(covered.values()) < first.storage_bytes else None

    def _decide(self, blob: Blob) -> None:
        """Send a new storage to the host, or keep it and count why."""
        self._largest = max(self._largest, blob.nbytes)
        plan = self._record.plan if self._record is not None else None
        reason = None if plan is None else plan.kept[blob.index]
        if plan is not None and reason is None:
            self._uses["planned_bytes"] += blob.nbytes
        if reason is None and not self.transfers.send(blob):
            reason = "host_full"
        self._bytes[blob.name][reason or "offloaded"] += blob.nbytes

    def _act(self, record: StepRecord, position: int, needed: Blob | None = None) -> None:
        """Releases and reloads at this mark: the plan's, or those of a rule while there is none.

        Few originals wait for their copies in forward; what backward needs next comes back while
        few have.
        """
        if record.plan is not None:
            for index in record.plan.release[position]:
                blob = record.entries[index].blob()
                if blob is not None and blob.outbound is not None:
                    self.transfers.release(blob.outbound)
            wanted: Iterable[Entry] = [record.entries[i] for i in record.plan.reload[position]]
        elif needed is None:
            self.transfers.trim(_PENDING_BLOBS * self._largest)
            return
        else:
            most = _AHEAD_BLOBS * self._largest
            wanted = itertools.takewhile(
                lambda _: self.transfers.reloading_bytes < most, record.next_needed(needed.index)
            )
        for entry in wanted:
            blob = entry.blob()
            if blob is not None and blob.state is State.HOST:
                self.transfers.fetch(blob)

    def need(self, blob: Blob) -> Tensor:
        """The bytes of a storage for backward, on the device, uint8 ``[blob.nbytes]``."""
        with self._lock:
            if not blob.needed:
                blob.needed = True
                record = self._record
                if record is None or not record.owns(blob):  # a graph that outlived its step
                    self._bring(blob)
                    self.transfers.receive(blob)
                else:
                    with record.mark(("need", blob.index)) as position:
                        record.entries[blob.index].need = position
                        self._bring(blob)
                        self._act(record, position, blob)
                        self.transfers.receive(blob)
        return blob.present()

    def _bring(self, blob: Blob) -> None:
        """Begin the way back if it has not begun, and count which it is."""
        if blob.state is State.HOST:
            self._uses["exposed"] += 1
            self._uses["exposed_bytes"] += blob.nbytes
            self.transfers.fetch(blob)
        elif blob.state is State.RELOADING:
            self._uses["prefetched"] += 1
            self._uses["hidden_bytes"] += blob.nbytes


def _records_gradients() -> bool:
    """False in evaluation, and in a recomputation inside backward, which uses all it saves."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1
