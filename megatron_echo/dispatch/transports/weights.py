"""How the weights of clones reach their slots, and how gradients return.

``collective`` exchanges one expert for each pair of ranks and slot, whatever the plan: static, and
R times the bytes that one slot of each rank holds. ``p2p`` sends only the slots in use, and for
that the host must know the plan: one asynchronous copy of it for each layer call.
``symmetric_memory`` sends only those too, and the host knows nothing: homes write into the slots of
their peers, and read the gradients that lie there.

The ranks of a group exchange: all expert-parallel ones, or those of a node where clones stay inside
it. Experts and ranks are numbered from the first of the group; :meth:`WeightTransport.slots`
makes them so.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, override

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.collectives import exchange
from megatron_echo.copy_lanes import Backend, Errand
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.dispatch.transports.peer_buffers import PeerBuffers
from megatron_echo.environment import on_gpu
from megatron_echo.host_copy import HostCopy

_EXCHANGED_BYTES = 1 << 30
"""Of weights that travel at once; or one slot of each rank, where that is more."""


class WeightTransport(ABC):
    """Moves experts between the ranks of a group; keeps no state of a call.

    Ranks call the methods together and in the same order.

    Attributes:
        is_hidden: whether movements may run beside compute, and begin before they are needed.
            Collectives may not: those of two groups could begin in another order on each rank.
        backend: where movements run, by :meth:`run`.
    """

    is_hidden = False
    backend = Backend()

    def run(self, movement: Callable[[], Any], unread: int) -> Errand:
        """Launch a movement, or several, beside compute where that may be.

        Args:
            movement: calls the methods below.
            unread: earlier pushes whose products compute was not given yet.
        """
        return Errand(self.backend, movement)

    def __init__(self, group: dist.ProcessGroup, experts_per_rank: int) -> None:
        """Set the sizes.

        Args:
            group: R ranks, among which clones are made.
            experts_per_rank: m; expert e lives on rank ``e // m``.
        """
        self._group, self._rank, self._per_rank = group, group.rank(), experts_per_rank

    def slots(self, slot_expert: Tensor, rank: int) -> Tensor:
        """The slots of the group's ranks, experts numbered from the first of these.

        Args:
            slot_expert: int64, the expert in each slot of more ranks, those of the group in a row,
                -1 if unused. No home of these is elsewhere.
            rank: this one's number there.

        Returns:
            int64 ``[R, S]``, what the other methods take.
        """
        if len(slot_expert) == self._group.size():
            return slot_expert
        first = rank - self._rank
        slots = slot_expert[first : first + self._group.size()]
        return (slots - first * self._per_rank).clamp_(min=-1)

    def announce(self, slot_expert: Tensor) -> Any:
        """Begin what a plan needs before its weights travel; once for a call of a layer.

        Args:
            slot_expert: int64 ``[R, S]``, the expert in each slot, -1 if unused.

        Returns:
            What the other methods take as ``announced``.
        """
        return None

    def push_in_place(self, weight: Tensor, slot_expert: Tensor, announced: Any) -> Tensor | None:
        """As :meth:`push`, into slots of the transport's own; None where it has none.

        Returns:
            ``[S, out, in]``, good until the next movement.
        """
        return None

    @abstractmethod
    def push(self, weight: Tensor, slot_expert: Tensor, announced: Any, slots: Tensor) -> None:
        """Fill this rank's slots. Those without an expert hold anything afterwards.

        Args:
            weight: ``[m, out, in]``, this rank's experts.
            slot_expert: int64 ``[R, S]``.
            announced: what :meth:`announce` gave for it.
            slots: ``[S, out, in]``, written.
        """

    @abstractmethod
    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: Any) -> Tensor:
        """Add the gradients of clones to those of their home experts.

        The order is fixed; experts without clones keep their bits.

        Args:
            grads: ``[m + S, out, in]`` of this rank's experts and slots, contiguous; used up. Sums
                are in the wide dtype, and rounded once where these are narrower.
            slot_expert: int64 ``[R, S]``.
            announced: what :meth:`announce` gave for it.

        Returns:
            ``[m, out, in]``, in the same memory.
        """

    @abstractmethod
    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        """Bytes that all ranks together send to others in one :meth:`push`; reads the plan."""


class CollectiveWeights(WeightTransport):
    """Exchanges of one expert for each pair of ranks and slot, some slots at a time.

    Gradients are added in the order of slots, then ranks.
    """

    def push(self, weight: Tensor, slot_expert: Tensor, announced: Any, slots: Tensor) -> None:
        """See :class:`WeightTransport`; an unused slot gets some expert's weights."""
        wanted = slot_expert - self._rank * self._per_rank
        wanted = wanted.clamp_(0, self._per_rank - 1)
        homes = (slot_expert[self._rank] // self._per_rank).clamp_(min=0)
        for some in self._parts(slots):
            sent = weight.index_select(0, wanted[:, some].flatten())
            received = exchange(sent, self._group).unflatten(0, (self._group.size(), -1))
            number = torch.arange(received.shape[1], device=sent.device)
            slots[some] = received[homes[some], number]

    @override
    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: Any) -> Tensor:
        ranks, experts = self._group.size(), self._per_rank
        target = slot_expert - self._rank * experts
        is_here = (target >= 0) & (target < experts)
        for some in self._parts(grads[experts:]):
            parts = grads[experts:][some]
            sent = parts.expand(ranks, *parts.shape).flatten(0, 1)
            received = exchange(sent, self._group)
            targets = target.masked_fill(~is_here, experts)[:, some]
            _add_in_order(grads, experts, received, targets)
        return grads[:experts]

    def _parts(self, slots: Tensor) -> list[slice]:
        """Slots that travel at once, all of them or as many as fill ``_EXCHANGED_BYTES``."""
        number = max(1, _EXCHANGED_BYTES // (self._group.size() * slots[0].nbytes))
        return [slice(first, first + number) for first in range(0, len(slots), number)]

    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        """See :class:`WeightTransport`; the same for every plan."""
        ranks, slots = slot_expert.shape
        return ranks * (ranks - 1) * slots * expert_bytes


class PeerToPeerWeights(WeightTransport):
    """Sends between the home and the clone only, straight into the slots; adds as the collectives.

    Attributes:
        host_copies: plans that were copied to the host so far.
    """

    def __init__(self, group: dist.ProcessGroup, experts_per_rank: int) -> None:
        super().__init__(group, experts_per_rank)
        self.host_copies = 0

    @override
    def announce(self, slot_expert: Tensor) -> HostCopy:
        self.host_copies += 1
        return HostCopy(slot_expert)

    def push(self, weight: Tensor, slot_expert: Tensor, announced: Any, slots: Tensor) -> None:
        """See :class:`WeightTransport`; an unused slot is not written."""
        weight = weight.detach()
        transfers = []
        for slot, experts in enumerate(zip(*announced.read(), strict=True)):
            for rank, expert in enumerate(experts):
                home, index = divmod(expert, self._per_rank)
                if expert >= 0 and home == self._rank:
                    transfers.append(self._transfer(dist.isend, weight[index], rank))
                elif expert >= 0 and rank == self._rank:
                    transfers.append(self._transfer(dist.irecv, slots[slot], home))
        _complete(transfers)

    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: Any) -> Tensor:
        """See :class:`WeightTransport`; a slot at a time, so that at most R experts arrive."""
        totals: dict[int, Tensor] = {}
        for slot, experts in enumerate(zip(*announced.read(), strict=True)):
            transfers, arrivals = [], []
            for rank, expert in enumerate(experts):
                home, index = divmod(expert, self._per_rank)
                if expert >= 0 and home == self._rank:
                    arrivals.append((index, torch.empty_like(grads[0])))
                    transfers.append(self._transfer(dist.irecv, arrivals[-1][1], rank))
                elif expert >= 0 and rank == self._rank:
                    part = grads[self._per_rank + slot]
                    transfers.append(self._transfer(dist.isend, part, home))
            _complete(transfers)
            for index, part in arrivals:
                if index not in totals:
                    totals[index] = grads[index].to(wide_dtype(grads.dtype))
                totals[index] += part
        for index, total in totals.items():
            grads[index] = total
        return grads[: self._per_rank]

    @override
    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        return int((slot_expert >= 0).sum()) * expert_bytes

    def _transfer(self, operation: Any, tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self._group, group_peer=peer)


