"""Which expert got how many tokens: counts of each layer and call, reduced over ranks.

The counts of a call are written in its forward pass and read in a backward pass, maybe of another
microbatch. One asynchronous all-reduce carries those of all layers of a pipeline stage (or of a
virtual stage's chunk); it starts when the last layer has written, and whoever reads waits.

A recomputation is the call that its checkpoint's first pass was (``call_roles.py``), and writes
nothing. Calls of a checkpoint that nothing refers to any more, and that never ran again, belong to
no step. A reader gets exactly the calls whose forward pass came before it in the program, never
whatever has happened to arrive: the same on every rank and in every run. The calls of the last step
are kept: the replay of a CUDA graph calls no layer, and fills the same tensors.

In graphs of single layers one capture serves many calls, so that none of this can be known in
Python. There each layer reduces its counts at once, and adds them to totals on the device, which
are the calls seen so far in any pass, replayed or not.
"""

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from torch import Tensor
from torch.autograd.function import FunctionCtx

from megatron_echo.call_roles import Role, checkpoint_run_again, checkpoints_of_first_pass


@dataclass
class _Call:
    """One call of a layer; counts ``[b, E]`` of this rank, then over the two groups."""

    owners: list[weakref.ref[FunctionCtx]] = field(default_factory=list)  # whose first pass it was
    is_run_again: bool = False  # one of these checkpoints was
    local: Tensor | None = None  # this rank's, None until it is written
    over_batch: bool = False  # ``batch`` will be asked for
    sequence: Tensor | None = None  # over the ranks that share its sequences
    batch: Tensor | None = None  # ``[E]``, over all ranks of the stage; None: ``sequence`` says it
    work: tuple[dist.Work, ...] = ()  # to wait for before either is read
    seen: "_Totals | None" = None  # with totals, what they were after this call
    at_end: Callable[[], object] | None = None  # called when the step ends, if it belongs to it

    @property
    def is_in_step(self) -> bool:
        """Whether it is written, and not of a checkpoint that went without a backward pass."""
        if self.local is None:
            return False
        is_recorded = self.is_run_again or not self.owners
        return is_recorded or any(owner() is not None for owner in self.owners)

    def wait(self) -> None:
        """Wait for ``sequence`` and ``batch``."""
        for work in self.work:
            work.wait()
        self.work = ()


class _Totals(NamedTuple):
    """Sums over the calls of a step, int64 on the device."""

    local: Tensor  # ``[E]``: this rank's counts
    batch: Tensor  # ``[E]``: those over all ranks of the stage
    squares: Tensor  # ``[E]``: of the latter
    calls: Tensor  # scalar: their number

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


class LayerCounts:
    """The calls of one layer in a step, each named by its number."""

    def __init__(
        self,
        exchange: "CountExchange",
        calls_per_microbatch: int,
        previous: Callable[[], Tensor] | None,
    ) -> None:
        """See :meth:`CountExchange.register`."""
        self._exchange = exchange
        self._calls_per_microbatch = calls_per_microbatch
        self._previous = previous
        self.first_passes = weakref.WeakKeyDictionary[FunctionCtx, deque[int]]()
        self.calls: list[_Call] = []
        self.last_calls: list[_Call] = []  # of the last whole step
        self.totals: _Totals | None = None  # in graphs of single layers, from the first call on

    def enter(self, role: Role) -> tuple[int, bool]:
        """Begin a forward pass of the layer in training, of any role but UNRECORDED.

        Gives the number of the call, which a repeated pass does not need, and whether its counts
        are to be written.
        """
        if role is Role.REPEATED:
            return -1, False
        again = checkpoint_run_again()
        first = None if again is None else self.first_passes.get(again)
        if first:
            number = first[0]
            first.rotate(-1)
            self.calls[number].is_run_again = True
        else:
            number = len(self.calls)
            self.calls.append(_Call())
        if role is Role.FIRST_PASS:
            for checkpoint in checkpoints_of_first_pass():
                self.calls[number].owners.append(weakref.ref(checkpoint))
                self.first_passes.setdefault(checkpoint, deque()).append(number)
        return number, not first

    def write(self, call: int, counts: Tensor, over_batch: bool) -> None:
        """Hand over this rank's counts of a call, int64 ``[b, E]`` or ``[1, E]``.

        ``over_batch`` says whether :meth:`of_batch` will be asked for.
        """
        entry = self.calls[call]
        entry.local, entry.over_batch = counts, over_batch
        self._exchange.send(self, entry)
        if self._exchange.has_layer_graphs:
            self._add_to_totals(call)

    @torch.no_grad()
    def _add_to_totals(self, call: int) -> None:
        entry = self._arrived(call)
        assert entry.local is not None
        local = entry.local.sum(0)
        new = _Totals.of([local], [self.of_batch(call) if entry.over_batch else local])
        if self.totals is None:
            self.totals = _Totals(*map(torch.zeros_like, new))
        for total, more in zip(self.totals, new, strict=True):
            total += more
        entry.seen = _Totals(*(total.clone() for total in self.totals))

    def at_end(self, call: int, function: Callable[[], object]) -> None:
        """Call a function when the step ends, if the call belongs to it: in each replay too."""
        self.calls[call].at_end = function

    def of_sequences(self, call: int) -> Tensor:
        """The counts of a call over the ranks that share its sequences, ``[b, E]``."""
        entry = self._arrived(call)
        assert entry.sequence is not None
        return entry.sequence

    def of_batch(self, call: int) -> Tensor:
        """The counts of a call over all ranks of the stage, ``[E]``."""
        entry = self._arrived(call)
        return self.of_sequences(call).sum(0) if entry.batch is None else entry.batch

    def of_seen(self, up_to: int | None = None) -> tuple[Tensor, Tensor]:
        """The sum of the step's calls so far, up to one of them, and their number, a scalar.

        The sum is over all ranks of the stage, fp64 ``[E]``.
        """
        totals = self.totals if up_to is None else self.calls[up_to].seen
        if totals is None:
            totals = self._sum(up_to)
        return totals.batch.double(), totals.calls

    def _sum(self, up_to: int | None = None) -> _Totals:
        local, batch = [], []
        for number in self.seen():
            call = self.calls[number]
            if call.local is not None and (up_to is None or number <= up_to):
                local.append(call.local.sum(0))
                batch.append(self.of_batch(number) if call.over_batch else local[-1])
        return _Totals.of(local, batch)

    def seen(self) -> list[int]:
        """The calls of this step whose counts are written."""
        return [number for number, call in enumerate(self.calls) if call.is_in_step]

    def calls_in_step(self) -> int:
        """How many calls this step will have; 0 where nobody knows."""
        try:
            return get_num_microbatches() * self._calls_per_microbatch
        except AttributeError:  # Megatron's calculator is not set up
            return 0

    def sum_up(self) -> Tensor | None:
        """Counts of the step on this rank, int64 ``[E]``; None if the layer was not called."""
        seen = self.seen()
        for call in seen:
            if (function := self.calls[call].at_end) is not None:
                function()
        totals = self._sum() if self.totals is None and seen else self.totals
        if totals is None:
            return None
        if self._previous is not None:
            kept = self._previous()
            kept.copy_(torch.where(totals.calls > 0, totals.mean_and_variance(), kept))
        return totals.local

    def wait(self) -> None:
        """Wait for the counts of all calls."""
        for call in self.calls:
            call.wait()

    def _arrived(self, call: int) -> _Call:
        entry = self.calls[call]
        if entry.sequence is None:
            self._exchange.launch()
        entry.wait()
        return entry


