"""One MoE layer, forward and backward: Megatron's, ours eager, ours in a CUDA graph.

bf16, one rank, even routing, layers of three models; that of DeepSeek-V3 has the experts of one
rank of eight. Times are of passes back to back, with the gaps in which the device waits for the
host; ``host_ms`` is what the host needs to enqueue a pass. ``over_products`` is the time over that
of the bare grouped products, which no layer can do without: without Transformer Engine, Megatron's
has one product for each expert and is easy to beat.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import grouped_gemm
import torch
from moe_layer import Shape, shapes
from passes import DRY_SHAPE, VARIANTS, CapturedPass, Pass
from record import Case, Figures, Recorder
from timing import (
    call_milliseconds,
    device_microseconds,
    host_milliseconds,
    on_gpu,
    release_memory,
    synchronize,
)

PART, PROFILE_PART = "One MoE layer, forward and backward", "One MoE layer in the profiler"
SMALL_EXPERTS, TOKENS = "Qwen3-30B-A3B", 4096
MODELS = (SMALL_EXPERTS, "DeepSeek-V3", "Mixtral-8x7B")
PRODUCTS = "bare grouped products"
LAUNCHES = {
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx",
    "cudaGraphLaunch", "cudaMemsetAsync", "cudaMemcpyAsync",
}  # fmt: skip
WAITS = {"cudaStreamSynchronize", "cudaEventSynchronize"}  # the profiler itself adds another kind


def shape_of(model: str) -> Shape:
    """The layer of a model."""
    if model == "dry run":
        return DRY_SHAPE
    return dataclasses.replace(shapes(on_gpu=True)[model], tokens=TOKENS)


def build(shape: Shape, variant: str) -> Callable[[], None]:
    """A pass that has run once."""
    run = Pass(shape, variant)
    run()
    return CapturedPass(run) if variant == "ours captured" else run


def targets_of(model: str, variant: str) -> tuple[str, ...]:
    """What the captured layer shall reach."""
    if variant != "ours captured":
        return ()
    return f"over_stock >= {1.3 if model == SMALL_EXPERTS else 1.0}", "over_products <= 1.25"


def measure_products(shape: Shape) -> Figures:
    """The sum of the layer's six grouped products, each timed alone on the device."""
    rows, total = shape.tokens * shape.topk, 0.0
    for widths in ((shape.hidden, 2 * shape.ffn), (shape.ffn, shape.hidden)):
        for direction in grouped_gemm.DIRECTIONS:
            release_memory()
            given = (rows, shape.experts, 0, *widths)
            contenders = grouped_gemm.contenders(direction, given, skew=0.0)
            name = "grouped_mm"
            total += device_microseconds({name: contenders[name]}, rounds=8)[name]
    return {"ms": total / 1e3}


def measure(recorder: Recorder, model: str, variant: str) -> Figures:
    """One variant, beside the products and Megatron's layers."""
    release_memory()
    run = build(shape_of(model), variant)
    ms = call_milliseconds({variant: run}, *(() if on_gpu() else (2, 1)))[variant]
    figures = {"ms": ms, "host_ms": host_milliseconds(run)}
    for name, other in (("over_stock", "stock local"), ("over_te", "stock TE")):
        base = recorder.figures(PART, f"{model}: {other}")
        if base and variant.startswith("ours"):
            figures[name] = base["ms"] / ms
    products = recorder.figures(PART, f"{model}: {PRODUCTS}")
    if products:
        figures["over_products"] = ms / products["ms"]
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


def profile(recorder: Recorder, model: str, variant: str) -> Figures:
    """Kernels, launches, waits and copies to the host of one pass; its trace goes beside the rows.

    Raises:
        AssertionError: our layer waits.
    """
    release_memory()
    run = build(shape_of(model), variant)
    run()
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if on_gpu() else []
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize()
    words = f"{model}-{variant}".lower().replace(" ", "-")
    profiler.export_chrome_trace(str(recorder.file.with_suffix(f".{words}.json.gz")))
    events = profiler.events()
    names = [event.name for event in events]
    on_device = torch.autograd.DeviceType.CUDA
    figures: Figures = {
        "device_operations": sum(event.device_type == on_device for event in events),
        "launches": sum(name in LAUNCHES for name in names),
        "waits": sum(name in WAITS for name in names),
        "copies_to_host": sum(name.startswith("Memcpy DtoH") for name in names),
    }
    if variant.startswith("ours") and (figures["waits"] or figures["copies_to_host"]):
        raise AssertionError(f"the host waits: {figures}")
    return figures


def cases_of(recorder: Recorder, model: str) -> list[Case]:
    """The products of a model's layer, then each variant."""

    def products() -> Figures:
        return measure_products(shape_of(model))

    return [
        Case(PART, f"{model}: {PRODUCTS}", products),
        *(
            Case(PART, f"{model}: {variant}", partial(measure, recorder, model, variant),
                 targets_of(model, variant))
            for variant in VARIANTS
        ),
    ]  # fmt: skip


def profiles(recorder: Recorder, model: str) -> list[Case]:
    """Each variant in the profiler, which slows the process down: best the last cases."""
    return [
        Case(PROFILE_PART, f"{model}: {variant}", partial(profile, recorder, model, variant))
        for variant in VARIANTS
    ]
