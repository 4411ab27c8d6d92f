"""What happens when the receive buffers are too small: known on the device, read once a step.

Each layer adds what it saw to a few numbers on the device. They are read where Megatron finishes
the gradients: after the backward passes of all microbatches and before the optimizer, on every
rank, so that all of them raise the same error and no weight has been touched.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_echo.config import echo_setting, num_clone_slots
from megatron_echo.observe.statistics import StepStatistics


class MoEOverflowError(RuntimeError):
    """A token-expert pair had no row to be computed in, and dropping was not asked for."""


class OverflowCheck:
    """Stands in for ``config.finalize_model_grads_func`` and reads the layers' record after it.

    One object for a model: :meth:`of` finds or installs it, on every rank of the job.

    Attributes:
        dropped: pairs dropped since the start, over all ranks, with the policy ``drop``.
        statistics: what the planner did, published here too.
    """

    def __init__(self, policy: str, is_auto: bool, has_clones: bool, finalize: Any) -> None:
        self.statistics = StepStatistics()
        self._has_clones = has_clones
        self._policy = policy
        self._is_auto = is_auto
        self._finalize = finalize
        self._seen: Tensor | None = None
        self.dropped = 0

    @classmethod
    def of(cls, config: Any) -> "OverflowCheck":
        """The check of a model, from its ``TransformerConfig``; installed on first use."""
        if not isinstance(config.finalize_model_grads_func, cls):
            config.finalize_model_grads_func = cls(
                echo_setting(config, "moe_echo_overflow"),
                echo_setting(config, "moe_received_token_capacity") is None,
                num_clone_slots(config) > 0,
                config.finalize_model_grads_func or finalize_model_grads,
            )
        return config.finalize_model_grads_func

    def __deepcopy__(self, memo: dict) -> "OverflowCheck":
        return self  # Megatron copies configurations for some layers; the model stays one

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
        self._add(torch.stack((zero, zero, torch.where(cut > 0, need, 0), cut)), dropped, counts)

    def _add(self, highest: Tensor, dropped: Tensor, counts: bool) -> None:
        if self._seen is None or self._seen.device != dropped.device:
            self._seen = torch.zeros(5, dtype=torch.int64, device=dropped.device)
        self._seen[:4] = torch.maximum(self._seen[:4], highest)
        if counts:
            self._seen[4] += dropped

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Finish the gradients, then raise or count."""
        result = self._finalize(*args, **kwargs)
        self.check()
        if self._has_clones:
            self._publish()
        return result

    def _publish(self) -> None:
        from megatron.training import global_vars  # absent where only Megatron-Core is used

        if global_vars._GLOBAL_ARGS is not None:
            writer = global_vars.get_tensorboard_writer()
            writers = (writer,) if writer is not None else ()
            self.statistics.publish(global_vars.get_args(), writers)

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
