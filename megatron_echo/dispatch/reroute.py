"""From logical to physical experts: which copy of an expert computes each token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.copy_lanes import Errand
from megatron_echo.dispatch.layout import PairCounts
from megatron_echo.dispatch.transports.weights import WeightTransport
from megatron_echo.planner import ClonePlan


def weight_key(weight: Tensor) -> tuple[int, int]:
    """Which parameter it is, also of views of one."""
    return weight.untyped_storage()._cdata, int(weight.storage_offset())


class _Homecoming(torch.autograd.Function):
    """The identity; in backward waits until everything is at home."""

    @staticmethod
    def forward(ctx: Any, errands: list[Errand], hidden: Tensor, *weights: Tensor) -> Any:
        ctx.errands = errands
        ctx.set_materialize_grads(False)
        results = tuple(tensor.detach() for tensor in (hidden, *weights))
        if not hidden.requires_grad:
            ctx.mark_non_differentiable(results[0])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        while ctx.errands:
            ctx.errands.pop().wait()
        return None, *grads


class Homecoming:
    """Lets gradients of clones travel home while backward goes on, and their parameters wait.

    A node of autograd stands between parameters and what computes with them. It gives their
    gradients on once that of ``hidden`` is there, so behind the backward pass of all that lies
    between, and after a wait for what travels. Whatever watches a parameter comes behind it.
    """

    def __init__(self) -> None:
        self._errands: list[Errand] = []
        self._edges: dict[tuple[int, int], Tensor] = {}

    def attach(self, hidden: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Make the node.

        Args:
            hidden: an input of the layer, of any shape.
            weights: its experts' parameters; frozen ones are left out.

        Returns:
            What to use in place of ``hidden``.
        """
        wanted = [weight for weight in weights if weight.requires_grad]
        hidden, *edges = _Homecoming.apply(self._errands, hidden, *wanted)
        self._edges = {weight_key(weight): edge for weight, edge in zip(wanted, edges, strict=True)}
        return hidden

    def edge(self, weight: Tensor) -> Tensor | None:
        """What gets the gradient in the parameter's place, None for a frozen one."""
        return self._edges.get(weight_key(weight))

    def expect(self, errand: Errand) -> None:
        """Let the parameters wait for an errand."""
        self._errands.append(errand)


@dataclass(frozen=True)
class Clones:
    """The clones of one layer call: which experts sit in which slots.

    Attributes:
        slot_expert: int64 ``[R, S]``, the expert in each slot of each rank, -1 if unused.
        experts_per_rank: m; expert e lives on rank ``e // m``.
        transport: how weights get into the slots.
        announced: what the transport keeps of the plan.
        homecoming: what the gradients of the weights wait for; None if they wait for nothing.
        begun: weights on their way, by the key of the parameter.
        is_frozen: nobody trains what is cloned: no gradient of it is computed or travels.
    """

    slot_expert: Tensor
    experts_per_rank: int
    transport: WeightTransport
    announced: Any = None
    homecoming: Homecoming | None = None
    begun: dict[tuple[int, int], Errand] = field(default_factory=dict)
    is_frozen: bool = False

    @property
    def slots(self) -> int:
        """S."""
        return self.slot_expert.shape[1]

    def run(self, movement: Callable[[], Any]) -> Errand:
        """Launch movements of the transport, beside compute where that may be."""
        return self.transport.run(movement, unread=len(self.begun))

    @torch.no_grad()
    def begin(self, weight: Tensor, bring: Callable[[], Any]) -> None:
        """Begin to bring the clones of a projection before they are needed.

        Args:
            weight: the parameter of their homes.
            bring: what :meth:`brought` will be called with.
        """
        self.begun[weight_key(weight)] = self.run(bring)

    def brought(self, key: tuple[int, int], bring: Callable[[], Any]) -> Any:
        """What ``bring`` returns, which was begun before or begins now; compute waits for it.

        Args:
            key: of the parameter.
            bring: brings the clones, on all ranks together.
        """
        errand = self.begun.pop(key, None) or self.run(bring)
        return errand.wait()

    def target(self, weight: Tensor) -> Tensor:
        """What the gradient of a parameter is given to."""
        edge = self.homecoming.edge(weight) if self.homecoming is not None else None
        return weight if edge is None else edge.view(weight.shape)

    def homeward(self, weight: Tensor, grad: Tensor, errand: Errand, *, is_wanted: bool) -> Tensor:
        """A gradient that is on its way, where :meth:`target` waits for it.

        Args:
            weight: the parameter.
            grad: of the home experts.
            errand: what it is whole behind.
            is_wanted: autograd will pass it on.
        """
        is_awaited = self.homecoming is not None and self.homecoming.edge(weight) is not None
        if self.homecoming is None or not (is_awaited and is_wanted) or torch.is_anomaly_enabled():
            errand.wait()
        else:
            self.homecoming.expect(errand)
        return grad


