"""The tripwire sees every construct that reads on the host, and nothing that does not."""

import contextlib
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor

from megatron_echo.planner import plan_clones
from megatron_echo.planner.kernels import plan_tensors
from megatron_echo.testing import Hit, HostSyncError, no_host_sync

Construct = Callable[[Tensor], object]


def branch(t: Tensor) -> int:
    return 1 if t.sum() > 0 else 0


# Name -> the kind that is reported and the construct, which gets a float tensor of shape [4].
READS: dict[str, tuple[str, Construct]] = {
    "item": ("Tensor.item", lambda t: t.sum().item()),
    "int": ("Tensor.__int__", lambda t: int(t.sum())),
    "float": ("Tensor.__float__", lambda t: float(t.sum())),
    "complex": ("Tensor.__complex__", lambda t: complex(t.sum())),
    "bool": ("Tensor.__bool__", lambda t: bool(t.sum())),
    "not": ("Tensor.__bool__", lambda t: not t.sum()),
    "compare": ("Tensor.__bool__", lambda t: max(t[0], t[1])),
    "range": ("Tensor.__index__", lambda t: range(t.sum().long())),
    "list index": ("Tensor.__index__", lambda t: [1, 2, 3, 4, 5][t[0].long()]),
    "slice": ("Tensor.__index__", lambda t: t[: t[0].long()]),
    "0-d index": ("aten._local_scalar_dense", lambda t: t[t[0].long()]),
    "size from a tensor": ("aten._local_scalar_dense", lambda t: torch.arange(t[0])),
    "narrow": ("aten._local_scalar_dense", lambda t: torch.narrow(t, 0, t[0].long(), 1)),
    "tolist": ("Tensor.tolist", lambda t: t.tolist()),
    "cpu": ("Tensor.cpu", lambda t: t.cpu()),
    "to cpu": ("Tensor.to", lambda t: t.to("cpu")),
    "to cpu by keyword": ("Tensor.to", lambda t: t.to(device=torch.device("cpu"), dtype=t.dtype)),
    "to cpu without waiting": ("Tensor.to", lambda t: t.to("cpu", non_blocking=True)),
    "module to cpu": ("Tensor.to", lambda t: torch.nn.Linear(1, 1, bias=False).to("cpu")),
    "numpy": ("Tensor.numpy", lambda t: t.numpy()),
    "np.asarray": ("Tensor.__array__", lambda t: np.asarray(t)),
    "format a scalar": ("Tensor.__format__", lambda t: f"{t.sum():.3f}"),
    "format": ("Tensor.__format__", lambda t: f"{t}"),
    "repr": ("Tensor.__repr__", lambda t: repr(t)),
    "str": ("Tensor.__repr__", lambda t: str(t)),
    "in": ("Tensor.__contains__", lambda t: 3 in t),
    "is_nonzero": ("Tensor.is_nonzero", lambda t: t.sum().is_nonzero()),
    "torch.is_nonzero": ("aten._local_scalar_dense", lambda t: torch.is_nonzero(t.sum())),
    "equal": ("aten.equal", lambda t: torch.equal(t, t)),
    "allclose": ("aten.allclose", lambda t: torch.allclose(t, t)),
    "nonzero": ("aten.nonzero", lambda t: t.nonzero()),
    "where(mask)": ("aten.nonzero", lambda t: torch.where(t > 0)),
    "argwhere": ("aten.nonzero", lambda t: torch.argwhere(t)),
    "masked_select": ("aten.masked_select", lambda t: t.masked_select(t > 0)),
    "t[mask]": ("aten.index", lambda t: t[t > 0]),
    "t[uint8 mask]": ("aten.index", lambda t: t[(t > 0).byte()]),
    "t[mask] = tensor": ("aten.index_put_", lambda t: t.clone().__setitem__(t > 0, t[0])),
    "index_put(mask)": ("aten.index_put", lambda t: t.index_put((t > 0,), t[0])),
    "unique": ("aten._unique2", lambda t: torch.unique(t)),
    "unique_consecutive": ("aten.unique_consecutive", lambda t: t.unique_consecutive()),
    "repeat_interleave": ("aten.repeat_interleave", lambda t: t.repeat_interleave(t.long())),
    "bincount": ("aten.bincount", lambda t: torch.bincount(t.long(), minlength=8)),
    "masked_fill(tensor)": ("aten.masked_fill", lambda t: t.masked_fill(t > 0, t[0])),
    "index_fill(tensor)": ("aten.index_fill", lambda t: t.index_fill(0, t.long() % 4, t[0])),
    "inverse": ("aten._linalg_check_errors", lambda t: torch.linalg.inv(torch.diag(t))),
    "one_hot": ("torch.nn.functional.one_hot", lambda t: torch.nn.functional.one_hot(t.long())),
    "tensor of tensors": ("torch.tensor", lambda t: torch.tensor([t[0], t[1]])),
    "nested tensors": ("torch.as_tensor", lambda t: torch.as_tensor([[1.0, 2.0], (t[0], t[1])])),
    "as_tensor to cpu": ("torch.as_tensor", lambda t: torch.as_tensor(t, device="cpu")),
    "new_tensor": ("Tensor.new_tensor", lambda t: t.new_tensor([t[0], t[1]])),
    "synchronize": ("torch.cuda.synchronize", lambda t: torch.cuda.synchronize()),
    "accelerator": ("torch.accelerator.synchronize", lambda t: torch.accelerator.synchronize()),
    "event wait": ("torch.cuda.Event.synchronize", lambda t: torch.cuda.Event().synchronize()),
    "event query": ("torch.cuda.Event.query", lambda t: torch.cuda.Event().query()),
    "stream wait": ("torch.cuda.Stream.synchronize", lambda t: torch.cuda.Stream().synchronize()),
    "stream query": ("torch.cuda.Stream.query", lambda t: torch.cuda.current_stream().query()),
}

