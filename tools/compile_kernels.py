"""Compiles the Triton kernels of ``tools/gpu_check.py`` for a GPU that need not be here.

    python tools/compile_kernels.py --arch 90 --cache DIR [--only PATTERN] [--list]

``DIR`` is then a ``TRITON_CACHE_DIR`` of a machine with that GPU and the same packages. What is
compiled is found by running the check's own functions on fake tensors, with the launches recorded
in place of made. Prints a line of JSON: kernels, how many were in the folder already, how many had
to be compiled, seconds.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
_DEFAULTS = {"debug": False, "instrumentation_mode": ""}  # what a launch adds to its options
_recorded: list["Launch"] = []  # processes inherit it: kernels cannot be sent to them
FOLDERS = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]


def relocate(cache: Path) -> None:
    """Let a compiled folder be used where it lies now: Triton notes its files' absolute paths."""
    for group in cache.glob("*/__grp__*.json"):
        names = json.loads(group.read_text())["child_paths"]
        moved = json.dumps({"child_paths": {name: str(group.parent / name) for name in names}})
        if moved != group.read_text():
            replacement = group.with_suffix(".moved")
            replacement.write_text(moved)
            replacement.replace(group)


class Pointer:
    """What Triton looks at in a tensor: its dtype, and whether its address is one of 16 bytes."""

    def __init__(self, dtype: Any, offset: int) -> None:
        self.dtype, self._offset = dtype, offset

    def data_ptr(self) -> int:
        """An address with the same remainder."""
        return self._offset % 16


class Launch(NamedTuple):
    """A kernel and what it was called with, pointers in place of tensors."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the kernel, with its module."""
        return f"{self.kernel.fn.__module__}.{self.kernel.fn.__name__}"

    @property
    def key(self) -> tuple[str, str]:
        """Launches with the same key are one compilation.

        A kernel's own key depends on which others had theirs before, as Triton hashes the constants
        of a function that it calls only then. So it is made here, in the order of a run.
        """
        *_, binder = self.kernel.device_caches[0]
        _, specialization, options = binder(*self.arguments, **self.options)
        return self.kernel.cache_key, f"{specialization} {options}"


