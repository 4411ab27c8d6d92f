"""The ledger against the allocator, under other hooks, and on devices without memory."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from moe_cases import HIDDEN, forced, layer_config, router_probs, routing_map
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megatron_echo.memory import SavedTensorLedger
from megatron_echo.moe_layer import EchoMoELayer

WIDTH = 32


class Block(nn.Module):
    """A pre-norm MLP whose hidden part runs under ``around``."""

    def __init__(self, around: Callable | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.around = around

    def inner(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.inner(x) if self.around is None else self.around(self.inner, x))


class Model(nn.Module):
    def __init__(self, around: Callable | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block(around) for _ in range(2))
        self.register_buffer("mask", torch.randn(WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) * self.mask
        for layer in self.layers:
            x = layer(x)
        return (x @ self.embedding.weight.T).square().mean()


def model_and_tokens(around: Callable | None = None) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(around), torch.randint(0, 50, (3, 40))


def allocated(run: Callable) -> tuple[object, int]:
    """The function's result, and the bytes that it allocated and did not free."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = run()
    events = profile.profiler.kineto_results.events()
    return result, sum(event.nbytes() for event in events if event.name() == "[memory]")


def rows(ledger: SavedTensorLedger, *fields: str) -> dict[Any, Counter[str]]:
    """Bytes by kind, summed over the entries that agree in some fields."""
    sums: defaultdict[Any, Counter[str]] = defaultdict(Counter)
    for entry in ledger.entries:
        key = tuple(getattr(entry, field) for field in fields)
        kind = "taken" if entry.taken else entry.kind
        sums[key if len(key) > 1 else key[0]][kind] += entry.nbytes
    return sums


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def test_total_is_what_the_allocator_holds():
    model, tokens = model_and_tokens()
    model(tokens)
    with SavedTensorLedger(model) as ledger:
        loss, held = allocated(lambda: model(tokens))
        kept = ledger.live_bytes(("activation",)) + loss.untyped_storage().nbytes()
        assert kept == pytest.approx(held, rel=0.02)
        assert ledger.live_bytes(("weight",)) > 0
        loss.backward()
    assert ledger.live_bytes(("activation", "index", "weight", "buffer")) == 0
    assert ledger.peak_bytes() >= kept - loss.untyped_storage().nbytes()
    assert all(entry.freed_at is not None for entry in ledger.entries)


def test_total_of_our_layer(single_rank):
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = layer_config(1, 2, torch.float32)
    chosen = routing_map("random", 256, 12, 2)
    probs = router_probs(chosen, torch.float32).requires_grad_()
    layer = EchoMoELayer(config, pg_collection=get_default_pg_collection())
    forced(layer, probs, chosen)
    hidden = torch.randn(256, 1, HIDDEN, requires_grad=True)
    layer(hidden)
    with SavedTensorLedger(layer) as ledger:
        (output, _), held = allocated(lambda: layer(hidden))
        assert ledger.live_bytes() + output.nbytes == pytest.approx(held, rel=0.02)
        output.sum().backward()
    assert ledger.live_bytes() == 0
    assert {"experts.linear_fc1", "experts.linear_fc2"} <= {
        f"{e.layer}.{e.module}" for e in ledger.entries if e.kind == "weight"
    }


def test_views_slices_and_aliases_are_counted_once():
    weight = nn.Parameter(torch.randn(8, 16))
    owner = nn.Module()
    owner.weight = weight
    x = torch.randn(16, 16, requires_grad=True)
    with SavedTensorLedger(owner) as ledger:
        y = x.tanh()
        z = (y.t() * y) + y[:, 3:4] * y.view(-1)[:1]
        z = z @ weight[2:].t()
    kinds = {e.kind: e for e in ledger.entries}
    assert kinds["weight"].nbytes == weight.nbytes
    tanh = [e for e in ledger.entries if e.saves > 3]
    assert [e.nbytes for e in tanh] == [y.nbytes]
    assert ledger.live_bytes() == sum(e.nbytes for e in ledger.entries if e.kind == "activation")
    del y, z
    assert ledger.live_bytes() == 0


def test_attribution():
    model, tokens = model_and_tokens()
    wrapped = nn.Module()
    wrapped.module = model
    wrapped.forward = model.forward
    with SavedTensorLedger(wrapped) as ledger:
        for _ in range(2):
            wrapped(tokens).backward()
        with torch.no_grad():
            wrapped(tokens)
        wrapped(tokens)
    per_microbatch = rows(ledger, "microbatch")
    assert list(per_microbatch) == [0, 1, 2]
    assert per_microbatch[0]["activation"] == per_microbatch[1]["activation"] > 0
    layers = rows(ledger, "layer")
    assert layers["layers.0"]["activation"] == layers["layers.1"]["activation"] > 0
    assert layers["embedding"]["index"] == 3 * tokens.nbytes
    assert sum(row["buffer"] for row in layers.values()) == 3 * model.mask.nbytes
    assert rows(ledger, "module").keys() >= {"up", "down", "norm"}


