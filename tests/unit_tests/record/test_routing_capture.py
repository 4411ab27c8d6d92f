"""Capture of the routing: what was decided arrives, however late the copies."""

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_echo.copy_lanes import Backend, Lane, Link
from megatron_echo.dispatch.dispatcher import compact_routing
from megatron_echo.record.routing_capture import (
    Routing,
    RoutingCapture,
    RoutingReplay,
    read_captures,
    replayed_map,
)
from megatron_echo.testing import no_host_sync
from megatron_echo.testing.simulated_device import SimulatedBackend

TOKENS, TOPK, EXPERTS = 24, 8, 256


class LateEvent:
    """Done when its copies are; the host's waits are counted."""

    def __init__(self, backend: "LateBackend", position: int) -> None:
        self._backend, self._position = backend, position

    def query(self) -> bool:
        return self._backend.done >= self._position

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
) -> Any:
    """Ids as the dispatcher has them (E where a token has fewer), weights and logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    chosen = logits.topk(min(TOPK, experts)).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
    routing_map[::5] = False
    ids = compact_routing(routing_map, TOPK).to(dtype)
    return ids, torch.rand(tokens, TOPK, generator=generator), logits


def assert_same(found: Routing, ids: Tensor, weights: Tensor | None, logits: Tensor | None) -> None:
    assert found.ids.dtype is torch.uint16
    assert found.ids.long().equal(ids.long())
    for part, expected, dtype in (
        (found.weights, weights, torch.bfloat16),
        (found.logits, logits, torch.float32),
    ):
        assert (part is None) == (expected is None)
        if part is not None:
            assert part.dtype is dtype
            assert part.equal(expected.to(dtype))


@pytest.mark.parametrize("backend", [Backend(), LateBackend()], ids=["eager", "late"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16])
@pytest.mark.parametrize("parts", [(False, False), (True, False), (False, True), (True, True)])
def test_the_source_is_free_after_record(backend: Backend, dtype: Any, parts: tuple) -> None:
    capture = RoutingCapture(None, 4, EXPERTS, backend=backend)
    sources, handles, expected = [], [], []
    with no_host_sync():
        for call in range(4):
            ids, weights, logits = routed(call, tokens=23, dtype=dtype)
            source = (ids, weights if parts[0] else None, logits if parts[1] else None)
            sources.append(source)
            expected.append([None if part is None else part.clone() for part in source])
            handles.append(capture.record(call, 0, *source))
            for part in source:
                if part is not None:
                    part.zero_()
    for handle, values in zip(reversed(handles), reversed(expected), strict=True):
        assert_same(handle.result(), *values)


def test_odd_shapes_are_aligned() -> None:
    ids = torch.tensor([[2], [0], [1]])
    weights, logits = torch.rand(3, 1), torch.rand(3, 3)
    result = RoutingCapture(None, 1, 3).record(1, 0, ids, None, logits).result()
    assert_same(result, ids, None, logits)
    result = RoutingCapture(None, 1, 3).record(1, 0, ids, weights, logits).result()
    assert_same(result, ids, weights, logits)


def test_waits_once_and_only_for_what_is_not_ready() -> None:
    backend = LateBackend()
    capture = RoutingCapture(None, 4, EXPERTS, backend=backend)
    handles = [capture.record(layer, 0, routed(layer)[0]) for layer in range(3)]
    assert [handle.ready() for handle in handles] == [False] * 3
    handles[1].result()  # a stream is a queue: the first is there, too
    assert [handle.ready() for handle in handles] == [True, True, False]
    assert backend.waits == 1
    assert handles[1].result() is handles[1].result()
    assert backend.waits == 1
    backend.run(3)
    assert handles[2].ready()


def test_a_full_ring_waits_for_its_oldest_and_loses_nothing() -> None:
    backend = LateBackend()
    capture = RoutingCapture(None, 3, EXPERTS, backend=backend)
    made = [routed(seed)[0] for seed in range(11)]
    handles = []
    for layer, ids in enumerate(made):
        handles.append(capture.record(layer, 0, ids))
        under_way = backend.enqueued - backend.done
        assert under_way == min(layer + 1, 3)
        assert backend.waits == capture.stalls == max(0, layer - 2)
    assert len(backend.host_bytes) == 3
    for handle, ids in zip(handles, made, strict=True):
        assert_same(handle.result(), ids, None, None)


def test_results_that_were_read_free_their_slots() -> None:
    backend = LateBackend()
    capture = RoutingCapture(None, 2, EXPERTS, backend=backend)
    kept = []
    for call in range(9):
        ids = routed(call)[0]
        handle = capture.record(1, call, ids)
        kept.append((handle.result(), ids))
        capture.end_step(call)
    assert capture.stalls == 0
    assert len(backend.host_bytes) == 1
    for found, ids in kept:
        assert_same(found, ids, None, None)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), ring=st.integers(1, 4))
def test_any_order_of_reading(data: st.DataObject, ring: int) -> None:
    """Slots of changing sizes, late copies and reads in any order: every result is its own."""
    backend = LateBackend()
    capture = RoutingCapture(None, ring, 16, backend=backend)
    open_handles: list[tuple[Any, tuple]] = []
    for call in range(data.draw(st.integers(1, 12))):
        ids, weights, logits = routed(call, tokens=data.draw(st.integers(0, 9)), experts=16)
        with_weights, with_logits = data.draw(st.booleans()), data.draw(st.booleans())
        source = (ids, weights if with_weights else None, logits if with_logits else None)
        open_handles.append((capture.record(call, 0, *source), source))
        if data.draw(st.booleans()):
            backend.run(data.draw(st.integers(backend.done, backend.enqueued)))
        if data.draw(st.booleans()):
            handle, expected = open_handles.pop(data.draw(st.integers(0, len(open_handles) - 1)))
            assert_same(handle.result(), *expected)
    assert len(backend.queue) <= ring
    for handle, expected in open_handles:
        assert_same(handle.result(), *expected)


def test_bytes() -> None:
    """E = 256, K = 8: 64 times fewer than fp32 logits, in the copy, the ring and the file."""
    backend = LateBackend()
    capture = RoutingCapture(None, 3, EXPERTS, backend=backend)
    ids, weights, logits = routed(0)
    capture.record(1, 0, ids)
    capture.record(1, 1, ids, weights)
    capture.record(1, 2, ids, weights, logits)
    assert logits.nbytes == 64 * backend.copied[0]
    assert backend.copied == [
        TOKENS * TOPK * 2,
        TOKENS * TOPK * 4,
        TOKENS * (TOPK * 4 + EXPERTS * 4),
    ]
    assert backend.host_bytes == backend.copied


@pytest.mark.parametrize("ticks", [0, 1, 1000])
def test_copies_are_ordered_by_events(ticks: int) -> None:
    """The simulated device's clocks prove it, whatever a copy takes."""
    backend = SimulatedBackend(Link(1, 1), latency=lambda lane, nbytes: ticks)
    noted: list[Tensor] = []
    allocate = backend.allocate_device

    def allocate_device(nbytes: int, device: torch.device) -> Tensor:
        noted.append(allocate(nbytes, device))
        return noted[-1]

    backend.allocate_device = allocate_device  # type: ignore[method-assign]
    capture = RoutingCapture(None, 3, EXPERTS, backend=backend)
    for layer in range(3):
        capture.record(layer, 0, routed(layer)[0])
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
                ids, weights, logits = routed(10 * microbatch + layer)
                capture.record(layer, microbatch, ids, weights.requires_grad_(), logits)
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
    ids, weights, logits = routed(0)
    capture.record(3, 1, ids, weights, logits)
    capture.end_step(7)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    assert path.name == "step-00000007-rank-00000.npz"
    with np.load(path, allow_pickle=False) as file:
        assert file["ids/3/1"].dtype == np.uint16
        widened = (file["weights/3/1"].astype(np.uint32) << 16).view(np.float32)
        assert np.array_equal(widened, weights.bfloat16().float().numpy())
        assert np.array_equal(file["logits/3/1"], logits.numpy())


