"""EchoMoELayer over symmetric memory; the argument names a check, here or in another worker.

What the layer must do whatever its transport is checked by the functions of ``moe_layer.py`` and
``clones.py``, with this transport alone.
"""

import contextlib
import itertools
import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from moe_cases import HIDDEN
from torch import Tensor
from unit_tests.workers import clones, moe_layer, token_counts
from unit_tests.workers.moe_layer import RESULTS, build, errors, forward, run, same_bits, thinned

from megatron_echo import cpu_backend
from megatron_echo.dispatch.transports import (
    PeerBuffers,
    SymmetricMemoryWeights,
    peer_memory,
)
from megatron_echo.dispatch.transports.peer_memory import FileMemory, PeerRows
from megatron_echo.step.overflow import UnevenTokensError
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

WIRE = {"moe_echo_token_transport": "symmetric_memory"}
SHARED = {
    f"{worker.__name__.rpartition('.')[2]}_{name.removeprefix('check_')}": check
    for worker in (clones, moe_layer, token_counts)
    for name, check in vars(worker).items()
    if name.startswith("check_")
}
take = PeerBuffers._take


def spoil(buffers: PeerBuffers, taken: list[PeerRows]) -> None:
    """Fill all buffers of all ranks, but of those of weights only what is taken."""
    weights = {id(rows) for key, rows in buffers._rows.items() if key[0] == "weights"}
    dist.barrier()
    for rows in buffers.rows:
        if id(rows) not in weights or any(rows is each for each in taken):
            rows.own.fill_(float("nan") if rows.own.is_floating_point() else -(1 << 40))
    dist.barrier()


def take_spoiled(buffers: PeerBuffers, *args: Any, **lane: int) -> list[PeerRows]:
    taken = take(buffers, *args, **lane)
    spoil(buffers, taken)
    return taken


@contextlib.contextmanager
def delayed(most: float) -> Iterator[None]:
    """Every rank sleeps now and then: before it writes, and between a barrier and its reads."""
    chance = random.Random(dist.get_rank())

    def slowly(function: Callable) -> Callable:
        def call(*args: Any) -> Any:
            if function is barrier:
                barrier(*args)
            if chance.random() < 0.5:
                time.sleep(chance.random() * most)
            return None if function is barrier else function(*args)

        return call

    barrier = FileMemory.barrier
    with contextlib.ExitStack() as stack:
        for owner, name in ((PeerRows, "put"), (PeerRows, "offer"), (FileMemory, "barrier")):
            slow = slowly(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, slow))
        yield


def check_as_all_gather() -> None:
    """All gradients of weights and probabilities bit by bit; sums over k in another order."""
    kinds, dtypes = ("hot", "random", "empty", "padding"), (torch.float64, torch.float32)
    cases = itertools.product(dtypes, kinds, (1, 3), (0, 2))
    for dtype, kind, topk, slots in thinned(cases):
        case = clones.case_of(kind, topk, dtype)
        fields = {"moe_echo_tolerance": 0.0, "moe_num_echo_experts": slots * dist.get_world_size()}
        result = run(build(topk, dtype, **fields, **WIRE), case)
        expected = run(build(topk, dtype, **fields), case)
        for name in RESULTS[2:] if topk > 1 else RESULTS:
            assert torch.equal(result[name], expected[name]), (name, kind, topk, slots)
        limit = 1e-12 if dtype == torch.float64 else 1e-5
        wide = {name: tensor.double() for name, tensor in expected.items()}
        assert max(errors(result, wide).values()) <= limit


def check_spoiled() -> None:
    """Buffers that hold anything before each movement, calls in flight, two layers, two sizes."""
    first, second = clones.layers_of(2, 2, torch.float32, **WIRE, moe_echo_row_alignment=4,
                                     moe_received_token_capacity=1.5, moe_echo_overflow="drop",
                                     moe_num_echo_experts=dist.get_world_size())  # fmt: skip
    cases = [clones.case_of(kind, 2, torch.float32) for kind in ("hot", "padding")]

    def everything() -> list[dict[str, Tensor]]:
        results = []
        finish = [forward(layer, case) for layer in (first, second) for case in cases]
        for layer in (first, second):
            layer.eval()
            with torch.no_grad():
                mine = cases[0].mine()
                clones.forced(layer, mine.probs, mine.chosen)(mine.hidden.view(6, 2, -1))
            layer.train()
        results += [backward() for backward in finish]
        return results

    expected = everything()
    with mock.patch.object(PeerBuffers, "_take", take_spoiled):
        for result, clean in zip(everything(), expected, strict=True):
            same_bits(result, clean)
    buffers = PeerBuffers.of(first.config, first.ep_group)
    assert buffers is PeerBuffers.of(second.config, second.ep_group)
    # rows, probabilities and leads there, rows and probabilities' gradients back; in evaluation no
    # gradients
    assert len(buffers.rows) == 5 + 4
    assert buffers.nbytes == sum(rows.own.nbytes for rows in buffers.rows)


def check_delays() -> None:
    """Ranks that are late anywhere, many times, with another routing each time."""
    cases = [clones.case_of(kind, 2, torch.float32, seed) for seed in range(3)
             for kind in ("random", "hot", "padding")]  # fmt: skip
    first, second = clones.layers_of(2, 2, torch.float32, **WIRE, moe_num_echo_experts=0)
    layers = (first, first, second)
    expected = [[run(layer, case) for case in cases] for layer in layers]
    with delayed(2e-3):
        for repeat in range(4):
            order = random.Random(repeat).sample(range(len(cases)), len(cases))
            finish = [forward(layers[n % 3], cases[n]) for n in order[:3]]
            for number, backward in zip(order, finish, strict=False):
                same_bits(backward(), expected[number % 3][number])
            for number in order:
                same_bits(run(layers[number % 3], cases[number]), expected[number % 3][number])


