"""Which expert got how many tokens: a slot for each layer and microbatch, reduced over ranks.

The counts of a call are written in its forward pass and read in a backward pass, maybe of another
microbatch. One asynchronous all-reduce carries those of all layers of a pipeline stage (or of a
virtual stage's chunk); it starts when the last layer has written, and whoever reads waits.

**Which call is it?** Megatron does not tell a layer the number of its microbatch reliably, so each
layer counts its own calls: the forward passes of a step are 0, 1, 2, ... and their recomputations,
which run inside a backward pass, are the same numbers again, first in, first out. A recomputation
writes nothing. :meth:`CountExchange.end_step` begins again at 0.

**What has been seen?** A reader gets exactly the calls whose forward pass came before it in the
program, never whatever has happened to arrive: the same on every rank and in every run.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor

from megatron_echo.step_hooks import EndOfStep


def in_backward() -> bool:
    """True while autograd runs in this thread: what is computed there is computed again."""
    return torch._C._current_graph_task_id() != -1


@dataclass
class _Row:
    """One layer.

    Attributes:
        calls_per_microbatch: of one microbatch, above 1 for a repeated MTP layer. Such calls
            build on each other, so their backward passes come in the opposite order.
        previous: the layer's buffer for mean and variance of the step's calls; None if not kept.
    """

    calls_per_microbatch: int
    previous: Callable[[], Tensor] | None
    calls: int = 0
    replays: int = 0


@dataclass
class _Slot:
    """The counts of one call, ``[B, E]``: of this rank, then over the two groups.

    Attributes:
        local: of this rank.
        over_batch: whether ``batch`` will be asked for.
        sequence: over the ranks that share its sequences.
        batch: ``[E]``, over all ranks of the stage; None where ``sequence`` says it.
        work: to wait for before either of the latter is read.
    """

    local: Tensor
    over_batch: bool
    sequence: Tensor | None = None
    batch: Tensor | None = None
    work: tuple[dist.Work, ...] = ()


class CountExchange:
    """The slots of all layers on this rank; one object a model, see :class:`RouterStep`.

    Attributes:
        batch_group: all ranks of the pipeline stage.
        last_step: int64 ``[L, E]``, this rank's counts of the last whole step, over its calls.
    """

    def __init__(
        self, sequence_group: dist.ProcessGroup | None, batch_group: dist.ProcessGroup
    ) -> None:
        """Choose the groups.

        Args:
            sequence_group: ranks that share sequences (tensor and context parallel); None if
                nobody asks for :meth:`of_sequences`.
            batch_group: all ranks of the pipeline stage.
        """
        self._sequence_group = sequence_group
        self.batch_group = batch_group
        self._same_ranks = (
            sequence_group is not None and sequence_group.size() == batch_group.size()
        )
        self._rows: list[_Row] = []
        self._slots: dict[tuple[int, int], _Slot] = {}
        self._pending: list[tuple[int, int]] = []
        self._last_rows: set[int] = set()
        self.last_step: Tensor | None = None

    def register(
        self, calls_per_microbatch: int = 1, previous: Callable[[], Tensor] | None = None
    ) -> int:
        """A row for a layer.

        Args:
            calls_per_microbatch: how often one microbatch passes the layer.
            previous: gives a buffer ``[2, E]``, filled at the end of each step with mean and
                variance of its calls, for which all calls are written with ``over_batch``.
        """
        self._rows.append(_Row(calls_per_microbatch, previous))
        return len(self._rows) - 1

    def enter(self, row: int) -> tuple[int, bool]:
        """Begin a forward pass of a layer in training.

        Returns:
            The number of the call, and True if it is a recomputation.
        """
        state = self._rows[row]
        if not in_backward():
            state.calls += 1
            return state.calls - 1, False
        microbatch, depth = divmod(state.replays, state.calls_per_microbatch)
        state.replays += 1
        return (microbatch + 1) * state.calls_per_microbatch - 1 - depth, True

    def write(self, row: int, call: int, counts: Tensor, over_batch: bool) -> None:
        """Fill the slot of a call.

        Args:
            row: from :meth:`register`.
            call: from :meth:`enter`.
            counts: int64 ``[B, E]`` or ``[1, E]``, this rank's.
            over_batch: whether :meth:`of_batch` will be asked for.
        """
        if any(waiting == row for waiting, _ in self._pending):
            self._launch()  # the stage begins again: what waits is a whole microbatch
        self._slots[row, call] = _Slot(counts, over_batch)
        self._pending.append((row, call))
        if row in self._last_rows:
            self._launch()

    def of_sequences(self, row: int, call: int) -> Tensor:
        """The counts of a call over the ranks that share its sequences, ``[B, E]``."""
        slot = self._arrived(row, call)
        assert slot.sequence is not None
        return slot.sequence

    def of_batch(self, row: int, call: int) -> Tensor:
        """The counts of a call over all ranks of the stage, ``[E]``."""
        slot = self._arrived(row, call)
        if slot.batch is not None:
            return slot.batch
        assert slot.sequence is not None
        return slot.sequence.sum(0)

    def seen(self, row: int) -> list[int]:
        """The calls of this step whose counts are written."""
        return [call for call in range(self._rows[row].calls) if (row, call) in self._slots]

    def calls_in_step(self, row: int) -> int:
        """How many calls this step will have; what it has had, where nobody knows."""
        state = self._rows[row]
        try:
            return get_num_microbatches() * state.calls_per_microbatch
        except AttributeError:  # Megatron's calculator is not set up
            return state.calls

    @torch.no_grad()
    def end_step(self) -> None:
        """Forget the calls. Nothing is read, and it may be called twice."""
        if not self._slots:
            return
        for row, state in enumerate(self._rows):
            if state.previous is not None and (calls := self.seen(row)):
                batch = torch.stack([self.of_batch(row, call) for call in calls]).double()
                variance = batch.var(0, correction=min(len(calls) - 1, 1))
                state.previous().copy_(torch.stack((batch.mean(0), variance)))
        self.last_step = torch.stack(list(self._step_totals()))
        for slot in self._slots.values():
            for work in slot.work:  # a CUDA graph must not end before what it has started
                work.wait()
        self._slots.clear()
        self._pending.clear()
        for state in self._rows:
            state.calls = state.replays = 0

    def _step_totals(self) -> Iterator[Tensor]:
        experts = next(iter(self._slots.values())).local
        for row in range(len(self._rows)):
            calls = [self._slots[row, call].local.sum(0) for call in self.seen(row)]
            yield torch.stack(calls).sum(0) if calls else torch.zeros_like(experts[0])

    def _arrived(self, row: int, call: int) -> _Slot:
        slot = self._slots[row, call]
        if slot.sequence is None:
            self._launch()
        for work in slot.work:
            work.wait()
        slot.work = ()
        return slot

    def _launch(self) -> None:
        """Start the all-reduce of everything that waits; remember which layer came last."""
        self._last_rows.add(self._pending[-1][0])
        slots = [self._slots[key] for key in self._pending]
        self._pending = []
        local = torch.stack([slot.local for slot in slots])
        batch, work = None, []
        if any(slot.over_batch for slot in slots) and not self._same_ranks:
            batch = local.sum(1)
            work += self._all_reduce(batch, self.batch_group)
        if self._sequence_group is not None:
            work += self._all_reduce(local, self._sequence_group)
        for index, slot in enumerate(slots):
            slot.sequence, slot.work = local[index], tuple(work)
            slot.batch = None if batch is None else batch[index]

    @staticmethod
    def _all_reduce(counts: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
        if group.size() == 1:
            return []
        work = dist.all_reduce(counts, group=group, async_op=True)
        assert work is not None
        return [work]


class RouterStep(EndOfStep):
    """Ends the step of a model's routers, after Megatron's ``finalize_model_grads``.

    Attributes:
        exchange: of the model's routers; None before the first one is built.
    """

    def __init__(self, finalize: Any) -> None:
        super().__init__(finalize)
        self.exchange: CountExchange | None = None

    @classmethod
    def of(cls, config: Any) -> "RouterStep":
        """The object of a model, from its ``TransformerConfig``; installed on first use.

        Others of this package stand there as well; each keeps the next as ``_finalize``, and this
        one goes to the inside, where they do not look.
        """
        holder, name = config, "finalize_model_grads_func"
        while hasattr(getattr(holder, name), "_finalize"):
            holder, name = getattr(holder, name), "_finalize"
            if isinstance(holder, cls):
                return holder
        step = cls(getattr(holder, name))
        setattr(holder, name, step)
        return step

    def end_step(self) -> None:
        """Begin the routers' next step."""
        if self.exchange is not None:
            self.exchange.end_step()
