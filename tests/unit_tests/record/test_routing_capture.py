"""Capture of the routing: what was decided arrives in the file, however late the copies."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_echo.copy_lanes import Backend, Lane, Link
from megatron_echo.dispatch.reroute import compact_routing
from megatron_echo.record.routing_capture import Routing, RoutingCapture, read_captures
from megatron_echo.testing import no_host_sync
from megatron_echo.testing.simulated_device import SimulatedBackend

TOKENS, TOPK, EXPERTS = 24, 8, 256


class LateEvent:
    """Done when its copies are; the host's waits are counted."""

    def __init__(self, backend: "LateBackend", position: int) -> None:
        self._backend, self._position = backend, position

    def synchronize(self) -> None:
        self._backend.waits += 1
        self._backend.run(self._position)


class LateBackend(Backend):
    """Copies nothing before the host waits, or a test calls :meth:`run`."""

    def __init__(self) -> None:
        self.queue: deque[tuple[Tensor, Tensor]] = deque()
        self.enqueued = self.done = self.waits = 0
        self.host_bytes: list[int] = []
        self.copied: list[int] = []

    def allocate_host(self, nbytes: int) -> Tensor:
        self.host_bytes.append(nbytes)
        return torch.full((nbytes,), 0xEE, dtype=torch.uint8)

    def copy(self, lane: Lane, target: Tensor, source: Tensor) -> None:
        assert lane is Lane.TO_HOST
        self.queue.append((target, source))
        self.copied.append(source.nbytes)
        self.enqueued += 1

    def record(self, lane: Lane) -> LateEvent:
        return LateEvent(self, self.enqueued)

    def run(self, until: int) -> None:
        while self.done < until:
            target, source = self.queue.popleft()
            target.copy_(source)
            self.done += 1


def routed(
    seed: int, tokens: int = TOKENS, experts: int = EXPERTS, dtype: Any = torch.int32
) -> tuple[Tensor, Tensor]:
    """Ids as the dispatcher has them (E where a token has fewer), and weights."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randn(tokens, experts, generator=generator).topk(min(TOPK, experts)).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
    routing_map[::5] = False
    ids = compact_routing(routing_map, TOPK).to(dtype)
    return ids, torch.rand(tokens, TOPK, generator=generator)


def assert_same(found: Routing, ids: Tensor, weights: Tensor) -> None:
    assert found.ids.dtype is torch.uint16
    assert found.ids.long().equal(ids.long())
    assert found.weights.equal(weights.bfloat16())


@pytest.mark.parametrize("backend", [Backend(), LateBackend()], ids=["eager", "late"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16])
def test_the_source_is_free_after_record(backend: Backend, dtype: Any, tmp_path: Path) -> None:
    capture = RoutingCapture(tmp_path, 4, EXPERTS, backend=backend)
    expected = []
    with no_host_sync():
        for call in range(4):
            source = routed(call, tokens=23, dtype=dtype)
            expected.append([part.clone() for part in source])
            capture.record(1, *source)
            for part in source:
                part.zero_()
    capture.end_step(1)
    (step,) = read_captures(tmp_path)
    for call, values in enumerate(expected):
        assert_same(step.calls[1, call], *values)


def test_a_full_ring_waits_for_its_oldest_and_loses_nothing(tmp_path: Path) -> None:
    backend = LateBackend()
    capture = RoutingCapture(tmp_path, 3, EXPERTS, backend=backend)
    made = [routed(seed) for seed in range(11)]
    for layer, source in enumerate(made):
        capture.record(layer, *source)
        assert backend.enqueued - backend.done == min(layer + 1, 3)
        assert backend.waits == max(0, layer - 2)
    assert len(backend.host_bytes) == 3
    capture.end_step(1)
    (step,) = read_captures(tmp_path)
    for layer, source in enumerate(made):
        assert_same(step.calls[layer, 0], *source)


def test_a_step_frees_its_blocks(tmp_path: Path) -> None:
    backend = LateBackend()
    capture = RoutingCapture(tmp_path, 2, EXPERTS, backend=backend)
    for iteration in range(9):
        capture.record(1, *routed(iteration))
        if iteration % 2:
            capture.forget()
        else:
            capture.end_step(iteration)
    assert len(backend.host_bytes) == 1
    steps = list(read_captures(tmp_path))
    assert [step.iteration for step in steps] == [0, 2, 4, 6, 8]
    for step in steps:
        assert list(step.calls) == [(1, 0)]
        assert_same(step.calls[1, 0], *routed(step.iteration))


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), ring=st.integers(1, 4))
def test_blocks_of_changing_sizes(data: st.DataObject, ring: int, tmp_path: Path) -> None:
    """Late copies that end at any time: every call gets its own routing."""
    backend = LateBackend()
    capture = RoutingCapture(tmp_path, ring, 16, backend=backend)
    made = []
    for call in range(data.draw(st.integers(1, 12))):
        made.append(routed(call, tokens=data.draw(st.integers(0, 9)), experts=16))
        capture.record(1, *made[-1])
        if data.draw(st.booleans()):
            backend.run(data.draw(st.integers(backend.done, backend.enqueued)))
        assert len(backend.queue) <= ring
    capture.end_step(1)
    (step,) = read_captures(tmp_path)
    for call, source in enumerate(made):
        assert_same(step.calls[1, call], *source)


def test_bytes(tmp_path: Path) -> None:
    """Four for each choice, in the copy and the ring."""
    backend = LateBackend()
    RoutingCapture(tmp_path, 3, EXPERTS, backend=backend).record(1, *routed(0))
    assert backend.copied == backend.host_bytes == [TOKENS * TOPK * 4]


@pytest.mark.parametrize("ticks", [0, 1, 1000])
def test_copies_are_ordered_by_events(ticks: int, tmp_path: Path) -> None:
    """The simulated device's clocks prove it, whatever a copy takes."""
    backend = SimulatedBackend(Link(1, 1), latency=lambda lane, nbytes: ticks)
    noted: list[Tensor] = []
    allocate = backend.allocate_device

    def allocate_device(nbytes: int, device: torch.device) -> Tensor:
        noted.append(allocate(nbytes, device))
        return noted[-1]

    backend.allocate_device = allocate_device  # type: ignore[method-assign]
    capture = RoutingCapture(tmp_path, 3, EXPERTS, backend=backend)
    for layer in range(3):
        capture.record(layer, *routed(layer))
        backend.compute(1)
    assert len(noted) == 3
    assert backend.races == []
    assert backend.premature_reads == 0


