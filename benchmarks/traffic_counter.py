"""Counts what one layer moves, operator by operator, on fake tensors and a pretended group.

An operator reads its tensors once and writes its results once; views are free. What fake tensors
cannot run is in :func:`kernels`, each with its formula: Triton's kernels, memory of peers, the
planner, and sends between two ranks. Rows that a plan decides are those of a mean rank, by
:class:`Facts`.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.dispatch.transports.peer_memory import PeerMemory, PeerRows
from megatron_echo.dispatch.transports.weights import PeerToPeerWeights
from megatron_echo.memory.live_bytes import nothing_sent
from megatron_echo.planner import ClonePlan

_NO_WORK = {"empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "detach_"}
_FILLS = {"zero_", "fill_", "copy_", "zeros", "ones", "full", "new_zeros", "zeros_like", "arange"}
_GATHERS = {"index_select", "gather", "index", "embedding"}
_SCATTERS = {"index_copy_", "scatter_", "index_add_", "scatter_add_", "index_put_"}
_ON_GPU = (
    "dispatch.permute",
    "dispatch.transports.weights",
    "experts.activation",
    "experts.fp8",
    "experts.grouped_linear",
)
_COPIES_SENT = {
    "_allgather_base_": lambda given, got, ranks: given * (ranks - 1),
    "_reduce_scatter_base_": lambda given, got, ranks: given * (ranks - 1) // ranks,
    "alltoall_base_": lambda given, got, ranks: given * (ranks - 1) // ranks,
    "allreduce_": lambda given, got, ranks: 2 * given * (ranks - 1) // ranks,
}
"""Bytes that one rank sends to others, of the bytes that it gives to a collective."""


@dataclass
class Count:
    """What a layer moved on one rank.

    Attributes:
        link: bytes sent to other ranks.
        between: of them, those to ranks of other nodes.
        memory: bytes read and written in device memory, grouped products left out.
        operators: kernels launched; a collective or barrier is not one.
        collectives: collectives, barriers and batches of sends.
        host_reads: times that the host waited for a value.
    """

    link: float = 0
    between: float = 0
    memory: float = 0
    operators: int = 0
    collectives: int = 0
    host_reads: int = 0


@dataclass(frozen=True)
class Facts:
    """What a real plan says of a mean rank, for what fake tensors do not know.

    Attributes:
        ranks: R.
        pairs: token-expert pairs that a rank computes, and sends in all.
        away: of them, those that go to other ranks.
        leads: of its tokens, each once for each rank that computes it.
        visits: of them, those on other ranks.
        clones: slots in use on a rank.
        slot_expert: of the plan, ``[R, S]``.
        node: ranks of a node.
        far_away: of ``away``, those that go to other nodes.
        far_visits: of ``visits``, those there.
        node_visits: its tokens, each once for each other node.
        forwarded: of ``far_visits``, those beside the rank of this one's number in the node.
        forwarded_pairs: likewise of ``far_away``.
        far_clones: of ``clones``, those whose home is on another node.
    """

    ranks: int
    pairs: int
    away: float
    leads: float
    visits: float
    clones: float
    slot_expert: list[list[int]] = field(default_factory=list)
    node: int = 8
    far_away: float = 0
    far_visits: float = 0
    node_visits: float = 0
    forwarded: float = 0
    far_clones: float = 0
    forwarded_pairs: float = 0

    def moved(self, places: Tensor) -> tuple[float, float, float]:
        """Rows that peers' places ``[T, C]`` name, those of other ranks, and of other nodes.

        Tokens have several places, pairs one.
        """
        if places.shape[1] == 1:
            return self.pairs, self.away, self.far_away
        return self.leads, self.visits, self.far_visits


def _nbytes(tensor: Tensor) -> int:
    """What an operator reads of it: an expanded tensor's storage, not its size."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Counter(TorchDispatchMode):
    """Counts the operators within the block; the outer mode around fake tensors.

    Attributes:
        count: so far.
        facts: of the plan in use.
    """

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.count, self.facts = Count(), facts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d":
            self._collective(func, name, args)
            return nothing_sent(func, args)
        if name in ("_local_scalar_dense", "item"):
            self.count.host_reads += 1
            return self.facts.pairs
        if name == "masked_select":  # its size is the host's to know
            self.count.host_reads += 1
            result = args[0].new_empty(self.facts.pairs)
        else:
            result = func(*args, **kwargs)
        self._operator(func, name, args, kwargs, result)
        return result

    def reset(self) -> None:
        """Begin at zero again."""
        self.count = Count()

    def _operator(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given, made = _tensors((args, kwargs)), _tensors(result)
        known = {tensor.untyped_storage()._cdata for tensor in given}
        is_view = all(tensor.untyped_storage()._cdata in known for tensor in made)
        if name in _NO_WORK or not made or (is_view and not func._schema.is_mutable):
            return
        self.count.operators += 1
        if name in ("_grouped_mm", "grouped_outer"):
            return
        self.count.memory += self._moved(name, given, made)

    def _moved(self, name: str, given: list[Tensor], made: list[Tensor]) -> int:
        written = sum(_nbytes(tensor) for tensor in made)
        if name in _FILLS:
            return written + sum(_nbytes(tensor) for tensor in given[1:])
        if name in _GATHERS:
            return 2 * written + sum(_nbytes(tensor) for tensor in given[1:])
        if name in _SCATTERS:
            adds = 3 if "add" in name else 2
            values = _nbytes(given[-1])
            return adds * values + sum(_nbytes(tensor) for tensor in given[1:-1])
        return written + sum(_nbytes(tensor) for tensor in given)

    def _collective(self, func: Any, name: str, args: tuple) -> None:
        self.count.collectives += 1
        names = [argument.name for argument in func._schema.arguments]
        ranks = dist.ProcessGroup.unbox(args[names.index("process_group")]).size()
        if name == "allreduce_":
            given = got = sum(_nbytes(tensor) for tensor in _tensors(args[0]))
        else:
            got = sum(_nbytes(tensor) for tensor in _tensors(args[0]))
            given = sum(_nbytes(tensor) for tensor in _tensors(args[1]))
        if "process_group" not in names or name not in _COPIES_SENT:
            raise ValueError(f"The collective {name} has no formula. Add it to _COPIES_SENT.")
        sent = _COPIES_SENT[name](given, got, ranks)
        self.sent(sent, sent * max(ranks - self.facts.node, 0) / (ranks - 1))
        self.count.memory += given + got

    def sent(self, link: float, between: float) -> None:
        """Count bytes sent to other ranks, and of them those to other nodes."""
        self.count.link += link
        self.count.between += between

    def kernel(self, memory: float, link: float = 0, between: float = 0) -> None:
        """Count one launch of a kernel that fake tensors cannot run."""
        self.count.operators += 1
        self.count.memory += memory
        self.sent(link, between)


class _CountedMemory(PeerMemory):
    """Of peers that are not there: barriers are counted."""

    def __init__(self, counter: Counter, group: dist.ProcessGroup) -> None:
        self._counter, self._ranks = counter, group.size()

    def allocate(self, rows: int, columns: int, dtype: torch.dtype) -> PeerRows:
        own = torch.empty(rows, columns, dtype=dtype)
        return PeerRows(own, None, torch.empty(self._ranks, dtype=torch.int64))

    def barrier(self, lane: int = 0) -> None:
        self._counter.count.collectives += 1


@contextlib.contextmanager
def kernels(counter: Counter) -> Iterator[None]:
    """Put the formulas in place of what fake tensors cannot run, and let the layer take them."""
    from traffic_engines import HybridEP, NcclEP

    package, nccl_ep = "megatron_echo", NcclEP(counter)
    on_gpu = [f"{package}.{name}.on_gpu" for name in _ON_GPU]
    replaced: dict[str, Any] = {
        **dict.fromkeys(on_gpu, lambda _: True),
        f"{package}.dispatch.dispatcher.planner_backend": lambda _: _planner(counter),
        f"{package}.host_copy.HostCopy.read": _host_read(counter),
        f"{package}.experts.grouped_linear._is_cast_first": lambda _: False,
        f"{package}.experts.grouped_linear._takes_grouped_mm": lambda *_: True,
        f"{package}.experts.grouped_linear.grouped_outer": _outer(counter),
        f"{package}.experts.kernels.product": _product(counter),
        f"{package}.dispatch.transports.peer_buffers.peer_memory": lambda group: _CountedMemory(
            counter, group
        ),
        f"{package}.flag_checks.find_hybrid_ep": lambda: True,
        f"{package}.flag_checks.find_nccl_ep": lambda: True,
        f"{package}.dispatch.transports.hybrid_ep.find_hybrid_ep": lambda: partial(
            HybridEP, counter
        ),
        f"{package}.dispatch.transports.nccl_ep.find_nccl_ep": lambda: nccl_ep,
        **_row_kernels(counter),
        **_activation_kernels(counter),
        **_fp8_kernels(counter),
        **_peer_kernels(counter),
    }
    with contextlib.ExitStack() as stack:
        for target, value in replaced.items():
            stack.enter_context(mock.patch(target, value))
        for name in ("push", "bring_home"):
            send = _sends(counter, name)
            stack.enter_context(mock.patch.object(PeerToPeerWeights, name, send))
        yield


def _planner(counter: Counter) -> Callable[..., ClonePlan]:
    """One launch, which reads the counts and writes the plan."""

    def plan(counts: Tensor, num_slots: int, *_: Any) -> ClonePlan:
        ranks, experts = counts.shape
        allocation = counts.new_empty(experts, ranks)
        slots, load = counts.new_empty(ranks, num_slots), counts.new_empty(ranks)
        counter.kernel(_nbytes(counts) + _nbytes(allocation) + _nbytes(slots))
        return ClonePlan(counts, slots, allocation, load, load, counts.new_empty(()))

    return plan


def _host_read(counter: Counter) -> Callable[[Any], list]:
    def read(_: Any) -> list:
        counter.count.host_reads += 1
        return counter.facts.slot_expert

    return read


def _outer(counter: Counter) -> Callable[..., Tensor]:
    """A grouped product: one operator, its bytes left out."""

    def outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
        counter.kernel(0)
        return left.new_empty(len(ends), left.shape[1], right.shape[1])

    return outer


def _product(counter: Counter) -> Callable[..., Tensor]:
    def product(rows: Tensor, home: Tensor, *_: Any, clones_into: Tensor) -> Tensor:
        counter.kernel(0)
        return clones_into

    return product


def _row_kernels(counter: Counter) -> dict[str, Any]:
    """``dispatch/kernels.py``: an index is read, and rows in use are read and written."""

    def take_rows(source: Tensor, index: Tensor, used: Tensor | None = None) -> Tensor:
        output = source.new_empty(len(index), source.shape[1])
        row = source.shape[1] * source.itemsize
        read = min(len(index), counter.facts.pairs)
        written = len(index) if used is None else read
        counter.kernel((read + written) * row + index.itemsize * written)
        return output

    def sum_rows(source: Tensor, index: Tensor, output: Tensor) -> Tensor:
        read = min(index.numel(), counter.facts.pairs) * source.shape[1] * source.itemsize
        counter.kernel(read + _nbytes(output) + _nbytes(index))
        return output

    place = "megatron_echo.dispatch.kernels."
    return {f"{place}take_rows": take_rows, f"{place}sum_rows": sum_rows}


def _activation_kernels(counter: Counter) -> dict[str, Any]:
    """``experts/activation_kernels.py``: rows in use, read once and written once."""

    def moved(*tensors: Tensor) -> float:
        return sum(counter.facts.pairs * math.prod(t.shape[1:]) * t.itemsize for t in tensors)

    def forward(hidden: Tensor, probs: Tensor, ends: Tensor, settings: dict) -> Tensor:
        width = hidden.shape[1] // (2 if settings["IS_GATED"] else 1)
        output = hidden.new_empty(len(hidden), width)
        counter.kernel(moved(hidden, probs, output))
        return output

    def packed(hidden: Tensor, probs: Tensor, ends: Tensor, values: Tensor, *_: Any) -> None:
        counter.kernel(moved(hidden, probs, values))

    def backward(
        hidden: Tensor, probs: Tensor, ends: Tensor, grad: Tensor, settings: dict
    ) -> tuple[Tensor, Tensor]:
        result = torch.empty_like(hidden), torch.empty_like(probs)
        counter.kernel(moved(hidden, probs, grad, *result))
        return result

    place = "megatron_echo.experts.activation_kernels."
    both = {f"{place}forward": forward, f"{place}backward": backward}
    return both | {f"{place}packed": packed}


def _fp8_kernels(counter: Counter) -> dict[str, Any]:
    """``experts/fp8_kernels.py``, rows in use read and written once; and torch's products."""

    def quantised(source: Tensor, is_bounded: bool) -> None:
        elements = source.numel()
        if is_bounded:
            elements = min(len(source), counter.facts.pairs) * source[0].numel()
        counter.kernel(elements * (source.itemsize + 1))

    def rows(source: Tensor, used: Tensor | None, values: Tensor, scales: Tensor) -> None:
        quantised(source, used is not None)

    def columns(source: Tensor, *_: Tensor, is_stack: bool, row_scales: Any = None) -> None:
        quantised(source, not is_stack)

    def product(rows: Any, weights: Any, ends: Tensor, dtype: torch.dtype) -> Tensor:
        counter.kernel(0)
        shape = len(rows.values), weights.values.shape[1]
        return rows.values.new_empty(shape, dtype=dtype)

    def outer(left: Any, right: Any, ends: Tensor, dtype: torch.dtype) -> Tensor:
        counter.kernel(0)
        shape = len(ends), len(left.values), len(right.values)
        return left.values.new_empty(shape, dtype=dtype)

    place = "megatron_echo.experts.fp8"
    return {
        f"{place}_kernels.rows": rows,
        f"{place}_kernels.columns": columns,
        f"{place}_linear.scaled_product": product,
        f"{place}_linear.scaled_outer": outer,
    }


def _peer_kernels(counter: Counter) -> dict[str, Any]:
    """``transports/kernels.py``: what is named is written, or read, once; links carry the rest."""

    def put_rows(own: Tensor, offsets: Tensor, values: Tensor, places: Tensor) -> None:
        row = values.shape[1] * values.itemsize
        rows, away, far = counter.facts.moved(places)
        counter.kernel(_nbytes(values) + _nbytes(places) + rows * row, away * row, far * row)

    def pull_rows(
        own: Tensor, offsets: Tensor, places: Tensor, into: Tensor | None = None
    ) -> Tensor:
        output = into
        if output is None:
            output = own.new_empty(len(places), own.shape[1], dtype=wide_dtype(own.dtype))
        row = own.shape[1] * own.itemsize
        rows, away, far = counter.facts.moved(places)
        counter.kernel(_nbytes(output) + _nbytes(places) + rows * row, away * row, far * row)
        return output

    def put_matrices(own: Tensor, offsets: Tensor, matrices: Tensor, source: Tensor) -> None:
        moved = counter.facts.clones * _nbytes(matrices[0])
        sent = len(offsets) > 1  # else it is an offer
        far = counter.facts.far_clones * _nbytes(matrices[0])
        counter.kernel(2 * moved + _nbytes(source), sent * moved, sent * far)

    def add_matrices(
        own: Tensor, offsets: Tensor, places: Tensor, slots: int, home: Tensor
    ) -> None:
        elements, clones = home[0].numel(), counter.facts.clones
        read = clones * elements * own.itemsize
        homes = clones * elements * home.itemsize  # at most: an expert may have several clones
        sent = len(offsets) > 1
        far = counter.facts.far_clones * elements * own.itemsize
        counter.kernel(read + 2 * homes + _nbytes(places), sent * read, sent * far)

    place = "megatron_echo.dispatch.transports."
    return {
        f"{place}kernels.put_rows": put_rows,
        f"{place}kernels.pull_rows": pull_rows,
        f"{place}kernels.put_matrices": put_matrices,
        f"{place}kernels.add_matrices": add_matrices,
    }


def _sends(counter: Counter, name: str) -> Callable[..., Any]:
    """``PeerToPeerWeights``: a clone's matrix is read here and written there, in S batches."""

    def count(matrix: Tensor, reads: int) -> None:
        facts = counter.facts
        counter.count.host_reads += 1
        columns = zip(*facts.slot_expert, strict=True)
        counter.count.collectives += sum(max(column) >= 0 for column in columns)
        nbytes = facts.clones * _nbytes(matrix)
        counter.sent(nbytes, facts.far_clones * _nbytes(matrix))
        counter.count.memory += reads * nbytes

    def push(self: Any, weight: Tensor, slot_expert: Tensor, announced: Any, slots: Tensor) -> None:
        count(weight[0], 2)

    def bring_home(self: Any, grads: Tensor, slot_expert: Tensor, announced: Any) -> Tensor:
        count(grads[0], 5)  # sent, received, added
        counter.count.operators += math.ceil(counter.facts.clones)
        return grads[: self._per_rank]

    return push if name == "push" else bring_home
