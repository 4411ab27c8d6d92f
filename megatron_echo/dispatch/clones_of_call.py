"""The clones of one call of a layer, and how their gradients come home before a parameter's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.copy_lanes import Errand
from megatron_echo.dispatch.transports.weights import WeightTransport


def storage_key(tensor: Tensor) -> tuple[int, int]:
    """Which tensor or parameter it is, also of views of one."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def as_it_is_now(weight: Tensor) -> Tensor:
    """A view of a parameter again, in the memory that the parameter has by now.

    Megatron-FSDP gathers parameters for backward once more, not always in the same place.
    """
    return weight if weight._base is None else weight._base.view(weight.shape)


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
        self._edges = {
            storage_key(weight): edge for weight, edge in zip(wanted, edges, strict=True)
        }
        return hidden

    def edge(self, weight: Tensor) -> Tensor | None:
        """What gets the gradient in the parameter's place, None for a frozen one."""
        return self._edges.get(storage_key(weight))

    def expect(self, errand: Errand) -> None:
        """Let the parameters wait for an errand."""
        self._errands.append(errand)


@dataclass(frozen=True)
class Clones:
    """The clones of one layer call: which experts sit in which slots.

    Attributes:
        slot_expert: int64 ``[R, S]``, the expert in each slot of each rank, -1 if unused; ranks and
            experts are those of the transport's group.
        transport: how weights get into the slots.
        announced: what the transport keeps of the plan.
        homecoming: where the gradients of the weights that it has an edge for may arrive later.
        begun: weights on their way, by the key of the parameter.
        is_frozen: nobody trains what is cloned: no gradient of it is computed or travels.
    """

    slot_expert: Tensor
    transport: WeightTransport
    announced: Any = None
    homecoming: Homecoming = field(default_factory=Homecoming)
    begun: dict[tuple[int, int], Errand] = field(default_factory=dict)
    is_frozen: bool = False

    @property
    def slots(self) -> int:
        """S."""
        return self.slot_expert.shape[1]

    def given_back(self, slot_expert: Tensor) -> Self:
        """These, by the plan that autograd kept: another one where the call was computed again.

        So recomputes ``torch.utils.checkpoint`` without reentry, in the graph of the first call.
        """
        if storage_key(slot_expert) == storage_key(self.slot_expert):
            return self
        announced = self.transport.announce(slot_expert)
        return replace(self, slot_expert=slot_expert, announced=announced)

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
        self.begun[storage_key(weight)] = self.run(bring)

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
        edge = self.homecoming.edge(weight)
        return weight if edge is None else edge.view(weight.shape)

    def homeward(self, weight: Tensor, grad: Tensor, errand: Errand, *, is_wanted: bool) -> Tensor:
        """A gradient that is on its way, where :meth:`target` waits for it.

        Args:
            weight: the parameter.
            grad: of the home experts.
            errand: what it is whole behind.
            is_wanted: autograd will pass it on.
        """
        is_awaited = self.homecoming.edge(weight) is not None and is_wanted
        if is_awaited and not torch.is_anomaly_enabled():
            self.homecoming.expect(errand)
        else:
            errand.wait()
        return grad
