"""Weight gradients that wait for ``backward_dw``, with ``--delay-wgrad-compute``.

A schedule that overlaps exchanges with work computes the gradients that other layers wait for
first, and those of weights when there is time. What waits belongs to one call of a layer: its
rows, its gradient and its plan, whatever call the layer has seen since.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[], Tensor]


class _WeightGradient(torch.autograd.Function):
    """Hands a gradient to autograd, so that whatever watches the parameter sees it as ever."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, make: Make) -> Tensor:
        ctx.make, ctx.shape = make, weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.make().view(ctx.shape), None


class DelayedGradients:
    """The weight gradients of one projection that wait, those of the first call first."""

    def __init__(self) -> None:
        self._waiting: deque[Make] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, make: Make) -> None:
        """Let a gradient wait.

        Args:
            make: computes ``[m, out, in]``; all ranks call it together.
        """
        self._waiting.append(make)

    def compute(self, weight: nn.Parameter) -> None:
        """Compute what the first call left, if anything, and accumulate it.

        Args:
            weight: the parameter; where it is frozen, ranks that it has clones on still take part.
        """
        if not self._waiting:
            return
        make = self._waiting.popleft()
        if weight.requires_grad:
            _WeightGradient.apply(weight, make).backward()
        else:
            with torch.no_grad():
                make()


def now_or_later(later: DelayedGradients | None, make: Make) -> Tensor | None:
    """The gradient, or None where it waits."""
    if later is None:
        return make()
    later.add(make)
    return None
