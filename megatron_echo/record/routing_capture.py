"""``--moe-echo-capture-routing``: where every token went, copied to the host behind the model.

The ids and weights of a layer call are packed on the device, in the compute stream's order, so the
source is free as soon as :meth:`RoutingCapture.record` returns. One copy on a stream of its own
brings them to pinned memory. The host waits for it at the end of the step, or when no block of the
ring is free.

One file a step and rank, ``.npz`` without pickle: ``iteration``, ``rank``, ``num_experts``,
``layout`` (see :mod:`megatron_echo.record.token_layout`), and for each call
``ids/<layer>/<microbatch>`` (uint16 ``[T, K]``) and ``weights/...`` (the 16 bits of bf16 as
uint16). At K = 8 that is 32 bytes a token.
"""

import os
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_echo.copy_lanes import Backend, CudaBackend, Lane
from megatron_echo.record.token_layout import TokenLayout
from megatron_echo.record.trace import write_npz

_MOST_EXPERTS = 2**16 - 1
"""E itself must fit into uint16: it stands for a missing choice."""


class Routing(NamedTuple):
    """What a router decided for T tokens."""

    ids: Tensor  # uint16 ``[T, K]``, the chosen experts; E for a missing choice
    weights: Tensor  # bf16 ``[T, K]``, their weights


class _Block(NamedTuple):
    """Memory for one call, used again only after the host has waited for its copy."""

    host: Tensor  # uint8, pinned where there is a device
    device: Tensor  # uint8, what is copied


class _Copy(NamedTuple):
    """A call on its way to the host."""

    layer: int
    microbatch: int
    shape: torch.Size
    block: _Block
    event: Any


def _parts(buffer: Tensor, shape: torch.Size) -> Routing:
    """Ids and weights in the first bytes of a uint8 buffer."""
    ids, weights = buffer[: 4 * shape.numel()].view(torch.uint16).view(2, *shape)
    return Routing(ids, weights.view(torch.bfloat16))


