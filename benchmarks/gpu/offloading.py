"""Offloading on a device: the same bits, and copies that run while the device computes."""

from collections.abc import Callable

import torch
from record import Case, Figures, SkippedError
from timing import call_milliseconds, device, on_gpu, release_memory, synchronize
from torch import Tensor, nn

from megatron_echo.copy_lanes import CudaBackend, Lane
from megatron_echo.offload import ActivationOffloader, OffloadConfig

PART = "Offloading"
LAYERS, STEPS = 6, 5  # some steps are learnt, the others planned
ROWS, WIDTH = 8192, 2048
COPY_BYTES, PARTS = 2**28, 12


class Block(nn.Module):
    """A part of a network that keeps its wide middle for backward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.middle = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Of the same shape."""
        return x + self.down(self.middle(self.up(x)))


def gradients(is_offloaded: bool, rows: int, width: int) -> tuple[list[Tensor], Figures]:
    """All gradients of the last step, and the offloader's statistics."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(LAYERS))).to(device(), torch.bfloat16)
    config = OffloadConfig(extra_regions={"middle": "*.middle"}, min_tensor_bytes=0)
    offloader = ActivationOffloader(config).attach(model) if is_offloaded else None
    for _ in range(STEPS):
        model.zero_grad()
        x = torch.randn(rows, width, device=device(), dtype=torch.bfloat16)
        model(x).float().square().mean().backward()
        if offloader is not None:
            offloader.step_end()
    synchronize()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return found, dict(offloader.statistics()) if offloader is not None else {}


def check_bits(rows: int, width: int) -> Figures:
    """Gradients with and without.

    Raises:
        AssertionError: they differ, or nothing went to the host.
    """
    release_memory()
    (plain, _), (offloaded, statistics) = (gradients(on, rows, width) for on in (False, True))
    if not all(map(torch.equal, plain, offloaded)) or not statistics["offload/bytes"]:
        raise AssertionError(f"other gradients, or nothing was offloaded: {statistics}")
    names = ("bytes", "hidden_bytes", "exposed_bytes", "host_allocated_bytes")
    return {"gradients": len(plain), **{name: statistics[f"offload/{name}"] for name in names}}


def check_captured_bits(rows: int, width: int) -> Figures:
    """Gradients of replays with offloading against eager steps without.

    Raises:
        AssertionError: they differ, or the capture sent nothing to the host.
    """
    release_memory()
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(width) for _ in range(LAYERS))).to(device(), torch.bfloat16)
    x = torch.empty(rows, width, device=device(), dtype=torch.bfloat16)
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]

    def step() -> None:
        found = torch.autograd.grad(model(x).float().square().mean(), parameters)
        for parameter, gradient in zip(total, found, strict=True):
            parameter.copy_(gradient)

    def gradients_of(number: int, run: Callable[[], None]) -> list[Tensor]:
        torch.manual_seed(number)
        x.copy_(torch.randn(rows, width, device=device(), dtype=torch.bfloat16))
        run()
        return [gradient.clone() for gradient in total]

    plain = [gradients_of(number, step) for number in range(STEPS)]
    config = OffloadConfig(extra_regions={"middle": "*.middle"}, min_tensor_bytes=0)
    offloader = ActivationOffloader(config).attach(model)

    def offloaded() -> None:
        with offloader.step():
            step()

    for number in range(config.learning_steps):
        gradients_of(number, offloaded)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        offloaded()
    for number, expected in enumerate(plain):
        if not all(map(torch.equal, gradients_of(number, graph.replay), expected)):
            raise AssertionError(f"other gradients in replay {number}")
    sent = offloader.statistics()["offload/planned_bytes"]
    if not sent:
        raise AssertionError(f"nothing was offloaded: {offloader.statistics()}")
    return {"replays": len(plain), "bytes": sent}


def measure_overlap() -> Figures:
    """How much of the shorter of copies and products hides behind the longer.

    Both directions on the offloader's own streams, in a process with
    ``CUDA_DEVICE_MAX_CONNECTIONS=1``, which Megatron's recipes set.
    """
    if not on_gpu():
        raise SkippedError("needs a GPU")
    release_memory()
    backend = CudaBackend()
    host = [backend.allocate_host(COPY_BYTES) for _ in range(2)]
    away = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=device()) for _ in range(2)]
    left = torch.randn(8192, 8192, device=device()).bfloat16()

    def copy(number: int) -> None:
        """A part in each direction, behind what was enqueued on the compute stream."""
        for lane, target, source in (
            (Lane.TO_HOST, host[0], away[0]), (Lane.TO_DEVICE, away[1], host[1]),
        ):  # fmt: skip
            backend.wait(lane, backend.record(Lane.COMPUTE))
            backend.copy(lane, target.chunk(PARTS)[number], source.chunk(PARTS)[number])

    def copies() -> None:
        for number in range(PARTS):
            copy(number)

    def products() -> None:
        for _ in range(PARTS):
            torch.mm(left, left)

    def both() -> None:
        for number in range(PARTS):
            torch.mm(left, left)
            copy(number)

    functions: dict[str, Callable[[], None]]
    functions = {"copies": copies, "products": products, "both": both}
    times = call_milliseconds(functions, rounds=5, calls=1)
    hidden = times["copies"] + times["products"] - times["both"]
    return {
        **{f"{name}_ms": value for name, value in times.items()},
        "hidden_share": hidden / min(times["copies"], times["products"]),
    }


def bits(dry: bool) -> Case:
    """The check of the gradients."""
    sizes = (32, 16) if dry else (ROWS, WIDTH)
    return Case(PART, "the same gradients", lambda: check_bits(*sizes))


def captured_bits(dry: bool) -> Case:
    """The check of the gradients of replays."""
    sizes = (32, 16) if dry else (ROWS, WIDTH)
    return Case(PART, "the same gradients in a graph", lambda: check_captured_bits(*sizes))


def overlap() -> Case:
    """The measurement of the overlap."""
    name = "copies beside products, CUDA_DEVICE_MAX_CONNECTIONS=1"
    return Case(PART, name, measure_overlap, ("hidden_share >= 0.8",))