ALLOWED: dict[str, Construct] = {
    "shapes": lambda t: (t.shape, t.size(0), len(t), t.numel(), t.stride(), t.dim()),
    "attributes": lambda t: (t.device, t.dtype, t.is_cpu, t.requires_grad, t is None, id(t)),
    "print of a shape": lambda t: f"{t.shape} {t.device} {t.dtype}",
    "unbind": lambda t: [q * 2 for q in t.unbind()],
    "iterate": lambda t: [q * 2 for q in t],
    "split": lambda t: t.split([1, 3]),
    "where": lambda t: torch.where(t > 0, t, 0.0),
    "masked_fill": lambda t: t.masked_fill(t > 0, 0.0),
    "repeat_interleave": lambda t: t.repeat_interleave(t.long(), output_size=7),
    "repeat_interleave by a number": lambda t: t.repeat_interleave(2),
    "int index": lambda t: t[t.long() % 4],
    "int index and None": lambda t: t[None, t.long() % 4],
    "t[mask] = number": lambda t: t.clone().__setitem__(t > 0, 0.0),
    "t[mask of rows] = number": lambda t: t.view(2, 2).clone().__setitem__(t[:2] > 0, 0.0),
    "int index_put": lambda t: t.clone().__setitem__(t.long() % 4, 0.0),
    "accumulate": lambda t: t.index_put((t.long() % 4,), t, accumulate=True),
    "python index": lambda t: (t[1], t[:2], t[-1:], t[..., None]),
    "sort": lambda t: (t.sort(stable=True), t.argsort(), t.topk(2), t.cumsum(0)),
    "scatter": lambda t: torch.zeros(8).scatter_add(0, t.long(), t),
    "gather": lambda t: t.gather(0, t.long() % 4),
    "searchsorted": lambda t: torch.searchsorted(t.cumsum(0), t),
    "counts": lambda t: torch.zeros(8).index_add_(0, t.long(), torch.ones(4)),
    "one_hot": lambda t: torch.nn.functional.one_hot(t.long(), 8),
    "nonzero_static": lambda t: torch.nonzero_static(t, size=4),
    "arithmetic": lambda t: (t + t[0]) * 2 / t.sum() - t**2,
    "any": lambda t: (t > 0).any() & (t > 0).all() & ~t.isnan().any(),
    "to dtype": lambda t: (t.to(torch.float64), t.to(dtype=torch.int32), t.half(), t.long()),
    "to another tensor's": lambda t: t.to(torch.empty(1, dtype=torch.float64)),
    "to cuda": lambda t: (t.to("cuda"), t.to(torch.device("cuda", 0)), t.cuda()),
    "clone and copy": lambda t: (t.clone(), torch.empty(4).copy_(t), t.detach(), t.contiguous()),
    "stack": lambda t: torch.stack([t[0], t[1]]),
    "numbers": lambda t: (torch.tensor([1, 2], device="cuda"), torch.as_tensor(data=[(1, 2)])),
    "new_tensor": lambda t: (t.new_tensor(1), t.new_tensor(data=[1, 2], dtype=torch.int32)),
    "the same tensor": lambda t: (torch.as_tensor(t), torch.asarray(obj=t), t.to(tensor=t)),
    "random": lambda t: (torch.rand(4), torch.randperm(4), torch.dropout(t, 0.5, True)),
    "cross_entropy": lambda t: torch.nn.functional.cross_entropy(t.view(1, 4), t[:1].long()),
    "embedding": lambda t: torch.nn.functional.embedding(t.long() % 4, t.view(4, 1)),
    "streams": lambda t: torch.cuda.current_stream().wait_event(torch.cuda.Event()),
    "event": lambda t: torch.cuda.current_stream().record_event(),
}