class RoutingCapture:
    """Copies routing decisions to the host and writes them at the end of each step.

    A folder that cannot be written ends the capture with a warning, not the training.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        ring_blocks: int,
        num_experts: int,
        rank: int = 0,
        backend: Backend | None = None,
    ) -> None:
        """Set up; nothing is allocated or written yet.

        Args:
            folder: where to.
            ring_blocks: most calls under way at a time, each with its memory on host and device.
                Layers times microbatches of a step never wait for each other.
            num_experts: E; a ``ValueError`` above 65535.
            rank: this process's, part of the file's name.
            backend: where copies run, by default that of the first tensor's device. Its events have
                ``synchronize()``, or are None where a copy is done at once.
        """
        if num_experts > _MOST_EXPERTS:
            raise ValueError(
                f"The ids of {num_experts} experts do not fit into 16 bits. "
                f"Capture the routing of at most {_MOST_EXPERTS} experts."
            )
        self._folder: Path | None = Path(folder)
        self._blocks_left = ring_blocks
        self._num_experts = num_experts
        self._rank = rank
        self._backend = backend
        self._free: list[_Block] = []
        self._under_way: deque[_Copy] = deque()  # oldest first
        self._calls: Counter[int] = Counter()
        self._arrived: dict[tuple[int, int], Routing] = {}

    @torch.no_grad()
    def record(self, layer: int, ids: Tensor, weights: Tensor) -> None:
        """Start the copy of one call. Nothing is read, and the host waits only for a full ring.

        A layer's calls in a step are the microbatches, from 0. ``ids`` are integers ``[T, K]`` from
        0 to E, written by the current stream; ``weights`` ``[T, K]`` are rounded to bf16.
        """
        if self._folder is None:
            return
        if self._backend is None:
            self._backend = CudaBackend() if ids.is_cuda else Backend()
        microbatch, nbytes = self._calls[layer], 4 * ids.numel()
        self._calls[layer] += 1
        block = self._take_block(self._backend, nbytes, ids.device)
        for target, source in zip(_parts(block.device, ids.shape), (ids, weights), strict=True):
            target.copy_(source)
        self._backend.wait(Lane.TO_HOST, self._backend.record(Lane.COMPUTE))
        self._backend.copy(Lane.TO_HOST, block.host[:nbytes], block.device[:nbytes])
        event = self._backend.record(Lane.TO_HOST)
        self._under_way.append(_Copy(layer, microbatch, ids.shape, block, event))

    def forget(self) -> None:
        """Leave the step in progress unwritten."""
        self._calls.clear()
        while self._under_way:
            self._wait_for_oldest()
        self._arrived.clear()

    def end_step(self, iteration: int, layout: TokenLayout | None = None) -> None:
        """Wait for the step's copies and write them; without a layout they cannot be replayed."""
        while self._under_way:
            self._wait_for_oldest()
        if self._arrived and self._folder is not None:
            arrays: dict[str, Any] = {
                "iteration": iteration,
                "rank": self._rank,
                "num_experts": self._num_experts,
                "layout": np.array(layout or (), dtype=np.int64),
            }
            for (microbatch, layer), routing in sorted(self._arrived.items()):
                for name, part in routing._asdict().items():
                    arrays[f"{name}/{layer}/{microbatch}"] = part.view(torch.uint16).numpy()
            path = self._folder / f"step-{iteration:08d}-rank-{self._rank:05d}.npz"
            try:
                write_npz(path, arrays)
            except OSError as error:
                self._folder = None
                print(f"WARNING: {path} cannot be written ({error}): no more captures.", flush=True)
        self.forget()

    def _take_block(self, backend: Backend, nbytes: int, device: torch.device) -> _Block:
        """A block whose last copy the host has waited for, with room for ``nbytes``."""
        if not self._free and not self._blocks_left:
            self._wait_for_oldest()
        if self._free:
            block = self._free.pop()
            if block.host.numel() >= nbytes:
                return block
        else:
            self._blocks_left -= 1
        return _Block(backend.allocate_host(nbytes), backend.allocate_device(nbytes, device))

    def _wait_for_oldest(self) -> None:
        """Keep what the oldest copy brings in memory of its own, and free its block."""
        copy = self._under_way.popleft()
        if copy.event is not None:
            copy.event.synchronize()
        routing = Routing(*(part.clone() for part in _parts(copy.block.host, copy.shape)))
        self._arrived[copy.microbatch, copy.layer] = routing
        self._free.append(copy.block)


@dataclass(frozen=True)
class StepCapture:
    """One file."""

    iteration: int  # Megatron's, from 1
    rank: int  # of the process that wrote it
    num_experts: int  # E
    calls: dict[tuple[int, int], Routing]  # by layer and microbatch, in the microbatches' order
    layout: TokenLayout | None = None  # the rank's; None if it was not known


def _load(path: Path) -> StepCapture:
    calls: dict[tuple[int, int], Routing] = {}
    with np.load(path, allow_pickle=False) as file:
        head = {name: int(file[name]) for name in ("iteration", "rank", "num_experts")}
        for name in file.files:
            kind, *call = name.split("/")
            if kind == "ids":
                weights = torch.from_numpy(file["/".join(("weights", *call))])
                ids = torch.from_numpy(file[name])
                layer, microbatch = map(int, call)
                calls[layer, microbatch] = Routing(ids, weights.view(torch.bfloat16))
        layout = file["layout"].tolist() if "layout" in file.files else ()
    return StepCapture(**head, calls=calls, layout=TokenLayout(*layout) if layout else None)


def read_captures(
    folder: str | os.PathLike, rank: int | None = None, iteration: int | None = None
) -> Iterator[StepCapture]:
    """A folder's captures by iteration and rank, each read in its turn.

    ``FileNotFoundError`` for none.
    """
    ranks = "*" if rank is None else f"{rank:05d}"
    steps = "*" if iteration is None else f"{iteration:08d}"
    paths = sorted(Path(folder).glob(f"step-{steps}-rank-{ranks}.npz"))
    if not paths:
        whose = "" if rank is None else f" of rank {rank}"
        raise FileNotFoundError(
            f"{folder} holds no captures{whose}. "
            f"Start the run with --moe-echo-capture-routing {folder}, in the same layout."
        )
    return map(_load, paths)
