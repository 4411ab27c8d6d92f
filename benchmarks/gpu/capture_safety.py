"""What a CUDA graph needs of the layer: nothing waits, and replays equal eager passes.

Without a GPU the passes of ``passes.py`` run eagerly and the tripwire stands in for CUDA's check.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import moe_layer
import torch
from layers import DRY_SHAPE, shape_of
from moe_layer import Shape
from passes import CapturedPass, Pass, single_rank
from record import Figures, Recorder
from timing import device, on_gpu, release_memory, synchronize
from torch import Tensor

from megatron_echo.testing import no_host_sync

MODELS = ("Qwen3-30B-A3B", "DeepSeek-V3", "Mixtral-8x7B")
ROUTINGS = (("even", 0), ("even", 7), ("zipf", 0), ("hot", 0), ("holes", 3), ("zipf", 11))
NO_WAIT = "no wait for the device"
CONTROL = "control: Megatron's all-gather layer waits"
REPLAY = "replays equal eager passes"
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def cuda_reports_waits() -> Iterator[None]:
    """Inside, whatever CUDA knows to wait for the device raises."""
    if not on_gpu():
        with no_host_sync():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_no_wait(shape: Shape) -> Figures:
    """Forward and backward under CUDA's check and our tripwire, after a warm-up."""
    run = Pass(shape, "ours")
    run()
    synchronize()
    with cuda_reports_waits(), no_host_sync(), torch.autograd.set_multithreading_enabled(False):
        run()
    synchronize()
    return {"waits": 0}


def check_control(shape: Shape) -> Figures:
    """The same check must stop at Megatron's layer, or it shows nothing."""
    dtype = torch.bfloat16 if on_gpu() else torch.float32
    layer = moe_layer.build(shape, dtype, False, None)
    hidden = torch.randn(shape.tokens, 1, shape.hidden, dtype=dtype, device=device())
    layer(hidden)
    synchronize()
    try:
        with cuda_reports_waits():
            layer(hidden)
    except RuntimeError:
        return {"waits": 1}
    raise AssertionError("Megatron's all-gather layer passed the check that it must fail")


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal bit for bit."""
    integers = INTEGERS[left.element_size()]
    return torch.equal(left.contiguous().view(integers), right.contiguous().view(integers))


def num_allocations() -> int:
    """Allocations since the start of the process, those from the cache included."""
    return torch.cuda.memory_stats()["allocation.all.allocated"] if on_gpu() else 0


def replay(captured: CapturedPass) -> int:
    """Replay over poisoned results; returns the number of allocations."""
    for tensor in captured.results.values():
        tensor.fill_(torch.nan)
    synchronize()
    before = num_allocations()
    captured()
    synchronize()
    return num_allocations() - before


def check_replays(shape: Shape) -> Figures:
    """Output and each gradient of replays against eager passes, bit for bit."""
    run = Pass(shape, "ours")
    run()
    captured = CapturedPass(run)
    allocations, differing = 0, []
    for routing, seed in ROUTINGS:
        run.route(routing, seed)
        run()
        expected = {name: tensor.clone() for name, tensor in run.results().items()}
        run()
        again = run.results()
        allocations += replay(captured)
        for name, tensor in expected.items():
            if not tensor.isfinite().all():
                differing.append(f"{name} of {routing} is not finite")
            for kind, other in (("eager", again), ("replay", captured.results)):
                if not same_bits(tensor, other[name]):
                    differing.append(f"{name} of {routing} {seed}, {kind}")
    if differing or allocations:
        raise AssertionError(
            f"{allocations} allocations; {len(differing)} results are wrong: {'; '.join(differing)}"
        )
    return {"routings": len(ROUTINGS), "tensors": len(expected), "allocations": allocations}


def run(recorder: Recorder, dry: bool) -> None:
    """All checks for each model."""
    with single_rank():
        for model in ("dry run",) if dry else MODELS:
            shape = DRY_SHAPE if dry else shape_of(model, 4096)
            recorder.measure(f"{model}, {NO_WAIT}", partial(check_no_wait, shape))
            recorder.measure(f"{model}, {REPLAY}", partial(check_replays, shape))
            recorder.measure(f"{model}, {CONTROL}", partial(check_control, shape))
            release_memory()
