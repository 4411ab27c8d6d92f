"""What a CUDA graph needs of the layer: right results, no waits, replays that equal eager passes.

Without a GPU the passes of ``passes.py`` run eagerly and the tripwire stands in for CUDA's check.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import moe_layer
import torch
from moe_layer import Shape
from passes import DRY_SHAPE, CapturedPass, Pass
from record import Case, Figures
from timing import device, on_gpu, synchronize
from torch import Tensor

from megatron_echo.testing import no_host_sync

PART = "One small layer"
SMALL_SHAPE = Shape(hidden=256, ffn=512, experts=16, topk=4, tokens=512)
TRANSPORTS = ("all_gather", "all_to_all", "symmetric_memory")
GEMMS = ("torch", "triton")
ROUTINGS = (("even", 0), ("even", 7), ("zipf", 0), ("hot", 0), ("holes", 3), ("zipf", 11))
LARGEST_ERROR = 2e-2
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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


def check_no_wait(shape: Shape, **settings: str) -> Figures:
    """Forward and backward under CUDA's check and our tripwire, after a warm-up."""
    run = Pass(shape, "ours", **settings)
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


def dense_layer(hidden: Tensor, fc1: Tensor, fc2: Tensor, weights: Tensor) -> Tensor:
    """A loop over all experts for all tokens; ``weights`` is ``[T, E]``."""
    total = torch.zeros_like(hidden)
    for expert, weight in enumerate(weights.unbind(1)):
        gate, up = (hidden @ fc1[expert].t()).chunk(2, -1)
        inner = torch.nn.functional.silu(gate) * up
        total = total + weight[:, None] * (inner @ fc2[expert].t())
    return total


def check_results(shape: Shape, **settings: str) -> Figures:
    """Output and gradients of the experts against :func:`dense_layer` in fp64."""
    run = Pass(shape, "ours", **settings)
    run()
    probs, chosen = run.layer.route(run.hidden)
    experts = run.layer.experts
    given = (run.hidden[:, 0], experts.linear_fc1.weight, experts.linear_fc2.weight)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = dense_layer(*wide, (probs * chosen).detach().double())
    expected.backward(run.cotangent[:, 0].double())
    results = run.results()
    pairs = {
        "output": (results["output"][:, 0], expected),
        "fc1": (given[1].grad, wide[1].grad),
        "fc2": (given[2].grad, wide[2].grad),
    }
    errors = {
        name: ((actual.double() - exact).norm() / exact.norm()).item()
        for name, (actual, exact) in pairs.items()
    }
    if not max(errors.values()) < LARGEST_ERROR:
        raise AssertionError(f"errors against a dense loop: {errors}")
    return {f"{name}_error": error for name, error in errors.items()}


def cases(dry: bool) -> list[Case]:
    """Every product and transport, then the graph; our products need a GPU."""
    shape, gemms = (DRY_SHAPE, GEMMS[:1]) if dry else (SMALL_SHAPE, GEMMS)
    checks = {
        f"results by {gemm}": partial(check_results, shape, moe_echo_grouped_gemm=gemm)
        for gemm in gemms
    }
    checks |= {
        f"no wait for the device, {transport}, {gemm}": partial(
            check_no_wait, shape, moe_echo_token_transport=transport, moe_echo_grouped_gemm=gemm
        )
        for transport in TRANSPORTS
        for gemm in gemms[: None if transport == TRANSPORTS[0] else 1]
    }
    checks["replays equal eager passes"] = partial(check_replays, shape)
    checks["control: Megatron's all-gather layer waits"] = partial(check_control, shape)
    return [Case(PART, name, check) for name, check in checks.items()]
