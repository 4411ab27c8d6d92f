"""Run Megatron on a machine without a CUDA device.

Megatron-Core addresses ``torch.cuda`` directly: streams, events, generators, ``device="cuda"``
literals. :func:`enable` redirects those calls to the CPU, says so in one line, and
:func:`disable` puts everything back; where CUDA works both do nothing. Any Megatron training
script runs under it (the flags that the machine needs are added to its command line)::

    python -m megatron_echo.cpu_backend pretrain_gpt.py --num-layers 2 ...

How ``device="cuda"`` is rewritten: the functions that *create* tensors on a device, or move them
to one, are wrapped; no computation is. A ``TorchFunctionMode`` would see every torch call of a
step and cost several per cent of a small one, and it is per thread; the wrappers cost nothing
elsewhere and hold in every thread (``benchmarks/cpu_backend_overhead.py`` measures both).
"""

import collections
import contextlib
import ctypes
import functools
import importlib.util
import logging
import os
import runpy
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import torch
import torch.utils._device

from megatron_echo import environment
from megatron_echo.cpu_backend.cuda_stand_ins import (
    DefaultGenerator,
    Event,
    Stream,
    current_stream,
    default_stream,
    set_stream,
    use_stream,
)
from megatron_echo.cpu_backend.recorded_graph import RecordedGraph, capture, record_stream

_PREFIX = "[megatron_echo.cpu_backend]"
_DRIVER = Path("/proc/driver/nvidia/version")
_MALLOC_DEFAULTS = {-1: 128 << 10, -3: 128 << 10}
"""glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD with their defaults."""
_MALLOC_KEEP = 1 << 30


class _PatchList(contextlib.ExitStack):
    """Attributes and environment variables that are replaced until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set ``owner.name`` to ``value``; an inherited attribute is deleted again."""
        self.enter_context(mock.patch.object(owner, name, value, create=True))
        self.names.append(f"{getattr(owner, '__name__', owner)}.{name}")

    def set_default_env(self, name: str, value: str) -> None:
        """Set an environment variable that the user left unset."""
        if name not in os.environ:
            os.environ[name] = value
            self.callback(os.environ.__delitem__, name)
            self.names.append(f"${name}")


_patches = _PatchList()
_enabled = False


