"""``--moe-echo-capture-routing``: the routing of every layer, copied to the host and replayed.

A call's ids, and on request its weights and logits, are packed on the device in the compute
stream's order, so the source is free as soon as :meth:`RoutingCapture.record` returns. One copy on
a stream of its own brings them to pinned memory. The host waits for it when somebody asks for the
result, at the end of the step, or when no slot of the ring is free.

One file a step and rank, ``.npz`` without pickle: ``iteration``, ``rank``, ``num_experts``, and for
each call ``ids/<layer>/<microbatch>`` (uint16 ``[T, K]``), ``weights/...`` (the 16 bits of bf16 as
uint16) and ``logits/...`` (fp32 ``[T, E]``). Ids at E = 256 and K = 8 are 16 bytes a token, fp32
logits are 1024.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_echo.copy_lanes import Backend, CudaBackend, Lane
from megatron_echo.record.trace import write_npz

_MOST_EXPERTS = 2**16 - 1
"""E itself must fit into uint16: it stands for a missing choice."""


class Routing(NamedTuple):
    """What a router decided for T tokens.

    Attributes:
        ids: uint16 ``[T, K]``, the chosen experts; E for a missing choice.
        weights: bf16 ``[T, K]``, their weights; None if not captured.
        logits: fp32 ``[T, E]``, before any score function; None if not captured.
    """

    ids: Tensor
    weights: Tensor | None = None
    logits: Tensor | None = None


_DTYPES = (torch.uint16, torch.bfloat16, torch.float32)
_Shapes = Sequence[torch.Size | None]


def _num_bytes(shapes: _Shapes) -> int:
    return sum(
        math.prod(shape) * dtype.itemsize
        for shape, dtype in zip(shapes, _DTYPES, strict=True)
        if shape is not None
    )


def _views(buffer: Tensor, shapes: _Shapes) -> Routing:
    """The parts of a uint8 buffer. The widest dtype lies first, so that all are aligned."""
    parts: dict[str, Tensor] = {}
    start = 0
    for name, shape, dtype in reversed(list(zip(Routing._fields, shapes, _DTYPES, strict=True))):
        if shape is not None:
            end = start + math.prod(shape) * dtype.itemsize
            parts[name] = buffer[start:end].view(dtype).view(shape)
            start = end
    return Routing(**parts)


@dataclass
class _Slot:
    """Memory for one call, used again only after the host has waited for its copy.

    Attributes:
        host: uint8, pinned where there is a device.
        device: uint8, what is copied.
    """

    host: Tensor
    device: Tensor


@dataclass(eq=False)
class CaptureHandle:
    """A call on its way to the host; made by :meth:`RoutingCapture.record`.

    Attributes:
        layer: its number.
        microbatch: its number within the step.
    """

    layer: int
    microbatch: int
    _pending: tuple[_Slot, _Shapes, Any] | None
    _release: Callable[["CaptureHandle", _Slot], None]
    _routing: Routing | None = None

    def ready(self) -> bool:
        """Whether :meth:`result` returns without waiting."""
        return self._pending is None or (event := self._pending[2]) is None or event.query()

    def result(self) -> Routing:
        """The routing as it was when it was recorded. Waits for the copy, the first time."""
        if self._pending is not None:
            slot, shapes, event = self._pending
            if event is not None:
                event.synchronize()
            # Unpinned memory of its own: the slot is overwritten by a later call.
            self._routing = _views(slot.host[: _num_bytes(shapes)].clone(), shapes)
            self._pending = None
            self._release(self, slot)
        assert self._routing is not None
        return self._routing


class RoutingCapture:
    """Copies routing decisions to the host and writes them at the end of each step.

    A folder that cannot be written ends the capture with a warning, not the training.

    Attributes:
        is_on: False after that; what is recorded then is not written.
        stalls: how often the ring was full, so that the host waited for its oldest copy.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None,
        ring_slots: int,
        num_experts: int,
        rank: int = 0,
        backend: Backend | None = None,
    ) -> None:
        """Set up; nothing is allocated or written yet.

        Args:
            folder: where to; None keeps the results for the handles only.
            ring_slots: most calls under way at a time, each with its memory on host and device.
                Layers times microbatches of a step never stall.
            num_experts: E, at most 65535.
            rank: this process's, part of the file's name.
            backend: where copies run. Its events have ``query()`` and ``synchronize()``, or are
                None where a copy is done at once. By default that of the first tensor's device.

        Raises:
            ValueError: no slot, or ids that 16 bits cannot hold.
        """
        if ring_slots < 1:
            raise ValueError(f"A ring of {ring_slots} slots holds no call. Use 1 or more.")
        if not 1 <= num_experts <= _MOST_EXPERTS:
            raise ValueError(
                f"The ids of {num_experts} experts do not fit into 16 bits. "
                f"Capture the routing of 1 to {_MOST_EXPERTS} experts."
            )
        self._folder = None if folder is None else Path(folder)
        self._ring_slots = ring_slots
        self._num_experts = num_experts
        self._rank = rank
        self._backend = backend
        self._num_slots = 0
        self._free: list[_Slot] = []
        self._unread: dict[CaptureHandle, None] = {}  # oldest first
        self._step: dict[tuple[int, int], CaptureHandle] = {}
        self.is_on = True
        self.stalls = 0

    @torch.no_grad()
    def record(
        self,
        layer: int,
        microbatch: int,
        ids: Tensor,
        weights: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> CaptureHandle:
        """Start the copy of one call. Nothing is read, and the host waits only for a full ring.

        A call that this step has already recorded is not copied again: a recomputed layer routes
        as it did.

        Args:
            layer: its number.
            microbatch: its number within the step.
            ids: integers ``[T, K]`` from 0 to E, written by the current stream.
            weights: ``[T, K]``, rounded to bf16.
            logits: ``[T, E]``, kept in fp32.

        Raises:
            ValueError: shapes or dtypes other than these.
            RuntimeError: the current stream is captured into a CUDA graph.
        """
        key = (microbatch, layer)
        if key in self._step:
            return self._step[key]
        self._check(ids, weights, logits)
        if self._backend is None:
            self._backend = CudaBackend() if ids.is_cuda else Backend()
        source = Routing(ids, weights, logits)
        shapes = tuple(None if part is None else part.shape for part in source)
        nbytes = _num_bytes(shapes)
        slot = self._take_slot(self._backend, nbytes, ids.device)
        for target, part in zip(_views(slot.device, shapes), source, strict=True):
            if target is not None and part is not None:
                target.copy_(part)
        self._backend.wait(Lane.TO_HOST, self._backend.record(Lane.COMPUTE))
        self._backend.copy(Lane.TO_HOST, slot.host[:nbytes], slot.device[:nbytes])
        event = self._backend.record(Lane.TO_HOST)
        handle = CaptureHandle(layer, microbatch, (slot, shapes, event), self._release)
        self._step[key] = handle
        self._unread[handle] = None
        return handle

    def forget(self) -> None:
        """Leave the step in progress unwritten; its handles stay valid."""
        self._step = {}

    def end_step(self, iteration: int) -> None:
        """Wait for the step's copies and write them, by microbatch and layer.

        Args:
            iteration: Megatron's, from 1.
        """
        step, self._step = self._step, {}
        if not step or self._folder is None or not self.is_on:
            return
        arrays: dict[str, Any] = {
            "iteration": iteration,
            "rank": self._rank,
            "num_experts": self._num_experts,
        }
        for (microbatch, layer), handle in sorted(step.items()):
            for name, part in handle.result()._asdict().items():
                if part is not None:
                    bits = part.view(torch.uint16) if part.dtype is torch.bfloat16 else part
                    arrays[f"{name}/{layer}/{microbatch}"] = bits.numpy()
        path = self._folder / f"step-{iteration:08d}-rank-{self._rank:05d}.npz"
        try:
            write_npz(path, arrays)
        except OSError as error:
            self.is_on = False
            print(f"WARNING: {path} cannot be written ({error}): no more captures.", flush=True)

    def _check(self, ids: Tensor, weights: Tensor | None, logits: Tensor | None) -> None:
        if ids.dim() != 2 or ids.dtype.is_floating_point or ids.dtype is torch.bool:
            raise ValueError(
                f"Ids of shape {list(ids.shape)} and dtype {ids.dtype} are no routing. "
                "Record integers [T, K], not a map."
            )
        shapes = {"weights": ids.shape, "logits": (ids.shape[0], self._num_experts)}
        for name, part in (("weights", weights), ("logits", logits)):
            if part is not None and part.shape != shapes[name]:
                raise ValueError(
                    f"The {name} {list(part.shape)} do not fit ids {list(ids.shape)} of "
                    f"{self._num_experts} experts. Record {list(shapes[name])}."
                )
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "A CUDA graph would replay this copy into the same slot. "
                "Capture the routing in a run without CUDA graphs of the router."
            )

    def _take_slot(self, backend: Backend, nbytes: int, device: torch.device) -> _Slot:
        """A slot whose last copy the host has waited for, with room for ``nbytes``."""
        if not self._free and self._num_slots == self._ring_slots:
            self.stalls += 1
            next(iter(self._unread)).result()
        if self._free:
            slot = self._free.pop()
            if slot.host.numel() >= nbytes:
                return slot
        else:
            self._num_slots += 1
        with torch.inference_mode(False):  # the slot serves training as well
            return _Slot(backend.allocate_host(nbytes), backend.allocate_device(nbytes, device))

    def _release(self, handle: CaptureHandle, slot: _Slot) -> None:
        del self._unread[handle]
        self._free.append(slot)


