"""How even the loads of ranks were: kept on the device, read at the log interval."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_SUMS = 7  # routed and placed overload, clones, moved pairs, pairs, layer calls, seconds saved


class StepStatistics:
    """Sums over the layer calls since they were last read.

    ``overload_routed`` and ``overload_placed``: pairs of the fullest rank over the mean, before and
    after planning, the mean over layer calls, and the highest under the same name with ``_max``.
    ``clones``: clones of a layer call. ``tokens_moved``: the share of token-expert pairs computed
    by clones. ``layer_calls``: layer calls of a step, over all pipeline stages. ``seconds_saved``:
    what the clones of a layer call save by prediction, where plans are chosen by it.

    Without clones there is no plan, and no rank knows the loads of the others in a layer: each
    keeps what it sends where, and one all-reduce at the end of the step adds up all calls.
    """

    def __init__(self, is_priced: bool = False) -> None:
        """Begin.

        Args:
            is_priced: plans have a price.
        """
        self._sums_kept = _SUMS if is_priced else _SUMS - 1
        self._local: list[Tensor] = []
        self._last_local: list[Tensor] = []
        self._group: dist.ProcessGroup | None = None
        self._sums: Tensor | None = None
        self._highest: Tensor | None = None
        self._steps = 0

    @torch.no_grad()
    def record(self, plan: Any) -> None:
        """Add one layer call. Nothing is read.

        Args:
            plan: a ``ClonePlan``.
        """
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
        # Every rank of the group records the same call.
        self._add(torch.cat(sums) / ranks, overload)

    def record_local(self, pairs: Tensor, group: dist.ProcessGroup) -> None:
        """Keep one layer call without clones. Nothing is read, nothing is sent.

        Args:
            pairs: int64 ``[R]``, this rank's pairs for the experts of each rank.
            group: the expert-parallel group.
        """
        self._local.append(pairs)
        self._group = group

    def forget(self) -> None:
        """Drop what is kept of the step in progress."""
        self._local = []

    @torch.no_grad()
    def end_step(self, is_replayed: bool = False) -> None:
        """Count a step; the ranks of the expert-parallel group must all call.

        Args:
            is_replayed: by a CUDA graph, which filled the tensors of the last step again.
        """
        self._steps += 1
        self._last_local = self._last_local if is_replayed else self._local
        self.forget()
        if not self._last_local or self._group is None:
            return
        loads = torch.stack(self._last_local)
        if self._group.size() > 1:
            dist.all_reduce(loads, group=self._group)
        pairs = loads.sum(1)
        ranks = loads.shape[1]
        overload = loads.amax(1).double() * ranks / pairs.clamp(min=1)
        zero, number = overload.new_zeros(()), overload.new_tensor(len(loads))
        sums = (overload.sum(), overload.sum(), zero, zero, pairs.sum().double(), number, zero)
        kept = torch.stack(sums[: self._sums_kept])
        self._add(kept / ranks, overload.amax().expand(2))

    def _add(self, sums: Tensor, highest: Tensor) -> None:
        if self._sums is None or self._highest is None or self._sums.device != sums.device:
            self._sums, self._highest = self._zeros(sums.device)
        self._sums += sums
        self._highest.copy_(torch.maximum(self._highest, highest))

    def read(self) -> dict[str, float]:
        """Everything since the last call, over all ranks; all of them must call.

        Returns:
            The values above; ``layer_calls`` alone, 0, where no layer call was recorded.
        """
        if self._sums is None or self._highest is None:
            self._sums, self._highest = self._zeros("cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(self._sums, op=dist.ReduceOp.SUM)
        dist.all_reduce(self._highest, op=dist.ReduceOp.MAX)
        *highest, routed, placed, clones, moved, pairs, calls, saved = torch.cat(
            (self._highest, self._sums, self._sums.new_zeros(_SUMS - self._sums_kept))
        ).tolist()
        values = {"layer_calls": calls / max(self._steps, 1)}
        if calls:
            values |= {
                "overload_routed": routed / calls,
                "overload_placed": placed / calls,
                "overload_routed_max": highest[0],
                "overload_placed_max": highest[1],
                "clones": clones / calls,
                "tokens_moved": moved / max(pairs, 1),
            }
            if self._sums_kept == _SUMS:
                values["seconds_saved"] = saved / calls
        self._sums.zero_()  # in place: a CUDA graph adds to these tensors
        self._highest.zero_()
        self._steps = 0
        return values

    def _zeros(self, device: Any) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(self._sums_kept + 2, dtype=torch.float64, device=device)
        return zeros[: self._sums_kept], zeros[self._sums_kept :]


def console_line(values: dict[str, float], iteration: int) -> str:
    """One line under Megatron's own, from the values of :meth:`StepStatistics.read`."""
    value = {name.removeprefix("moe_echo/"): number for name, number in values.items()}
    return (
        f" [moe_echo] iteration {iteration:8d} | max/mean load of ranks: routed "
        f"{value['overload_routed']:.3f} (max {value['overload_routed_max']:.2f}), placed "
        f"{value['overload_placed']:.3f} (max {value['overload_placed_max']:.2f}) | clones "
        f"{value['clones']:.1f} | tokens moved {value['tokens_moved']:.1%} |"
    )
