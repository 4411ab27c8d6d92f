"""``--moe-echo-trace-dir``: who wanted which expert, and what the planner made of it, as ``.npz``.

One file for each traced step and pipeline stage, for the first expert-parallel group of a stage
(data-parallel replicas see other tokens of the same distribution).
"""

import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_echo.environment import is_capturing


def write_npz(path: Path, arrays: dict[str, Any], save: Callable[..., None] = np.savez) -> None:
    """Write a file that is there whole or not at all; its folder is made where it is missing.

    Args:
        path: the file.
        arrays: by name.
        save: ``np.savez``, or ``np.savez_compressed``.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        save(file, **arrays)
    os.replace(unfinished, path)


_Record = tuple[int, int, Tensor, Tensor, Tensor]
"""Layer, microbatch, counts, slots and load after."""


@dataclass(frozen=True)
class StepTrace:
    """One file: C layer calls of one step on one pipeline stage. R ranks, E experts, S slots.

    Attributes:
        iteration: Megatron's, from 1.
        stage: the pipeline stage's rank.
        layer: int32 ``[C]``, Megatron's layer numbers, from 1.
        microbatch: int32 ``[C]``, from 0.
        counts: int32 ``[C, R, E]``, token-expert pairs of each rank for each expert.
        slot_expert: int32 ``[C, R, S]``, the expert in each slot, -1 if unused.
        load_after: int32 ``[C, R]``, pairs that each rank computed.
    """

    iteration: int
    stage: int
    layer: np.ndarray
    microbatch: np.ndarray
    counts: np.ndarray
    slot_expert: np.ndarray
    load_after: np.ndarray

    @property
    def load_before(self) -> np.ndarray:
        """int32 ``[C, R]``, pairs that each rank would have computed without clones."""
        calls, ranks, experts = self.counts.shape
        return self.counts.sum(1).reshape(calls, ranks, experts // ranks).sum(2)


class RoutingTrace:
    """Collects the plans of a step on the device and writes them at its end.

    What is collected while a CUDA graph is captured is collected once: a replay fills the same
    tensors again, so they are kept and read after each traced step.
    A folder that cannot be written ends the tracing with a warning, not the training.
    """

    def __init__(self, folder: str | None, every: int) -> None:
        """Set up; nothing is written yet.

        Args:
            folder: where to, None for no trace.
            every: trace each so many steps.
        """
        self._folder = Path(folder) if folder is not None else None
        self._every = every
        self._step = 0
        self._stage = 0
        self._calls: dict[int, int] = {}
        self._records: list[_Record] = []
        self._in_graph: list[_Record] = []

    @property
    def is_on(self) -> bool:
        """Whether the current step is traced; all are whose graph is captured."""
        return self._folder is not None and (self._is_traced_step or is_capturing())

    @property
    def _is_traced_step(self) -> bool:
        return self._step % self._every == 0

    def record(self, layer: int, stage: int, plan: Any) -> None:
        """Keep one layer call. Nothing is read.

        Args:
            layer: its number.
            stage: the pipeline stage's rank.
            plan: a ``ClonePlan``.
        """
        microbatch = self._calls[layer] = self._calls.get(layer, -1) + 1
        self._stage = stage
        records = self._in_graph if is_capturing() else self._records
        records.append(
            (layer, microbatch, plan.counts.int(), plan.slot_expert.int(), plan.load_after.int())
        )

    def forget(self) -> None:
        """Drop what the step in progress has recorded."""
        self._records = []
        self._calls.clear()

    def end_step(self, iteration: int) -> None:
        """Write what the step left, if it was traced."""
        records = (self._records or self._in_graph) if self._is_traced_step else []
        self._step += 1
        self.forget()
        if not records or self._folder is None:
            return
        layers, microbatches, *tensors = zip(*records, strict=True)
        names = ("counts", "slot_expert", "load_after")
        arrays: dict[str, Any] = {
            name: torch.stack(column).cpu().numpy()
            for name, column in zip(names, tensors, strict=True)
        }
        arrays["layer"] = np.array(layers, np.int32)
        arrays["microbatch"] = np.array(microbatches, np.int32)
        path = self._folder / f"step-{iteration:08d}-stage-{self._stage:03d}.npz"
        arrays |= {"iteration": iteration, "stage": self._stage}
        try:
            write_npz(path, arrays, np.savez_compressed)
        except OSError as error:
            self._folder = None
            print(f"WARNING: {path} cannot be written ({error}): no more traces.", flush=True)


_DIMENSIONS = {
    "layer": "C",
    "microbatch": "C",
    "counts": "CRE",
    "slot_expert": "CRS",
    "load_after": "CR",
}


class TraceError(ValueError):
    """A file that is no routing trace, or is damaged."""


def trace_files(folder: str | os.PathLike) -> list[Path]:
    """The traces in a folder, by iteration and stage."""
    return sorted(Path(folder).glob("step-*-stage-*.npz"))


def read_trace(path: Path) -> StepTrace:
    """One file, checked.

    Raises:
        TraceError: it cannot be read or is no trace.
    """
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
    """All traces of a folder, by iteration and stage.

    Raises:
        FileNotFoundError: there is none.
        TraceError: a file is no trace, or is damaged.
    """
    paths = trace_files(folder)
    if not paths:
        raise FileNotFoundError(
            f"{folder} holds no traces. Start the run with --moe-echo-trace-dir {folder}."
        )
    return [read_trace(path) for path in paths]
