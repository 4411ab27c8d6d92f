"""``--moe-echo-trace-dir``: who wanted which expert, and what the planner made of it, as ``.npz``.

One file for each traced step and pipeline stage, for the first expert-parallel group of a stage
(data-parallel replicas see other tokens of the same distribution).
"""

import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_echo.record.call_log import CallLog


def write_npz(path: Path, arrays: dict[str, Any], save: Callable[..., None] = np.savez) -> None:
    """Write arrays by name into a file, made with its folder, that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        save(file, **arrays)
    os.replace(unfinished, path)


@dataclass(frozen=True)
class StepTrace:
    """One file: C layer calls of one step on one pipeline stage. R ranks, E experts, S slots.

    Calls are in the order of microbatches, and within each in that of layers. Arrays are int32.
    """

    iteration: int  # Megatron's, from 1
    stage: int  # the pipeline stage's rank
    layer: np.ndarray  # ``[C]``, Megatron's layer numbers, from 1
    microbatch: np.ndarray  # ``[C]``, from 0
    counts: np.ndarray  # ``[C, R, E]``, token-expert pairs of each rank for each expert
    slot_expert: np.ndarray  # ``[C, R, S]``, the expert in each slot, -1 if unused
    load_after: np.ndarray  # ``[C, R]``, pairs that each rank computed

    @property
    def load_before(self) -> np.ndarray:
        """int32 ``[C, R]``, pairs that each rank would have computed without clones."""
        calls, ranks, experts = self.counts.shape
        return self.counts.sum(1).reshape(calls, ranks, experts // ranks).sum(2)


class RoutingTrace:
    """Collects the plans of each ``every``-th step on the device and writes them at its end.

    With CUDA graphs those of all steps are collected, as a graph does the same in each. A
    folder that cannot be written ends the tracing with a warning, not the training; None is no
    trace.
    """

    def __init__(self, folder: str | None, every: int, has_graph: bool = False) -> None:
        self._folder = Path(folder) if folder is not None else None
        self._every = every
        self._has_graph = has_graph
        self._step = 0
        self._stage = 0
        self._log = CallLog()
        self._shapes: tuple[torch.Size, ...] = ()

    @property
    def is_on(self) -> bool:
        """Whether the plans of the current step are collected."""
        return self._folder is not None and (self._is_traced_step or self._has_graph)

    @property
    def _is_traced_step(self) -> bool:
        return self._step % self._every == 0

    def begin_step(self) -> None:
        """Forget what has come since the last step ended, or of one that failed."""
        self._log.begin_step()

    def record(self, layer: int, stage: int, plan: Any) -> None:
        """Keep one layer call by its layer's and stage's numbers. Nothing of the plan is read."""
        self._stage = stage
        parts = (plan.counts, plan.slot_expert, plan.load_after)
        self._shapes = tuple(part.shape for part in parts)
        number = plan.counts.new_full((1,), layer)
        self._log.add(torch.cat((number, *(part.reshape(-1) for part in parts))).int())

    def end_step(self, iteration: int) -> None:
        """Write what the step left, if it was traced."""
        is_traced = self._is_traced_step
        self._step += 1
        found = self._log.end_step()
        if found is None or self._folder is None or not is_traced:
            return
        rows = found[0].cpu()[: int(found[1])]
        if not len(rows):
            return
        sizes = [shape.numel() for shape in self._shapes]
        layers, *columns = (part.numpy() for part in rows.split([1, *sizes], dim=1))
        names = ("counts", "slot_expert", "load_after")
        arrays: dict[str, Any] = {
            name: column.reshape(-1, *shape)
            for name, column, shape in zip(names, columns, self._shapes, strict=True)
        }
        arrays["layer"] = layers[:, 0]
        arrays["microbatch"] = _numbered(layers[:, 0])
        # Layers that are recomputed are counted in backward, in the other order.
        order = np.lexsort((arrays["layer"], arrays["microbatch"]))
        arrays = {name: array[order] for name, array in arrays.items()}
        path = self._folder / f"step-{iteration:08d}-stage-{self._stage:03d}.npz"
        arrays |= {"iteration": iteration, "stage": self._stage}
        try:
            write_npz(path, arrays, np.savez_compressed)
        except OSError as error:
            self._folder = None
            print(f"WARNING: {path} cannot be written ({error}): no more traces.", flush=True)


def _numbered(layers: np.ndarray) -> np.ndarray:
    """For each call of a layer, int32, how many of the same came before it."""
    seen: Counter[int] = Counter()
    numbers = []
    for layer in layers.tolist():
        numbers.append(seen[layer])
        seen[layer] += 1
    return np.array(numbers, np.int32)


_DIMENSIONS = {
    "layer": "C", "microbatch": "C", "counts": "CRE", "slot_expert": "CRS", "load_after": "CR"
}  # fmt: skip


class TraceError(ValueError):
    """A file that is no routing trace, or is damaged."""


def trace_files(folder: str | os.PathLike) -> list[Path]:
    """The traces in a folder, by iteration and stage."""
    return sorted(Path(folder).glob("step-*-stage-*.npz"))


def read_trace(path: Path) -> StepTrace:
    """One file, checked; a ``TraceError`` if it cannot be read or is no trace."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("iteration", "stage", *_DIMENSIONS)}
    except KeyError as error:
        raise TraceError(f"{path} is no routing trace: {error}. Take it away.") from None
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise TraceError(
            f"{path} is cut short or no .npz file of numbers. Take it away, or trace again."
        ) from None
    sizes: dict[str, int] = {}
    is_sound = all(array.dtype.kind in "iu" for array in arrays.values())
    for name, letters in _DIMENSIONS.items():
        is_sound &= arrays[name].ndim == len(letters)
        for letter, size in zip(letters, arrays[name].shape, strict=False):
            is_sound &= sizes.setdefault(letter, size) == size
    is_sound &= arrays["iteration"].ndim == arrays["stage"].ndim == 0
    if not is_sound or not (sizes["C"] and sizes["R"]) or sizes["E"] % sizes["R"]:
        raise TraceError(f"{path} is no routing trace: its arrays do not fit. Take it away.")
    iteration, stage = int(arrays.pop("iteration")), int(arrays.pop("stage"))
    return StepTrace(iteration, stage, **arrays)


def read_traces(folder: str | os.PathLike) -> list[StepTrace]:
    """All traces of a folder, by iteration and stage; ``FileNotFoundError`` for none."""
    paths = trace_files(folder)
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no traces. Start the run with --moe-echo-trace-dir {folder}."
        )
    return [read_trace(path) for path in paths]