class Observed(torch.autograd.Function):
    """The identity; runs a construct in its forward, another in its backward."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: Construct | None, backward: Construct | None) -> Tensor:
        ctx.backward_construct = backward
        if forward is not None:
            forward(x.detach())
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.backward_construct is not None:
            ctx.backward_construct(grad)
        return grad, None, None


VALUES = (1.0, 2.0, 3.0, 1.0)


def run(forward: Construct | None = None, backward: Construct | None = None) -> None:
    x = torch.ones(4, requires_grad=True)
    weights = torch.tensor(VALUES)  # they reach backward as the gradient
    (Observed.apply(x * weights, forward, None) * 1.0).sum().backward()
    out = Observed.apply(x, None, backward)
    torch.autograd.grad(out, x, grad_outputs=weights)


def line_of(construct: Construct) -> str:
    return f"{__file__}:{construct.__code__.co_firstlineno}"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("name", READS)
def test_every_read_is_one_hit_with_its_line(name: str, where: str) -> None:
    kind, construct = READS[name]
    with no_host_sync("record") as sync:
        run(**{where: construct})
    assert sync.hits == [Hit(kind, line_of(construct))]


@pytest.mark.parametrize("name", READS)
def test_every_read_raises_with_its_line(name: str) -> None:
    kind, construct = READS[name]
    with pytest.raises(HostSyncError) as raised, no_host_sync():
        run(backward=construct)
    assert str(raised.value).startswith(f"{kind} at {line_of(construct)} makes the host wait")


@pytest.mark.parametrize("name", ALLOWED)
def test_what_stays_on_the_device_is_no_hit(name: str) -> None:
    with no_host_sync():
        run(ALLOWED[name], ALLOWED[name])


def test_gradients_of_the_allowed_operators_do_not_read() -> None:
    x = torch.randn(6, 4, requires_grad=True)
    index = torch.tensor([3, 1, 1, 0])
    with no_host_sync():
        y = x[index].index_put((index,), x[:4], accumulate=True)
        y = torch.where(y > 0, y, 0.0).repeat_interleave(index, 0, output_size=5)
        y = y.gather(0, index[None]).sort(1).values.cumsum(1).topk(2, 1).values
        y = torch.zeros(4).scatter_add(0, index[:2], y[0]).masked_fill(index > 1, 0.0)
        torch.stack(y.unbind()).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm_does_not_read(dtype: torch.dtype) -> None:
    """Its CPU implementation reads the offsets, but inside one operator; sync-free on SM90."""
    x = torch.randn(32, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, 16, 16, dtype=dtype, requires_grad=True)
    offsets = torch.tensor([8, 8, 24], dtype=torch.int32)
    with no_host_sync():
        y = torch.nn.functional.grouped_mm(x, weight, offs=offsets)
        y.backward(torch.ones_like(y))


@pytest.mark.usefixtures("single_rank")
def test_collectives_of_tensors_do_not_read() -> None:
    x, y = torch.randn(4), torch.empty(4)
    with no_host_sync():
        dist.all_gather_into_tensor(y, x)
        dist.reduce_scatter_tensor(y, x)
        dist.all_to_all_single(y, x)
        dist.all_to_all_single(y, x, [4], [4])
        dist.broadcast(y, 0)
        dist.all_reduce(y, async_op=True).wait()


@pytest.mark.usefixtures("single_rank")
def test_collectives_of_objects_and_barriers_are_hits() -> None:
    with no_host_sync("record") as sync:
        dist.barrier()
        dist.all_gather_object([None], {"tokens": 3})
    assert [hit.kind.rpartition(".")[2] for hit in sync.hits] == ["barrier", "all_gather_object"]


def test_blocking_copies_between_devices_are_hits() -> None:
    """The meta device stands for the GPU."""
    meta, host = torch.empty(2, device="meta"), torch.empty(2)
    with no_host_sync("record") as sync:
        meta.copy_(host, non_blocking=True)
        host.to("meta", non_blocking=True)
        meta.to("meta").copy_(meta)
        assert sync.hits == []
        meta.copy_(host)
        host.to("meta")
    assert [hit.kind for hit in sync.hits] == ["aten.copy_", "aten._to_copy"]


@pytest.mark.parametrize("plan", [plan_clones, plan_tensors])
def test_the_planner_does_not_read(plan: Callable[..., object]) -> None:
    """Neither the reference nor Triton's interpreter as it copies a kernel's arguments."""
    with no_host_sync():
        plan(torch.randint(0, 100, (4, 16)), 2, 0.0, 0, None)


@pytest.mark.usefixtures("single_rank")
def test_recomputation_does_not_read() -> None:
    """Megatron's keeps the states of two random generators and runs backward inside backward."""
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    x = torch.randn(4, requires_grad=True)
    with no_host_sync():
        y = tensor_parallel.checkpoint(lambda t: torch.dropout(t, 0.5, True), False, x)
        torch.utils.checkpoint.checkpoint(torch.sin, y, use_reentrant=False).sum().backward()


