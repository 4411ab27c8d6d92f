"""How the weights of clones reach their slots, and how gradients return.

``collective`` exchanges one expert for each pair of ranks and slot, whatever the plan: static, and
R times the bytes that one slot of each rank holds. ``p2p`` sends only the slots in use, and for
that the host must know the plan: one asynchronous copy of it for each layer call.
``symmetric_memory`` sends only those too, and the host knows nothing: each rank reads what it wants
where its peers lay it open.
"""

from abc import ABC, abstractmethod
from typing import Any, override

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.collectives import exchange
from megatron_echo.dispatch.transports.peer_buffers import PeerBuffers
from megatron_echo.host_copy import HostCopy


class WeightTransport(ABC):
    """Moves experts between the ranks of a group; keeps no state of a call.

    Ranks call the methods together and in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, experts_per_rank: int) -> None:
        """Set the sizes.

        Args:
            group: the expert-parallel group, R ranks.
            experts_per_rank: m; expert e lives on rank ``e // m``.
        """
        self._group, self._rank, self._experts = group, group.rank(), experts_per_rank

    def announce(self, slot_expert: Tensor) -> HostCopy | None:
        """Begin what a plan needs before its weights travel.

        Args:
            slot_expert: int64 ``[R, S]``, the expert in each slot, -1 if unused.
        """
        return None

    @abstractmethod
    def push(
        self, weight: Tensor, slot_expert: Tensor, announced: HostCopy | None, slots: Tensor
    ) -> None:
        """Fill this rank's slots. Those without an expert hold anything afterwards.

        Args:
            weight: ``[m, out, in]``, this rank's experts.
            slot_expert: int64 ``[R, S]``.
            announced: what :meth:`announce` gave for it.
            slots: ``[S, out, in]``, written.
        """

    @abstractmethod
    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: HostCopy | None) -> Tensor:
        """Add the gradients of clones to those of their home experts.

        The order is fixed; experts without clones keep their bits.

        Args:
            grads: ``[m + S, out, in]`` of this rank's experts and slots; used up.
            slot_expert: int64 ``[R, S]``.
            announced: what :meth:`announce` gave for it.

        Returns:
            ``[m, out, in]``, in the same memory.
        """

    @abstractmethod
    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        """Bytes that all ranks together send to others in one :meth:`push`; reads the plan."""


class CollectiveWeights(WeightTransport):
    """One exchange a slot, of one expert for each rank: the buffers are R experts, not R * S.

    Gradients are added in the order of slots, then ranks.
    """

    def push(
        self, weight: Tensor, slot_expert: Tensor, announced: HostCopy | None, slots: Tensor
    ) -> None:
        """See :class:`WeightTransport`; an unused slot gets some expert's weights."""
        wanted = slot_expert.t() - self._rank * self._experts
        wanted = wanted.clamp_(0, self._experts - 1).contiguous()
        homes = (slot_expert[self._rank] // self._experts).clamp_(min=0)
        for slot, home in enumerate(homes.split(1)):
            received = exchange(weight.index_select(0, wanted[slot]), self._group)
            slots[slot] = received.index_select(0, home).squeeze(0)

    @override
    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: HostCopy | None) -> Tensor:
        ranks, experts = self._group.size(), self._experts
        target = slot_expert - self._rank * experts
        target.masked_fill_((target < 0) | (target >= experts), experts)  # slot 0 is sent by then
        for slot, local in enumerate(target.unbind(1)):
            sent = grads[experts + slot].expand(ranks, *grads.shape[1:])
            received = exchange(sent.contiguous(), self._group)
            for source in range(ranks):
                grads.index_add_(0, local[source : source + 1], received[source : source + 1])
        return grads[:experts]

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

    def push(
        self, weight: Tensor, slot_expert: Tensor, announced: HostCopy | None, slots: Tensor
    ) -> None:
        """See :class:`WeightTransport`; an unused slot is not written."""
        assert announced is not None
        weight = weight.detach()
        transfers = []
        for slot, experts in enumerate(zip(*announced.read(), strict=True)):
            for rank, expert in enumerate(experts):
                home, local = divmod(expert, self._experts)
                if expert >= 0 and home == self._rank:
                    transfers.append(self._transfer(dist.isend, weight[local], rank))
                elif expert >= 0 and rank == self._rank:
                    transfers.append(self._transfer(dist.irecv, slots[slot], home))
        _complete(transfers)

    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: HostCopy | None) -> Tensor:
        """See :class:`WeightTransport`; a slot at a time, so that at most R experts arrive."""
        assert announced is not None
        for slot, experts in enumerate(zip(*announced.read(), strict=True)):
            transfers, arrivals = [], []
            for rank, expert in enumerate(experts):
                home, local = divmod(expert, self._experts)
                if expert >= 0 and home == self._rank:
                    arrivals.append((local, torch.empty_like(grads[0])))
                    transfers.append(self._transfer(dist.irecv, arrivals[-1][1], rank))
                elif expert >= 0 and rank == self._rank:
                    part = grads[self._experts + slot]
                    transfers.append(self._transfer(dist.isend, part, home))
            _complete(transfers)
            for local, part in arrivals:
                grads[local] += part
        return grads[: self._experts]

    @override
    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        return int((slot_expert >= 0).sum()) * expert_bytes

    def _transfer(self, operation: Any, tensor: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(operation, tensor, group=self._group, group_peer=peer)


class SymmetricMemoryWeights(WeightTransport):
    """Slots pull their experts, and homes the gradients of their clones, added up over ranks.

    A rank lays open all of its experts to begin with, and in the end what is in its slots. It has
    one clone of an expert at most, as the planner makes them.
    """

    def __init__(self, buffers: PeerBuffers, experts_per_rank: int) -> None:
        """Set the sizes.

        Args:
            buffers: the model's.
            experts_per_rank: m.
        """
        super().__init__(buffers.group, experts_per_rank)
        self._buffers = buffers

    def push(
        self, weight: Tensor, slot_expert: Tensor, announced: HostCopy | None, slots: Tensor
    ) -> None:
        """See :class:`WeightTransport`; an unused slot gets zeros."""
        expert = slot_expert[self._rank]
        home = expert // self._experts
        first = (expert % self._experts).masked_fill_(expert < 0, -1)
        places = self._places(home, first, weight)
        rows = weight.detach().flatten(0, 1)
        self._buffers.pull("weights", [(rows, places[:, None])], slots.view(-1, slots.shape[2]))

    @override
    def bring_home(self, grads: Tensor, slot_expert: Tensor, announced: HostCopy | None) -> Tensor:
        ranks, slots = slot_expert.shape
        home, parts = grads[: self._experts], grads[self._experts :]
        local = torch.arange(self._experts, device=grads.device) + self._rank * self._experts
        holds = slot_expert[None] == local[:, None, None]  # [m, R, S]
        slot = torch.arange(slots, device=grads.device)
        slot = torch.where(holds, slot, -1).amax(2)
        rank = torch.arange(ranks, device=grads.device).expand_as(slot)
        places = self._places(rank.reshape(-1), slot.reshape(-1), parts)
        places = places.view(self._experts, ranks, -1).transpose(1, 2).flatten(0, 1)
        (total,) = self._buffers.pull("gradients", [(parts.flatten(0, 1), places)])
        home += total.view_as(home)
        return home

    def _places(self, rank: Tensor, matrix: Tensor, matrices: Tensor) -> Tensor:
        """Where the rows of some matrices lie, one after the other, int32.

        Args:
            rank: int64 ``[n]``, who has it.
            matrix: int64 ``[n]``, which one there, -1 for none.
            matrices: those of a rank, ``[M, out, in]``.
        """
        many, out = matrices.shape[:2]
        stride = many * out + 1
        row = torch.arange(out, device=rank.device)
        place = (rank * stride + matrix * out)[:, None] + row
        none = (self._rank + 1) * stride - 1
        return place.masked_fill_(matrix[:, None] < 0, none).flatten().int()

    @override
    def sent_bytes(self, slot_expert: Tensor, expert_bytes: int) -> int:
        return int((slot_expert >= 0).sum()) * expert_bytes


def _complete(transfers: list[dist.P2POp]) -> None:
    """Run all transfers; on CUDA the stream waits, not the host."""
    if transfers:
        for work in dist.batch_isend_irecv(transfers):
            work.wait()
