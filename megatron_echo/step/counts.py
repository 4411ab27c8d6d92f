"""Which expert got how many tokens: counts of each layer and call, reduced over ranks.

The counts of a call are written in its forward pass and read in a backward pass, maybe of another
microbatch. One asynchronous all-reduce carries those of all layers of a pipeline stage (or of a
virtual stage's chunk); it starts when the last layer has written, and whoever reads waits.

**Which call is it?** Each layer numbers its own calls in a step: 0, 1, 2, ... A recomputation is
the call that its checkpoint's first pass was (``call_roles.py``), and writes nothing. Calls of a
checkpoint that nothing refers to any more, and that never ran again, belong to no step.

**What has been seen?** A reader gets exactly the calls whose forward pass came before it in the
program, never whatever has happened to arrive: the same on every rank and in every run.

**When does it end?** :meth:`CountExchange.end_step` sums up and begins at 0. The calls of the last
step are kept: the replay of a CUDA graph calls no layer, and fills the same tensors.

**In graphs of single layers** one capture serves many calls, so that none of this can be known in
Python. There each layer reduces its counts at once, and adds them to totals on the device, which
are the calls seen so far in any pass, replayed or not.
"""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_echo.call_roles import Role, checkpoint_run_again, checkpoints_of_first_pass


@dataclass
class _Call:
    """One call of a layer; counts ``[B, E]`` of this rank, then over the two groups.

    Attributes:
        owners: the checkpoints whose first pass it was; none for a recorded one.
        is_run_again: whether one of them has run again.
        local: of this rank, None until it is written.
        over_batch: whether ``batch`` will be asked for.
        sequence: over the ranks that share its sequences.
        batch: ``[E]``, over all ranks of the stage; None where ``sequence`` says it.
        work: to wait for before either of the latter is read.
        seen: with totals, what they were after this call.
        at_end: called when the step ends, if the call belongs to it.
    """

    owners: list[weakref.ref[FunctionCtx]] = field(default_factory=list)
    is_run_again: bool = False
    local: Tensor | None = None
    over_batch: bool = False
    sequence: Tensor | None = None
    batch: Tensor | None = None
    work: tuple[dist.Work, ...] = ()
    seen: "_Totals | None" = None
    at_end: Callable[[], object] | None = None

    @property
    def is_in_step(self) -> bool:
        """Whether it is written, and not of a checkpoint that went without a backward pass."""
        if self.local is None:
            return False
        is_recorded = self.is_run_again or not self.owners
        return is_recorded or any(owner() is not None for owner in self.owners)


@dataclass
class _Totals:
    """Sums over the calls of a step, int64 on the device; ``calls`` is a scalar.

    Attributes:
        local: ``[E]``, this rank's counts.
        batch: ``[E]``, those over all ranks of the stage.
        squares: ``[E]``, of the latter.
        calls: their number.
    """

    local: Tensor
    batch: Tensor
    squares: Tensor
    calls: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.local, self.batch, self.squares, self.calls

    @classmethod
    def of(cls, local: list[Tensor], batch: list[Tensor]) -> "_Totals":
        """Sum up some calls, at least one; each ``[E]``."""
        own, whole = torch.stack(local), torch.stack(batch)
        calls = whole.new_full((), len(whole))
        return cls(own.sum(0), whole.sum(0), whole.square().sum(0), calls)

    def mean_and_variance(self) -> Tensor:
        """Of ``batch`` over the calls, fp64 ``[2, E]``; sums are exact, divided once."""
        calls = self.calls.clamp(min=1)
        spread = calls * self.squares - self.batch.square()
        variance = spread.double() / (calls * (calls - 1).clamp(min=1))
        return torch.stack((self.batch.double() / calls, variance))


@dataclass
class _Row:
    """One layer.

    Attributes:
        calls_per_microbatch: of one microbatch, above 1 for a repeated MTP layer.
        previous: the layer's buffer for mean and variance of the step's calls; None if not kept.
        calls: of the step.
        totals: in graphs of single layers, from the first call on.
    """

    calls_per_microbatch: int
    previous: Callable[[], Tensor] | None
    calls: list[_Call] = field(default_factory=list)
    totals: _Totals | None = None


