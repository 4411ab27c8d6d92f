"""What the planner did in a step: kept on the device, read at the log interval."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_EVENTS = 3  # routed overload, placed overload, clones


class StepStatistics:
    """Sums over the layer calls since they were last published.

    ``moe_echo/overload_routed`` and ``moe_echo/overload_placed``: tokens of the fullest rank over
    the mean, before and after planning, the mean over layer calls, and the highest under the
    same name with ``_max``. ``moe_echo/clones``: clones of a layer call.
    ``moe_echo/layer_calls``: layer calls of a step, over all pipeline stages.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._highest: Tensor | None = None
        self._steps = 0

    @torch.no_grad()
    def record(self, load_before: Tensor, load_after: Tensor, num_clones: Tensor) -> None:
        """Add one layer call. Nothing is read.

        Args:
            load_before: int64 ``[R]``, tokens of each rank without clones.
            load_after: the same with clones.
            num_clones: int64 scalar.
        """
        if self._sums is None or self._highest is None or self._sums.device != load_before.device:
            self._sums, self._highest = self._zeros(load_before.device)
        mean = load_before.sum().clamp(min=1).double() / load_before.shape[0]
        overload = torch.stack((load_before.max(), load_after.max())).double() / mean
        share = 1 / load_before.shape[0]  # every rank of the group records the same call
        event = torch.cat((overload, num_clones.double()[None], torch.ones_like(overload[:1])))
        self._sums += event * share
        self._highest.copy_(torch.maximum(self._highest, overload))

    def publish(self, args: Any, writers: tuple[Any, ...]) -> None:
        """Count a step; at the log interval read everything, on all ranks, and write it.

        Args:
            args: Megatron's arguments.
            writers: of TensorBoard's kind; those of this rank, if it has any.
        """
        self._steps += 1
        iteration = args.curr_iteration + 1
        if iteration % args.log_interval:
            return
        if self._sums is None or self._highest is None:
            self._sums, self._highest = self._zeros("cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(self._sums, op=dist.ReduceOp.SUM)
        dist.all_reduce(self._highest, op=dist.ReduceOp.MAX)
        routed, placed, clones, calls, *highest = torch.cat((self._sums, self._highest)).tolist()
        values = {
            "overload_routed": routed / max(calls, 1),
            "overload_placed": placed / max(calls, 1),
            "overload_routed_max": highest[0],
            "overload_placed_max": highest[1],
            "clones": clones / max(calls, 1),
            "layer_calls": calls / self._steps,
        }
        for writer in writers:
            for name, value in values.items():
                writer.add_scalar(f"moe_echo/{name}", value, iteration)
        self._sums, self._highest, self._steps = *self._zeros(self._sums.device), 0

    @staticmethod
    def _zeros(device: Any) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(_EVENTS + 1 + 2, dtype=torch.float64, device=device)
        return zeros[: _EVENTS + 1], zeros[_EVENTS + 1 :]
