"""Offloading on a simulated device: time, memory and order of copies in pipeline schedules.

    python benchmarks/offload_simulator.py [--output benchmarks/results/offload_simulator]

The offloader is the real one, with real autograd; modules and copies take time on an integer clock
(``testing/simulated_device.py``). "known" is what the implementation in Megatron-LM's main
branch of August 2026 takes on a clock of the same kind: infinitely fast host, one rank, no bubbles.
All figures are simulated. Writes a table (``.md``) and everything (``.json``).
"""

import dataclasses
import json
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from processes import results_parser  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from megatron_echo.copy_lanes import Link  # noqa: E402
from megatron_echo.offload import ActivationOffloader, OffloadConfig  # noqa: E402
from megatron_echo.testing.simulated_device import Latency, SimulatedBackend  # noqa: E402

UNIT = 1000
"""Ticks of a time unit."""

MEGABYTE = 4096
"""Bytes that stand for a megabyte."""


class Module(NamedTuple):
    """Forward and backward time in units, and megabytes saved."""

    forward: float
    backward: float
    megabytes: int


Profile = dict[str, Module]
Schedule = list[tuple[str, int, int]]

UNIFORM: Profile = {name: Module(1, 2, 1) for name in "ABC"}
MOE: Profile = {
    "attn_norm": Module(0.3, 0.6, 1),
    "core_attn": Module(3, 6.5, 6),
    "attn_proj": Module(1, 2, 2),
    "mlp_norm": Module(0.3, 0.6, 1),
    "expert_fc1": Module(2.5, 5, 4),
    "moe_act": Module(0.4, 0.8, 4),
}


def pipeline(microbatches: int, ranks: int = 1, rank: int = 0, chunks: int = 1) -> Schedule:
    """``("forward" | "backward", model chunk, microbatch)`` of one rank's 1F1B, interleaved or not.

    Args:
        microbatches: with more than one chunk a multiple of ``ranks``.
        ranks: stages of the pipeline.
        rank: whose order.
        chunks: model chunks of a rank.
    """
    total = microbatches * chunks
    group = ranks * chunks

    def place(number: int) -> tuple[int, int]:
        if chunks == 1:
            return 0, number
        return number % group // ranks, number // group * ranks + number % ranks

    warmup = ranks - rank - 1
    if chunks > 1:
        warmup = 2 * warmup + (chunks - 1) * ranks
    warmup = min(warmup, total)
    forward = [("forward", *place(number)) for number in range(total)]
    backward = [
        ("backward", chunks - 1 - chunk, microbatch)
        for chunk, microbatch in map(place, range(total))
    ]
    order = forward[:warmup]
    for pair in zip(forward[warmup:], backward, strict=False):
        order += pair
    return order + backward[total - warmup :]


class SimulatedModule(nn.Module):
    """A module that takes time and saves one tensor.

    Args:
        backend: whose compute lane it keeps busy.
        nbytes: of the saved tensor, a multiple of 32.
        forward_ticks: before the tensor is saved.
        backward_ticks: after it was needed.
    """

    def __init__(
        self, backend: SimulatedBackend, nbytes: int, forward_ticks: int, backward_ticks: int
    ) -> None:
        super().__init__()
        self._work = (backend, nbytes, forward_ticks, backward_ticks)

    def forward(self, x: Tensor) -> Tensor:
        """Fp32 ``[8]`` to fp32 ``[8]``."""
        return _Work.apply(x, *self._work)


