"""Known bugs of other offloaders, put into this one: each makes at least one test fail."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from unit_tests.offload import test_manager
from unit_tests.testing import test_simulated_device as test_simulator
from unit_tests.testing.test_simulated_device import Module, Simulation, pipeline

from megatron_echo.copy_lanes import Lane
from megatron_echo.offload import manager
from megatron_echo.offload.host_arena import HostArena, Lease
from megatron_echo.offload.manager import ActivationOffloader
from megatron_echo.offload.recorder import StepRecord
from megatron_echo.offload.schedule import Scheduler, Timeline
from megatron_echo.offload.storages import Blob, Handle
from megatron_echo.offload.transfers import Transfers
from megatron_echo.testing.simulated_device import Event, SimulatedBackend

Patch = pytest.MonkeyPatch
Check = Callable[[], None]


def all_schedules() -> None:
    for name in ("PP1", "PP4 rank 0", "VPP2 PP2 rank 0"):
        test_simulator.test_adversarial_latencies("slow to host", name)
        test_simulator.test_adversarial_latencies("slow to device", name)
        test_simulator.test_pipeline_schedules(name, 3)


def drop_edge(patch: Patch, waiting: Lane, recorded: Lane) -> None:
    """One lane no longer waits for events of another."""
    lanes: dict[int, tuple[Lane, Event]] = {}
    record, wait = SimulatedBackend.record, SimulatedBackend.wait

    def recording(self: SimulatedBackend, lane: Lane) -> Event:
        event = record(self, lane)
        lanes[id(event)] = lane, event
        return event

    def waiting_less(self: SimulatedBackend, lane: Lane, event: Event) -> None:
        if (lane, lanes[id(event)][0]) != (waiting, recorded):
            wait(self, lane, event)

    patch.setattr(SimulatedBackend, "record", recording)
    patch.setattr(SimulatedBackend, "wait", waiting_less)


@pytest.mark.parametrize(
    ("waiting", "recorded"),
    [
        pytest.param(Lane.TO_HOST, Lane.COMPUTE, id="copies what is not computed yet"),
        pytest.param(Lane.COMPUTE, Lane.TO_HOST, id="frees the original too early"),
        pytest.param(Lane.TO_DEVICE, Lane.COMPUTE, id="writes into memory in use"),
        pytest.param(Lane.COMPUTE, Lane.TO_DEVICE, id="uses what is not back yet"),
    ],
)
def test_a_missing_wait(monkeypatch: Patch, waiting: Lane, recorded: Lane) -> None:
    drop_edge(monkeypatch, waiting, recorded)
    with pytest.raises(AssertionError):
        all_schedules()


def test_early_reads_of_host_memory(monkeypatch: Patch) -> None:
    """#7398: two waits stand against it, one in the copy back itself, one before in compute."""

    def premature_reads() -> int:
        simulation = Simulation(test_simulator.UNIFORM, 2, latency=lambda lane, nbytes: 4000)
        simulation.step(pipeline(2))
        return simulation.backend.premature_reads

    drop_edge(monkeypatch, Lane.COMPUTE, Lane.TO_HOST)
    assert premature_reads() == 0
    drop_edge(monkeypatch, Lane.TO_DEVICE, Lane.TO_HOST)
    assert premature_reads() > 0


def give_blocks_back_at_reload(patch: Patch) -> None:
    fetch, give_back = Transfers.fetch, HostArena.give_back

    def fetching(self: Transfers, blob: Blob) -> None:
        fetch(self, blob)
        assert blob.lease is not None
        give_back(self.arena, blob.lease)
        blob.lease = Lease(blob.lease.block)

    patch.setattr(Transfers, "fetch", fetching)
    lost: list[Lease] = []
    patch.setattr(HostArena, "give_back", lambda self, lease: lost.append(lease))


def test_the_guard_of_a_block(monkeypatch: Patch) -> None:
    """A block that is lent again while it is read: safe with its guard, a race without."""
    give_blocks_back_at_reload(monkeypatch)

    def races() -> int:
        slow: dict[Lane, int] = {Lane.TO_HOST: 10, Lane.TO_DEVICE: 9000}
        simulation = Simulation(
            {"A": Module(1, 1, 1)}, 2, latency=lambda lane, nbytes: slow[lane], slab_bytes=4096
        )
        for _ in range(3):
            for microbatches in (4, 3):
                simulation.step(pipeline(microbatches, 4, 1))
        return len(simulation.backend.races)

    assert races() == 0
    drop_edge(monkeypatch, Lane.TO_HOST, Lane.TO_DEVICE)
    assert races() > 0


def wait_by_name(patch: Patch) -> None:
    """A storage waits for the first reload of its name under way, kept ones included."""
    launched: list[Blob] = []
    fetch, receive = Transfers.fetch, Transfers.receive

    def fetching(self: Transfers, blob: Blob) -> None:
        fetch(self, blob)
        launched.append(blob)

    def receiving(self: Transfers, blob: Blob) -> None:
        for other in launched:
            if other.name == blob.name:
                launched.remove(other)
                self.backend.wait(Lane.COMPUTE, other.loaded)
                break
        receive(self, blob)

    patch.setattr(Transfers, "fetch", fetching)
    patch.setattr(Transfers, "receive", receiving)


