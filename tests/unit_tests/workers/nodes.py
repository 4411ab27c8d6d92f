"""Clones inside nodes, two of two ranks each; the argument names a check."""

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from unit_tests.workers import clones, hidden_clones
from unit_tests.workers.moe_layer import (
    TOKENS,
    Problem,
    dense,
    errors,
    main,
    run,
    run_quietly,
    same_bits,
)

from megatron_echo import collectives, cpu_backend
from megatron_echo.copy_lanes import Backend
from megatron_echo.dispatch.layout import round_rows
from megatron_echo.dispatch.transports import PeerBuffers, automatic, peer_buffers
from megatron_echo.dispatch.transports.automatic import Topology
from megatron_echo.dispatch.transports.weights import WeightTransport
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

WEIGHTS = ("collective", "p2p", "symmetric_memory")
WIRES = ("all_to_all", "symmetric_memory", "all_gather")
NODE = 2
INSIDE = {"moe_echo_ranks_per_node": NODE, "moe_echo_clones_within_node": True}
BOTH = {**INSIDE, **hidden_clones.WAYS}


def case_of(kind: str) -> Problem:
    """A problem; ``skewed``: every token takes an expert of the first rank and one of the last."""
    case = clones.case_of("hot" if kind == "skewed" else kind, 2, torch.float64)
    if kind != "skewed":
        return case
    swap = torch.arange(case.chosen.shape[1])
    swap[[1, -1]] = swap[[-1, 1]]
    return replace(case, chosen=case.chosen[:, swap], probs=case.probs[:, swap])


def layer_of(weights: str, slots: int | None = None, **fields: Any) -> EchoMoELayer:
    fields = {**INSIDE, "moe_echo_expert_dispatcher_type": weights, **fields}
    return clones.cloned(2, torch.float64, slots, **fields)


def node_of(rank: Any) -> Any:
    return rank // NODE


def watched_plan(layer: EchoMoELayer, case: Problem) -> tuple[dict[str, Tensor], Tensor]:
    """The results of a pass, and the expert in each slot of all ranks."""
    plans = []
    hook = layer.experts.register_forward_pre_hook(
        lambda *_: plans.append(layer.token_dispatcher.plan.slot_expert)
    )
    results = run(layer, case)
    hook.remove()
    return results, plans[0]


def check_dense() -> None:
    """Against a loop over experts, by each transport; clones stay in their node, all fits."""
    ranks, made = dist.get_world_size(), Counter()
    full = clones.layer_experts(ranks)
    cases = itertools.product(("skewed", "random", "one expert"), clones.all_slots())
    tolerances = (0.0, 0.02, None, None) * 3
    ways = itertools.cycle(zip(WEIGHTS * 4, WIRES * 4, tolerances, strict=True))
    for kind, slots in cases:
        case = case_of(kind)
        expected = dense(clones.plain(2, torch.float64), case)
        weights, wire, tolerance = next(ways)
        layer = layer_of(
            weights, slots, moe_echo_tolerance=tolerance, moe_echo_token_transport=wire,
            moe_received_token_capacity=float(ranks) if slots < full else None,
        )  # fmt: skip
        results, plan = watched_plan(layer, case)
        found = errors(results, expected)
        assert max(found.values()) <= 1e-12, (kind, slots, weights, found)
        homes = plan // layer.token_dispatcher._per_rank
        assert ((node_of(homes) == node_of(torch.arange(ranks))[:, None]) | (plan < 0)).all()
        made[weights] += int((plan >= 0).sum())
        if slots >= full:
            rows = 2 * TOKENS * 2 * (1.25 if tolerance is None else 1 + tolerance)
            assert layer.token_dispatcher.buffer_rows(TOKENS) == round_rows(int(rows + 0.999))
        StepEnd.of(layer.config).overflow.check()
    assert set(made) == set(WEIGHTS)
    assert all(made.values())