def test_chunks_of_a_virtual_pipeline():
    first, second = Block(), Block()
    with SavedTensorLedger([first, second]) as ledger:
        second(first(torch.randn(2, WIDTH))).sum().backward()
    assert rows(ledger, "layer").keys() == {"chunk0", "chunk1"}


def reference_gradients() -> list[Tensor]:
    model, tokens = model_and_tokens()
    model(tokens).backward()
    return gradients(model)


def offloading(inner: Callable, x: Tensor) -> Tensor:
    """``save_on_cpu`` copies nothing that is on the CPU."""
    with saved_tensors_hooks(lambda t: ("away", t.detach().clone()), lambda packed: packed[1]):
        return inner(x)


def declining(inner: Callable, x: Tensor) -> Tensor:
    """An offloader that leaves everything where it is, in a tuple."""
    with saved_tensors_hooks(lambda t: ("here", t.detach()), lambda packed: packed[1]):
        return inner(x)


@pytest.mark.parametrize(
    ("around", "is_taken"),
    [
        (offloading, True),
        (declining, False),
        (lambda inner, x: checkpoint(inner, x, use_reentrant=False), True),
    ],
    ids=["offload", "declining", "checkpoint"],
)
def test_hooks_inside_are_watched_and_work(around, is_taken):
    plain, tokens = model_and_tokens()
    with SavedTensorLedger(plain) as expected:
        plain_loss = plain(tokens)
    model, tokens = model_and_tokens(around)
    with SavedTensorLedger(model) as ledger:
        loss = model(tokens)
        if is_taken:
            assert ledger.live_bytes() < expected.live_bytes() / 2
            assert any(entry.taken for entry in ledger.entries)
        else:
            assert ledger.live_bytes() == expected.live_bytes()
        del plain_loss
        assert expected.live_bytes() == 0
        loss.backward()
    assert ledger.live_bytes() == 0
    torch.testing.assert_close(gradients(model), reference_gradients(), rtol=0, atol=0)


def test_hooks_outside_are_called():
    model, tokens = model_and_tokens()
    packed = []

    def pack(tensor: Tensor) -> tuple[Tensor]:
        packed.append(tensor)
        return (tensor.clone(),)

    with saved_tensors_hooks(pack, lambda held: held[0]):
        with SavedTensorLedger(model) as ledger:
            loss = model(tokens)
        seen = len(packed)
        model(tokens)
    assert len(packed) == 2 * seen
    assert sum(entry.saves for entry in ledger.entries) == seen
    loss.backward()
    torch.testing.assert_close(gradients(model), reference_gradients(), rtol=0, atol=0)


def test_two_ledgers_and_everything_put_back():
    push = torch._C._autograd._push_saved_tensors_default_hooks
    model, tokens = model_and_tokens()
    with SavedTensorLedger(model) as outer, SavedTensorLedger(model) as inner:
        loss = model(tokens)
    assert inner.live_bytes() == outer.live_bytes() > 0
    with pytest.raises(RuntimeError, match="used before"):
        inner.__enter__()
    del loss
    assert inner.live_bytes() == outer.live_bytes() == 0
    assert torch._C._autograd._push_saved_tensors_default_hooks is push
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_recomputation_is_not_part_of_a_microbatch():
    def again(inner: Callable, x: Tensor) -> Tensor:
        return checkpoint(inner, x, use_reentrant=True)

    model, tokens = model_and_tokens(again)
    with SavedTensorLedger(model) as ledger:
        loss = model(tokens)
        kept = ledger.live_bytes()
        loss.backward()
    assert ledger.peak_bytes() > kept
    again_rows = [e for e in ledger.entries if e.microbatch is None]
    assert {e.layer for e in again_rows} >= {"layers.0", "layers.1"}
    assert {e.module for e in again_rows} >= {"up", "down", "norm"}


def test_an_exception_in_a_module_keeps_the_paths_right():
    def fail(inner: Callable, x: Tensor) -> Tensor:
        raise KeyError

    model, tokens = model_and_tokens(fail)
    with SavedTensorLedger(model) as ledger:
        with pytest.raises(KeyError):
            model(tokens)
        model.layers[0].around = model.layers[1].around = None
        model(tokens)
    assert {e.microbatch for e in ledger.entries} == {0, 1}


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_without_memory(kind):
    real, tokens = model_and_tokens()
    with SavedTensorLedger(real) as expected:
        real(tokens)
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        model, tokens = Model(), torch.zeros(3, 40, dtype=torch.int64)
        with SavedTensorLedger(model) as ledger:
            model(tokens).backward()
    assert ledger.live_bytes() == 0
    assert rows(ledger, "layer", "module") == rows(expected, "layer", "module")


def test_reports(tmp_path):
    model, tokens = model_and_tokens()
    with SavedTensorLedger(model) as ledger:
        model(tokens).backward()
    ledger.write_json(tmp_path / "ledger.json")
    written = json.loads((tmp_path / "ledger.json").read_text())
    assert written["peak_bytes"] == ledger.peak_bytes() > 0
    assert len(written["entries"]) == len(ledger.entries)
    ledger.plot(tmp_path / "ledger.png")
    assert (tmp_path / "ledger.png").stat().st_size > 5000
