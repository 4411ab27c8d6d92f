"""How everything in this folder is timed.

Kernels by CUDA events, with a cold cache and launches that are already enqueued; whole passes by
the host's clock around several of them. In a dry run all by the host's clock.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from megatron_echo import cpu_backend

Functions = Mapping[str, Callable[[], object]]

_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
_SPIN_CYCLES = 1_000_000  # about half a millisecond: longer than the host needs for a call
_WARM_UP = 3


def on_gpu() -> bool:
    """False in a dry run, where the CPU backend stands in for CUDA."""
    return torch.cuda.is_available() and not cpu_backend.is_enabled()


def device() -> torch.device:
    """Where tensors of a benchmark lie."""
    return torch.device("cuda" if on_gpu() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def release_memory() -> None:
    """Give what nobody holds back to the device."""
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()


@cache
def _flushed() -> Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def device_microseconds(functions: Functions, rounds: int = 20) -> dict[str, float]:
    """Median time of one call on the device, of functions that are called in turns.

    Before each call the L2 cache is overwritten and the device spins until the host has enqueued
    the call: neither what is in the cache nor the time to launch counts.
    """
    if not on_gpu():
        return {name: 1e3 * value for name, value in call_milliseconds(functions, 2).items()}
    samples: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]]
    samples = {name: [] for name in functions}
    for _ in range(_WARM_UP + rounds):
        for name, function in functions.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            _flushed().zero_()
            torch.cuda._sleep(_SPIN_CYCLES)
            begin.record()
            function()
            end.record()
            samples[name].append((begin, end))
    torch.cuda.synchronize()
    return {
        name: statistics.median(b.elapsed_time(e) * 1e3 for b, e in pairs[_WARM_UP:])
        for name, pairs in samples.items()
    }


def call_milliseconds(functions: Functions, rounds: int = 9, calls: int = 3) -> dict[str, float]:
    """Median time of a call within ``calls`` back to back, of functions that take turns.

    Gaps in which the device waits for the host count, as they do in training.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            synchronize()
            begin = time.perf_counter()
            for _ in range(calls):
                function()
            synchronize()
            if number:
                samples[name].append((time.perf_counter() - begin) / calls * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}


def host_milliseconds(function: Callable[[], object], rounds: int = 9) -> float:
    """Median time that the host needs to enqueue a call on an idle device."""
    samples = []
    for _ in range(rounds + 1):
        synchronize()
        begin = time.perf_counter()
        function()
        samples.append(time.perf_counter() - begin)
    synchronize()
    return statistics.median(samples[1:]) * 1e3


def copy_of(num_bytes: int) -> Callable[[], Tensor]:
    """A copy on the device that moves so many bytes, those read and those written: a floor."""
    source = torch.empty(max(1, num_bytes // 2), dtype=torch.uint8, device=device()).fill_(1)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
