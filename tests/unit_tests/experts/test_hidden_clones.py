"""Clones fetched and gradients brought home beside compute: what must be behind what."""

from pathlib import Path

import launch
import pytest
import torch

from megatron_echo.copy_lanes import Errand, StreamBackend
from megatron_echo.cpu_backend.recorded_graph import CaptureError, RecordedGraph, capture

WORKER = Path(__file__).resolve().parents[1] / "workers" / "hidden_clones.py"


@launch.on_ranks(2, slow=(4,))
def test_order(ranks: int) -> None:
    """Captured, eager and on one stream: the same bits; no reduction begins too early."""
    launch.run(["order", "buckets"], ranks, script=WORKER).check()


def test_mutants() -> None:
    """The recorder sees each wait that is left out."""
    launch.run(["mutants"], 2, script=WORKER).check()


def test_no_rank_overwrites_what_another_reads() -> None:
    """By vector clocks over ranks that are late anywhere."""
    launch.run(["peers"], 2, script=WORKER).check()


def test_an_errand_keeps_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that compute lets go of is not handed out again before it is waited for."""
    begin = Errand.__init__

    def forgetful(errand: Errand, *args: object) -> None:
        begin(errand, *args)  # type: ignore[arg-type]
        errand._work = None

    def use() -> None:
        with capture(RecordedGraph()):
            total, backend = torch.zeros(4), StreamBackend()
            given = torch.ones(4)
            errand = Errand(backend, lambda given=given: total.add_(given))
            del given
            torch.ones(4)
            errand.wait()

    use()
    monkeypatch.setattr(Errand, "__init__", forgetful)
    with pytest.raises(CaptureError, match="Memory is freed while another stream still reads"):
        use()
