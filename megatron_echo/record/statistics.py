"""How even the loads of ranks were: kept on the device, read at the log interval."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.record.call_log import CallLog

_SUMS = 7  # routed and placed overload, clones, moved pairs, pairs, layer calls, seconds saved


class StepStatistics:
    """Sums over the layer calls since they were last read.

    ``overload_routed`` and ``overload_placed``: pairs of the fullest rank over the mean, before and
    after planning, the mean over layer calls, and the highest under the same name with ``_max``.
    ``clones``: clones of a layer call. ``tokens_moved``: the share of token-expert pairs computed
    by clones. ``layer_calls``: layer calls of a step, over all pipeline stages. ``seconds_saved``:
    what the clones of a layer call save by prediction, where plans have a price.

    Without clones there is no plan, and no rank knows the loads of the others in a layer: each
    keeps what it sends where, and one all-reduce at the end of the step adds up all calls.

    All that a call leaves is on the device, where the replay of a CUDA graph leaves it too.
    """

    def __init__(self, is_priced: bool = False) -> None:
        self._sums_kept = _SUMS if is_priced else _SUMS - 1
        self._local = CallLog()
        self._group: dist.ProcessGroup | None = None
        self._of_step: Tensor | None = None
        self._total: Tensor | None = None
        self._steps = 0

    def begin_step(self) -> None:
        """Forget what has come since the last step ended, or of one that failed."""
        self._local.begin_step()
        if self._of_step is not None:
            self._of_step.zero_()

    @torch.no_grad()
    def record(self, plan: Any) -> None:
        """Add one layer call with its ``ClonePlan``. Nothing is read."""
        before = plan.load_before
        ranks, pairs = before.shape[0], before.sum()
        mean = pairs.clamp(min=1).double() / ranks
        overload = torch.stack((before.max(), plan.load_after.max())).double() / mean
        by_home = plan.allocation.view(ranks, -1, ranks)
        moved = pairs - by_home.diagonal(dim1=0, dim2=2).sum()
        rest = torch.stack((plan.num_clones, moved, pairs, torch.ones_like(pairs))).double()
        sums = [overload, rest]
        if plan.price is not None:
            sums.append((plan.rows_saved() * plan.price.row_seconds).double().view(1))
        if self._of_step is None or self._of_step.device != pairs.device:
            self._of_step = self._zeros(pairs.device)
        # Every rank of the group records the same call.
        _add(self._of_step, torch.cat(sums) / ranks, overload)

    def record_local(self, pairs: Tensor, group: dist.ProcessGroup) -> None:
        """Keep one layer call without clones. Nothing is read, nothing is sent.

        ``pairs`` are int64 ``[R]``, this rank's for the experts of each rank of the expert-parallel
        group.
        """
        self._local.add(pairs)
        self._group = group

    @torch.no_grad()
    def end_step(self) -> None:
        """Count a step; the ranks of the expert-parallel group must all call."""
        self._steps += 1
        if self._of_step is not None:
            self._add(self._of_step[:-2], self._of_step[-2:])
        found = self._local.end_step()
        if found is None or self._group is None:
            return
        loads, calls = found[0].clone(), found[1].double()
        if self._group.size() > 1:
            dist.all_reduce(loads, group=self._group)
        pairs = loads.sum(1)
        ranks = loads.shape[1]
        overload = loads.amax(1).double() * ranks / pairs.clamp(min=1)
        zero, total = calls.new_zeros(1), overload.sum()[None]
        sums = (total, total, zero, zero, pairs.sum()[None].double(), calls, zero)
        self._add(torch.cat(sums[: self._sums_kept]) / ranks, overload.amax().expand(2))

    def _add(self, sums: Tensor, highest: Tensor) -> None:
        if self._total is None or self._total.device != sums.device:
            self._total = self._zeros(sums.device)
        _add(self._total, sums, highest)

    def read(self) -> dict[str, float]:
        """Everything since the last call, over all ranks; all of them must call.

        ``layer_calls`` alone, 0, where no layer call was recorded.
        """
        total, self._total = self._total, None
        if total is None:
            total = self._zeros("cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(total[:-2], op=dist.ReduceOp.SUM)
        dist.all_reduce(total[-2:], op=dist.ReduceOp.MAX)
        *sums, routed_most, placed_most = total.tolist()
        routed, placed, clones, moved, pairs, calls, *saved = sums
        values = {"layer_calls": calls / max(self._steps, 1)}
        if calls:
            values |= {
                "overload_routed": routed / calls,
                "overload_placed": placed / calls,
                "overload_routed_max": routed_most,
                "overload_placed_max": placed_most,
                "clones": clones / calls,
                "tokens_moved": moved / max(pairs, 1),
            }
            if saved:
                values["seconds_saved"] = saved[0] / calls
        self._steps = 0
        return values

    def _zeros(self, device: Any) -> Tensor:
        return torch.zeros(self._sums_kept + 2, dtype=torch.float64, device=device)


def _add(total: Tensor, sums: Tensor, highest: Tensor) -> None:
    """Into ``total``, in place: sums, then what is the highest."""
    total[:-2] += sums
    total[-2:].copy_(torch.maximum(total[-2:], highest))


def console_line(values: dict[str, float], iteration: int) -> str:
    """One line under Megatron's own, from the values of :meth:`StepStatistics.read`."""
    value = {name.removeprefix("moe_echo/"): number for name, number in values.items()}
    return (
        f" [moe_echo] iteration {iteration:8d} | max/mean load of ranks: routed "
        f"{value['overload_routed']:.3f} (max {value['overload_routed_max']:.2f}), placed "
        f"{value['overload_placed']:.3f} (max {value['overload_placed_max']:.2f}) | clones "
        f"{value['clones']:.1f} | tokens moved {value['tokens_moved']:.1%} |"
    )