@contextlib.contextmanager
def over_all_ranks() -> Iterator[None]:
    """Weights are exchanged over the whole expert-parallel group, as between any ranks."""
    with mock.patch.object(automatic, "part_of", lambda group, size: group):
        yield


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Bytes of weights and their gradients that this rank gives to, or takes from, each other."""
    sent: Counter[int] = Counter()

    def note(group: Any, peer: int, nbytes: float) -> None:
        sent[dist.get_global_rank(group, int(peer))] += int(nbytes)

    def exchange(output: Tensor, given: Tensor, group: Any = None) -> None:
        for peer in range(group.size()):
            note(group, peer, given.nbytes / group.size())
        original_exchange(output, given, group=group)

    def transfer(self: Any, operation: Any, tensor: Tensor, group: Any, group_peer: int) -> Any:
        note(group, group_peer, tensor.nbytes)
        return original_transfer(operation, tensor, group=group, group_peer=group_peer)

    def push(self: PeerBuffers, name: str, matrices: Tensor, source: Tensor) -> Tensor:
        for peer in (source >= 0).nonzero()[:, 0]:
            note(self.group, peer, matrices[0].nbytes)
        return original_push(self, name, matrices, source)

    def add(self: PeerBuffers, name: str, matrices: Tensor, used: Any, places: Tensor,
            home: Tensor) -> None:  # fmt: skip
        for place in places[places >= 0]:
            note(self.group, place // len(matrices), matrices[0].nbytes)
        original_add(self, name, matrices, used, places, home)

    original_exchange, original_transfer = dist.all_to_all_single, dist.P2POp
    original_push, original_add = PeerBuffers.push_matrices, PeerBuffers.add_matrices
    with (
        mock.patch.object(collectives.dist, "all_to_all_single", exchange),
        mock.patch.object(dist, "P2POp", lambda *args, **rest: transfer(None, *args, **rest)),
        mock.patch.object(PeerBuffers, "push_matrices", push),
        mock.patch.object(PeerBuffers, "add_matrices", add),
    ):
        yield sent


def check_bytes() -> None:
    """The bits of the transport over all ranks under the same plan; no weights leave a node."""
    me, ranks = dist.get_rank(), dist.get_world_size()
    totals = Counter()
    for weights, kind in itertools.product(WEIGHTS, ("skewed", "random")):
        case = case_of(kind)
        with counted() as sent:
            results = run(layer_of(weights), case)
        with over_all_ranks(), counted() as over_all:
            same_bits(run(layer_of(weights), case), results)
        assert all(node_of(peer) == node_of(me) for peer, nbytes in sent.items() if nbytes)
        crossing = sum(n for peer, n in over_all.items() if node_of(peer) != node_of(me))
        inside = sum(n for peer, n in over_all.items() if node_of(peer) == node_of(me))
        assert sum(sent.values()) == inside
        expected = inside * (ranks // NODE - 1) if weights == "collective" else 0
        assert crossing == expected
        totals[weights] += inside
    seen = torch.tensor([totals[weights] for weights in WEIGHTS])
    dist.all_reduce(seen)
    assert (seen > 0).all()


def highest_error(layer: EchoMoELayer, case: Problem, expected: dict[str, Tensor]) -> float:
    """Of any rank; NaN is an error without bound."""
    worst = max(errors(run(layer, case), expected).values())
    found = torch.tensor(worst if worst == worst else float("inf"), dtype=torch.float64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def check_mutants() -> None:
    """A rank of all ranks taken for one of its node, or the other node's slots, are seen."""
    case = case_of("skewed")
    expected = dense(clones.plain(2, torch.float64), case)
    slots = WeightTransport.slots

    def of_first_node(self: Any, plan: Tensor, rank: int) -> Tensor:
        return slots(self, plan, self._rank)

    def of_the_other(self: Any, plan: Tensor, rank: int) -> Tensor:
        return slots(self, plan, (rank + NODE) % len(plan))

    def global_experts(self: Any, plan: Tensor, rank: int) -> Tensor:
        first = rank - self._rank
        return plan[first : first + NODE].clone()

    shifted: tuple[Callable, ...] = (of_first_node, of_the_other)
    for weights, mutant in (
        *itertools.product(("collective", "symmetric_memory"), shifted),
        ("symmetric_memory", global_experts),
    ):
        assert highest_error(layer_of(weights), case, expected) <= 1e-12
        with mock.patch.object(WeightTransport, "slots", mutant):
            assert highest_error(layer_of(weights), case, expected) > 1e-6, (weights, mutant)


def check_auto() -> None:
    """On two machines whose ranks reach each other's memory auto keeps clones inside them."""
    topology = Topology(dist.get_world_size(), True, NODE, has_peer_memory=True)
    with mock.patch.object(Topology, "of", return_value=topology):
        layer = clones.cloned(2, torch.float64, moe_echo_expert_dispatcher_type="auto")
    assert (layer.config.moe_echo_ranks_per_node, layer.config.moe_echo_clones_within_node) == (
        NODE, True,
    )  # fmt: skip
    assert layer.token_dispatcher.hides_clones
    for kind in ("skewed", "random"):
        case = case_of(kind)
        results = run(layer, case)
        assert max(errors(results, dense(clones.plain(2, torch.float64), case)).values()) <= 1e-12
        same_bits(results, run(layer_of("symmetric_memory"), case))
        with no_host_sync("raise"):
            run_quietly(layer, case)
    StepEnd.of(layer.config).overflow.check()


def check_order() -> None:
    """Beside compute: captured, eager and on one stream the same bits; no rank is overtaken."""
    with mock.patch.object(peer_buffers, "stream_backend", Backend):
        one_stream = [tensor.clone() for tensor in hidden_clones.block(**BOTH)[1]()]
    _, step = hidden_clones.block(**BOTH)
    eager = [tensor.clone() for tensor in step()]
    for results in (eager, hidden_clones.captured(step)):
        for found, expected in zip(results, one_stream, strict=True):
            assert torch.equal(found, expected)
    assert not hidden_clones.races(hidden_clones.logged_step("all_gather", **INSIDE))


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main(globals())