def check_the_same_movement_again() -> None:
    """Pushes, or pulls, one after the other, by ranks that are late: each sees its own."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    buffers = PeerBuffers(dist.group.WORLD)
    places = (torch.arange(ranks, dtype=torch.int32) * (ranks + 1) + rank)[None]
    wanted = torch.arange(ranks, dtype=torch.int32)[:, None] * (ranks + 1)
    everyone = torch.arange(ranks, dtype=torch.float64)[:, None]
    with delayed(4e-3):
        for step in range(40):
            value = torch.full((1, 1), rank + 10.0 * step, dtype=torch.float64)
            (came,) = buffers.push("a", [(value, places)], ranks)
            assert torch.equal(came, everyone + 10 * step), step
        for step in range(40):
            rows = torch.full((ranks, 1), rank + 10.0 * step, dtype=torch.float64)
            (pulled,) = buffers.pull("b", [(rows, wanted)])
            assert torch.equal(pulled, everyone + 10 * step), step


def check_weights() -> None:
    """As collectives bring them, and their gradients; with either transport of tokens."""
    way = {"moe_echo_expert_dispatcher_type": "symmetric_memory"}
    variants = itertools.cycle(itertools.product((True, False), ({}, WIRE), (1, 4)))
    used = 0
    dtypes = (torch.float64, torch.bfloat16)
    for kind, dtype, slots in thinned(
        itertools.product(("hot", "padding"), dtypes, clones.all_slots())
    ):
        again, wire, alignment = next(variants)
        fields = {**wire, "moe_echo_recompute_expert_dispatch": again,
                  "moe_echo_row_alignment": alignment}  # fmt: skip
        case = clones.case_of(kind, 2, dtype)
        expected = run(clones.cloned(2, dtype, slots, **fields), case)
        layer = clones.cloned(2, dtype, slots, **fields, **way)
        with clones.watched(layer) as seen:
            result = run(layer, case)
        ((_, made),) = seen
        assert isinstance(made.transport, SymmetricMemoryWeights)
        used += int((made.slot_expert >= 0).sum())
        assert made.transport.sent_bytes(made.slot_expert, 1) == (made.slot_expert >= 0).sum()
        limit = 1e-12 if dtype == torch.float64 else 0.01
        for name in RESULTS[:3]:
            assert torch.equal(result[name], expected[name]), (name, kind, slots)
        wide = {name: tensor.double() for name, tensor in expected.items()}
        assert max(errors(result, wide).values()) <= limit
    assert used > 0
    layer = clones.cloned(2, torch.float32, **way, **WIRE)
    case = clones.case_of("hot", 2, torch.float32)
    with no_host_sync("raise"):
        moe_layer.run_quietly(layer, case)
    expected = run(layer, case)
    with mock.patch.object(PeerBuffers, "_take", take_spoiled):
        same_bits(run(layer, case), expected)
    with delayed(2e-3):
        for _ in range(10):
            same_bits(run(layer, case), expected)


def check_uneven_tokens() -> None:
    """Ranks that bring different numbers of tokens: every rank hears of it before the optimizer."""
    rank = dist.get_rank()
    for slots, sequences, is_new in (
        (0, [(4, 6)], True),
        (2 * dist.get_world_size(), [(4, 6)], True),
        (0, [(4, 6), (6, 4)], False),  # as many in the whole step
        (2 * dist.get_world_size(), [(6, 6), (4, 6)], False),
    ):
        layer = build(2, torch.float32, **WIRE, moe_num_echo_experts=slots)
        check = StepEnd.of(layer.config).overflow
        even = [] if is_new else [(4, 4), (6, 6)]
        for step in (even, sequences, even):
            for lengths in step:
                hidden = torch.ones(lengths[rank], 2, HIDDEN, requires_grad=True)
                layer(hidden)[0].sum().backward()
            if step is even:
                check.check()
            else:
                with pytest.raises(UnevenTokensError, match="brought between 8 and 12 tokens"):
                    check.check()


def check_inference_first() -> None:
    """Training after the buffers were made in inference mode."""
    case = clones.case_of("hot", 2, torch.float64)
    layer = build(2, torch.float64, **WIRE).eval()
    mine = case.mine()
    with torch.inference_mode():
        clones.forced(layer, mine.probs, mine.chosen)(mine.hidden.view(6, 2, -1))
    layer.train()
    assert max(errors(run(layer, case), moe_layer.dense(layer, case)).values()) <= 1e-12


def check_refusals() -> None:
    """The same sentence on every rank, whichever of them cannot."""
    last = dist.get_rank() == dist.get_world_size() - 1
    name = f"{socket.gethostname()}{'-other' if last else ''}"
    with (
        mock.patch.object(socket, "gethostname", return_value=name),
        pytest.raises(ValueError, match="and these are on several"),
    ):
        PeerBuffers(dist.group.WORLD)
    mapped = peer_memory._mapped

    def another_file(path: Path, nbytes: int) -> Any:
        return mapped(path.with_name(f"{path.name}-other") if last else path, nbytes)

    def no_file(path: Path, nbytes: int) -> Any:
        if last:
            raise OSError("No space left on device")
        return mapped(path, nbytes)

    for fault in (another_file, no_file):
        with (
            mock.patch.object(peer_memory, "_mapped", fault),
            pytest.raises(ValueError, match="and these do not"),
        ):
            PeerBuffers(dist.group.WORLD)
    for path in Path("/dev/shm").glob("megatron_echo-*-other"):
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    for module in (moe_layer, clones):
        vars(module)["TRANSPORTS"] = ("symmetric_memory",)
    moe_layer.main({**{f"check_{name}": check for name, check in SHARED.items()}, **globals()})