def test_no_wait_between_record_and_end_step(tmp_path: Path) -> None:
    backend = LateBackend()
    capture = RoutingCapture(tmp_path, 6, EXPERTS, rank=2, backend=backend)
    with no_host_sync():
        for microbatch in range(2):
            for layer in (3, 1, 2):  # chunks of a virtual pipeline run in any order
                ids, weights = routed(10 * microbatch + layer)
                capture.record(layer, ids, weights.requires_grad_())
    assert backend.waits == backend.done == 0
    capture.end_step(5)
    assert backend.waits == 6
    (step,) = read_captures(tmp_path)
    assert (step.iteration, step.rank, step.num_experts) == (5, 2, EXPERTS)
    assert list(step.calls) == [(layer, micro) for micro in range(2) for layer in (1, 2, 3)]
    for (layer, microbatch), found in step.calls.items():
        assert_same(found, *routed(10 * microbatch + layer))


def test_file_is_plain_numpy(tmp_path: Path) -> None:
    capture = RoutingCapture(tmp_path / "new" / "folder", 1, EXPERTS)
    ids, weights = routed(0)
    capture.record(3, ids, weights)
    capture.end_step(7)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == "step-00000007-rank-00000.npz"
    with np.load(path, allow_pickle=False) as file:
        assert file["ids/3/0"].dtype == np.uint16
        widened = (file["weights/3/0"].astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(widened, weights.bfloat16().float().numpy())


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    capture = RoutingCapture(tmp_path / "file", 2, EXPERTS)
    capture.record(1, *routed(0))
    capture.end_step(1)
    assert "no more captures" in capsys.readouterr().out
    capture.record(1, *routed(0))
    capture.end_step(2)
    assert capsys.readouterr().out == ""


def test_a_step_without_calls_writes_nothing(tmp_path: Path) -> None:
    RoutingCapture(tmp_path, 2, EXPERTS).end_step(1)
    assert not list(tmp_path.iterdir())


def test_the_captures_of_a_rank(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--moe-echo-capture-routing"):
        read_captures(tmp_path)
    for rank in (2, 1):
        for iteration in (10, 9):
            capture = RoutingCapture(tmp_path, 1, EXPERTS, rank=rank)
            capture.record(1, *routed(rank * iteration))
            capture.end_step(iteration)
    with pytest.raises(FileNotFoundError, match="of rank 0"):
        read_captures(tmp_path, 0)
    assert [(s.iteration, s.rank) for s in read_captures(tmp_path, 1)] == [(9, 1), (10, 1)]
    for step in read_captures(tmp_path):
        assert_same(step.calls[1, 0], *routed(step.rank * step.iteration))


def test_ids_of_16_bits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit into 16 bits"):
        RoutingCapture(tmp_path, 1, 65536)
    ids = torch.tensor([[65534, 65535]], dtype=torch.int32)
    capture = RoutingCapture(tmp_path, 1, 65535)
    capture.record(1, ids, torch.ones(1, 2))
    capture.end_step(1)
    (step,) = read_captures(tmp_path)
    assert step.calls[1, 0].ids.tolist() == ids.tolist()