class _Work(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, backend: SimulatedBackend, nbytes: int, ticks: int, later: int
    ) -> Tensor:
        backend.compute(ticks)
        ctx.save_for_backward(torch.sin(x).repeat(nbytes // x.nbytes))
        ctx.backend, ctx.ticks = backend, later
        return torch.cos(x) * 1.5

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        ctx.backend.compute(ctx.ticks)
        return grad * saved.view(-1, 8).mean(0) * 1.5, None, None, None, None


class Layer(nn.Module):
    """The modules of a profile in a row."""

    def __init__(self, backend: SimulatedBackend, profile: Profile) -> None:
        super().__init__()
        self.names = tuple(profile)
        for name, (forward, backward, megabytes) in profile.items():
            module = SimulatedModule(
                backend, megabytes * MEGABYTE, round(forward * UNIT), round(backward * UNIT)
            )
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Fp32 ``[8]`` to fp32 ``[8]``."""
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Step(NamedTuple):
    """One step on the clock: time over time without offload, megabytes, and the gradients."""

    ratio: float
    peak: float
    forecast: float | None
    statistics: dict[str, float]
    gradients: list[Tensor]


class Simulation:
    """A rank with a model of equal layers.

    Args:
        profile: of a layer.
        to_host: megabytes in a time unit.
        to_device: the same, by default as fast.
        layers: of a model chunk.
        chunks: model chunks.
        latency: what copies really take.
        config: fields of :class:`OffloadConfig`.
    """

    def __init__(
        self, profile: Profile, to_host: float, to_device: float | None = None, layers: int = 8,
        chunks: int = 1, latency: Latency | None = None, **config: Any,
    ) -> None:  # fmt: skip
        rates = (to_host, to_host if to_device is None else to_device)
        link = Link(*(Fraction(str(rate)) * MEGABYTE / UNIT for rate in rates))
        self.backend = SimulatedBackend(link, latency)
        self.models = [
            nn.Sequential(*(Layer(self.backend, profile) for _ in range(layers)))
            for _ in range(chunks)
        ]
        settings = {"min_tensor_bytes": 0, "learning_steps": 1, "strict": True, **config}
        regions = {name: f"*.{name}" for name in profile}
        self.offloader = ActivationOffloader(
            OffloadConfig(extra_regions=regions, **settings), self.backend
        ).attach(self.models)
        self._chunk_time = layers * sum(round(m.forward * UNIT) + round(m.backward * UNIT)
                                        for m in profile.values())  # fmt: skip

    def step(self, schedule: Schedule) -> Step:
        """One training step; the gradients are those of the inputs, in forward order."""
        start, offloader = self.backend.now, self.offloader
        inputs, outputs = {}, {}
        with offloader.step():
            forecast = offloader.forecast_bytes
            for what, chunk, microbatch in schedule:
                key = chunk, microbatch
                if what == "forward":
                    inputs[key] = torch.linspace(0, 1 + microbatch, 8).requires_grad_()
                    outputs[key] = self.models[chunk](inputs[key])
                else:
                    outputs.pop(key).sum().backward()
        statistics = offloader.statistics()
        return Step(
            ratio=(self.backend.now - start) / (self._chunk_time * len(inputs)),
            peak=statistics["offload/peak_device_bytes"] / MEGABYTE,
            forecast=None if forecast is None else forecast / MEGABYTE,
            statistics=statistics,
            gradients=[tensor.grad for tensor in inputs.values() if tensor.grad is not None],
        )


@dataclasses.dataclass
class Row:
    """A line of the table; ratios are of time with over time without offload."""

    case: str
    first: float
    known_first: float | None
    steady: float
    known_steady: float | None
    peak: float
    known_peak: float | None
    whole: float
    offloaded: float
    races: int
    premature: int


KNOWN: dict[str, tuple[float | None, float | None, float | None]] = {
    "uniform PP1, link 2": (1.167, 1.000, 2),
    "uniform PP1, link 0.8": (1.417, 1.000, 6),
    "uniform PP1, link 0.5": (1.847, 1.208, 12),
    "uniform PP1, link 2, fraction 0.8": (1.167, 1.129, 7),
    "uniform PP1, link 0.8, fraction 0.8": (1.417, 1.321, 7),
    "uniform PP1, link 0.5, fraction 0.8": (1.847, 1.681, 12),
    "uniform PP1, link 2, fraction 0.5": (1.167, 1.038, 13),
    "uniform PP1, link 0.8, fraction 0.5": (1.417, 1.096, 13),
    "uniform PP1, link 0.5, fraction 0.5": (1.847, 1.153, 13),
    "MoE PP1, link 3": (1.261, 1.000, 17),
    "MoE PP1, link 2": (1.391, 1.000, 31),
    "MoE PP1, link 1.5": (1.582, 1.085, 58),
    "uniform PP4 rank 0, link 2": (None, 1.000, 4),
    "uniform PP4 rank 0, link 0.8": (None, 1.000, 20),
    "MoE PP4 rank 0, link 3": (None, 1.000, 27),
    "uniform VPP2 PP4 rank 0, link 2": (None, 1.000, 4),
    "MoE VPP2 PP4 rank 3, link 2": (None, 1.008, 67),
    "uniform PP1, link 2 out, 0.4 back": (None, 1.118, 2),
}


def simulate(case: str) -> Row:
    """The row of one of :data:`KNOWN`, whose name says everything."""
    model, link, *rest = case.split(", ")
    profile = UNIFORM if model.startswith("uniform") else MOE
    words = model.split()
    ranks = int(next(w for w in words if w.startswith("PP"))[2:])
    rank = int(words[-1]) if "rank" in words else 0
    chunks = 2 if "VPP2" in words else 1
    schedule = pipeline(8 if ranks > 1 else 2, ranks, rank, chunks)
    rates = [float(link.split()[1])]
    options: dict[str, float] = {}
    for part in rest:
        name, value = part.split() if part.startswith("fraction") else reversed(part.split())
        if name == "fraction":
            options["fraction"] = float(value)
        else:
            rates.append(float(value))
    layers = 4 if chunks > 1 and profile is MOE else 8
    simulation = Simulation(profile, *rates, layers=layers, chunks=chunks, **options)
    first, *_, steady = [simulation.step(schedule) for _ in range(3)]
    whole = Simulation(profile, *rates, layers=layers, chunks=chunks, max_host_bytes=0)
    return Row(
        case, first.ratio, KNOWN[case][0], steady.ratio, KNOWN[case][1], steady.peak,
        KNOWN[case][2], whole.step(schedule).peak,
        steady.statistics["offload/bytes"] / steady.statistics["offload/candidate_bytes"],
        len(simulation.backend.races), simulation.backend.premature_reads,
    )  # fmt: skip


def as_table(rows: list[Row]) -> str:
    """Markdown."""

    def text(value: Any) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    names = [field.name.replace("_", " ") for field in dataclasses.fields(Row)]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(map(text, dataclasses.astuple(row))) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "offload_simulator")
    args = parser.parse_args()
    rows = [simulate(case) for case in KNOWN]
    print(as_table(rows))
    notes = (
        "\nfirst, steady: time of a step over its time without offload, simulated. peak, whole: "
        "megabytes of the regions' storages on the device, with offload and without. offloaded: "
        "share of the bytes. races: unordered conflicting accesses.\n"
    )
    args.output.with_suffix(".md").write_text(as_table(rows) + "\n" + notes)
    record = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
    args.output.with_suffix(".json").write_text(record + "\n")


if __name__ == "__main__":
    main()