@dataclass(frozen=True)
class StepCapture:
    """One file.

    Attributes:
        iteration: Megatron's, from 1.
        rank: of the process that wrote it.
        num_experts: E.
        calls: by layer and microbatch, in the order of the microbatches.
    """

    iteration: int
    rank: int
    num_experts: int
    calls: dict[tuple[int, int], Routing]


def _load(path: Path) -> StepCapture:
    head: dict[str, int] = {}
    parts: dict[tuple[int, int], dict[str, Tensor]] = {}
    with np.load(path, allow_pickle=False) as file:
        for name in file.files:
            kind, *call = name.split("/")
            if not call:
                head[kind] = int(file[name])
                continue
            part = torch.from_numpy(file[name])
            if kind == "weights":
                part = part.view(torch.bfloat16)
            parts.setdefault((int(call[0]), int(call[1])), {})[kind] = part
    return StepCapture(**head, calls={call: Routing(**each) for call, each in parts.items()})


def read_captures(folder: str | os.PathLike, rank: int | None = None) -> Iterator[StepCapture]:
    """The captures of a folder, by iteration and rank; each is read when it is its turn.

    Args:
        folder: of ``--moe-echo-capture-routing``.
        rank: only this one's.

    Raises:
        FileNotFoundError: there is none.
    """
    return map(_load, _paths(folder, rank))


