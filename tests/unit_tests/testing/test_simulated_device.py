"""The real offloader on a simulated device: time, memory, and the order of all accesses."""

import random
import sys
from fractions import Fraction
from typing import Any

import launch
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

from offload_simulator import MOE, UNIFORM, Module, Profile, Schedule, Simulation, pipeline

from megatron_echo.copy_lanes import Lane, Link
from megatron_echo.offload import ActivationOffloader, OffloadConfig
from megatron_echo.testing.simulated_device import Latency, SimulatedBackend

SCHEDULES = {
    "PP1": (pipeline(2), 1),
    "PP4 rank 0": (pipeline(6, 4, 0), 1),
    "PP4 rank 2": (pipeline(6, 4, 2), 1),
    "VPP2 PP2 rank 0": (pipeline(4, 2, 0, 2), 2),
    "VPP2 PP2 rank 1": (pipeline(4, 2, 1, 2), 2),
    "VPP3 PP2 rank 0": (pipeline(4, 2, 0, 3), 3),
}


def check(simulation: Simulation) -> None:
    """No race, nothing early, nothing left, each byte copied once."""
    backend, offloader = simulation.backend, simulation.offloader
    assert backend.races == []
    assert backend.premature_reads == 0
    assert backend.live_bytes == offloader.transfers.device_bytes == 0
    assert backend.surviving_storages() == 0
    assert offloader.transfers.arena.leased_bytes == 0
    assert not offloader.transfers.pending
    assert offloader.statistics()["offload/live_storages"] == 0


def gradients(profile: Profile, schedule: Schedule, **options: Any) -> list[torch.Tensor]:
    return Simulation(profile, 1, fraction=0, **options).step(schedule).gradients


@pytest.mark.parametrize(("link", "first"), [(2, 1.02), (0.8, 1.05), (0.5, 1.25)])
@pytest.mark.parametrize("fraction", [1.0, 0.8, 0.5, 0.25])
def test_time(link: float, first: float, fraction: float) -> None:
    simulation = Simulation(UNIFORM, link, fraction=fraction)
    ratios = [simulation.step(pipeline(2)).ratio for _ in range(3)]
    assert ratios[0] <= first
    assert ratios[1:] == [1, 1]
    check(simulation)


@pytest.mark.parametrize(("link", "peak"), [(3, 15), (2, 35), (1.5, 62)])
def test_moe_profile(link: float, peak: int) -> None:
    """Never slower than without; the peaks are pinned so that a worse plan is noticed."""
    simulation = Simulation(MOE, link)
    *_, last = (simulation.step(pipeline(2)) for _ in range(2))
    assert last.ratio == 1
    assert last.peak <= peak
    check(simulation)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("link", [3, 0.7])
def test_pipeline_schedules(name: str, link: float) -> None:
    schedule, chunks = SCHEDULES[name]
    simulation = Simulation(UNIFORM, link, layers=2, chunks=chunks)
    expected = gradients(UNIFORM, schedule, layers=2, chunks=chunks)
    for number in range(3):
        step = simulation.step(schedule)
        assert all(map(torch.equal, step.gradients, expected))
        if number > 0:
            assert step.ratio == 1
            assert step.forecast == step.peak
            assert step.statistics["offload/exposed"] == 0
    check(simulation)


def test_the_peak_falls_when_the_link_is_fast() -> None:
    simulation = Simulation(UNIFORM, 2)
    *_, last = (simulation.step(pipeline(8, 4, 0)) for _ in range(2))
    assert last.peak <= 4
    assert last.forecast == last.peak


profiles = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(0, 6)), min_size=1, max_size=3
).map(lambda modules: {f"m{i}": Module(*module) for i, module in enumerate(modules)})
schedules = st.sampled_from(sorted(SCHEDULES))
links = st.sampled_from([0.3, 0.5, 0.8, 1, 2, 5])


