"""Recorded graph, tripwire and capture check agree on what the host would read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_echo.cpu_backend.recorded_graph import CaptureError, RecordedGraph, capture
from megatron_echo.testing import assert_capturable, no_host_sync
from megatron_echo.testing.capturable import NotCapturableError

STATIC: dict[str, Callable[[Tensor], object]] = {
    "repeat_interleave(output_size)": lambda t: t.repeat_interleave(t.long(), output_size=6),
    "masked_fill(number)": lambda t: t.masked_fill(t > 1, 0.0),
    "a number into a mask": lambda t: t.clone().__setitem__(t > 1, 0.0),
    "a number into a mask of rows": lambda t: t[:, None].clone().__setitem__(t > 1, 0.0),
    "numbers as an index": lambda t: t[t.long() % 3],
    "index_put": lambda t: t.index_put((t.long() % 3,), t),
    "where": lambda t: torch.where(t > 1, t, 0.0),
    "nonzero_static": lambda t: torch.nonzero_static(t, size=3),
}
READING: dict[str, Callable[[Tensor], object]] = {
    "repeat_interleave": lambda t: t.repeat_interleave(t.long()),
    "masked_fill(tensor)": lambda t: t.masked_fill(t > 1, t[0]),
    "index_fill(tensor)": lambda t: t.index_fill(0, t.long() % 3, t[0]),
    "a tensor into a mask": lambda t: t.clone().__setitem__(t > 1, t[0]),
    "a mask as an index": lambda t: t[t > 1],
    "index_put(mask)": lambda t: t.index_put((t > 1,), t[0]),
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.any()),
    "nonzero": lambda t: t.nonzero(),
    "unique": lambda t: torch.unique(t),
    "equal": lambda t: torch.equal(t, t),
    "inverse": lambda t: torch.linalg.inv(torch.diag(t)),
}


def refusals(construct: Callable[[Tensor], object]) -> list[bool]:
    """What the recorded graph, the tripwire and the capture check say of a construct."""
    tensor = torch.tensor([1.0, 2.0, 3.0])
    found = []
    try:
        with capture(RecordedGraph()):
            construct(tensor)
        found.append(False)
    except CaptureError:
        found.append(True)
    with no_host_sync("record") as sync:
        construct(tensor)
    found.append(bool(sync.hits))
    try:
        assert_capturable(construct, tensor, tensor.clone())
        found.append(False)
    except NotCapturableError:
        found.append(True)
    return found


@pytest.mark.parametrize("name", STATIC)
def test_static(name: str) -> None:
    assert refusals(STATIC[name]) == [False] * 3


@pytest.mark.parametrize("name", READING)
def test_reading(name: str) -> None:
    assert refusals(READING[name]) == [True] * 3


def test_stores_give_the_same_values() -> None:
    before = torch.Tensor.__setitem__
    for mask_of, value in ((lambda t: t > 2, 7), (lambda t: t[:, 0] > 1, 7.5)):
        expected = torch.arange(6.0).view(3, 2)
        found = expected.clone()
        expected[mask_of(expected)] = value
        with no_host_sync():
            found[mask_of(found)] = value
        assert torch.equal(found, expected)
    assert torch.Tensor.__setitem__ is before
