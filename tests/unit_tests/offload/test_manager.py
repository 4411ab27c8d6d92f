"""The offloader on plain modules: what autograd promises still holds, and nothing is left."""

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_echo.offload import ActivationOffloader, OffloadConfig

WIDTH = 32


class Block(nn.Module):
    """A feed-forward layer whose parts can be switched by the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.register_buffer("scale", torch.linspace(1, 2, WIDTH))
        self.middle: Callable[[Tensor], Tensor] = F.gelu

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.middle(self.up(self.norm(x)))) * self.scale


def model(layers: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(layers)))


def offloader(module: Any, pattern: str = "*.[dnu]*", **fields: Any) -> ActivationOffloader:
    config = OffloadConfig(
        extra_regions={"part": pattern}, **{"min_tensor_bytes": 0, "slab_bytes": 1 << 16, **fields}
    )
    return ActivationOffloader(config).attach(module)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(seed))


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def assert_clean(*offloaders: ActivationOffloader) -> None:
    for each in offloaders:
        assert each.transfers.device_bytes == 0
        assert each.transfers.arena.leased_bytes == 0
        assert not each.transfers.pending
        assert not each._open
        assert not each._chunks
        assert len(each._blobs) == 0
    saved: list[Tensor] = []
    x = torch.ones(2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: x):
        _ = x * x
    assert type((x * x).grad_fn._saved_self) is Tensor  # no hook of a region is left open


def same_as_without(train: Callable[[nn.Module], None], **fields: Any) -> ActivationOffloader:
    plain, offloaded = model(), model()
    train(plain)
    keeper = offloader(offloaded, **fields)
    with keeper.step():
        train(offloaded)
    expected, got = grads(plain), grads(offloaded)
    assert len(expected) == len(got) > 0
    assert all(map(torch.equal, expected, got))
    assert_clean(keeper)
    return keeper


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_gradients(dtype: torch.dtype) -> None:
    def train(module: nn.Module) -> None:
        module.to(dtype)
        for seed in range(3):
            module(inputs(seed).to(dtype)).sum().backward()

    statistics = same_as_without(train).statistics()
    assert statistics["offload/bytes"] > 0
    assert statistics["offload/candidate_bytes"] == statistics["offload/bytes"]
    parts = ("reloaded", "forwarded", "dropped")
    assert statistics["offload/bytes"] == sum(statistics[f"offload/{p}_bytes"] for p in parts)


def test_each_storage_is_copied_once() -> None:
    """Two regions that save one storage copy it once, and autograd gets views of one storage."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Identity()
            self.first.forward = lambda x: x[:, :16] * x[:, 16:]  # type: ignore[method-assign]
            self.second.forward = lambda x: x.exp() * x  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            return self.first(y).sum() + self.second(y).sum()

    module = nn.Sequential(Twice())
    keeper = offloader(module, "0.?*", learning_steps=1)
    plain = inputs().requires_grad_()
    Twice()(plain).backward()
    for _ in range(3):
        x = inputs().requires_grad_()
        with keeper.step():
            module(x).backward()
        assert torch.equal(x.grad, plain.grad)
        assert keeper.statistics()["offload/bytes"] == 2 * x.nbytes  # y, and exp(y)
    assert_clean(keeper)


def test_parameters_and_buffers_stay() -> None:
    """Also where autograd saves a view of them, and after they were bound to other memory."""
    module = model()
    keeper = offloader(module, "?", min_tensor_bytes=1)
    for p in module.parameters():
        p.data = p.detach().clone()
    with keeper.step():
        loss = module(inputs()).sum()
        stored = {blob.identity.cdata for blob in keeper._blobs.values()}
        loss.backward()
    mine = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    assert len(stored) == 3 * 6  # in: norm (with mean and scale), up, gelu, down
    assert not stored & mine


def test_changing_a_saved_tensor_in_place_is_an_error() -> None:
    """As without offload; the shape and the versions are named."""
    for keep in (0, 1 << 30):
        module = model(1)
        keeper = offloader(module, min_tensor_bytes=keep)
        hidden = module[0].up(inputs())  # outside of any step: nothing is offloaded
        keeper.step_begin()
        module[0].middle = lambda x: x.mul(2)
        seen: list[tuple[Tensor]] = []
        record = seen.append
        module[0].down.register_forward_pre_hook(lambda _m, args, record=record: record(args))
        loss = module(inputs()).sum()
        seen[0][0].add_(1)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1"):
            loss.backward()
        del loss, hidden
        seen.clear()
        keeper.step_abort()
        assert_clean(keeper)


def test_backward_twice() -> None:
    def train(module: nn.Module) -> None:
        loss = module(inputs()).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    same_as_without(train)


