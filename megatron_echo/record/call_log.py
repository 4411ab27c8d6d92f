"""What the layer calls of a step leave on the device, one row each, where a replay goes on writing.

Python does not run when a CUDA graph is replayed. So the place of the next row is a tensor, as the
rows are: each call puts its own there and moves the place on, whoever calls it.
"""

import torch
from torch import Tensor

from megatron_echo.environment import is_capturing

_FIRST_ROWS = 16
"""A step of more calls doubles them."""


class CallLog:
    """Rows of integers, all of one width, in the order of the calls of a step.

    There is room for as many calls as a step had that ran without a graph: the first steps do. What
    comes between two steps, such as the passes that warm a graph up, writes over the last row.
    """

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._place: Tensor | None = None
        self._calls = 0
        self._most = 0
        self._is_open = True

    def begin_step(self) -> None:
        """Start again at the first row."""
        self._calls, self._is_open = 0, True
        if self._rows is not None and self._place is not None:
            self._rows.zero_()
            self._place.zero_()

    @torch.no_grad()
    def add(self, row: Tensor) -> None:
        """Write a row, integers ``[W]``. Nothing is read."""
        can_grow = self._is_open and not is_capturing()
        if self._rows is None or self._place is None or self._rows.device != row.device:
            self._rows = row.new_zeros(_FIRST_ROWS, len(row))
            self._place = torch.zeros(1, dtype=torch.int64, device=row.device)
        elif can_grow and self._calls == len(self._rows):
            self._rows = torch.cat((self._rows, torch.zeros_like(self._rows)))
        self._rows.index_copy_(0, self._place.clamp(max=len(self._rows) - 1), row[None])
        self._place += 1
        if can_grow:
            self._calls += 1
            self._most = max(self._most, self._calls)

    def end_step(self) -> tuple[Tensor, Tensor] | None:
        """What the step left, good until the next one begins; None if there was no call yet.

        Rows ``[C, W]``, C the calls of the longest step so far, with zeros in those not
        written; and int64 ``[1]``, how many were.
        """
        self._is_open = False
        if self._rows is None or self._place is None:
            return None
        return self._rows[: self._most], self._place.clamp(max=self._most)