def test_recomputation_is_not_copied_again(tmp_path: Path) -> None:
    backend = LateBackend()
    capture = RoutingCapture(tmp_path, 4, EXPERTS, backend=backend)
    first = capture.record(1, 0, routed(0)[0])
    assert capture.record(1, 0, routed(1)[0]) is first
    assert backend.enqueued == 1
    capture.end_step(1)
    assert capture.record(1, 0, routed(1)[0]) is not first
    capture.end_step(2)
    steps = list(read_captures(tmp_path))
    assert [step.iteration for step in steps] == [1, 2]
    for seed, step in enumerate(steps):
        assert_same(step.calls[1, 0], routed(seed)[0], None, None)


def test_a_ring_made_in_inference_serves_training() -> None:
    capture = RoutingCapture(None, 1, EXPERTS)
    with torch.inference_mode():
        capture.record(1, 0, routed(0)[0]).result()
    ids = routed(1)[0]
    assert_same(capture.record(1, 1, ids).result(), ids, None, None)


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    capture = RoutingCapture(tmp_path / "file", 2, EXPERTS)
    handle = capture.record(1, 0, routed(0)[0])
    capture.end_step(1)
    assert "no more captures" in capsys.readouterr().out
    assert not capture.is_on
    assert_same(handle.result(), routed(0)[0], None, None)
    capture.record(1, 0, routed(0)[0])
    capture.end_step(2)
    assert capsys.readouterr().out == ""


