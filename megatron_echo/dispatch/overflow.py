"""What happens when the receive buffers are too small: known on the device, read once a step.

Each layer adds what it saw to four numbers on the device. They are read where Megatron finishes
the gradients: after the backward passes of all microbatches and before the optimizer, on every
rank, so that all of them raise the same error and no weight has been touched.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

MILLION = 10**6


class MoEOverflowError(RuntimeError):
    """A token-expert pair had no row to be computed in, and dropping was not asked for."""


class OverflowCheck:
    """Stands in for ``config.finalize_model_grads_func`` and reads the layers' record after it.

    One object for a model: :meth:`of` finds or installs it, on every rank of the job.

    Attributes:
        dropped: pairs dropped since the start, over all ranks, with the policy ``drop``.
    """

    def __init__(self, policy: str, finalize: Any) -> None:
        self._policy = policy
        self._finalize = finalize
        self._seen: Tensor | None = None  # capacity and peer capacity in millionths, over, dropped
        self.dropped = 0

    @classmethod
    def of(cls, config: Any) -> "OverflowCheck":
        """The check of a model, from its ``TransformerConfig``; installed on first use."""
        if not isinstance(config.finalize_model_grads_func, cls):
            policy = getattr(config, "moe_echo_overflow", "raise")
            finalize = config.finalize_model_grads_func or finalize_model_grads
            config.finalize_model_grads_func = cls(policy, finalize)
        return config.finalize_model_grads_func

    def __deepcopy__(self, memo: dict) -> "OverflowCheck":
        return self  # Megatron copies configurations for some layers; the model stays one

    @torch.no_grad()
    def record(
        self, capacity: Tensor, peer_capacity: Tensor, over: Tensor, dropped: Tensor
    ) -> None:
        """Add what one layer saw. Nothing is read.

        Args:
            capacity: int64 scalar, the capacity that would have sufficed, in millionths.
            peer_capacity: the same for one peer's part of an all-to-all.
            over: bool scalar, something did not fit.
            dropped: int64 scalar, pairs dropped; a recomputation adds 0.
        """
        if self._seen is None or self._seen.device != over.device:
            self._seen = torch.zeros(4, dtype=torch.int64, device=over.device)
        seen = torch.stack((capacity, peer_capacity, over.to(torch.int64), dropped))
        self._seen[:3] = torch.maximum(self._seen[:3], seen[:3])
        self._seen[3] += seen[3]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Finish the gradients, then raise or count."""
        result = self._finalize(*args, **kwargs)
        self.check()
        return result

    def check(self) -> None:
        """Read the record of this step on all ranks and forget it.

        Raises:
            MoEOverflowError: something did not fit on some rank, and the policy is ``raise``.
        """
        seen = self._seen
        if seen is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            seen = torch.zeros(4, dtype=torch.int64, device=device)
        elif seen.is_meta:
            return
        total = seen.clone()
        if dist.is_initialized():
            dist.all_reduce(total[:3], op=dist.ReduceOp.MAX)
            dist.all_reduce(total[3:], op=dist.ReduceOp.SUM)
        seen.zero_()
        capacity, peer_capacity, over, dropped = total.tolist()
        if over and self._policy == "raise":
            raise MoEOverflowError(_message(capacity, peer_capacity, dropped))
        if dropped:
            self.dropped += dropped
            _log(dropped, self.dropped, _advice(capacity, peer_capacity))


def _message(capacity: int, peer_capacity: int, dropped: int) -> str:
    return (
        f"{dropped} token-expert pairs of this step had no row in a MoE layer's receive buffer. "
        f"Use {_advice(capacity, peer_capacity)}, or --moe-echo-overflow drop to train without "
        "such pairs. Weights, optimizer state and checkpoints are as they were before the step."
    )


def _advice(capacity: int, peer_capacity: int) -> str:
    words = f"--moe-received-token-capacity {_rounded_up(capacity)} or more"
    if peer_capacity:
        words += f" and --moe-echo-peer-capacity {_rounded_up(peer_capacity)} or more"
    return words


def _rounded_up(millionths: int) -> str:
    return f"{math.ceil(millionths / 10**4) / 100:.2f}"


def _log(dropped: int, in_total: int, advice: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(
            f"WARNING: {dropped} token-expert pairs dropped in this step, {in_total} since the "
            f"start; {advice} would have kept them.",
            flush=True,
        )
