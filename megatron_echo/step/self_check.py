"""Doubt in production: every so many steps one layer is computed again without clones."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.collectives import all_gather
from megatron_echo.planner import ClonePlan

_LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float8_e4m3fn: 2**-4}
"""In FP8 a value may be rounded to the other side: a sixteenth of it, among many."""
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407  # Knuth's MMIX


class EchoCheckError(RuntimeError):
    """Ranks planned differently, or a layer computes something else with clones."""


def plan_hash(plan: ClonePlan) -> Tensor:
    """An int64 scalar that depends on every number of a plan."""
    parts = (plan.counts, plan.slot_expert, plan.allocation)
    values = torch.cat([part.reshape(-1) for part in parts])
    index = torch.arange(values.numel(), device=values.device)
    return ((values + 1) * (index * _MULTIPLIER + _INCREMENT)).sum()


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Largest difference over the largest value; NaN in both is none, NaN in one is infinite."""
    actual, expected = actual.double(), expected.double()
    difference = (actual - expected).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    difference = torch.where(actual.isnan() & expected.isnan(), 0, difference)
    scale = expected.abs().nan_to_num(nan=0).max()
    return difference.max() / scale.clamp(min=torch.finfo(torch.float32).tiny)


class SelfCheck:
    """Says which layer to check, and keeps the result on the device until the end of the step.

    In every N-th step one MoE layer of each pipeline stage is checked, in its first microbatch,
    the next layer the next time. Layers count that are called: which ones follow a step's first
    is remembered, so those of a model that was built and dropped are not waited for.

    Attributes:
        ranks: that compared a layer in the last step; None if it was none to check in.
    """

    def __init__(self, every: int) -> None:
        """Set the interval N, 0 for never."""
        self._every = every
        self.ranks: int | None = None
        self._layers = 0
        self._called: list[int] = []
        self._sequences: dict[int, list[int]] = {}
        self._step = 0
        self._is_taken = False
        self._seen: Tensor | None = None
        self._limit = 0.0

    def register(self) -> int:
        """A layer's number in the order of building."""
        self._layers += 1
        return self._layers - 1

    def is_due(self, layer: int) -> bool:
        """Whether this call of a layer is the one to check; it counts as checked then."""
        if self._every == 0:
            return False
        if layer not in self._called:
            self._called.append(layer)
        turn, is_off = divmod(self._step, self._every)
        if is_off or self._is_taken:
            return False
        layers = self._sequences.get(self._called[0], [layer])
        self._is_taken = layer == layers[turn % len(layers)]
        return self._is_taken

    @torch.no_grad()
    def record(
        self, actual: Tensor, expected: Tensor, plan: ClonePlan, group: Any, dtype: torch.dtype
    ) -> None:
        """Compare what the layer gave with what it gives without clones; nothing is read.

        The plan's hash is compared over the expert-parallel ``group``. ``dtype`` is the experts'.
        """
        hashes = all_gather(plan_hash(plan)[None], group)
        differs = (hashes != hashes[0]).any().double()
        self._seen = torch.stack((relative_error(actual, expected), differs))
        self._limit = _LIMITS.get(dtype, 4 * torch.finfo(dtype).eps)

    def forget(self) -> None:
        """Drop the result of the step in progress."""
        self._is_taken, self._seen, self._called = False, None, []

    def check(self) -> float | None:
        """End a step; in a step with a check read its result, on all ranks.

        Gives the largest relative error on any rank, None if no rank compared anything.

        Raises:
            EchoCheckError: the error is above the rounding of the experts' dtype, or plans differ.
        """
        is_checked_step = self._every > 0 and self._step % self._every == 0
        seen, self.ranks = self._seen, None
        self._step += 1
        if self._called:
            self._sequences[self._called[0]] = self._called
        self.forget()
        if not is_checked_step:
            return None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        result = torch.zeros(4, dtype=torch.float64, device=device)
        if seen is not None:
            result = torch.cat((seen, seen.new_tensor([self._limit, 1])))
        dist.all_reduce(result[:3], op=dist.ReduceOp.MAX)
        dist.all_reduce(result[3:], op=dist.ReduceOp.SUM)
        error, differs, limit, ranks = result.tolist()
        self.ranks = int(ranks)
        if ranks == 0:
            return None
        if differs or error > limit:
            fault = (
                "ranks of an expert-parallel group planned different clones"
                if differs
                else f"a MoE layer with clones is {error:.1e} from itself without (limit "
                f"{limit:.1e})"
            )
            raise EchoCheckError(
                f"--moe-echo-check-every: {fault}. Restart with --moe-num-echo-experts 0, which "
                "makes no clones, from the last checkpoint, and report this."
            )
        return error
