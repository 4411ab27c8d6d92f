"""A captured step with offloading: its order, and what is refused. The graph is the stand-in's."""

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any

import launch
import pytest
import torch
from torch import Tensor, nn
from unit_tests.testing.test_simulated_device import (
    MOE,
    SCHEDULES,
    UNIFORM,
    Profile,
    Schedule,
    pipeline,
)

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

from offload_simulator import Layer

from megatron_echo.copy_lanes import Lane, Link, StreamBackend
from megatron_echo.cpu_backend.recorded_graph import CaptureError, RecordedGraph, capture
from megatron_echo.offload import ActivationOffloader, OffloadConfig
from megatron_echo.offload.host_arena import HostArena
from megatron_echo.offload.storages import Blob, Handle, State
from megatron_echo.offload.transfers import Transfers
from megatron_echo.testing.simulated_device import SimulatedBackend

Patch = pytest.MonkeyPatch


class NoClock:
    """Stands in for the simulated device where nothing takes time."""

    def compute(self, ticks: int) -> None:
        """Nothing."""


class Training:
    """A model, its static inputs and gradients, and a step that can be captured."""

    def __init__(self, backend: Any = None, schedule: str = "PP1", profile: Profile = MOE,
                 **fields: Any) -> None:  # fmt: skip
        self.schedule, chunks = SCHEDULES[schedule]
        clock: Any = NoClock()
        self.models = [
            nn.Sequential(*(Layer(clock, profile) for _ in range(2))) for _ in range(chunks)
        ]
        settings = {"min_tensor_bytes": 0, "strict": True, "slab_bytes": 4096, **fields}
        regions = {name: f"*.{name}" for name in profile}
        self.offloader = ActivationOffloader(
            OffloadConfig(extra_regions=regions, **settings), backend
        ).attach(self.models)
        self.inputs = torch.empty(8, 8)
        self.gradients = torch.zeros(8, chunks, 8)

    def step(self, schedule: Schedule | None = None) -> None:
        """All passes of a step."""
        outputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        with self.offloader.step():
            for what, chunk, batch in schedule or self.schedule:
                if what == "forward":
                    x = (self.inputs[batch] * 1.0).detach().requires_grad_()
                    outputs[chunk, batch] = x, self.models[chunk](x)
                else:
                    x, output = outputs.pop((chunk, batch))
                    output.sum().backward()
                    self.gradients[batch, chunk].copy_(x.grad)

    def with_inputs(self, number: int, run: Callable[[], object]) -> Tensor:
        """The gradients that a step makes of the inputs of this number."""
        self.inputs.copy_(torch.linspace(0, 1 + number, 64).view(8, 8))
        self.gradients.zero_()
        run()
        return self.gradients.clone()

    def captured(self) -> RecordedGraph:
        """A graph of a step, after two eager ones."""
        for number in range(2):
            self.with_inputs(number, self.step)
        graph = RecordedGraph()
        with capture(graph):
            self.step()
        return graph


def check_bits(**fields: Any) -> Training:
    """Replays against a twin that offloads nothing."""
    plain, training = Training(fraction=0, schedule=fields.get("schedule", "PP1")), None
    training = Training(**fields)
    graph = training.captured()
    for number in range(3, 6):
        expected = plain.with_inputs(number, plain.step)
        assert torch.equal(training.with_inputs(number, graph.replay), expected)
    return training


