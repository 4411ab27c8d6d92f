"""What happens when the receive buffers are too small: known on the device, read once a step.

Each layer adds what it saw to a few numbers on the device. They are read at the end of the step
(``step_end.py``), on every rank, so that all of them raise the same error before any weight has
been touched.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor


class MoEOverflowError(RuntimeError):
    """A token-expert pair had no row to be computed in, and dropping was not asked for."""


class OverflowCheck:
    """The record of one model's layers, kept on the device until the end of the step.

    Attributes:
        dropped: pairs dropped since the start, over all ranks, with the policy ``drop``.
    """

    def __init__(self, policy: str, is_auto: bool) -> None:
        """Set the policy.

        Args:
            policy: ``raise`` or ``drop``.
            is_auto: whether the receive buffers are as large as anything that may come.
        """
        self._policy = policy
        self._is_auto = is_auto
        self._seen: Tensor | None = None
        self.dropped = 0

    @torch.no_grad()
    def record_rows(self, need: Tensor, dropped: Tensor, counts: bool) -> None:
        """Add what one layer's receive buffer saw. Nothing is read.

        Args:
            need: int64 scalar, the capacity that would have sufficed, in millionths.
            dropped: int64 scalar, pairs without a row.
            counts: False in the half of a recomputation that is not counted.
        """
        zero = torch.zeros_like(need)
        self._add(torch.stack((need, (dropped > 0).to(torch.int64), zero, zero)), dropped, counts)

    @torch.no_grad()
    def record_wire(self, need: Tensor, cut: Tensor, dropped: Tensor, counts: bool) -> None:
        """Add what one layer's all-to-all saw. Nothing is read.

        Args:
            need: int64 scalar, the peer capacity that would have sufficed, in millionths.
            cut: int64 scalar, receive capacity that the pairs cut off would take, in millionths.
            dropped: int64 scalar, those pairs.
            counts: as for :meth:`record_rows`.
        """
        zero = torch.zeros_like(need)
        self._add(torch.stack((zero, zero, need * (cut > 0), cut)), dropped, counts)

    def _add(self, highest: Tensor, dropped: Tensor, counts: bool) -> None:
        if self._seen is None or self._seen.device != dropped.device:
            self._seen = torch.zeros(5, dtype=torch.int64, device=dropped.device)
        self._seen[:4] = torch.maximum(self._seen[:4], highest)
        if counts:
            self._seen[4] += dropped

    def check(self) -> None:
        """Read the record of this step on all ranks and forget it.

        Raises:
            MoEOverflowError: something did not fit on some rank, and the policy is ``raise``.
        """
        if self._seen is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._seen = torch.zeros(5, dtype=torch.int64, device=device)
        if self._seen.is_meta:
            return  # shapes only: there is nothing to read
        total = self._seen.clone()
        if dist.is_initialized():
            dist.all_reduce(total[:3], op=dist.ReduceOp.MAX)
            dist.all_reduce(total[3:], op=dist.ReduceOp.SUM)
        self._seen.zero_()
        rows, rows_over, peer, cut, dropped = total.tolist()
        # What the wire cut off might all have been for the fullest rank.
        rows = rows + cut if rows_over or (peer and not self._is_auto) else 0
        if (rows_over or peer) and self._policy == "raise":
            raise MoEOverflowError(_message(dropped, _advice(rows, peer)))
        if dropped:
            self.dropped += dropped
            _log(dropped, self.dropped, _advice(rows, peer))


def _message(dropped: int, advice: str) -> str:
    return (
        f"Token-expert pairs of this step ({dropped}) had no row in a MoE layer's receive buffer. "
        f"Use {advice}, or --moe-echo-overflow drop to train without such pairs. Weights, "
        "optimizer state and checkpoints are as they were before the step."
    )


def _advice(rows: int, peer: int) -> str:
    needs = (("--moe-received-token-capacity", rows), ("--moe-echo-peer-capacity", peer))
    return " and ".join(f"{flag} {_rounded_up(need)} or more" for flag, need in needs if need)


def _rounded_up(millionths: int) -> str:
    return f"{math.ceil(millionths / 10**4) / 100:.2f}"


def _log(dropped: int, in_total: int, advice: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"WARNING: {dropped} token-expert pairs dropped in this step, {in_total} since the "
            f"start. Use {advice} to keep such pairs.",
            flush=True,
        )