@dataclass(frozen=True)
class _Places:
    """What a plan says to one rank, int32.

    Attributes:
        source: ``[R, S]``, which expert of this rank goes to each slot, -1 for none.
        used: ``[S]``, each slot's own number, -1 where it is unused.
        clones: ``[m, R]``, ``rank * S + slot`` of the clones of each of its experts, -1 for none.
    """

    source: Tensor
    used: Tensor
    clones: Tensor


class SymmetricMemoryWeights(WeightTransport):
    """Homes push experts into slots, and add the gradients of their clones, rank after rank.

    A rank has one clone of an expert at most, as the planner makes them. Only slots in use are
    written or laid open, and only homes that have clones are touched.
    """

    def __init__(self, buffers: PeerBuffers, experts_per_rank: int, is_hidden: bool = True) -> None:
        """Set the sizes.

        Args:
            buffers: the model's, of the ranks among which clones are made.
            experts_per_rank: m.
            is_hidden: movements go beside compute; False where a schedule fills that time already.
        """
        super().__init__(buffers.group, experts_per_rank)
        self._buffers, self.is_hidden = buffers, is_hidden
        self.backend = buffers.backend if is_hidden else Backend()

    @override
    def run(self, movement: Callable[[], Any], unread: int) -> Errand:
        self._buffers.unread = unread
        return super().run(movement, unread)

    @override
    def announce(self, slot_expert: Tensor) -> _Places:
        ranks, slots = slot_expert.shape
        index = slot_expert - self._rank * self._per_rank
        index.masked_fill_((index < 0) | (index >= self._per_rank), -1)
        slot = torch.arange(slots, device=index.device)
        number = torch.arange(ranks * slots, device=index.device).view(ranks, slots)
        clones = index.new_full((ranks, self._per_rank + 1), -1)
        clones.scatter_(1, index.remainder(self._per_rank + 1), number)  # -1 becomes the last
        return _Places(
            source=index.int(),
            used=slot.masked_fill_(slot_expert[self._rank] < 0, -1).int(),
            clones=clones[:, :-1].t().int().contiguous(),
        )

    @override
    def push_in_place(self, weight: Tensor, slot_expert: Tensor, announced: _Places) -> Tensor:
        return self._buffers.push_matrices("weights", weight.detach(), announced.source)

    @override
    def push(self, weight: Tensor, slot_expert: Tensor, announced: Any, slots: Tensor) -> None:
        slots.copy_(self.push_in_place(weight, slot_expert, announced))

    @override
    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: _Places) -> Tensor:
        home, parts = grads[: self._per_rank], grads[self._per_rank :]
        places = announced.used, announced.clones
        self._buffers.add_matrices("gradients", parts, *places, home)
        return home

    @override
    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        return int((slot_expert >= 0).sum()) * expert_bytes