@settings(max_examples=20, deadline=None)
@given(profiles, schedules, links, links, st.lists(st.floats(0, 1), min_size=2, max_size=2))
def test_offloading_less_is_never_slower(
    profile: Profile, name: str, to_host: float, to_device: float, fractions: list[float]
) -> None:
    """Nor does it offload more; the ledger is what the plan says, whatever the schedule."""
    schedule, chunks = SCHEDULES[name]
    ratios, sent = [], []
    for fraction in sorted(fractions):
        simulation = Simulation(
            profile, to_host, to_device, layers=2, chunks=chunks, fraction=fraction, strict=False
        )
        *_, last = (simulation.step(schedule) for _ in range(2))
        ratios.append(last.ratio)
        sent.append(last.statistics["offload/bytes"])
        assert last.forecast in (None, last.peak)
        assert simulation.backend.peak_bytes >= last.peak * 4096
        check(simulation)
    assert ratios == sorted(ratios)
    assert ratios[-1] == 1
    assert sent == sorted(sent)


def randomly(seed: int) -> Latency:
    drawn = random.Random(seed)
    return lambda lane, nbytes: drawn.randrange(9000)


ADVERSARIES: dict[str, Latency] = {
    "slow to host": lambda lane, nbytes: 100_000 if lane is Lane.TO_HOST else 0,
    "slow to device": lambda lane, nbytes: 0 if lane is Lane.TO_HOST else 100_000,
    "instant": lambda lane, nbytes: 0,
    **{f"random {seed}": randomly(seed) for seed in range(3)},
}


@pytest.mark.parametrize("adversary", ADVERSARIES)
@pytest.mark.parametrize("name", ["PP1", "PP4 rank 0", "VPP2 PP2 rank 1"])
def test_adversarial_latencies(adversary: str, name: str) -> None:
    """Copies that take other times than planned change nothing but the time."""
    schedule, chunks = SCHEDULES[name]
    expected = gradients(UNIFORM, schedule, layers=2, chunks=chunks)
    simulation = Simulation(
        UNIFORM, 2, layers=2, chunks=chunks, latency=ADVERSARIES[adversary], slab_bytes=8192
    )
    for _ in range(3):
        assert all(map(torch.equal, simulation.step(schedule).gradients, expected))
    check(simulation)


def test_more_and_fewer_microbatches() -> None:
    """All planned again after one step of learning; a known schedule is taken up at once."""
    simulation = Simulation(UNIFORM, 2, layers=2)
    shares = []
    for microbatches in (4, 4, 6, 6, 6, 4, 4):
        step = simulation.step(pipeline(microbatches, 4, 0))
        shares.append(step.statistics["offload/bytes"] / (microbatches * 6 * 4096))
        plan = simulation.offloader._scheduler.plan
        assert (plan is None) == (len(shares) == 3)
    assert shares == [1] * 7
    assert step.ratio == 1
    check(simulation)


def test_host_memory_is_allocated_once() -> None:
    simulation = Simulation(MOE, 2, layers=3, slab_bytes=64 << 10)
    arena = simulation.offloader.transfers.arena
    counts = []
    for _ in range(4):
        simulation.step(pipeline(4, 2, 0))
        counts.append(arena.allocations)
    assert counts == counts[:1] * 4
    assert counts[0] > 0


@pytest.mark.parametrize("capacity", [0, 5, 1000])
def test_full_host_memory(capacity: int) -> None:
    """What does not fit stays on the device and is counted."""
    simulation = Simulation(UNIFORM, 2, max_host_bytes=capacity * 4096, slab_bytes=4096)
    for _ in range(2):
        step = simulation.step(pipeline(2))
        assert step.statistics["offload/host_allocated_bytes"] <= capacity * 4096
    assert (step.statistics["offload/kept_host_full_bytes"] == 0) == (capacity == 1000)
    assert step.ratio == 1
    check(simulation)