class NoDriver:
    """What the compiler asks of a driver."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> Any:
        """The GPU to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default one."""
        return 0


@contextlib.contextmanager
def on_fake_device(launches: list[Launch], arch: int) -> Iterator[None]:
    """Inside, tensors are fake and count as CUDA's, and launches are noted."""
    import moe_layer
    import passes
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from triton.runtime.jit import JITFunction

    from megatron_echo import environment

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        pointers = tuple(
            Pointer(a.dtype, a.storage_offset() * a.element_size()) if torch.is_tensor(a) else a
            for a in arguments
        )
        launches.append(Launch(kernel, pointers, {**options, **_DEFAULTS}))

    def is_fake(tensor: torch.Tensor) -> bool:
        return isinstance(tensor, FakeTensor)

    originals = {name: vars(environment)[name] for name in ("on_gpu", "runs_triton")}
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        for module in [m for n, m in sys.modules.items() if n.startswith("megatron_echo")]:
            for name, function in originals.items():
                if vars(module).get(name) is function:
                    enter(mock.patch.object(module, name, is_fake))
        enter(mock.patch.object(passes, "on_gpu", return_value=True))
        capability = divmod(arch, 10)
        enter(mock.patch.object(torch.cuda, "get_device_capability", return_value=capability))
        enter(mock.patch.object(torch.accelerator, "is_available", return_value=True))
        enter(mock.patch.object(torch.nn.Module, "to", lambda module, *_: module))
        build = partial(moe_layer.build, perform_initialization=False)
        enter(mock.patch.object(moe_layer, "build", build))
        enter(mock.patch.object(JITFunction, "run", note))
        enter(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def work() -> Iterator[Callable[[], object]]:
    """Calls that launch every kernel with the shapes and dtypes of the check."""
    import capture_safety
    import fp8_products
    import grouped_gemm
    import layers
    import planner_kernel
    import row_copies
    import torch
    from kernel_checks import kernel_checks
    from moe_layer import Shape
    from passes import Pass
    from training_step import TINY, Model

    from megatron_echo.planner import plan_clones

    def call(check: Any) -> None:
        check.kernel(*check.inputs())

    def both_ways(name: str, shape: Any) -> None:
        operation, given, _ = row_copies.operation_of(name, shape)
        output = operation()
        torch.autograd.grad(output, given, torch.empty_like(output))

    for check in kernel_checks():
        yield partial(call, check)
    shapes = [capture_safety.SMALL_SHAPE, *map(layers.shape_of, layers.MODELS)]
    shapes += [
        Shape(m.hidden, m.ffn, m.experts, m.topk, m.sequence * m.sequences) for m in (TINY, Model())
    ]
    for shape in shapes:
        for gemm in ("auto", *capture_safety.GEMMS[: 2 if shape is shapes[0] else 0]):
            yield lambda shape=shape, gemm=gemm: Pass(shape, "ours", moe_echo_grouped_gemm=gemm)()
    peers = {"moe_echo_token_transport": "symmetric_memory"}
    for shape in (shapes[0], Shape(hidden=1024, ffn=64, experts=8, topk=3, tokens=300)):
        yield lambda shape=shape: Pass(shape, "ours", **peers)()
    for sizes in row_copies.SHAPES.values():
        for name in row_copies.OPERATIONS:
            yield partial(both_ways, name, sizes)
    for sizes in grouped_gemm.SHAPES.values():
        for direction in grouped_gemm.DIRECTIONS:
            yield lambda d=direction, s=sizes: grouped_gemm.contenders(d, s)["kernel"]()
    for sizes in fp8_products.SHAPES.values():
        for direction in fp8_products.DIRECTIONS:
            yield partial(fp8_products.contenders, direction, sizes)
    for slots in planner_kernel.TARGETS:
        yield lambda slots=slots: plan_clones(torch.zeros(64, 256, dtype=torch.int64), slots)


def prepare(cache: Path) -> None:
    """Let this process and its children compile into a folder, without a GPU."""
    cache.mkdir(parents=True, exist_ok=True)
    relocate(cache.resolve())
    os.environ |= {"TRITON_CACHE_DIR": str(cache.resolve()), "CUDA_VISIBLE_DEVICES": ""}
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"  # a fifth of the bytes
    sys.path[:0] = FOLDERS
    from megatron_echo import cpu_backend

    cpu_backend.enable(verbose=False)


def record(arch: int, pattern: str = "") -> None:
    """Note the launches of all work, one for each compilation, for :func:`compile_all`.

    Args:
        arch: 90 for an H100.
        pattern: searched for in the kernel's name.
    """
    from passes import single_rank
    from triton.runtime import driver

    driver.set_active(NoDriver(arch))
    launches: list[Launch] = []
    with single_rank():
        for call in work():
            with on_fake_device(launches, arch):
                call()
    found = {launch.key: launch for launch in launches}.values()
    # The longest ones first, so that no process ends long behind the others.
    longest = sorted(found, key=lambda launch: -len(launch.kernel.src))
    _recorded[:] = [launch for launch in longest if re.search(pattern, launch.name)]


def compile_one(number: int) -> tuple[str, bool, float]:
    """Compile a recorded launch: the kernel, whether it was there already, and seconds."""
    from triton import knobs

    launch = _recorded[number]
    hits: list[bool] = []
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    begin = time.perf_counter()
    launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
    return launch.name, all(hits), round(time.perf_counter() - begin, 1)


def compile_all(jobs: int) -> list[tuple[str, bool, float]]:
    """:func:`compile_one` of all that is recorded, by so many processes."""
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(compile_one, range(len(_recorded)), chunksize=1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability; 90: H100, H200")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the kernels")
    parser.add_argument("--only", default="", help="kernels whose name matches this pattern")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--list", action="store_true", help="print each kernel and its seconds")
    args = parser.parse_args()
    begin = time.perf_counter()
    prepare(args.cache)
    record(args.arch, args.only)
    results = compile_all(args.jobs)
    if args.list:
        for name, is_hit, seconds in results:
            print(f"{name} {'hit' if is_hit else f'{seconds:.1f} s'}")
    hits = sum(is_hit for _, is_hit, _ in results)
    figures = {"kernels": len(results), "hits": hits, "compiled": len(results) - hits}
    print(json.dumps({**figures, "seconds": round(time.perf_counter() - begin, 1)}))


if __name__ == "__main__":
    main()
