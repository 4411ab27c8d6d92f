"""Work on the rows in use: those behind cost nothing, and no tripwire sees a read of the host."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_echo.rows_in_use import on_used_rows
from megatron_echo.testing.capturable import assert_capturable

SEEN: list[int] = []


@dataclass(frozen=True)
class Scale:
    """Compares by value, so that each layer's is the same work."""

    factor: float

    def work(self, rows: Tensor, bias: Tensor) -> list[Tensor]:
        """Notes how many rows it is given."""
        SEEN.append(len(rows))
        return [rows * self.factor + bias, rows.sum(1)]


def test_only_rows_in_use_are_computed() -> None:
    rows, bias = torch.randn(8, 3), torch.randn(3)
    for used, number in (([2, 5], 5), ([0], 0), ([9], 8), (None, 8)):
        ends = None if used is None else torch.tensor(used, dtype=torch.int32)
        scaled, sums = on_used_rows(Scale(2.0).work, ends, [rows], bias)
        assert SEEN[-1] == number
        assert (scaled.shape, sums.shape) == ((8, 3), (8,))
        assert torch.equal(scaled[:number], rows[:number] * 2 + bias)
        assert torch.equal(sums[:number], rows[:number].sum(1))


def test_a_graph_could_hold_it() -> None:
    """The number of rows is a value of the device: one operator, whatever it is."""

    def step(rows: Tensor, ends: Tensor) -> Tensor:
        return on_used_rows(Scale(3.0).work, ends, [rows], rows[0])[0]

    rows = torch.randn(8, 3)
    given = [(rows, torch.tensor([end], dtype=torch.int32)) for end in (0, 3, 8)]
    operators = assert_capturable(step, *given)
    assert [each.name for each in operators if "on_used_rows" in each.name] != []


def test_of_shapes_only_all_rows_are() -> None:
    rows, ends = torch.empty(8, 3, device="meta"), torch.empty(1, device="meta")
    assert on_used_rows(Scale(2.0).work, ends, [rows], rows[0])[0].shape == (8, 3)
    assert SEEN[-1] == 8
