"""Early frees: what is refused, what is freed, and that a free too early does not go unnoticed."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from moe_cases import HIDDEN, layer_config, router_probs, routing_map
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from megatron_echo.free_ticket import storage_owners
from megatron_echo.memory import FreeQueue, FreeTicket, SavedTensorLedger
from megatron_echo.moe_layer import EchoMoELayer

TOKENS = 24


class Pending:
    """A communication that ends when somebody waits for it."""

    def __init__(self) -> None:
        self.waited = 0

    def wait(self) -> None:
        self.waited += 1


def values(tensor: Tensor) -> Tensor:
    """A copy of the values, with its own storage."""
    return tensor.detach().clone()


def gather(tokens: Tensor) -> Tensor:
    """A consumer that saves an index only."""
    return tokens.index_select(0, torch.arange(len(tokens)).flip(0))


CONSUMERS: dict[str, tuple[Callable[[Tensor], object], str | None]] = {
    "gather": (gather, None),
    "two sums": (lambda x: (x.sum(0), x.sum(1)), None),
    "dense layer": (nn.Linear(8, 8), "saves it"),
    "square": (lambda x: x * x, "saves it"),
    "part of it": (lambda x: x[2:] * x[:1].sum(), "saves it"),
    "hands it through": (lambda x: x.view(-1, 4), "keeps a reference"),
    "detaches it": (lambda x: x.detach(), "shares its storage"),
    "keeps it": (lambda x: [x], "keeps a reference"),
}


@pytest.mark.parametrize("mode", ["poison", "free"])
@pytest.mark.parametrize("name", CONSUMERS)
def test_one_consumer(name, mode):
    consume, reason = CONSUMERS[name]
    tensor = torch.randn(6, 8, requires_grad=True) * 2
    nbytes = tensor.nbytes
    ticket = FreeTicket(tensor, mode=mode)
    with ticket.consumer():
        held = consume(tensor)
    assert ticket.free() == (reason is None)
    if reason is not None:
        assert reason in ticket.refusal
        assert ticket.freed_bytes == 0
        assert torch.isfinite(tensor).all()
        return
    assert ticket.refusal is None
    assert ticket.freed_bytes == nbytes
    assert tensor.shape == (6, 8)
    assert tensor.untyped_storage().nbytes() == (0 if mode == "free" else nbytes)
    if mode == "poison":
        assert tensor.isnan().all()
    assert held is not None
    assert not ticket.free()  # once


def test_saves_of_earlier_consumers_and_of_the_producer_count():
    x = torch.randn(4, 8, requires_grad=True)
    tensor = x.tanh()  # its own backward reads it
    ticket = FreeTicket(tensor)
    with ticket.consumer():
        first = gather(tensor)
    assert not ticket.free()
    assert "shares" in ticket.refusal
    tensor = x * 2
    ticket = FreeTicket(tensor)
    with ticket.consumer():
        second = tensor * tensor
    with ticket.consumer():
        first = gather(tensor)
    assert not ticket.free()
    assert first is not None
    assert second is not None


def test_a_view_whose_base_is_gone_for_python():
    rows = torch.randn(8, 4, requires_grad=True).clone()[:5]
    ticket = FreeTicket(rows)
    with ticket.consumer():
        gather(rows)
    assert not ticket.free()


def test_under_an_offloader_and_under_the_ledger():
    away: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        away.append(values(tensor))
        return away[-1]

    layer = nn.Linear(8, 8)
    tensor = torch.randn(6, 8, requires_grad=True) * 2
    ticket = FreeTicket(tensor)
    offloader = saved_tensors_hooks(pack, lambda t: t)
    with SavedTensorLedger(layer) as ledger, ticket.consumer(), offloader:
        output = layer(tensor)
    assert not ticket.free()  # the offloader may still be copying
    assert any(torch.equal(tensor, t) for t in away if t.shape == tensor.shape)
    assert ledger.entries
    output.sum().backward()


def test_off_costs_nothing_and_checks_nothing():
    tensor = torch.randn(3)
    ticket = FreeTicket(tensor, mode="off")
    with ticket.consumer():
        assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not ticket.free()
    assert torch.isfinite(tensor).all()


def test_deferred_frees_drain_at_one_place():
    queue = FreeQueue("free")
    tensors = [torch.ones(5), torch.ones(7), torch.ones(9)]
    works = [Pending(), Pending()]
    view = tensors[1][:2]
    for tensor, work in zip(tensors, works):
        ticket = queue.ticket(tensor)
        with ticket.consumer():
            gather(tensor)
        assert not ticket.free(work)
    ticket = queue.ticket(tensors[2])
    with ticket.consumer():
        gather(tensors[2])
    assert ticket.free()
    assert tensors[0].untyped_storage().nbytes() == 20
    assert queue.drain() == 20
    assert [work.waited for work in works] == [1, 1]
    assert [t.untyped_storage().nbytes() for t in tensors] == [0, 28, 0]
    assert queue.freed_bytes == 20 + 36
    assert queue.refusals == {"another tensor shares its storage": 1}
    assert queue.drain() == 0
    assert view.sum() == 2


def test_refused_calls():
    with pytest.raises(ValueError, match="no mode 'later'"):
        FreeTicket(torch.ones(1), mode="later")
    ticket = FreeTicket(torch.ones(1))
    with pytest.raises(RuntimeError, match="No consumer"):
        ticket.free()
    with ticket.consumer():
        pass
    with pytest.raises(RuntimeError, match="no queue"):
        ticket.free(Pending())
    assert ticket.free()
    with pytest.raises(RuntimeError, match="after the free"), ticket.consumer():
        pass
    weight = nn.Parameter(torch.ones(2))
    ticket = FreeTicket(weight)
    with ticket.consumer():
        pass
    assert not ticket.free()
    assert ticket.refusal == "it is a parameter"


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.int32, -1), (torch.int64, -1), (torch.uint8, 255)]
)
def test_poison_of_whole_numbers(dtype, value):
    tensor = torch.arange(4).to(dtype)
    ticket = FreeTicket(tensor, mode="poison")
    with ticket.consumer():
        tensor + 1
    assert ticket.free()
    assert (tensor == value).all()


class Stages:
    """A layer run in stages on detached leaves, as overlapping schedules do it.

    The records hold every stage's argument and output until backward, which goes stage by stage.
    """

    def __init__(self, stages: list[Callable[[Tensor], Tensor]], queue: FreeQueue) -> None:
        self.stages, self.queue = stages, queue
        self.records: list[tuple[Tensor, Tensor]] = []
        self.tickets: list[FreeTicket] = []

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            leaf = x.detach().requires_grad_()
            ticket = self.queue.ticket(leaf, x)
            with ticket.consumer():
                x = stage(leaf)
            self.records.append((leaf, x))
            self.tickets.append(ticket)
            ticket.free()
        return values(x)

    def backward(self, grad: Tensor) -> Tensor:
        for leaf, output in reversed(self.records):
            torch.autograd.backward(output, grad)
            grad = leaf.grad
        return grad


def dispatch_to(ranks: int) -> Callable[[Tensor], Tensor]:
    """Expert parallelism over one rank hands its input through; over more it is a copy."""
    return (lambda x: x) if ranks == 1 else gather


def sort_by(experts: int) -> Callable[[Tensor], Tensor]:
    """With one local expert there is nothing to sort."""
    return (lambda x: x.view(x.shape)) if experts == 1 else gather


def layer_in_stages(kind: str) -> list[Callable[[Tensor], Tensor]]:
    torch.manual_seed(0)
    expert = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    ranks, experts = {"ep1": (1, 4), "one expert": (2, 1), "ep2": (2, 4)}.get(kind, (1, 1))
    if kind == "dense":
        return [nn.LayerNorm(8), expert, nn.Linear(8, 8)]
    return [nn.LayerNorm(8), dispatch_to(ranks), sort_by(experts), expert, gather, gather]


def run_in_stages(kind: str, mode: str) -> tuple[Stages, list[Tensor]]:
    stages = layer_in_stages(kind)
    run = Stages(stages, FreeQueue(mode))
    x = torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(1))
    output = run.forward(x)
    grad = run.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
    weights = [p for s in stages if isinstance(s, nn.Module) for p in s.parameters()]
    return run, [output, grad, *(p.grad for p in weights)]


@pytest.mark.parametrize("mode", ["poison", "free"])
@pytest.mark.parametrize("kind", ["ep1", "one expert", "dense", "ep2"])
def test_stages_give_the_same_gradients(kind, mode):
    _, expected = run_in_stages(kind, "off")
    run, result = run_in_stages(kind, mode)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    freed = [ticket.freed_bytes > 0 for ticket in run.tickets]
    # The norm, the experts and dense layers save their input; a gather frees what it read.
    assert (
        freed
        == {
            "ep1": [False, False, False, False, True, True],
            "one expert": [False, True, False, False, True, True],
            "dense": [False, False, False],
            "ep2": [False, True, True, False, True, True],
        }[kind]
    )


def test_a_free_too_early_is_caught(monkeypatch):
    """Without the refusal the expert's input is gone when its backward pass reads it."""
    _, expected = run_in_stages("ep2", "off")
    monkeypatch.setattr(FreeTicket, "_refuse", lambda self, reason: None)
    _, broken = run_in_stages("ep2", "poison")
    assert torch.isfinite(torch.cat([t.flatten() for t in expected])).all()
    assert not all(torch.isfinite(t).all() for t in broken)