def steady_time_with_one_name() -> None:
    simulation = Simulation({"A": Module(1, 2, 3)}, 1.2, layers=12, fraction=0.5)
    ratios = [simulation.step(pipeline(2)).ratio for _ in range(3)]
    assert ratios[1:] == [1, 1]


def look_up_in_the_current_chunk(patch: Patch) -> None:
    need = ActivationOffloader.need

    def needing(self: ActivationOffloader, blob: Blob) -> torch.Tensor:
        record = self._record
        assert record is not None
        entry = record.entries[blob.index]
        other = record.chunks[-1].entries[entry.chunk.entries.index(entry)].blob()
        return need(self, other or blob)

    patch.setattr(ActivationOffloader, "need", needing)


def keep_closed_storages(patch: Patch) -> None:
    """Storages that stay on the device are never taken off the list."""
    decide, closed = ActivationOffloader._decide, []

    def deciding(self: ActivationOffloader, blob: Blob) -> None:
        decide(self, blob)
        if blob.lease is None:
            closed.append(blob)

    patch.setattr(ActivationOffloader, "_decide", deciding)


def keep_originals(patch: Patch) -> None:
    release, originals = Transfers.release, []

    def releasing(self: Transfers, outbound: Any) -> None:
        originals.append(outbound.source)
        release(self, outbound)

    patch.setattr(Transfers, "release", releasing)


def learn_once(patch: Patch) -> None:
    learn = Scheduler.learn

    def learning(self: Scheduler, timeline: Timeline) -> None:
        if not self._plans:
            learn(self, timeline)

    patch.setattr(Scheduler, "learn", learning)


def send_only_what_the_plan_knows(patch: Patch) -> None:
    """Microbatches beyond those of the first step stay on the device, silently."""
    learn_once(patch)
    decide = ActivationOffloader._decide

    def deciding(self: ActivationOffloader, blob: Blob) -> None:
        plan = self._scheduler.plan
        if plan is None or blob.index < len(plan.kept):
            decide(self, blob)

    patch.setattr(ActivationOffloader, "_decide", deciding)


def learn_once_from_evaluation(patch: Patch) -> None:
    learn_once(patch)
    patch.setattr(manager, "_records_gradients", lambda: True)


def copy_every_view(patch: Patch) -> None:
    patch.setattr(Handle, "key", property(lambda self: (id(self), 0)))


def copy_parameters(patch: Patch) -> None:
    begin = ActivationOffloader.step_begin

    def beginning(self: ActivationOffloader) -> None:
        begin(self)
        self._excluded = set()

    patch.setattr(ActivationOffloader, "step_begin", beginning)


def leave_hooks_after_exceptions(patch: Patch) -> None:
    register = nn.Module.register_forward_hook
    patch.setattr(
        nn.Module,
        "register_forward_hook",
        lambda self, hook, always_call=False: register(self, hook),
    )


def unpack_once(patch: Patch) -> None:
    restore = Handle.restore

    def restoring(self: Handle) -> torch.Tensor:
        tensor = restore(self)
        self.blob = None
        return tensor

    patch.setattr(Handle, "restore", restoring)


def ignore_versions(patch: Patch) -> None:
    init = Handle.__init__

    def initialising(self: Handle, tensor: torch.Tensor, owner: Any) -> None:
        init(self, tensor, owner)
        self._alias = self._alias.clone()
        self._version = self._alias._version

    patch.setattr(Handle, "__init__", initialising)


def prefetch_nothing_at_first(patch: Patch) -> None:
    patch.setattr(StepRecord, "next_needed", lambda self, index: iter(()))


def use_copies_of_emptied_storages(patch: Patch) -> None:
    patch.setattr(Blob, "notice_emptying", lambda self: None)


def prefetch_in_forward_order(patch: Patch) -> None:
    patch.setattr(StepRecord, "next_needed", lambda self, index: iter(self.entries))


CASES: list[tuple[Callable[[Patch], None], Check]] = [
    (wait_by_name, steady_time_with_one_name),
    (look_up_in_the_current_chunk, all_schedules),
    (keep_closed_storages, functools.partial(test_simulator.test_time, 0.5, 1.25, 0.5)),
    (keep_originals, test_manager.test_originals_are_really_freed),
    (learn_once, test_simulator.test_more_and_fewer_microbatches),
    (send_only_what_the_plan_knows, test_simulator.test_more_and_fewer_microbatches),
    (learn_once_from_evaluation, test_manager.test_evaluation_first),
    (copy_every_view, test_manager.test_each_storage_is_copied_once),
    (copy_parameters, test_manager.test_parameters_and_buffers_stay),
    (
        leave_hooks_after_exceptions,
        functools.partial(test_manager.test_exceptions, "forward", 1, "up"),
    ),
    (unpack_once, test_manager.test_backward_twice),
    (ignore_versions, test_manager.test_changing_a_saved_tensor_in_place_is_an_error),
    (prefetch_nothing_at_first, functools.partial(test_simulator.test_time, 0.5, 1.25, 1.0)),
    (prefetch_in_forward_order, functools.partial(test_simulator.test_time, 0.5, 1.25, 1.0)),
    (
        use_copies_of_emptied_storages,
        functools.partial(test_simulator.test_storages_that_their_owner_empties, 5000),
    ),
]


@pytest.mark.parametrize(("mutate", "check"), CASES, ids=[mutate.__name__ for mutate, _ in CASES])
def test_mutant(monkeypatch: Patch, mutate: Callable[[Patch], None], check: Check) -> None:
    check()
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        check()