class CountExchange:
    """The calls of all layers on this rank; one object a model, see ``step/step_end.py``.

    Attributes:
        last_step: int64 ``[layers, E]``, this rank's counts of the last whole step, over its calls.
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
                nobody asks for :meth:`LayerCounts.of_sequences`.
            batch_group: all ranks of the pipeline stage.
            has_layer_graphs: whether single layers are in CUDA graphs.
        """
        self.has_layer_graphs = has_layer_graphs
        self._sequence_group, self.batch_group = sequence_group, batch_group
        self._same_ranks = sequence_group and sequence_group.size() == batch_group.size()
        self.layers: list[LayerCounts] = []
        self._pending: list[tuple[LayerCounts, _Call]] = []
        self._last_layers: set[LayerCounts] = set()
        self.last_step: Tensor | None = None

    def register(
        self, calls_per_microbatch: int = 1, previous: Callable[[], Tensor] | None = None
    ) -> LayerCounts:
        """The counts of one more layer.

        Args:
            calls_per_microbatch: how often one microbatch passes it, 1 but for MTP.
            previous: gives a buffer ``[2, E]``, filled at the end of each step with mean and
                variance of its calls, for which all calls are written with ``over_batch``.
        """
        self.layers.append(LayerCounts(self, calls_per_microbatch, previous))
        return self.layers[-1]

    def send(self, layer: LayerCounts, call: _Call) -> None:
        """Add written counts to what waits, and launch when the stage is through."""
        if any(waiting is layer for waiting, _ in self._pending):
            self.launch()  # the stage begins again: what waits is a whole microbatch
        self._pending.append((layer, call))
        if self.has_layer_graphs or layer in self._last_layers:
            self.launch()

    def launch(self) -> None:
        """Start the all-reduce of everything that waits; remember which layer came last."""
        self._last_layers.add(self._pending[-1][0])
        calls = [call for _, call in self._pending]
        self._pending = []
        local = torch.stack([call.local for call in calls if call.local is not None])
        batch, work = None, []
        if any(call.over_batch for call in calls) and not self._same_ranks:
            batch = local.sum(1)
            work += _all_reduce(batch, self.batch_group)
        if self._sequence_group is not None:
            work += _all_reduce(local, self._sequence_group)
        for index, call in enumerate(calls):
            call.sequence, call.work = local[index], tuple(work)
            call.batch = None if batch is None else batch[index]

    def begin_step(self) -> None:
        """Clear the totals, and drop the calls of captures: their graphs are whole by now."""
        if self.has_layer_graphs:
            for layer in self.layers:
                layer.calls = []
                for total in layer.totals or ():
                    total.zero_()

    @torch.no_grad()
    def end_step(self, is_replayed: bool = False) -> None:
        """Sum up the step and begin the next. Nothing is read; a second call does nothing.

        A replay of a CUDA graph has filled the tensors of the last step's calls again.
        """
        if is_replayed:
            for layer in self.layers:
                layer.calls = layer.last_calls
        if any(layer.totals or layer.seen() for layer in self.layers):
            for layer in self.layers:
                layer.wait()
            sums = [layer.sum_up() for layer in self.layers]
            some = next(each for each in sums if each is not None)
            self.last_step = torch.stack([torch.zeros_like(some) if e is None else e for e in sums])
            for layer in self.layers:
                layer.last_calls = layer.calls
        for layer in self.layers:
            layer.calls = []
            layer.first_passes.clear()
        self._pending = []

    def join(self) -> None:
        """Inside a CUDA graph, start what has not begun and wait for all: nothing may stay open."""
        if self._pending:
            self.launch()
        for layer in self.layers:
            layer.wait()


def _all_reduce(counts: Tensor, group: dist.ProcessGroup) -> list[dist.Work]:
    if group.size() == 1:
        return []
    work = dist.all_reduce(counts, group=group, async_op=True)
    assert work is not None
    return [work]