def test_a_real_free_too_early_ends_the_process():
    """Why there is a poison mode: nothing raises, the read goes to address 0."""
    code = """
import torch
from megatron_echo.memory import FreeTicket
FreeTicket._refuse = lambda self, reason: None
x = torch.randn(1 << 20, requires_grad=True) * 2
ticket = FreeTicket(x)
with ticket.consumer():
    y = (x * x).sum()
ticket.free()
y.backward()
"""
    root = Path(__file__).parents[3]
    finished = subprocess.run([sys.executable, "-c", code], cwd=root, check=False)
    assert finished.returncode != 0


@pytest.mark.parametrize("mode", ["off", "poison", "free"])
@pytest.mark.parametrize("kind", ["random", "no tokens", "padding"])
def test_our_layer(single_rank, mode, kind):
    """The experts' output is freed once ``token_combine`` has summed it."""
    results = []
    for this_mode in ("off", mode):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        config = layer_config(1, 2, torch.float32)
        layer = EchoMoELayer(config, pg_collection=get_default_pg_collection())
        chosen = routing_map(kind, TOKENS, 12, 2)
        probs = router_probs(chosen, torch.float32).requires_grad_()
        hidden = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(1))
        dispatcher = layer.token_dispatcher
        tokens, pairs = dispatcher.dispatch_preprocess(hidden.requires_grad_(), chosen, probs)
        tokens, pairs = dispatcher.token_dispatch(tokens, pairs)
        rows, ends, row_probs = dispatcher.dispatch_postprocess(tokens, pairs)
        queue = FreeQueue(this_mode)
        kept = queue.ticket(rows)
        with kept.consumer():
            output, _ = layer.experts(rows, ends, row_probs, dispatcher.clones)
        kept.free()
        ticket = queue.ticket(output)
        with ticket.consumer():
            summed = dispatcher.token_combine(dispatcher.combine_preprocess(output))
        ticket.free()
        if this_mode != "off":
            assert kept.refusal == "a consumer saves it for backward"
            assert ticket.freed_bytes == rows.shape[0] * HIDDEN * 4
        combined = dispatcher.combine_postprocess(summed)
        combined.square().sum().backward()
        results.append([hidden.grad, probs.grad, *(p.grad for p in layer.experts.parameters())])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_owners():
    tensor = torch.ones(3)
    assert storage_owners(tensor) == 1
    other = tensor.detach()
    assert storage_owners(tensor) == 2
    del other
    assert storage_owners(tensor) == 1
