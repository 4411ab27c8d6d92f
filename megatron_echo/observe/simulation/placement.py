"""What the planner makes of loads: balance, clones and who receives what, for many layer calls."""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_echo.planner import ClonePlan, ClonePrice, plan_clones
from megatron_echo.planner.bound import MAX_TOLERANCE

_BATCH = 32
PEER_CALLS, PEER_SOURCES = 4, 16
"""Of how many layer calls and source ranks the fullest part of an all-to-all is looked for."""


@dataclass(frozen=True)
class Placement:
    """Figures of C layer calls, each a float64 ``[C]``, for R ranks and S slots.

    Loads are pairs. "Highest" is that of the busiest rank; "inside" and "across" are traffic within
    a node and between nodes; shares are the least that is possible.
    """

    ranks: int  # R
    slots: int  # S
    tolerance: float | None  # of the planner, None for auto
    mean: np.ndarray  # load of a rank, the mean
    routed: np.ndarray  # highest load without clones
    placed: np.ndarray  # highest load with them
    clones: np.ndarray  # used slots
    clones_inside: np.ndarray  # highest number that one rank sends or receives in its node
    clones_across: np.ndarray  # the same to or from other nodes
    leave_rank: np.ndarray  # share of pairs computed on another rank than their token's
    leave_node: np.ndarray  # share of pairs computed on another node
    pairs_inside: np.ndarray  # highest number that a rank gets from its node, without clones
    pairs_across: np.ndarray  # the same from other nodes
    fullest: float  # scalar, mean over calls of the rank with the highest load over all
    price: ClonePrice | None = None  # of a clone, with auto

    @property
    def overload_routed(self) -> np.ndarray:
        """Max/mean of each layer call without clones."""
        return self.routed / self.mean

    @property
    def overload_placed(self) -> np.ndarray:
        """Max/mean of each layer call with clones."""
        return self.placed / self.mean


def place(
    counts: np.ndarray, slots: int, tolerance: float | None, node: int, by_node: bool = False,
    price: ClonePrice | None = None,
) -> Placement:  # fmt: skip
    """Plan layer calls ``[C, R, E]`` of int64; plans are those of ``plan_clones``, bit for bit.

    ``node`` ranks share a node; ``by_node`` says whether the planner is told. Without a tolerance
    the plan is the one of the shortest time at a ``price``, whatever buffer it needs.
    """
    parts = []
    for begin in range(0, len(counts), _BATCH):
        chunk = torch.from_numpy(np.ascontiguousarray(counts[begin : begin + _BATCH], np.int64))
        told = node if by_node and node < counts.shape[1] else None
        parts.append(_figures(chunk, _allocations(chunk, slots, tolerance, told, price), node))
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    fullest = joined.pop("load").double().mean(0).max().item()
    arrays = {name: value.double().numpy() for name, value in joined.items()}
    return Placement(counts.shape[1], slots, tolerance, **arrays, fullest=fullest, price=price)


def _allocations(
    counts: Tensor, slots: int, tolerance: float | None, node: int | None, price: ClonePrice | None
) -> Tensor:
    """Pairs of each expert on each rank, ``[C, E, R]``, of layer calls ``[C, R, E]``."""
    ranks, experts = counts.shape[1:]
    if slots == 0:
        home = torch.arange(experts) // (experts // ranks)
        return counts.sum(1)[:, :, None] * (home[:, None] == torch.arange(ranks))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # operators that vmap runs one by one
        bound = MAX_TOLERANCE if tolerance is None else tolerance
        settings = slots, bound, 0, node, False, price
        return torch.vmap(lambda each: plan_clones(each, *settings).allocation)(counts)


def _figures(counts: Tensor, allocation: Tensor, node: int) -> dict[str, Tensor]:
    """The arrays of a :class:`Placement`, and the ranks' loads ``[C, R]``."""
    calls, ranks, experts = counts.shape
    rank = torch.arange(ranks)
    home = torch.arange(experts) // (experts // ranks)
    together = rank[:, None] // node == rank // node
    total = counts.sum((1, 2))
    away = torch.where(home[:, None] == rank, 0, allocation)
    sent = (away > 0).reshape(calls, ranks, -1, ranks).sum(2)
    inside, across = sent * together, sent * ~together
    supply = counts.reshape(calls, ranks // node, node, experts).sum(2).transpose(1, 2)
    demand = allocation.reshape(calls, experts, ranks // node, node).sum(3)
    wanted = counts.reshape(calls, ranks, ranks, -1).sum(3)
    apart = rank[:, None] != rank
    safe = total.clamp(min=1).double()
    stay = torch.minimum(counts.transpose(1, 2), allocation).sum((1, 2))
    return {
        "load": allocation.sum(1),
        "mean": total.double() / ranks,
        "routed": wanted.sum(1).amax(1),
        "placed": allocation.sum(1).amax(1),
        "clones": sent.sum((1, 2)),
        "clones_inside": torch.maximum(inside.sum(1), inside.sum(2)).amax(1),
        "clones_across": torch.maximum(across.sum(1), across.sum(2)).amax(1),
        "leave_rank": 1 - stay / safe,
        "leave_node": 1 - torch.minimum(supply, demand).sum((1, 2)) / safe,
        "pairs_inside": (wanted * (together & apart)).sum(1).amax(1),
        "pairs_across": (wanted * ~together).sum(1).amax(1),
    }


def fullest_part(counts: np.ndarray, placed: Placement) -> float:
    """Pairs from one rank to one rank, the most of some calls and sources: an all-to-all's part.

    What a rank sends to itself counts. A token is sent once to a rank, so the places that are
    needed are at most that many.
    """
    most = 0
    chosen = torch.from_numpy(np.asarray(counts[:: max(1, len(counts) // PEER_CALLS)], np.int64))
    allocations = _allocations(chosen, placed.slots, placed.tolerance, None, placed.price)
    sources = range(0, placed.ranks, max(1, placed.ranks // PEER_SOURCES))
    for each, allocation in zip(chosen, allocations, strict=True):
        plan = ClonePlan(each, each, allocation, each, each, each)
        for source in sources:
            most = max(most, int(plan.split_for(source).sum(0).max()))
    return float(most)