def test_second_derivatives() -> None:
    def train(module: nn.Module) -> None:
        x = inputs().requires_grad_()
        (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
        slope.pow(2).sum().backward()

    same_as_without(train)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation(reentrant: bool) -> None:
    def train(module: nn.Module) -> None:
        x = inputs().requires_grad_()
        for block in module:
            assert isinstance(block, Block)
            block.middle = lambda y: checkpoint(F.gelu, y, use_reentrant=reentrant)
        for seed in range(2):
            module(inputs(seed) + x).sum().backward()

    same_as_without(train)


def test_backward_in_another_thread() -> None:
    def train(module: nn.Module) -> None:
        loss = module(inputs()).sum()
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    same_as_without(train)


def test_branches_that_backward_never_reaches() -> None:
    def train(module: nn.Module) -> None:
        unused = module(inputs(1))
        module(inputs(2)).sum().backward()
        del unused

    keeper = same_as_without(train)
    assert keeper.statistics()["offload/dropped_bytes"] > 0


def test_a_graph_that_outlives_its_step() -> None:
    plain, module = model(), model()
    keeper = offloader(module)
    with keeper.step():
        loss = module(inputs()).sum()
    assert keeper.statistics()["offload/live_storages"] > 0
    with keeper.step():
        module(inputs(2)).sum().backward()
        loss.backward()
        del loss
    for seed in (2, 1):
        plain(inputs(seed)).sum().backward()
    assert all(map(torch.equal, grads(plain), grads(module)))
    assert_clean(keeper)


class Fault(Exception):
    pass


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("place", ["norm", "up", "down"])
def test_exceptions(where: str, layer: int, place: str) -> None:
    """In a region, in forward or backward: nothing is left and the next step is right."""
    plain, module = model(), model()
    keeper = offloader(module)

    def fail(*_: Any) -> None:
        raise Fault

    part = getattr(module[layer], place)
    hooks = {
        "forward": lambda: part.register_forward_hook(fail),
        "backward": lambda: part.register_full_backward_hook(fail),
    }
    hook = hooks[where]()
    with pytest.raises(Fault) as caught, keeper.step():
        module(inputs()).sum().backward()
    hook.remove()
    del caught  # with the frames that hold the graph
    gc.collect(1)
    assert_clean(keeper)
    module.zero_grad()
    with keeper.step():
        module(inputs()).sum().backward()
    plain(inputs()).sum().backward()
    assert all(map(torch.equal, grads(plain), grads(module)))
    assert_clean(keeper)


def test_evaluation_is_left_alone() -> None:
    """First, between microbatches, and within a step: neither plan nor counters see it."""
    module = model()
    keeper = offloader(module, learning_steps=1)
    seen = []
    for _ in range(3):
        with torch.no_grad():
            module(inputs())
        with keeper.step():
            outputs = [module(inputs(seed)) for seed in range(2)]
            with torch.no_grad():
                module(inputs())
            for output in outputs:
                output.sum().backward()
            del outputs, output
        statistics = keeper.statistics()
        seen.append(statistics["offload/candidate_bytes"])
        assert_clean(keeper)
    assert len(set(seen)) == 1
    assert len(keeper._scheduler._plans) == 1


def test_evaluation_first() -> None:
    module = model()
    keeper = offloader(module, learning_steps=1)
    with keeper.step(), torch.no_grad():
        module(inputs())
    assert keeper.forecast_bytes is None
    for _ in range(2):
        with keeper.step():
            module(inputs()).sum().backward()
    assert keeper.forecast_bytes == keeper.statistics()["offload/peak_device_bytes"] > 0


def test_two_offloaders() -> None:
    """On two models whose passes are interleaved."""
    plain, modules = [model(), model(2)], [model(), model(2)]
    keepers = [offloader(modules[0]), offloader(modules[1], "*.up")]
    for pair in (plain, modules):
        losses = [module(inputs(seed)).sum() for seed in range(2) for module in pair]
        for loss in losses:
            loss.backward()
        del losses, loss
    for keeper in keepers:
        keeper.step_end()
    for one, other in zip(plain, modules, strict=True):
        assert all(map(torch.equal, grads(one), grads(other)))
    assert_clean(*keepers)
    assert all(keeper.statistics()["offload/bytes"] > 0 for keeper in keepers)


def test_model_chunks() -> None:
    """Each chunk is a region root of its own, in any order of passes."""
    chunks = [model(1), model(1)]
    keeper = ActivationOffloader(
        OffloadConfig(extra_regions={"part": "*.up"}, min_tensor_bytes=0)
    ).attach(chunks)
    middle = chunks[0](inputs())
    loss = chunks[1](middle).sum()
    loss.backward()
    del middle, loss
    keeper.step_end()
    assert keeper.statistics()["offload/bytes"] == 2 * 8 * WIDTH * 4
    assert_clean(keeper)


def test_a_module_that_is_called_twice() -> None:
    def train(module: nn.Module) -> None:
        module(module(inputs())).sum().backward()
        assert isinstance(module, nn.Sequential)
        module[0].middle = lambda x: module[0].up(F.gelu(x)[:, :WIDTH])
        module(inputs()).sum().backward()

    same_as_without(train)


def test_fraction_zero_attaches_nothing() -> None:
    module = model()
    keeper = offloader(module, fraction=0.0)
    assert not module[0].up._forward_hooks
    with keeper.step():
        module(inputs()).sum().backward()
    assert keeper.statistics()["offload/bytes"] == 0


def test_small_storages_and_parts_of_large_ones_stay() -> None:
    module = model(1)
    large = torch.randn(64, 10 * WIDTH)
    keeper = offloader(module, "?.up", min_tensor_bytes=100)
    module[0].norm = nn.Identity()
    with keeper.step():
        module(large[:8, :WIDTH]).sum().backward()
        module(inputs()[:, :WIDTH].clone()).sum().backward()
        module(torch.ones(0, WIDTH)).sum().backward()
    statistics = keeper.statistics()
    assert statistics["offload/kept_view_bytes"] == large.nbytes
    assert statistics["offload/bytes"] == 8 * WIDTH * 4
    assert statistics["offload/candidate_bytes"] == large.nbytes + 8 * WIDTH * 4


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_every_bit_comes_back(dtype: torch.dtype) -> None:
    """NaN payloads, negative zeros, all shapes and strides, whatever the dtype."""
    random_bytes = torch.randint(256, (4096,), dtype=torch.uint8)
    size = 4096 // torch.empty(0, dtype=dtype).element_size()
    raw = (random_bytes & 1 if dtype == torch.bool else random_bytes).view(dtype)[:size]
    square = raw[:256].view(16, 16)

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> Tensor:
            ctx.save_for_backward(*tensors)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            for got, sent in zip(ctx.saved_tensors, originals, strict=True):
                assert got.dtype == sent.dtype
                assert got.shape == sent.shape
                assert got.stride() == sent.stride()
                assert got.storage_offset() == sent.storage_offset()
                assert got.data_ptr() != sent.data_ptr() or got.numel() == 0
                same = got.contiguous().view(-1).view(torch.uint8)
                assert torch.equal(same, sent.contiguous().view(-1).view(torch.uint8))
            return (grad,) + (None,) * len(originals)

    originals = (raw, square, square.t(), square[2:10, 3:9], raw[0], raw[7:7])

    class Saver(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Save.apply(x, *originals)

    module = nn.Sequential(Saver())
    keeper = offloader(module, "0")
    with keeper.step():
        loss = module(torch.ones(1, requires_grad=True)).sum()
        keeper.transfers.trim(0)
        loss.backward()
        del loss
    assert keeper.statistics()["offload/bytes"] == raw.untyped_storage().nbytes()
    assert_clean(keeper)


def test_originals_are_really_freed() -> None:
    """In forward, while the graph lives; what something else keeps is kept in the next plan."""
    module = model()
    keeper = offloader(module, "*.up", learning_steps=1)
    held = []
    module[1].up.register_forward_pre_hook(lambda _module, args: held.append(args[0]))
    for kept in (0, 8 * WIDTH * 4):
        held.clear()
        with keeper.step():
            loss = module(inputs()).sum()
            keeper.transfers.trim(0)
            alive = [not blob.identity.expired() for blob in keeper._blobs.values()]
            assert alive[:2] == [False, True]
            loss.backward()
            del loss
        assert keeper.statistics()["offload/kept_held_bytes"] == kept
    assert_clean(keeper)


def test_names_that_save_nothing() -> None:
    module = model()
    for block in module:
        block.norm = nn.Identity()
    keeper = offloader(module, "*.norm", strict=True)
    module(inputs()).sum().backward()
    with pytest.raises(ValueError, match="Nothing was saved for backward in part"):
        keeper.step_end()
    with pytest.raises(ValueError, match="No module belongs to part"):
        offloader(module, "*.missing", strict=True)
    offloader(module, "*.missing")  # a warning


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules": ("core_atn",)}, "'core_atn' is not known"),
        ({"modules": ("router", "router")}, "'router' is named twice"),
        ({"fraction": 1.5}, "fraction 1.5"),
        ({"policy": "latest"}, "'latest' is not known"),
        ({"min_tensor_bytes": -1}, "min_tensor_bytes is -1"),
        ({"max_slowdown": -0.1}, "max_slowdown is -0.1"),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OffloadConfig(**fields)


def test_detach() -> None:
    module = model()
    before = copy.deepcopy([len(m._forward_hooks) for m in module.modules()])
    keeper = offloader(module)
    with pytest.raises(RuntimeError, match="attached already"):
        keeper.attach(module)
    loss = module(inputs()).sum()
    keeper.detach()
    assert [len(m._forward_hooks) for m in module.modules()] == before
    loss.backward()
    del loss
    keeper.step_end()
    assert_clean(keeper)