def patched() -> tuple[object, ...]:
    """Every attribute that may be replaced, as the classes and modules hold it."""
    owners = (torch, torch.Tensor, torch.cuda, torch.cuda.Event, torch.cuda.Stream, dist)
    owners += (torch.accelerator, torch.nn.functional)
    return tuple(dict(vars(owner)) for owner in owners)


def test_everything_is_put_back() -> None:
    before = patched()
    with no_host_sync("record") as outer:
        during = patched()
        assert during != before
        with no_host_sync("record") as inner:
            torch.ones(1).item()
        assert patched() == during
        torch.ones(1).item()
    assert patched() == before
    assert (len(outer.hits), len(inner.hits)) == (2, 1)
    torch.ones(1).item()
    torch.ones(2).nonzero()
    assert len(outer.hits) == 2


def test_everything_is_put_back_after_an_exception() -> None:
    before = patched()
    with pytest.raises(ZeroDivisionError), no_host_sync(), no_host_sync("record"):
        raise ZeroDivisionError
    with pytest.raises(HostSyncError), no_host_sync(), no_host_sync():
        run(backward=lambda g: g.tolist())
    assert patched() == before
    assert "__bool__" not in vars(torch.Tensor)
    assert torch.ones(1)


def test_one_object_serves_one_block_after_another() -> None:
    sync = no_host_sync("record")
    for _ in range(2):
        with sync:
            torch.ones(1).item()
    assert len(sync.hits) == 2
    with sync, pytest.raises(RuntimeError, match="already active"):
        sync.__enter__()
    sync = no_host_sync()
    with pytest.raises(HostSyncError), sync:
        torch.ones(1).item()
    with sync:
        torch.ones(1)


def test_another_thread_is_watched() -> None:
    def work() -> None:
        torch.ones(2).tolist()

    with no_host_sync("record") as sync:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert sync.hits == [Hit("Tensor.tolist", f"{__file__}:{work.__code__.co_firstlineno + 1}")]