class CountExchange:
    """The calls of all layers on this rank; one object a model, see ``step/step_end.py``.

    Attributes:
        batch_group: all ranks of the pipeline stage.
        last_step: int64 ``[L, E]``, this rank's counts of the last whole step, over its calls.
    """

    def __init__(
        self,
        sequence_group: dist.ProcessGroup | None,
        batch_group: dist.ProcessGroup,
        has_layer_graphs: bool = False,
    ) -> None:
        """Choose the groups.

        Args:
            sequence_group: ranks that share sequences (tensor and context parallel); None if
                nobody asks for :meth:`of_sequences`.
            batch_group: all ranks of the pipeline stage.
            has_layer_graphs: whether single layers are in CUDA graphs.
        """
        self.has_layer_graphs = has_layer_graphs
        self._sequence_group = sequence_group
        self.batch_group = batch_group
        self._same_ranks = (
            sequence_group is not None and sequence_group.size() == batch_group.size()
        )
        self._rows: list[_Row] = []
        self._first_passes: weakref.WeakKeyDictionary[FunctionCtx, dict[int, deque[int]]] = (
            weakref.WeakKeyDictionary()
        )
        self._pending: list[tuple[int, _Call]] = []
        self._last_rows: set[int] = set()
        self._last_calls: list[list[_Call]] = []
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

    def enter(self, row: int, role: Role) -> tuple[int, bool]:
        """Begin a forward pass of a layer in training.

        Args:
            row: from :meth:`register`.
            role: of the pass; not UNRECORDED.

        Returns:
            The number of the call, and True if its counts are to be written. A repeated pass is
            never asked for its number.
        """
        if role is Role.REPEATED:
            return -1, False
        calls, again = self._rows[row].calls, checkpoint_run_again()
        first = None if again is None else self._first_passes.get(again, {}).get(row)
        if first:
            number = first[0]
            first.rotate(-1)
            calls[number].is_run_again = True
        else:
            number = len(calls)
            calls.append(_Call())
        if role is Role.FIRST_PASS:
            for checkpoint in checkpoints_of_first_pass():
                calls[number].owners.append(weakref.ref(checkpoint))
                rows = self._first_passes.setdefault(checkpoint, {})
                rows.setdefault(row, deque()).append(number)
        return number, not first

    def write(self, row: int, call: int, counts: Tensor, over_batch: bool) -> None:
        """Hand over the counts of a call.

        Args:
            row: from :meth:`register`.
            call: from :meth:`enter`.
            counts: int64 ``[B, E]`` or ``[1, E]``, this rank's.
            over_batch: whether :meth:`of_batch` will be asked for.
        """
        if any(waiting == row for waiting, _ in self._pending):
            self._launch()  # the stage begins again: what waits is a whole microbatch
        entry = self._rows[row].calls[call]
        entry.local, entry.over_batch = counts, over_batch
        self._pending.append((row, entry))
        if self.has_layer_graphs:
            self._launch()
            self._add_to_totals(row, call)
        elif row in self._last_rows:
            self._launch()

    @torch.no_grad()
    def _add_to_totals(self, row: int, call: int) -> None:
        state, entry = self._rows[row], self._arrived(row, call)
        assert entry.local is not None
        local = entry.local.sum(0)
        new = _Totals.of([local], [self.of_batch(row, call) if entry.over_batch else local])
        if state.totals is None:
            state.totals = _Totals(*map(torch.zeros_like, new.tensors()))
        for total, more in zip(state.totals.tensors(), new.tensors(), strict=True):
            total += more
        entry.seen = _Totals(*(total.clone() for total in state.totals.tensors()))

    def at_end(self, row: int, call: int, function: Callable[[], object]) -> None:
        """Call a function when the step ends, if the call belongs to it: in each replay too."""
        self._rows[row].calls[call].at_end = function

    def of_sequences(self, row: int, call: int) -> Tensor:
        """The counts of a call over the ranks that share its sequences, ``[B, E]``."""
        entry = self._arrived(row, call)
        assert entry.sequence is not None
        return entry.sequence

    def of_batch(self, row: int, call: int) -> Tensor:
        """The counts of a call over all ranks of the stage, ``[E]``."""
        entry = self._arrived(row, call)
        if entry.batch is not None:
            return entry.batch
        assert entry.sequence is not None
        return entry.sequence.sum(0)

    def of_seen(self, row: int, up_to: int | None = None) -> tuple[Tensor, Tensor]:
        """The counts of the calls of this step so far, over all ranks of the stage.

        Args:
            row: from :meth:`register`.
            up_to: the last call to take; all that are written for None.

        Returns:
            Their sum, fp64 ``[E]``, and their number, a scalar.
        """
        state = self._rows[row]
        totals = state.totals if up_to is None else state.calls[up_to].seen
        if totals is None:
            totals = self._totals(row, up_to)
        return totals.batch.double(), totals.calls

    def _totals(self, row: int, up_to: int | None = None) -> _Totals:
        local, batch = [], []
        for number in self.seen(row):
            call = self._rows[row].calls[number]
            if call.local is not None and (up_to is None or number <= up_to):
                local.append(call.local.sum(0))
                batch.append(self.of_batch(row, number) if call.over_batch else local[-1])
        return _Totals.of(local, batch)

    def seen(self, row: int) -> list[int]:
        """The calls of this step whose counts are written."""
        calls = enumerate(self._rows[row].calls)
        return [number for number, call in calls if call.is_in_step]

    def calls_in_step(self, row: int) -> int:
        """How many calls this step will have; 0 where nobody knows."""
        try:
            return get_num_microbatches() * self._rows[row].calls_per_microbatch
        except AttributeError:  # Megatron's calculator is not set up
            return 0

    def begin_step(self) -> None:
        """Clear the totals, and drop the calls of captures: their graphs are whole by now."""
        if not self.has_layer_graphs:
            return
        for row in self._rows:
            row.calls = []
            if row.totals is not None:
                for total in row.totals.tensors():
                    total.zero_()

    @torch.no_grad()
    def end_step(self, is_replayed: bool = False) -> None:
        """Sum up the step and begin the next. Nothing is read; a second call does nothing.

        Args:
            is_replayed: the step was the replay of a CUDA graph, which filled the tensors of the
                last step's calls again.
        """
        if is_replayed:
            for row, calls in zip(self._rows, self._last_calls, strict=False):
                row.calls = calls
        if any(state.totals or self.seen(row) for row, state in enumerate(self._rows)):
            self._sum_up()
            self._last_calls = [row.calls for row in self._rows]
        for row in self._rows:
            row.calls = []
        self._pending = []
        self._first_passes.clear()

    def join(self) -> None:
        """Inside a CUDA graph, start what has not begun and wait for all: nothing may stay open."""
        if self._pending:
            self._launch()
        self._wait()

    def _wait(self) -> None:
        for row in self._rows:
            for call in row.calls:
                for work in call.work:
                    work.wait()
                call.work = ()

    def _sum_up(self) -> None:
        self._wait()
        sums = []
        for row, state in enumerate(self._rows):
            seen = self.seen(row)
            for call in seen:
                if (function := state.calls[call].at_end) is not None:
                    function()
            totals = self._totals(row) if state.totals is None and seen else state.totals
            sums.append(None if totals is None else totals.local)
            if state.previous is not None and totals is not None:
                kept = state.previous()
                kept.copy_(torch.where(totals.calls > 0, totals.mean_and_variance(), kept))
        some = next(each for each in sums if each is not None)
        self.last_step = torch.stack([torch.zeros_like(some) if e is None else e for e in sums])

    def _arrived(self, row: int, call: int) -> _Call:
        entry = self._rows[row].calls[call]
        if entry.sequence is None:
            self._launch()
        for work in entry.work:
            work.wait()
        entry.work = ()
        return entry

    def _launch(self) -> None:
        """Start the all-reduce of everything that waits; remember which layer came last."""
        self._last_rows.add(self._pending[-1][0])
        calls = [call for _, call in self._pending]
        self._pending = []
        local = torch.stack([call.local for call in calls if call.local is not None])
        batch, work = None, []
        if any(call.over_batch for call in calls) and not self._same_ranks:
            batch = local.sum(1)
            work += self._all_reduce(batch, self.batch_group)
        if self._sequence_group is not None:
            work += self._all_reduce(local, self._sequence_group)
        for index, call in enumerate(calls):
            call.sequence, call.work = local[index], tuple(work)
            call.batch = None if batch is None else batch[index]

    @staticmethod
    def _all_reduce(counts: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
        if group.size() == 1:
            return []
        work = dist.all_reduce(counts, group=group, async_op=True)
        assert work is not None
        return [work]
