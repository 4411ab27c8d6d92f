"""Traces of the routing: written at the end of traced steps, read again as they were."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_echo.planner import plan_clones
from megatron_echo.record.trace import RoutingTrace, read_traces

RANKS, EXPERTS = 4, 8


def plans(number: int) -> list:
    generator = torch.Generator().manual_seed(0)
    shape = (RANKS, EXPERTS)
    counts = [torch.randint(0, 100, shape, generator=generator) for _ in range(number)]
    return [plan_clones(each, 2, tolerance=0.02) for each in counts]


def test_written_and_read(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "traces"
    trace = RoutingTrace(str(folder), every=2)
    made = plans(4)
    for step in range(4):
        trace.begin_step()
        assert trace.is_on == (step % 2 == 0)
        if trace.is_on:
            for layer, plan in zip((3, 5, 3, 5), made, strict=True):
                trace.record(layer, stage=1, plan=plan)
        trace.end_step(iteration=10 + step)
    first, second = read_traces(folder)
    assert (first.iteration, second.iteration, first.stage) == (10, 12, 1)
    for found in (first, second):
        assert found.layer.tolist() == [3, 5, 3, 5]
        assert found.microbatch.tolist() == [0, 0, 1, 1]
        for name in ("counts", "slot_expert", "load_before", "load_after"):
            expected = torch.stack([getattr(plan, name) for plan in made])
            assert np.array_equal(getattr(found, name), expected), name
    assert len(list(folder.iterdir())) == 2


def test_off(tmp_path: Path) -> None:
    trace = RoutingTrace(None, every=1)
    assert not trace.is_on
    trace.end_step(1)
    with pytest.raises(FileNotFoundError, match="--moe-echo-trace-dir"):
        read_traces(tmp_path)


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    trace = RoutingTrace(str(tmp_path / "file"), every=1)
    trace.record(1, 0, plans(1)[0])
    trace.end_step(1)
    assert "no more traces" in capsys.readouterr().out
    assert not trace.is_on
