"""Clones that travel beside compute: the order of one rank, and of all ranks; names a check."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from moe_cases import HIDDEN
from torch import Tensor
from unit_tests.workers import clones
from unit_tests.workers.moe_layer import BATCH, SEQUENCE, main

from megatron_echo import cpu_backend
from megatron_echo.copy_lanes import Backend, Errand, Lane
from megatron_echo.cpu_backend.access_order import AccessOrder
from megatron_echo.cpu_backend.recorded_graph import CaptureError, RecordedGraph, capture
from megatron_echo.dispatch import clones_of_call
from megatron_echo.dispatch.transports import PeerBuffers, peer_buffers
from megatron_echo.dispatch.transports.peer_memory import FileMemory, PeerRows
from megatron_echo.experts.grouped_linear import TorchGemm

WAYS = {
    "moe_echo_token_transport": "symmetric_memory",
    "moe_echo_expert_dispatcher_type": "symmetric_memory",
}
MICROBATCHES = ("hot", "random")
Log = list[tuple]


class _Block(torch.nn.Module):
    """Two layers of something in an attention's place and experts, as transformer layers are."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.moe = torch.nn.ModuleList(clones.layers_of(2, 2, torch.float32, **fields))
        self.before = torch.nn.ModuleList(torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
        self.config = self.moe[0].config

    def forward(self, hidden: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
        for before, moe in zip(self.before, self.moe, strict=True):
            clones.forced(moe, probs, chosen)
            hidden = moe(before(moe.await_gradients(hidden)).tanh())[0]
        return hidden


def block(**fields: Any) -> tuple[DistributedDataParallel, Callable[[], list[Tensor]]]:
    """A model in Megatron's wrapper, and a step of three microbatches: outputs and gradients."""
    torch.manual_seed(1)
    slots = clones.layer_experts(dist.get_world_size()) * dist.get_world_size()
    fields = {"moe_num_echo_experts": slots, "moe_echo_tolerance": 0.0, **fields}
    layers = _Block(**fields)
    settings = DistributedDataParallelConfig(overlap_grad_reduce=True, bucket_size=1)
    model = DistributedDataParallel(layers.config, settings, layers)
    cases = [
        clones.case_of(kind, 2, torch.float32, n).mine() for n, kind in enumerate(MICROBATCHES)
    ]
    given = [(c.hidden.view(SEQUENCE, BATCH, -1).clone(), c.probs.clone(), c.chosen) for c in cases]

    def step() -> list[Tensor]:
        model.zero_grad_buffer()
        results = []
        for number, (hidden, probs, chosen) in enumerate(given):
            is_last = number == len(given) - 1
            with contextlib.nullcontext() if is_last else model.no_sync():
                leaf = hidden.detach().requires_grad_()
                output = model(leaf, probs.detach().requires_grad_(), chosen)
                output.square().sum().backward()
            results += [output.detach(), leaf.grad]
        model.finish_grad_sync()
        return results + [p.main_grad for p in model.parameters()]

    return model, step


def captured(step: Callable[[], list[Tensor]]) -> list[Tensor]:
    """The results of a replay."""
    graph = RecordedGraph()
    with capture(graph):
        results = step()
    graph.replay()
    return [tensor.clone() for tensor in results]


@contextlib.contextmanager
def kept(name: str, value: Any, owner: Any = Errand) -> Iterator[None]:
    with mock.patch.object(owner, name, value):
        yield


def check_order() -> None:
    """A captured step has its order complete and the bits of an eager one, and of one stream's."""
    for again in (True, False):
        fields = {**WAYS, "moe_echo_recompute_expert_dispatch": again}
        with mock.patch.object(peer_buffers, "stream_backend", Backend):
            one_stream = [tensor.clone() for tensor in block(**fields)[1]()]
        _, step = block(**fields)
        eager = [tensor.clone() for tensor in step()]
        for results in (eager, captured(step)):
            for found, expected in zip(results, one_stream, strict=True):
                assert torch.equal(found, expected)


def check_mutants() -> None:
    """Each wait that is left out is noticed; so is what would overwrite slots that are read."""
    _, step = block(**WAYS)
    step()
    wait = Errand.wait

    def skipping(number: int) -> Callable[[Errand], Any]:
        calls = itertools.count()
        return lambda errand: errand.result if next(calls) == number else wait(errand)

    for number in (0, 1):  # before the first projection, and before the second
        with kept("wait", skipping(number)), pytest.raises(CaptureError, match="reads memory"):
            captured(step)

    def at_once(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads

    with (
        kept("backward", staticmethod(at_once), clones_of_call._Homecoming),
        pytest.raises(CaptureError, match="another stream still writes"),
    ):
        captured(step)

    def unforked(errand: Errand, backend: Backend, work: Callable) -> None:
        waits, first = backend.wait, next(begun) == 0
        with mock.patch.object(backend, "wait", lambda lane, event: first and waits(lane, event)):
            begin(errand, backend, work)

    begin, begun = Errand.__init__, itertools.count()
    with kept("__init__", unforked), pytest.raises(CaptureError, match="another stream still"):
        captured(step)
    captured(step)


def check_buckets() -> None:
    """No reduction begins before its gradients are whole and at home, and none changes later."""
    start, launched = _ParamAndGradBucketGroup.start_grad_sync, {}
    make, expected = clones_of_call.Homecoming.expect, {}

    def expect(home: Any, errand: Errand) -> None:
        make(home, errand)
        expected[errand.result.shape] = errand  # those of the layer in backward now

    def note(group: Any, *args: Any, **kwargs: Any) -> None:
        for bucket in group.buckets:
            for parameter in bucket.params_list:
                launched[id(parameter)] = parameter.main_grad.clone()
                errand = expected.get(parameter.shape)
                assert errand is None or errand._work is None, "it is not waited for"
        start(group, *args, **kwargs)

    model, step = block(**WAYS)
    with (
        kept("expect", expect, clones_of_call.Homecoming),
        kept("start_grad_sync", note, _ParamAndGradBucketGroup),
    ):
        step()
    assert expected
    for moe in model.module.moe:
        for parameter in moe.experts.parameters():
            # Only scaled since, by one over the ranks of the whole job.
            assert torch.equal(launched[id(parameter)] / dist.get_world_size(), parameter.main_grad)


class _Logging(Backend):
    """Lanes that are told apart in a log."""

    def __init__(self, log: Log) -> None:
        self._log, self._numbers = log, itertools.count()
        self.lane = Lane.COMPUTE

    @contextlib.contextmanager
    def inside(self, lane: Lane) -> Iterator[None]:  # type: ignore[override]
        self.lane = lane
        yield
        self.lane = Lane.COMPUTE

    def record(self, lane: Lane) -> int:
        number = next(self._numbers)
        self._log.append(("record", lane, number))
        return number

    def wait(self, lane: Lane, event: int) -> None:
        self._log.append(("wait", lane, event))


@contextlib.contextmanager
def logged(log: Log) -> Iterator[None]:
    """Write down what is done to the memory of peers, and in which lane."""
    backend, weights = _Logging(log), {}

    def around(owner: Any, name: str, kind: str) -> Any:
        original = getattr(owner, name)

        def call(self: Any, *args: Any) -> Any:
            log.append((kind, backend.lane, args[0] if kind == "barrier" and args else id(self)))
            if name == "put_matrices":
                weights[args[0].shape[1:]] = id(self)
            return original(self, *args)

        return mock.patch.object(owner, name, call)

    def push(self: Any, *args: Any) -> list[Tensor]:
        results = move(self, *args)
        log.extend(("read", backend.lane, id(rows)) for rows in self._readable[0])
        return results

    def product(self: Any, rows: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if weight.shape[1:] in weights:  # on a GPU the slots lie where the push left them
            log.append(("read", backend.lane, weights[weight.shape[1:]]))
        return multiply(self, rows, weight, *args, **kwargs)

    move, multiply = PeerBuffers.push, TorchGemm.product
    with contextlib.ExitStack() as stack:
        for name, kind in (("put", "put"), ("put_matrices", "put"), ("offer", "offer"),
                           ("offer_matrices", "offer"), ("pull", "pull"),
                           ("add_matrices", "pull")):  # fmt: skip
            stack.enter_context(around(PeerRows, name, kind))
        stack.enter_context(around(FileMemory, "barrier", "barrier"))
        stack.enter_context(kept("push", push, PeerBuffers))
        stack.enter_context(kept("product", product, TorchGemm))
        stack.enter_context(kept("stream_backend", lambda: backend, peer_buffers))
        yield


def races(log: Log, ranks: int = 3) -> list[str]:
    """What nothing orders if so many ranks do that, each at its own pace."""
    order, seen, found = AccessOrder(), {}, []
    everyone = range(ranks)

    def access(kind: str, rank: int, lane: Lane, rows: int) -> None:
        places = {
            "put": [(rows, owner, rank) for owner in everyone],
            "offer": [(rows, rank, rank)],
            "read": [(rows, rank, source) for source in everyone],
            "pull": [(rows, owner, owner) for owner in everyone],
        }[kind]
        for place in places:
            writes = kind in ("put", "offer")
            if order.access((rank, lane), place, 0, 1, writes):
                found.append(f"{kind} in lane {lane.value} of rank {rank}")

    for kind, lane, what in log:
        if kind == "barrier":
            events = [order.record((rank, lane)) for rank in everyone]
            for rank, event in itertools.product(everyone, events):
                order.wait((rank, lane), event)
            continue
        for rank in everyone:
            if kind == "record":
                seen[rank, what] = order.record((rank, lane))
            elif kind == "wait":
                order.wait((rank, lane), seen[rank, what])
            else:
                access(kind, rank, lane, what)
    return found


def logged_step(wire: str, evaluates: bool = False, **fields: Any) -> Log:
    log: Log = []
    with logged(log):
        model, step = block(**{**WAYS, "moe_echo_token_transport": wire, **fields})
        log.clear()  # of the memory's own trial
        step()
        if evaluates:
            with torch.no_grad():
                case = clones.case_of("hot", 2, torch.float32).mine()
                model(case.hidden.view(SEQUENCE, BATCH, -1), case.probs, case.chosen)
        step()
    return log


def check_peers() -> None:
    """No rank writes what another may still read, however late that one is; mutants are noticed.

    Where tokens travel otherwise, nothing of theirs is taken to order ranks.
    """
    assert not races(logged_step("symmetric_memory", evaluates=True))
    log = logged_step("all_gather", evaluates=True)
    assert {("put", Lane.BESIDE), ("read", Lane.COMPUTE)} <= {entry[:2] for entry in log}
    assert not races(log)
    take = PeerBuffers._take

    def without_barriers(buffers: PeerBuffers, *args: Any, **kwargs: Any) -> list[PeerRows]:
        buffers._readable = [[], []]
        return take(buffers, *args, **kwargs)

    def as_if_read(self: Any, movement: Callable[[], Any]) -> Errand:
        return self.transport.run(movement, unread=0)

    for owner, name, mutant in (
        (PeerBuffers, "_take", without_barriers),
        (clones_of_call.Clones, "run", as_if_read),
    ):
        with kept(name, mutant, owner):
            assert any("put in lane beside" in race for race in races(logged_step("all_gather")))
    assert races([entry for entry in log if entry[:2] != ("barrier", Lane.BESIDE)])


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main(globals())
