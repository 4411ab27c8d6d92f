"""What a step must not be used for: buffers that were too small, ranks that brought other shapes.

Each layer adds what it saw to a few numbers on the device. They are read at the end of the step
(``step_end.py``), on every rank, so that all of them raise the same error before any weight has
been touched.
"""

import math
import zlib

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from megatron_echo.flags import flag_name

_BOUND = 1 << 62


class MoEOverflowError(RuntimeError):
    """A token-expert pair had no row to be computed in, and dropping was not asked for."""


class UnevenTokensError(RuntimeError):
    """Ranks of a group brought different numbers of tokens to a layer, or one above the bound."""


class OverflowCheck:
    """The record of one model's layers, kept on the device until the end of the step.

    Attributes:
        dropped: pairs dropped since the start, over all ranks, with the policy ``drop``.
    """

    def __init__(self, policy: str, is_auto: bool, bound: int | None = None) -> None:
        """Set the policy, ``raise`` or ``drop``.

        ``is_auto``: the receive buffers are as large as anything that may come. ``bound`` is
        ``--moe-echo-max-tokens-per-rank``, None if ranks must bring as many.
        """
        self._bound = bound
        self._policy = policy
        self._is_auto = is_auto
        self._seen: Tensor | None = None
        self._group: dist.ProcessGroup | None = None
        self._order, self._most, self._least = 0, 0, _BOUND
        self.dropped = 0

    def begin_step(self) -> None:
        """Forget what layers have seen since the last step ended, but for what ranks brought."""
        if self._seen is not None:
            self._seen.zero_()

    def record_tokens(self, tokens: int, group: dist.ProcessGroup) -> None:
        """Note what this rank brings to one call of a layer: a host value, nothing is sent.

        ``tokens`` are T, or with a bound at least T; ``group`` is the expert-parallel one, whose
        ranks must bring as many.
        """
        self._group = group
        self._order = zlib.crc32(tokens.to_bytes(8), self._order)
        self._most, self._least = max(self._most, tokens), min(self._least, tokens)

    @torch.no_grad()
    def record_rows(self, need: Tensor, dropped: Tensor, counts: bool) -> None:
        """Add what one layer's receive buffer saw: int64 scalars, of which none is read.

        ``need`` is the capacity that would have sufficed, in millionths, ``dropped`` the pairs
        without a row; ``counts`` says whether this pass of the tokens is the one that counts.
        """
        zero = torch.zeros_like(need)
        self._add(torch.stack((need, (dropped > 0).to(torch.int64), zero, zero)), dropped, counts)

    @torch.no_grad()
    def record_wire(self, need: Tensor, cut: Tensor, dropped: Tensor, counts: bool) -> None:
        """Add what one layer's all-to-all saw, as :meth:`record_rows` does.

        ``need`` is the peer capacity that would have sufficed, in millionths, ``dropped`` the pairs
        cut off, and ``cut`` the receive capacity that they would take, in millionths.
        """
        zero = torch.zeros_like(need)
        self._add(torch.stack((zero, zero, need * (cut > 0), cut)), dropped, counts)

    def _add(self, highest: Tensor, dropped: Tensor, counts: bool) -> None:
        if self._seen is None or self._seen.device != dropped.device:
            self._seen = torch.zeros(5, dtype=torch.int64, device=dropped.device)
        self._seen[:4] = torch.maximum(self._seen[:4], highest)
        if counts:
            self._seen[4] += dropped

    def _uneven(self, device: torch.device) -> Tensor:
        """The most tokens of a call, and ``_BOUND`` less the fewest; 0 where that is right.

        A replay of a graph notes nothing: its shapes are those of the capture.
        """
        numbers = [self._order, -self._order, self._most, _BOUND - self._least]
        self._order, self._most, self._least = 0, 0, _BOUND
        found = torch.tensor(numbers, device=device)
        if self._group is not None and self._group.size() > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        is_wrong = found[0] != -found[1] if self._bound is None else found[2] > self._bound
        return found[2:] * is_wrong

    def check(self) -> None:
        """Read the record of this step on all ranks, which raise the same errors, and forget it."""
        if self._seen is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._seen = torch.zeros(5, dtype=torch.int64, device=device)
        if self._seen.is_meta or isinstance(self._seen, FakeTensor):
            return  # shapes only: there is nothing to read
        total = torch.cat((self._uneven(self._seen.device), self._seen))
        if dist.is_initialized():
            dist.all_reduce(total[:5], op=dist.ReduceOp.MAX)
            dist.all_reduce(total[5:], op=dist.ReduceOp.SUM)
        self._seen.zero_()
        most, least, rows, rows_over, peer, cut, dropped = total.tolist()
        if most and self._bound is not None:
            raise UnevenTokensError(too_many_tokens(most, self._bound))
        if most:
            raise UnevenTokensError(
                f"Ranks of an expert-parallel group brought between {_BOUND - least} and {most} "
                "tokens to a MoE layer in this step. Bring the same number on each of them, or "
                "give --moe-echo-max-tokens-per-rank; weights, optimizer state and checkpoints "
                "are as they were before the step."
            )
        # What the wire cut off might all have been for the fullest rank.
        rows = rows + cut if rows_over or (peer and not self._is_auto) else 0
        advice = _advice(moe_received_token_capacity=rows, moe_echo_peer_capacity=peer)
        if (rows_over or peer) and self._policy == "raise":
            raise MoEOverflowError(
                f"Token-expert pairs of this step ({dropped}) had no row in a MoE layer's receive "
                f"buffer. Use {advice}, or --moe-echo-overflow drop to train without such pairs. "
                "Weights, optimizer state and checkpoints are as they were before the step."
            )
        self.dropped += dropped
        if dropped and (not dist.is_initialized() or dist.get_rank() == 0):
            print(
                f"WARNING: {dropped} token-expert pairs dropped in this step, {self.dropped} since "
                f"the start. Use {advice} to keep such pairs.",
                flush=True,
            )


def too_many_tokens(tokens: int, bound: int) -> str:
    """What to say of a rank that brings more than ``--moe-echo-max-tokens-per-rank``."""
    return (
        f"A rank brings {tokens} tokens to a MoE layer, but --moe-echo-max-tokens-per-rank is "
        f"{bound}. Make it {tokens} or more, or pack fewer tokens into a microbatch; weights, "
        "optimizer state and checkpoints are as they were before the step."
    )


def _advice(**millionths: int) -> str:
    """The flags that would have sufficed, by their names, rounded up to hundredths."""
    return " and ".join(
        f"{flag_name(name)} {math.ceil(need / 10**4) / 100:.2f} or more"
        for name, need in millionths.items()
        if need
    )