def test_a_step_without_calls_writes_nothing(tmp_path: Path) -> None:
    RoutingCapture(tmp_path, 2, EXPERTS).end_step(1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("experts", [4, 256, 65535])
def test_replay(tmp_path: Path, experts: int) -> None:
    topk, maps = 2, {}
    for rank in range(2):
        capture = RoutingCapture(tmp_path, 4, experts, rank=rank)
        for iteration in (9, 10):
            for microbatch in range(2):
                generator = torch.Generator().manual_seed(100 * rank + 10 * iteration + microbatch)
                chosen = torch.randint(0, experts, (6, topk), generator=generator)
                chosen[0, 0] = experts - 1
                routing_map = torch.zeros(6, experts, dtype=torch.bool)
                maps[rank, iteration, microbatch] = routing_map.scatter_(1, chosen, True)
                routing_map[3] = False  # a padding token
                capture.record(2, microbatch, compact_routing(routing_map, topk))
            capture.end_step(iteration)
    for rank in range(2):
        replay = RoutingReplay(tmp_path, rank, experts)
        for microbatch in range(2):
            for iteration in (9, 10):
                ids = replay.ids(iteration, 2, microbatch)
                found = replayed_map(ids, experts)
                assert found.dtype is torch.bool
                assert found.shape == (6, experts)
                assert found.equal(maps[rank, iteration, microbatch])


def test_replay_of_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--moe-echo-capture-routing"):
        read_captures(tmp_path)
    capture = RoutingCapture(tmp_path, 1, EXPERTS, rank=1)
    capture.record(1, 0, routed(0)[0])
    capture.end_step(4)
    with pytest.raises(FileNotFoundError, match="of rank 0"):
        RoutingReplay(tmp_path)
    replay = RoutingReplay(tmp_path, rank=1)
    with pytest.raises(LookupError, match="one of 4 to 4"):
        replay.ids(5, 1, 0)
    with pytest.raises(LookupError, match="layer 2, microbatch 0"):
        replay.ids(4, 2, 0)
    with pytest.raises(ValueError, match="256 experts, not 64"):
        RoutingReplay(tmp_path, rank=1, num_experts=64).ids(4, 1, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ring_slots": 0}, "ring of 0 slots"),
        ({"num_experts": 65536}, "do not fit into 16 bits"),
        ({"num_experts": 0}, "do not fit into 16 bits"),
    ],
)
def test_refused_settings(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingCapture(None, **{"ring_slots": 1, "num_experts": 8} | changes)


@pytest.mark.parametrize(
    ("ids", "weights", "logits", "message"),
    [
        (torch.ones(4, 8, dtype=torch.bool), None, None, "not a map"),
        (torch.ones(4, 2), None, None, "no routing"),
        (torch.ones(4, dtype=torch.int32), None, None, "no routing"),
        (torch.ones(4, 2, dtype=torch.int32), torch.ones(4, 1), None, "weights .* do not fit"),
        (torch.ones(4, 2, dtype=torch.int32), None, torch.ones(4, 9), "logits .* do not fit"),
    ],
)
def test_refused_calls(ids: Tensor, weights: Any, logits: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RoutingCapture(None, 1, 8).record(1, 0, ids, weights, logits)