def home_experts(experts: Tensor, per_rank: int, num_slots: int) -> Tensor:
    """Physical ids of the experts themselves: expert ``e`` is group ``e % m`` of rank ``e // m``.

    Args:
        experts: integer, logical ids; E stands for no expert and becomes ``R * (m + S)``.
        per_rank: m.
        num_slots: S.
    """
    return experts + experts // per_rank * num_slots


def pair_counts(plan: ClonePlan, below: Tensor, own: Tensor) -> PairCounts:
    """What a plan sends to each physical expert.

    Args:
        plan: of R ranks.
        below: int64 ``[E, R]``, the split of the ranks below this one; see ``split_up_to``.
        own: likewise, that of this rank.
    """
    ranks, num_experts = plan.counts.shape
    home = torch.arange(num_experts, device=own.device).view(ranks, -1)
    expert = torch.cat((home, plan.slot_expert), dim=1)  # [R, G], -1 in unused slots
    cell = expert.clamp(min=0) * ranks + torch.arange(ranks, device=own.device)[:, None]
    parts = torch.stack((plan.allocation, below, own)).flatten(1).index_select(1, cell.reshape(-1))
    return PairCounts(*parts.view(3, *cell.shape).masked_fill_(expert < 0, 0))


def physical_experts(experts: Tensor, plan: ClonePlan, split: Tensor) -> Tensor:
    """Send each pair to its expert's home or to one of its clones, as the plan splits them.

    An expert's pairs are counted in the order of (token, k); the first go to the lowest rank that
    gets some, and so on. Probabilities stay where they are.

    Args:
        experts: int32 ``[T, K]``, logical ids in ``[0, E]``; E stands for no expert. Their
            histogram is ``plan.counts[rank]``.
        plan: the plan made from it.
        split: int64 ``[E, R]``, ``plan.split_for(rank)`` of this source rank.

    Returns:
        int32 ``[T, K]``, ``rank * (m + S) + group``; ``R * (m + S)`` for no expert.
    """
    ranks, num_experts = plan.counts.shape
    slots = plan.slot_expert.shape[1]
    per_rank = num_experts // ranks
    groups = per_rank + slots
    # Physical id of expert e on rank r: its home there, or its slot.
    expert = plan.slot_expert.masked_fill(plan.slot_expert < 0, num_experts)
    slot = torch.arange(per_rank, groups, device=expert.device).expand(ranks, slots)
    group = expert.new_zeros(ranks, num_experts + 1).scatter_(1, expert, slot)[:, :num_experts]
    ids = torch.arange(num_experts, device=expert.device)
    owner = torch.arange(ranks, device=expert.device)[:, None]
    home = home_experts(ids, per_rank, slots)
    cell_id = torch.where(ids // per_rank == owner, home, owner * groups + group)
    cell_id = cell_id.t().reshape(-1)
    cell_id = torch.cat((cell_id, cell_id.new_full((1,), ranks * groups)))
    # Pairs in the order of experts fall into the cells [E, R] of the split, one after the other.
    ends = split.reshape(-1).cumsum(0)
    flat = experts.reshape(-1)
    order = flat.argsort(stable=True)
    cell = torch.searchsorted(ends, torch.arange(flat.numel(), device=flat.device), right=True)
    physical = torch.empty_like(order).scatter_(0, order, cell_id.index_select(0, cell))
    return physical.view(experts.shape).int()