def _names_cuda(device: Any) -> bool:
    """True if ``device`` asks for a CUDA device: ``"cuda"``, ``"cuda:1"``, an index, an object."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, int) and not isinstance(device, bool)


def _redirect(function: Callable, position: int | None = None) -> Callable:
    """``function`` with a CUDA device turned into the CPU, and pinned memory left out.

    It takes a device by keyword, ``device`` or ``map_location``, or at a position.
    """

    @functools.wraps(function)
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if position is not None and len(args) > position and _names_cuda(args[position]):
            args = (*args[:position], "cpu", *args[position + 1 :])
        if kwargs:
            for name in ("device", "map_location"):
                if _names_cuda(kwargs.get(name)):
                    kwargs[name] = "cpu"
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return on_cpu


def _redirect_type(function: Callable) -> Callable:
    """``Tensor.type`` that reports, and accepts, the names of the CUDA tensor types."""

    @functools.wraps(function)
    def on_cpu(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = function(self)
            return name if "cuda" in name else name.replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return function(self, dtype, *args, **kwargs)

    return on_cpu


def _redirect_splits(function: Callable) -> Callable:
    """``all_to_all_single`` with split sizes given as tensors turned into lists (gloo)."""

    def as_list(sizes: Any) -> Any:
        return sizes.tolist() if isinstance(sizes, torch.Tensor) else sizes

    @functools.wraps(function)
    def with_lists(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        options = {name: as_list(value) for name, value in kwargs.items()}
        return function(output, input, *map(as_list, args), **options)

    return with_lists


def _patch_factories() -> None:
    """Everything that creates a tensor on a device, or moves one to a device."""
    constructors = {f.__name__ for f in torch.utils._device._device_constructors()}
    likes = {name for name in dir(torch) if name.endswith("_like") and not name.startswith("_")}
    for name in sorted(constructors | likes):
        if callable(getattr(torch, name, None)):
            _patches.set(torch, name, _redirect(getattr(torch, name)))
    for name in [name for name in dir(torch.Tensor) if name.startswith("new_")] + ["new"]:
        _patches.set(torch.Tensor, name, _redirect(getattr(torch.Tensor, name)))
    context = torch.utils._device.DeviceContext
    _patches.set(context, "__init__", _redirect(context.__init__, 1))
    _patches.set(torch.Tensor, "to", _redirect(torch.Tensor.to, 1))
    _patches.set(torch.Tensor, "type", _redirect_type(torch.Tensor.type))
    _patches.set(torch.Tensor, "cuda", lambda self, *args, **kwargs: self)
    _patches.set(torch.Tensor, "pin_memory", lambda self, *args, **kwargs: self)
    _patches.set(torch.Tensor, "record_stream", record_stream)
    _patches.set(torch.nn.Module, "cuda", lambda self, device=None: self)
    _patches.set(torch, "load", _redirect(torch.load, 1))
    for name in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte"):
        _patches.set(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
    _patches.set(torch.cuda, "BoolTensor", torch.BoolTensor)


def _patch_streams() -> None:
    """Streams, events and waits: a CPU runs one thing after another."""
    _patches.set(torch.cuda, "Stream", Stream)
    _patches.set(torch.cuda, "ExternalStream", Stream)
    _patches.set(torch.cuda, "Event", Event)
    for function in (current_stream, default_stream, set_stream):
        _patches.set(torch.cuda, function.__name__, function)
    _patches.set(torch.cuda, "stream", use_stream)
    _patches.set(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for name in ("synchronize", "set_device"):
        _patches.set(torch.cuda, name, lambda *args, **kwargs: None)
    _patches.set(torch.cuda, "CUDAGraph", RecordedGraph)
    _patches.set(torch.cuda, "graph", capture)
    _patches.set(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool"):
        _patches.set(torch._C, name, lambda device, pool: None)
    _patches.set(torch.cuda, "is_current_stream_capturing", RecordedGraph.is_capturing)
    for name in ("range_push", "range_pop", "mark"):
        _patches.set(torch.cuda.nvtx, name, lambda *args, **kwargs: None)


def _patch_device_queries() -> None:
    """What there is: one device per process, with this process's memory as its memory."""
    process = psutil.Process()
    properties = types.SimpleNamespace(
        name=environment.device_name(),
        major=8,
        minor=0,
        total_memory=psutil.virtual_memory().total,
        multi_processor_count=os.cpu_count() or 1,
    )

    def resident_bytes(device: Any = None) -> int:
        return process.memory_info().rss

    def memory_stats(device: Any = None) -> dict[str, int]:
        names = ("reserved_bytes.all", "allocated_bytes.all")
        stats = dict.fromkeys(("allocation.all.current", "num_alloc_retries", "num_ooms"), 0)
        for name in names:
            stats[f"{name}.current"] = stats[f"{name}.peak"] = resident_bytes()
        return stats

    # torch.accelerator answers through torch.cuda: the DataLoader's pinning thread would start.
    _patches.set(torch.accelerator, "is_available", lambda: False)
    _patches.set(torch.cuda, "is_available", lambda: True)
    _patches.set(torch.cuda, "is_initialized", lambda: True)
    _patches.set(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    _patches.set(torch.cuda, "device_count", lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    _patches.set(torch.cuda, "current_device", lambda: 0)
    _patches.set(torch.cuda, "get_device_properties", lambda device=None: properties)
    _patches.set(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    _patches.set(torch.cuda, "get_device_name", lambda device=None: properties.name)
    for name in ("temperature", "power_draw", "utilization", "clock_rate"):  # no such sensors
        _patches.set(torch.cuda, name, lambda device=None: 0)
    for module in (torch.cuda, torch.cuda.memory):
        for name in ("memory_allocated", "memory_reserved"):
            _patches.set(module, name, resident_bytes)
            _patches.set(module, f"max_{name}", resident_bytes)
        _patches.set(module, "memory_stats", memory_stats)
        for name in ("empty_cache", "reset_peak_memory_stats"):
            _patches.set(module, name, lambda *args, **kwargs: None)


def _patch_random() -> None:
    """One generator for both: the CPU's default generator is also "the CUDA generator"."""

    def get_rng_state(device: Any = None) -> torch.Tensor:
        return torch.default_generator.get_state()

    def set_rng_state(new_state: torch.Tensor, device: Any = None) -> None:
        torch.default_generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(int(seed))

    for module in (torch.cuda, torch.cuda.random):
        _patches.set(module, "get_rng_state", get_rng_state)
        _patches.set(module, "set_rng_state", set_rng_state)
        _patches.set(module, "manual_seed", manual_seed)
        _patches.set(module, "manual_seed_all", manual_seed)
    _patches.set(torch.cuda, "default_generators", collections.defaultdict(DefaultGenerator))


def _patch_megatron() -> None:
    """The places where Megatron itself, not torch, assumes CUDA or Transformer Engine."""
    environment.skip_dataset_compilation(_patches.set)
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import cuda_graphs

    # A CPU's generators know no graphs, which draw no numbers here.
    _patches.set(cuda_graphs, "_ensure_generator_state_is_cudagraph_safe", lambda each: each)
    # With one generator for both, a fork of "the CUDA state" always changes the CPU's.
    logger = logging.getLogger(random.__name__)
    logger.addFilter(_drop_rng_warning)
    _patches.callback(logger.removeFilter, _drop_rng_warning)
    if not environment.HAVE_TRANSFORMER_ENGINE:
        # CheckpointWithoutOutput reads these names, which stock code binds only with TE.
        fp8 = types.SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=lambda: None)
        _patches.set(random, "FP8GlobalStateManager", fp8)
        for name in ("activation_recompute_forward", "fp8_autocast"):
            _patches.set(random, name, lambda **kwargs: contextlib.nullcontext())
    if importlib.util.find_spec("megatron.training") is not None:
        from megatron.training import initialize

        # There is nothing to warm up without torch.compile, and on a GPU its random numbers are
        # not those that the router's weights are drawn from.
        _patches.set(initialize, "_warmup_jit_function", lambda tp_size=None: None)


def _drop_rng_warning(entry: logging.LogRecord) -> bool:
    return not entry.getMessage().startswith("CPU RNG state changed")


def _disable_dynamo() -> None:
    """Megatron wraps its fusions in ``torch.compile``; run them eagerly."""
    _patches.set_default_env("TORCHDYNAMO_DISABLE", "1")
    dynamo: Any = sys.modules.get("torch._dynamo.config")
    if dynamo is not None and not dynamo.disable:
        dynamo.disable = True
        _patches.callback(setattr, dynamo, "disable", False)


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks of any size, as CUDA's caching allocator does.

    By default a block above 32 MiB goes back to the kernel when it is freed, and its next user
    pays for getting each page zeroed again: up to a tenth of a step with large layers.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or any(name.startswith("MALLOC_") for name in os.environ):
        return
    for parameter, default in _MALLOC_DEFAULTS.items():
        mallopt(parameter, _MALLOC_KEEP)
        _patches.callback(mallopt, parameter, default)


def _refuse_broken_cuda() -> None:
    """Do not train on the CPU because of a broken driver or a forgotten request for GPUs."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if _DRIVER.exists() and torch.version.cuda is not None and not hidden:
        raise RuntimeError(
            "This machine has an NVIDIA driver, but torch finds no usable GPU. Check nvidia-smi "
            "and the job's request for GPUs, or set CUDA_VISIBLE_DEVICES= (empty) to run on the "
            "CPU on purpose."
        )


def is_enabled() -> bool:
    """True while CUDA calls go to the CPU."""
    return _enabled


def changes() -> tuple[str, ...]:
    """Names of everything that is replaced at the moment; empty when nothing is."""
    return tuple(_patches.names)


def enable(verbose: bool = True) -> bool:
    """Redirect Megatron's CUDA calls to the CPU; does nothing where CUDA works.

    Call it before ``megatron`` is imported. Calling it twice is the same as calling it once.

    Args:
        verbose: print one line, on the first process of each node, that says what was done.

    Returns:
        True if the backend is enabled on return, False where there is a CUDA device.

    Raises:
        RuntimeError: there is an NVIDIA driver, but CUDA does not work and nobody asked for that.
    """
    global _enabled
    if _enabled:
        return True
    if torch.cuda.is_available():
        return False
    _refuse_broken_cuda()
    _enabled = True
    try:
        _disable_dynamo()
        # Megatron asks for it with TP > 1 on the GPU generations before Blackwell, but its FSDP
        # for another number.
        if "--use-megatron-fsdp" not in sys.argv:
            _patches.set_default_env("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        _patch_device_queries()
        _patch_streams()
        _patch_random()
        _patch_factories()
        _keep_freed_memory()
        exchange = _redirect_splits(torch.distributed.all_to_all_single)
        _patches.set(torch.distributed, "all_to_all_single", exchange)
        _patch_megatron()
    except BaseException:
        disable()
        raise
    if verbose and os.environ.get("LOCAL_RANK", "0") == "0":
        print(
            f"{_PREFIX} no CUDA device: {len(_patches.names)} CUDA entry points now run on the "
            "CPU (cpu_backend.changes() lists them, disable() restores them).",
            flush=True,
        )
    return True


def disable() -> None:
    """Restore everything that :func:`enable` replaced."""
    global _enabled
    _patches.close()
    _patches.names.clear()
    _enabled = False


def main(argv: Sequence[str]) -> None:
    """Run ``argv[0]`` as a script with the rest as its arguments, under the CPU backend."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: python -m megatron_echo.cpu_backend SCRIPT [ARGS ...]")
        raise SystemExit(0 if argv else 2)
    script = Path(argv[0])
    if not script.is_file():
        raise SystemExit(f"{_PREFIX} no such script: {script}. Give the path of a Python file.")
    enable()
    flags = environment.add_missing_flags(argv[1:], has_cuda=not _enabled)
    sys.argv = [str(script), *flags]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