@pytest.mark.parametrize("fraction", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_replays_have_the_bits_of_eager_steps(schedule: str, fraction: float) -> None:
    """The statistics are those of an eager step with the plan; the capture pinned nothing."""
    training = check_bits(schedule=schedule, fraction=fraction)
    captured, eager = (
        training.offloader.statistics(),
        Training(schedule=schedule, fraction=fraction),
    )
    for number in range(3):
        eager.with_inputs(number, eager.step)
    assert captured == eager.offloader.statistics()
    assert captured["offload/bytes"] == captured["offload/planned_bytes"] > 0
    assert (captured["offload/kept_fraction_bytes"] > 0) == (fraction < 1)


@pytest.mark.parametrize("policy", ["earliest", "largest", "longest-lifetime"])
def test_a_capture_pins_nothing(policy: str) -> None:
    """Also where host memory is short; and what goes to the host is what an eager step sends."""
    training = Training(policy=policy, fraction=0.5, max_host_bytes=1 << 16)
    arena = training.offloader.transfers.arena
    pinned = []
    take = arena._allocate

    def allocate(nbytes: int) -> Tensor:
        assert not RecordedGraph.is_capturing()
        pinned.append(nbytes)
        return take(nbytes)

    arena._allocate = allocate
    training.captured()
    assert sum(pinned) == arena.allocated_bytes > 0
    eager = Training(policy=policy, fraction=0.5, max_host_bytes=1 << 16)
    for number in range(3):
        eager.with_inputs(number, eager.step)
    assert training.offloader.statistics() == eager.offloader.statistics()


# ------------------------------------------------------------------------------ the order


class Noted:
    """Mixed into a backend: what the lanes were given, in order."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.sequence: list[tuple] = []
        self._recorded: list[tuple[Any, int]] = []

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        """A copy of so many bytes."""
        super().copy(lane, target, source)  # type: ignore[misc]
        self.sequence.append(("copy", lane, source.numel()))

    def record(self, lane: Lane) -> Any:
        """An event."""
        event = super().record(lane)  # type: ignore[misc]
        self._recorded.append((event, len(self.sequence)))
        self.sequence.append(("record", lane))
        return event

    def wait(self, lane: Lane, event: Any) -> None:
        """A wait for the event that was recorded at a place of the sequence."""
        place = next(place for other, place in reversed(self._recorded) if other is event)
        super().wait(lane, event)  # type: ignore[misc]
        self.sequence.append(("wait", lane, place))


class NotedSimulation(Noted, SimulatedBackend):
    """Without a link: it plans by marks, as the stand-in does, which measures none."""

    link = None


class NotedStreams(Noted, StreamBackend):
    """The streams of a capture."""


@pytest.mark.parametrize("fraction", [1.0, pytest.param(0.5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", ["PP1", "PP4 rank 0", "VPP2 PP2 rank 1"])
def test_simulated_device_and_captured_streams_agree(
    monkeypatch: Patch, schedule: str, fraction: float
) -> None:
    """Both are given the same copies, events and waits, and neither finds a race.

    The graph holds those copies, on the streams of their lanes, in that order.
    """
    simulated = NotedSimulation(Link(1, 1), lambda lane, nbytes: 4000)  # type: ignore[arg-type]
    streams = NotedStreams()
    for backend in (simulated, streams):
        training = Training(backend, schedule, fraction=fraction)
        for number in range(2):
            training.with_inputs(number, training.step)
        backend.sequence.clear()
        backend._recorded.clear()
        graph = RecordedGraph()
        with monkeypatch.context() as patch, capture(graph):
            if backend is simulated:
                patch.setattr(
                    RecordedGraph, "_record", lambda self, f, args, kwargs: f(*args, **kwargs)
                )
            training.step()
    assert simulated.races == []
    assert streams.sequence == simulated.sequence
    of_stream = {stream: lane for lane, stream in streams._streams.items()}
    copies = [
        ("copy", of_stream[each.stream], each.arguments[0][0].numel())
        for each in graph._operations
        if each.stream in of_stream
    ]
    assert copies == [each for each in simulated.sequence if each[0] == "copy"]
    assert copies


# ------------------------------------------------------------------------------ what goes wrong


def leave_out(patch: Patch, waiting: Lane, recorded: Lane) -> None:
    """One lane no longer waits for events of another."""
    record, wait = StreamBackend.record, StreamBackend.wait
    lanes: dict[int, Lane] = {}
    events = []

    def recording(self: StreamBackend, lane: Lane) -> Any:
        event = record(self, lane)
        lanes[id(event)] = lane
        events.append(event)
        return event

    def waiting_less(self: StreamBackend, lane: Lane, event: Any) -> None:
        if (lane, lanes[id(event)]) != (waiting, recorded):
            wait(self, lane, event)

    patch.setattr(StreamBackend, "record", recording)
    patch.setattr(StreamBackend, "wait", waiting_less)


def fork_nothing(patch: Patch) -> None:
    leave_out(patch, Lane.TO_HOST, Lane.COMPUTE)


def write_into_memory_in_use(patch: Patch) -> None:
    leave_out(patch, Lane.TO_DEVICE, Lane.COMPUTE)


def use_what_is_not_back(patch: Patch) -> None:
    leave_out(patch, Lane.COMPUTE, Lane.TO_DEVICE)


def free_the_original_too_early(patch: Patch) -> None:
    leave_out(patch, Lane.COMPUTE, Lane.TO_HOST)


def lend_a_block_twice(patch: Patch) -> None:
    """A block goes back to the arena while its bytes are still needed."""
    send = Transfers.send

    def sending(self: Transfers, blob: Blob) -> bool:
        is_sent = send(self, blob)
        if is_sent and blob.lease is not None:
            self.arena._free[blob.lease.block.numel()].append(blob.lease)
        return is_sent

    patch.setattr(Transfers, "send", sending)


def keep_guards(patch: Patch) -> None:
    """Events of eager steps are waited for in the capture."""
    begin = HostArena.begin_capture

    def beginning(self: HostArena) -> None:
        guards = {id(lease): lease.guard for leases in self._free.values() for lease in leases}
        begin(self)
        for leases in self._free.values():
            for lease in leases:
                lease.guard = guards[id(lease)]

    patch.setattr(HostArena, "begin_capture", beginning)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (fork_nothing, "runs on a stream that is not part of the capture"),
        (write_into_memory_in_use, "not part of the capture|writes memory while another"),
        (use_what_is_not_back, "memory while another stream still writes it"),
        (free_the_original_too_early, "Memory is freed while another stream still reads it"),
        (keep_guards, "waits for an event from outside of the capture"),
    ],
)
def test_a_wrong_order_fails_at_the_capture(
    monkeypatch: Patch, mutate: Callable[[Patch], None], message: str
) -> None:
    mutate(monkeypatch)
    with pytest.raises(CaptureError, match=message):
        Training(schedule="PP4 rank 0").captured()
    assert not RecordedGraph.is_capturing()


class Discards(nn.Module):
    """Saves something that nobody will need."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.lost = nn.Identity(), nn.Identity()
        self.kept.forward = self.lost.forward = torch.exp  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        self.lost(x)
        return self.kept(x)


def test_a_copy_that_nobody_waits_for_is_joined_at_the_end(monkeypatch: Patch) -> None:
    def run() -> None:
        model = nn.Sequential(Discards())
        config = OffloadConfig(extra_regions={"any": "0.?*"}, min_tensor_bytes=0)
        offloader = ActivationOffloader(config).attach(model)
        x, graph = torch.ones(8, requires_grad=True), RecordedGraph()
        for is_captured in (False, False, True):
            with capture(graph) if is_captured else contextlib.nullcontext(), offloader.step():
                model(x * 1.0).sum().backward()
        assert offloader.statistics()["offload/dropped_bytes"] == x.nbytes

    run()
    monkeypatch.setattr(Transfers, "join", lambda self: self.pending.clear())
    with pytest.raises(CaptureError, match="The capture ends while another stream has work"):
        run()


@pytest.mark.parametrize("is_guarded", [True, False])
def test_a_block_is_not_written_while_it_is_read(is_guarded: bool, monkeypatch: Patch) -> None:
    """A block that is lent again while its bytes are on their way back: its guard is waited for."""
    arena = HostArena(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8), None, 512)
    transfers = Transfers(StreamBackend(), arena)
    lost = None if is_guarded else pytest.raises(CaptureError, match="still reads it")
    pinned = arena.lease(512)
    assert pinned is not None
    arena.give_back(pinned)
    with lost or contextlib.nullcontext(), capture(RecordedGraph()):
        first, second = (Blob(transfers, name, Handle(torch.ones(128) * 2, None)) for name in "ab")
        assert transfers.send(first)
        transfers.trim(0)
        transfers.fetch(first)
        assert first.lease is not None
        if not is_guarded:
            first.lease.guard = None
        arena.give_back(first.lease)
        assert transfers.send(second)
        first.lease = None
        transfers.join()
    if is_guarded:  # what is left of a capture goes without a word, whatever collects it
        faults: list[Any] = []
        monkeypatch.setattr(sys, "unraisablehook", faults.append)
        del first, second
        assert not faults