def _add_in_order(grads: Tensor, experts: int, received: Tensor, targets: Tensor) -> None:
    """Add matrices to those of home experts: slot after slot, and in each rank after rank.

    Args:
        grads: ``[m + S, out, in]``, contiguous; the matrix behind the home experts is overwritten.
        experts: m.
        received: ``[R * n, out, in]``, n slots of each rank.
        targets: int64 ``[R, n]``, the home expert of each, m for none.
    """
    ranks, slots = targets.shape
    if not on_gpu(grads):
        for slot, of_slot in enumerate(targets.unbind(1)):
            grads[: experts + 1].index_add_(0, of_slot, received[slot::slots].to(grads.dtype))
        return
    from megatron_echo.dispatch.transports import kernels

    # Clones of an expert are on different ranks: R columns, sorted.
    order = torch.arange(slots, device=targets.device) * ranks
    order = order + torch.arange(ranks, device=targets.device)[:, None]
    nothing = ranks * slots
    columns = order.new_full((ranks, experts + 1), nothing).scatter_(1, targets, order)
    columns = columns[:, :-1].t().sort(1).values
    places = columns % ranks * slots + columns // ranks
    places = places.masked_fill_(columns == nothing, -1).int()
    here = torch.zeros(1, dtype=torch.int64, device=grads.device)
    kernels.add_matrices(received, here, places, nothing, grads[:experts])


def _complete(transfers: list[dist.P2POp]) -> None:
    """Run all transfers; on CUDA the stream waits, not the host."""
    if transfers:
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
