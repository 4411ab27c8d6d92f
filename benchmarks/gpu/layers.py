"""One MoE layer, forward and backward: Megatron's, ours eager, ours in a CUDA graph.

bf16, one rank, layers of three models. Times are of passes back to back, with the gaps in which
the device waits for the host; ``host_ms`` is what the host needs to enqueue a pass. The layer of
DeepSeek-V3 has the experts of one rank of eight.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from moe_layer import Shape, shapes
from passes import VARIANTS, CapturedPass, Pass, single_rank
from record import Figures, Recorder, SkippedError
from timing import call_milliseconds, host_milliseconds, on_gpu, release_memory

SMALL_EXPERTS = "Qwen3-30B-A3B"
CASES = (  # model, tokens, routing
    ("Qwen3-30B-A3B", 4096, "even"),
    ("Mixtral-8x7B", 4096, "even"),
    ("DeepSeek-V3", 4096, "even"),
    ("Qwen3-30B-A3B", 1024, "even"),
    ("Qwen3-30B-A3B", 4096, "zipf"),
    ("DeepSeek-V3", 4096, "zipf"),
    ("Mixtral-8x7B", 4096, "zipf"),
    ("Qwen3-30B-A3B", 512, "even"),
    ("Qwen3-30B-A3B", 8192, "even"),
)
DRY_CASES = (("dry run", 32, "even"), ("dry run", 32, "zipf"))
DRY_SHAPE = Shape(hidden=32, ffn=16, experts=8, topk=2, tokens=32)
LAUNCHES = {
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
    "cudaGraphLaunch", "cudaMemsetAsync", "cudaMemcpyAsync",
}  # fmt: skip
WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize"}  # the profiler itself adds another kind


def shape_of(model: str, tokens: int) -> Shape:
    """The layer of a model with so many tokens."""
    shape = DRY_SHAPE if model == "dry run" else shapes(on_gpu=True)[model]
    return dataclasses.replace(shape, tokens=tokens)


def build(shape: Shape, variant: str, routing: str) -> Callable[[], None]:
    """A pass that has run once."""
    run = Pass(shape, variant)
    run.route(routing)
    run()
    return CapturedPass(run) if variant == "ours captured" else run


def targets_of(model: str, variant: str, has_te: bool) -> list[str]:
    """What the captured layer shall reach against Megatron's."""
    if variant != "ours captured":
        return []
    local, te = (1.3, 1.15) if model == SMALL_EXPERTS else (1.0, 1.0)
    return [f"over_stock >= {local}", *([f"over_te >= {te}"] if has_te else [])]


def figures_of(run: Callable[[], None], milliseconds: dict[str, float], variant: str) -> Figures:
    """The figures of one variant, from the times of all."""
    figures = {"ms": milliseconds[variant], "host_ms": host_milliseconds(run)}
    for name, other in (("over_stock", "stock local"), ("over_te", "stock TE")):
        if other in milliseconds and variant.startswith("ours"):
            figures[name] = milliseconds[other] / milliseconds[variant]
    if not on_gpu():
        return figures
    if isinstance(run, CapturedPass):
        return {**figures, "pool_gib": run.pool_bytes / 2**30}
    run.clear()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return {**figures, "peak_gib": (torch.cuda.max_memory_allocated() - before) / 2**30}


def compare(recorder: Recorder, model: str, tokens: int, routing: str) -> None:
    """One case: build all variants that this machine has, time them in turns."""
    shape, case = shape_of(model, tokens), f"{model}, {tokens} tokens, {routing}"
    runs: dict[str, Callable[[], None]] = {}
    for variant in VARIANTS:
        name = f"{case}: {variant}"
        try:
            if not recorder.seconds_left:
                raise SkippedError("no time was left")
            runs[variant] = build(shape, variant, routing)
        except SkippedError as reason:
            recorder.skip(name, str(reason))
        except Exception as error:
            recorder.fail(name, error)
    try:
        times = call_milliseconds(runs, *(() if on_gpu() else (2, 1)))
    except Exception as error:
        recorder.fail(case, error)
        return
    for variant, run in runs.items():
        targets = targets_of(model, variant, "stock TE" in runs)
        figures = partial(figures_of, run, times, variant)
        recorder.measure(f"{case}: {variant}", figures, targets)


def count_launches(variant: str, shape: Shape) -> Figures:
    """Kernels, launches and waits of one pass, from the profiler."""
    run = build(shape, variant, "even")
    if not on_gpu():
        raise SkippedError("needs a GPU")
    run()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events()]
    on_device = sum(e.device_type == torch.autograd.DeviceType.CUDA for e in profile.events())
    return {
        "device_operations": on_device,
        "launches": sum(name in LAUNCHES for name in names),
        "waits": sum(name in WAITS for name in names),
        "copies_to_host": sum(name.startswith("Memcpy DtoH") for name in names),
    }


def run(recorder: Recorder, dry: bool) -> None:
    """All cases; last what the profiler counts, because it slows the process down."""
    # Megatron compiles its activation, and an expert gets any number of tokens.
    with single_rank(), torch._dynamo.config.patch(assume_static_by_default=False):
        for model, tokens, routing in DRY_CASES if dry else CASES:
            compare(recorder, model, tokens, routing)
            release_memory()
        shape = DRY_SHAPE if dry else shape_of(SMALL_EXPERTS, 4096)
        for variant in VARIANTS:
            function = partial(count_launches, variant, shape)
            recorder.measure(f"profile: {variant}", function)
            release_memory()