def test_a_block_that_is_lent_twice_changes_bits(monkeypatch: Patch) -> None:
    check_bits(schedule="PP4 rank 0")
    lend_a_block_twice(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):  # at the latest the bytes on loan are wrong
        check_bits(schedule="PP4 rank 0")


def test_blocks_of_a_graph_are_not_lent_to_eager_steps() -> None:
    """A replay between forward and backward of an eager step changes nothing there."""
    training = Training()
    graph = training.captured()
    eager = pipeline(2)

    def interrupted() -> None:
        output = training.models[0](x := training.inputs[0].clone().requires_grad_())
        assert training.offloader.transfers.arena.leased_bytes > 0
        graph.replay()
        output.sum().backward()
        training.gradients.zero_()[0, 0].copy_(x.grad)
        training.offloader.step_end()

    expected = training.with_inputs(1, functools.partial(training.step, eager))[0, 0]
    assert torch.equal(training.with_inputs(1, interrupted)[0, 0], expected)
    states = {blob.state for blob in training.offloader._blobs.values()}
    assert State.HOST not in states


# ------------------------------------------------------------------------------ what is refused


def test_a_capture_without_a_plan_is_refused() -> None:
    training = Training()
    with (
        pytest.raises(RuntimeError, match=r"before offloading has a plan\. Let at least 2 steps"),
        capture(RecordedGraph()),
    ):
        training.step()
    check_bits()  # and the next one may be captured


@pytest.mark.parametrize("microbatches", [1, 3])
def test_a_capture_of_another_schedule_is_refused(microbatches: int) -> None:
    """A plan that would change needs a capture of its own."""
    training = Training(profile=UNIFORM)
    for number in range(3):
        training.with_inputs(number, training.step)
    with (
        pytest.raises(RuntimeError, match="departs from the plan of offloading at mark"),
        capture(RecordedGraph()),
    ):
        training.step(pipeline(microbatches))
    assert training.offloader.transfers.arena.leased_bytes == 0


def test_a_capture_while_an_earlier_step_is_alive_is_refused() -> None:
    training = Training()
    for number in range(2):
        training.with_inputs(number, training.step)
    with training.offloader.step():
        kept = training.models[0](training.inputs[0].clone().requires_grad_())
    with (
        pytest.raises(RuntimeError, match="offloaded bytes of an earlier step are still in use"),
        capture(RecordedGraph()),
    ):
        training.step()
    del kept