def test_target_bytes() -> None:
    """No more is offloaded than the target needs."""
    sent = []
    for target in (None, 20, 10, 4):
        simulation = Simulation(UNIFORM, 2, target_bytes=None if target is None else target * 4096)
        *_, last = (simulation.step(pipeline(2)) for _ in range(2))
        assert last.peak <= (target or 2)
        assert last.peak >= (target or 3) - 1
        sent.append(last.statistics["offload/bytes"])
        kept = [last.statistics[f"offload/kept_{why}_bytes"] for why in ("target", "link")]
        assert sent[-1] + sum(kept) == 48 * 4096
    assert sent[0] > sent[3] > sent[2] > sent[1]


def test_time_for_memory() -> None:
    """``max_slowdown`` buys memory, and the step takes no longer than it says."""
    peaks = []
    for slowdown in (0.0, 0.1, 0.3):
        simulation = Simulation(UNIFORM, 0.5, max_slowdown=slowdown)
        *_, last = (simulation.step(pipeline(2)) for _ in range(3))
        assert last.ratio <= 1 + slowdown
        peaks.append(last.peak)
        check(simulation)
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize("policy", ["earliest", "largest", "longest-lifetime"])
def test_policies(policy: str) -> None:
    simulation = Simulation(MOE, 1, policy=policy, fraction=0.5)
    for _ in range(2):
        step = simulation.step(pipeline(2))
    assert step.ratio == 1
    assert 0 < step.statistics["offload/bytes"] <= 0.5 * 2 * 8 * 18 * 4096
    check(simulation)
    report = simulation.offloader.report()
    assert all(name in report for name in MOE)


def test_equal_runs_make_equal_traces() -> None:
    traces = []
    for _ in range(2):
        simulation = Simulation(MOE, 1.5, layers=2)
        for _ in range(3):
            simulation.step(pipeline(3, 2, 0))
        traces.append(simulation.backend.trace)
    assert traces[0] == traces[1] != []


class Keeps(nn.Module):
    """Saves the second argument and multiplies the gradient by it."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
            ctx.save_for_backward(kept)
            return x + 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * ctx.saved_tensors[0], None

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return self.Product.apply(x, kept)


class Discards(nn.Module):
    """Empties saved tensors in forward and fills them again before backward uses them.

    Megatron's checkpoint without output does so: what is computed again need not be offloaded.
    """

    def __init__(self, backend: SimulatedBackend) -> None:
        super().__init__()
        self.backend = backend
        self.parts = nn.ModuleList(Keeps() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        kept = [torch.full((8,), 2.0 + number) for number in range(6)]
        for part, tensor in zip(self.parts, kept, strict=True):
            self.backend.compute(1000)
            x = part(x, tensor)
            tensor.untyped_storage().resize_(0)

        def fill(_: Tensor) -> None:
            for number, tensor in enumerate(kept):
                tensor.untyped_storage().resize_(32)
                tensor.data.fill_(2.0 + number)
            kept.clear()

        x.register_hook(fill)
        return x


@pytest.mark.parametrize("ticks", [10, 5000])
def test_storages_that_their_owner_empties(ticks: int) -> None:
    """The copy, which may come too late, is not used, and the next plan makes none."""
    backend = SimulatedBackend(Link(Fraction(1), Fraction(1)), lambda lane, nbytes: ticks)
    model = nn.Sequential(Discards(backend))
    config = OffloadConfig(
        extra_regions={"part": "*.parts.*"}, min_tensor_bytes=0, learning_steps=1
    )
    offloader = ActivationOffloader(config, backend).attach(model)
    for kept in (0, 6 * 32):
        x = torch.ones(8, requires_grad=True)
        with offloader.step():
            model(x).sum().backward()
        assert torch.equal(x.grad, torch.full((8,), 5040.0))
        assert offloader.statistics()["offload/kept_held_bytes"] == kept
    assert backend.races == []
    assert backend.surviving_storages() == 0
