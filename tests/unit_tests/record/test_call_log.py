"""Rows of a step: those of eager calls, those of replays, and none of what comes between steps."""

import pytest
import torch

from megatron_echo.cpu_backend.recorded_graph import RecordedGraph, capture
from megatron_echo.record.call_log import CallLog


def rows(log: CallLog) -> list[list[int]]:
    found = log.end_step()
    assert found is not None
    written, number = found
    assert not written[int(number) :].any()
    return written[: int(number)].tolist()


def fill(log: CallLog, values: range) -> None:
    log.begin_step()
    for value in values:
        log.add(torch.tensor([value, -value]))


def test_rows_are_those_of_the_step() -> None:
    """More of them, fewer, and none."""
    log = CallLog()
    assert log.end_step() is None
    for values in (range(1, 4), range(1, 8), range(5, 7), range(0)):
        fill(log, values)
        assert rows(log) == [[value, -value] for value in values]


def test_one_capture_serves_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What warms the graph up counts for nothing; each replay moves on; too many stay inside."""
    monkeypatch.setattr("megatron_echo.record.call_log.is_capturing", RecordedGraph.is_capturing)
    log, value = CallLog(), torch.tensor([1, 2])
    fill(log, range(3))
    rows(log)
    for _ in range(9):
        log.add(value)
    graph = RecordedGraph()
    with capture(graph):
        log.add(value)
    for step in range(2):
        log.begin_step()
        for call in range(3):
            value.fill_(10 * step + call)
            graph.replay()
        assert rows(log) == [[10 * step + call] * 2 for call in range(3)]
    for _ in range(5):
        graph.replay()
    assert len(rows(log)) == 3