def _paths(folder: str | os.PathLike, rank: int | None) -> list[Path]:
    ranks = "*" if rank is None else f"{rank:05d}"
    paths = sorted(Path(folder).glob(f"step-*-rank-{ranks}.npz"))
    if not paths:
        whose = "" if rank is None else f" of rank {rank}"
        raise FileNotFoundError(
            f"{folder} holds no captures{whose}. "
            f"Start the run with --moe-echo-capture-routing {folder}, in the same layout."
        )
    return paths


class RoutingReplay:
    """Gives back what :class:`RoutingCapture` wrote for one rank. Holds one iteration at a time."""

    def __init__(
        self, folder: str | os.PathLike, rank: int = 0, num_experts: int | None = None
    ) -> None:
        """Look for the files.

        Args:
            folder: of the captures.
            rank: whose; the layout of the ranks must be that of the run that was captured.
            num_experts: E of the model that will route so; None if any will do.

        Raises:
            FileNotFoundError: none of this rank.
        """
        paths = _paths(folder, rank)
        self._paths = {int(path.stem.split("-")[1]): path for path in paths}
        self._num_experts = num_experts
        self._step: StepCapture | None = None

    def routing(self, iteration: int, layer: int, microbatch: int) -> Routing:
        """All that was captured of a call, on the host.

        Raises:
            LookupError: the call was not captured.
            ValueError: it was, with another number of experts.
        """
        if self._step is None or self._step.iteration != iteration:
            if iteration not in self._paths:
                raise LookupError(
                    f"Iteration {iteration} was not captured. "
                    f"Replay one of {min(self._paths)} to {max(self._paths)}."
                )
            self._step = _load(self._paths[iteration])
        if self._num_experts not in (None, self._step.num_experts):
            raise ValueError(
                f"{self._paths[iteration]} is of a model with {self._step.num_experts} experts, "
                f"not {self._num_experts}. Replay it with the same --num-experts."
            )
        call = (layer, microbatch)
        if call not in self._step.calls:
            raise LookupError(
                f"Iteration {iteration} has no capture of layer {layer}, microbatch {microbatch}. "
                "Replay with the layers and microbatches of the captured run."
            )
        return self._step.calls[call]

    def ids(self, iteration: int, layer: int, microbatch: int) -> Tensor:
        """Uint16 ``[T, K]`` on the host; raises as :meth:`routing` does."""
        return self.routing(iteration, layer, microbatch).ids


def replayed_map(ids: Tensor, num_experts: int) -> Tensor:
    """The map of choices that a router returns.

    Args:
        ids: integers ``[T, K]`` from 0 to E; E chooses nothing.
        num_experts: E.

    Returns:
        Bool ``[T, E]`` on the device of the ids.
    """
    chosen = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.bool, device=ids.device)
    return chosen.scatter_(1, ids.to(torch.int64), True)[:, :num_experts]