def test_a_swallowed_hit_raises_at_the_end() -> None:
    swallowed = contextlib.suppress(RuntimeError)
    with pytest.raises(HostSyncError, match=r"swallowed: .*item"), no_host_sync(), swallowed:
        torch.ones(1).item()


def test_the_message_names_the_fault_and_the_fix() -> None:
    expected = (
        r"^Tensor\.item at \S+test_no_host_sync\.py:\d+ makes the host wait for a device value\. "
        r"Keep the value on the device, .* no_host_sync\(allow=\[\"test_no_host_sync\.py:"
        r"test_the_message_names_the_fault_and_the_fix\"\]\)\.$"
    )
    with pytest.raises(HostSyncError, match=expected), no_host_sync():
        torch.ones(1).item()


class Host:
    """Code that reads on purpose."""

    def read(self, t: Tensor) -> object:
        return (t.tolist(), t.nonzero())


@pytest.mark.parametrize("function", ["read", "Host.read"])
def test_allowed_code_is_not_recorded(function: str) -> None:
    with no_host_sync(allow=[f"testing/test_no_host_sync.py:{function}"]) as sync:
        run(Host().read, Host().read)
    assert sync.hits == []
    with no_host_sync("record", allow=[f"elsewhere.py:{function}", "sync.py:other"]) as sync:
        run(Host().read, Host().read)
    assert len(sync.hits) == 4


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no mode 'warn'. Use 'raise' or 'record'"):
        no_host_sync("warn")  # type: ignore[arg-type]
    for allow in ("file.py:function", ["file.py"]):
        with pytest.raises(ValueError, match=r"not a collection of 'file:function'"):
            no_host_sync(allow=allow)


def stock_layer(dispatcher: str) -> MoELayer:
    settings = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_token_dispatcher_type=dispatcher,
        add_bias_linear=False,
        gated_linear_unit=True,
        transformer_impl="local",
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    build = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False).submodules.mlp
    return build(config=settings, layer_number=1, pg_collection=get_default_pg_collection())


STOCK_HITS = {
    "allgather": [
        *("dispatch_postprocess Tensor.cpu", "dispatch_postprocess Tensor.item"),
        *("dispatch_postprocess aten.masked_select", "experts Tensor.tolist"),
    ],
    "alltoall": [
        "dispatch_postprocess torch.cuda.Event.synchronize",  # without EP; with it, token_dispatch
        *["dispatch_postprocess Tensor.tolist"] * 4,
        "experts Tensor.tolist",
        *["combine_preprocess Tensor.tolist"] * 2,
    ],
}
"""What Megatron-Core 0.19.2 reads in one layer and microbatch, by stage. On a GPU the all-to-all
dispatcher's copies to the host come on top: ``maybe_move_tensor_to_cpu`` skips CPU tensors."""


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("dispatcher", STOCK_HITS)
def test_stock_dispatchers_light_up(dispatcher: str) -> None:
    layer = stock_layer(dispatcher)
    x = torch.randn(8, 2, 16, requires_grad=True)
    found: list[str] = []

    def observe(owner: object, stage: str, label: str) -> None:
        method = getattr(owner, stage)

        def observed(*args: object, **kwargs: object) -> object:
            with no_host_sync("record") as sync:
                result = method(*args, **kwargs)
            found.extend(f"{label} {hit.kind}" for hit in sync.hits)
            return result

        setattr(owner, stage, observed)

    for stage in ("dispatch_preprocess", "token_dispatch", "dispatch_postprocess"):
        observe(layer.token_dispatcher, stage, stage)
    for stage in ("combine_preprocess", "token_combine", "combine_postprocess"):
        observe(layer.token_dispatcher, stage, stage)
    observe(layer.experts, "forward", "experts")
    with no_host_sync("record") as forward:
        y, _ = layer(x)
    with no_host_sync("record") as backward:
        y.backward(torch.randn_like(y))
    print(f"{dispatcher}: {len(forward.hits)} hits in forward, {len(backward.hits)} in backward")
    print(*forward.hits, sep="\n")
    assert found == STOCK_HITS[dispatcher]
    assert len(forward.hits) == len(found)
    assert backward.hits == []
    assert all("megatron/core/transformer/moe" in hit.where for hit in forward.hits)
