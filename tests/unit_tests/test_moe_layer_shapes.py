"""Static shapes of the MoE layer: meta tensors, traced graphs, and every tensor it makes.

The ranks of these tests are pretended: the collectives of a "fake" group return at once.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from moe_cases import (
    HIDDEN,
    ROUTINGS,
    ShapeRecorder,
    experts_for,
    forced,
    layer_config,
    router_probs,
    routing_map,
)
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves

from megatron_echo.experts.fp8 import WORD
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.record.ledger import KEPT, SavedTensorLedger
from megatron_echo.step.step_end import StepEnd

SEQUENCE, BATCH, TOPK = 6, 2, 3
TOKENS = SEQUENCE * BATCH
KINDS = (*ROUTINGS, "no tokens")
WEIGHTS = ("layer.experts.linear_fc1.weight", "layer.experts.linear_fc2.weight")

transports = pytest.mark.parametrize("wire", ["all_gather", "all_to_all", "symmetric_memory"])
MOST_OPERATORS = {"all_gather": 231, "all_to_all": 372, "symmetric_memory": 356}  # with views


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[int]:
    """An expert-parallel group of this many pretended ranks; this process is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=request.param, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield request.param
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def groups_of(*sizes: int, slow: tuple[int, ...] = ()) -> pytest.MarkDecorator:
    """Parametrizes a test by ``ranks``; those of ``slow`` have the mark of that name."""
    groups = [pytest.param(size, marks=[pytest.mark.slow] * (size in slow), id=f"{size}_ranks")
              for size in (*sizes, *slow)]  # fmt: skip
    return pytest.mark.parametrize("ranks", groups, indirect=True)


def build(ranks: int, wire: str, dtype: torch.dtype, **fields: Any) -> EchoMoELayer:
    fields["moe_echo_token_transport"] = wire
    return EchoMoELayer(layer_config(ranks, TOPK, dtype, **fields))


@transports
@groups_of(1, 8, 64)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"moe_echo_row_alignment": 16},
        {"moe_received_token_capacity": 0.5, "moe_echo_overflow": "drop"},
        {"add_bias_linear": True},
    ],
    ids=["auto", "aligned", "small", "biases"],
)
def test_meta_tensors(ranks: int, wire: str, fields: dict[str, Any]) -> None:
    """The whole layer with Megatron's router, in bf16: no value is there to be read."""
    layer = build(ranks, wire, torch.bfloat16, moe_router_dtype="fp32", **fields).to("meta")
    shape = (SEQUENCE, BATCH, HIDDEN)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    output, bias = layer(hidden)
    output.sum().backward()
    assert bias is None
    assert (output.shape, output.dtype, output.device.type) == (shape, torch.bfloat16, "meta")
    assert hidden.grad is not None
    assert hidden.grad.shape == shape
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
        assert parameter.grad.is_meta
    StepEnd.of(layer.config).overflow.check()


@transports
@groups_of(8)
def test_meta_tensors_in_evaluation(ranks: int, wire: str) -> None:
    layer = build(ranks, wire, torch.bfloat16, moe_router_dtype="fp32").to("meta").eval()
    hidden = torch.empty(SEQUENCE, BATCH, HIDDEN, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        output, _ = layer(hidden)
    assert output.shape == hidden.shape


@transports
@groups_of(8)
def test_few_operators(ranks: int, wire: str) -> None:
    """Each is a kernel on a GPU; no number is made a tensor only to choose between two values."""
    layer = build(ranks, wire, torch.bfloat16, moe_router_dtype="fp32").to("meta")
    shape = (SEQUENCE, BATCH, HIDDEN)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with ShapeRecorder() as recorder:
        layer(hidden)[0].backward(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    names = [name for name, _ in recorder.made]
    assert "aten.scalar_tensor.default" not in names
    assert len(names) <= MOST_OPERATORS[wire]


@transports
@groups_of(8)
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"add_bias_linear": True},
        {"moe_num_echo_experts": 8, "moe_echo_expert_dispatcher_type": "collective"},
        {
            "moe_num_echo_experts": 8, "moe_echo_expert_precision": "fp8-rowwise",
            "moe_ffn_hidden_size": 32,
        },
    ],
    ids=["home", "biases", "clones", "fp8"],
)  # fmt: skip
def test_rows_that_are_kept(ranks: int, wire: str, fields: dict[str, Any]) -> None:
    """The experts' input and the first product, once each; not the activation.

    In FP8 both inputs of products are kept quantised, and the first product as it is.
    """
    layer = build(ranks, wire, torch.bfloat16, moe_router_dtype="fp32", **fields).to("meta")
    shape = (SEQUENCE, BATCH, HIDDEN)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    with SavedTensorLedger(layer) as ledger:
        output, _ = layer(hidden)
    rows = layer.token_dispatcher.buffer_rows(TOKENS)
    of_rows = [e for e in ledger.entries if e.kind in KEPT and e.shape[0] == rows]
    matrices = [entry for entry in of_rows if len(entry.shape) == 2]
    widths = [entry.shape[1] for entry in matrices if entry.dtype == "bfloat16"]
    packed = [entry.shape[1] for entry in matrices if entry.dtype == "int32"]
    fc1, fc2 = layer.experts.linear_fc1, layer.experts.linear_fc2
    if "moe_echo_expert_precision" in fields:
        assert widths == [fc1.weight.shape[1]]
        of_products = [(linear.weight.shape[2] + 16) // WORD.itemsize for linear in (fc1, fc2)]
        assert sorted(packed)[-2:] == sorted(of_products)  # the others are places
    else:
        assert sorted(widths) == sorted([HIDDEN, fc1.weight.shape[1]])
    output.sum().backward()


class Stages(torch.nn.Module):
    """All stages of the layer behind the router."""

    def __init__(self, layer: EchoMoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, probs: Tensor, chosen: Tensor) -> Tensor:
        layer = self.layer
        tokens, pair_probs = layer.dispatch(*layer.preprocess(hidden, probs, chosen))
        output, _ = layer.routed_experts_compute(tokens, pair_probs)
        return layer.postprocess(layer.combine(output), None)


def traced(ranks: int, wire: str, dtype: torch.dtype, kind: str, mode: str) -> GraphModule:
    """The graph of forward and backward; map, probabilities and weights are its inputs."""
    stages = Stages(build(ranks, wire, dtype, moe_echo_row_alignment=4))

    def both(
        hidden: Tensor, probs: Tensor, chosen: Tensor, grad: Tensor, fc1: Tensor, fc2: Tensor
    ) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, probs, fc1, fc2)]
        weights = dict(zip(WEIGHTS, leaves[2:], strict=True))
        output = torch.func.functional_call(stages, weights, (leaves[0], leaves[1], chosen))
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    chosen = routing_map(kind, TOKENS, experts_for(ranks), TOPK)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=dtype)
    probs = router_probs(chosen, torch.promote_types(dtype, torch.float32))
    weights = [stages.get_parameter(name).detach() for name in WEIGHTS]
    inputs = (hidden, probs, chosen, torch.randn_like(hidden), *weights)
    both(*inputs)  # makes buffers, as before a capture
    trace = make_fx(both, tracing_mode=mode, _allow_non_fake_inputs=mode != "real")
    return trace(*inputs)


def values_of(graph: GraphModule, *types: type) -> list[Any]:
    """What the nodes stand for, of these types: tensors, or sizes that are symbols."""
    values = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, types)]


@transports
@pytest.mark.parametrize(
    ("ranks", "dtype", "kinds"),
    [
        pytest.param(8, torch.bfloat16, ("hot", "padding"), id="8_ranks"),
        pytest.param(1, torch.bfloat16, ROUTINGS, id="bf16", marks=pytest.mark.slow),
        pytest.param(8, torch.bfloat16, ROUTINGS, id="8_ranks-bf16", marks=pytest.mark.slow),
        pytest.param(  # has many nodes
            8, torch.float64, ("hot", "padding"), id="8_ranks-fp64", marks=pytest.mark.slow
        ),
    ],
    indirect=["ranks"],
)
def test_the_graph_is_the_same_for_every_routing(
    ranks: int, wire: str, dtype: torch.dtype, kinds: tuple[str, ...]
) -> None:
    """Its text, in which a value that had been read would be a constant, and all its shapes."""
    graphs = [traced(ranks, wire, dtype, kind, "real") for kind in kinds]
    codes = {graph.code for graph in graphs}
    assert len(codes) == 1
    collectives = len(re.findall(r"torch\.ops\.c10d", codes.pop()))
    expected = {"all_gather": 7, "all_to_all": 7, "symmetric_memory": 5}  # barriers, on a CPU
    assert collectives == (0 if ranks == 1 else expected[wire])
    shapes = {tuple((t.shape, t.stride(), t.dtype) for t in values_of(g, Tensor)) for g in graphs}
    assert len(shapes) == 1
    assert len(shapes.pop()) > 100


@groups_of(8)
@pytest.mark.parametrize(
    ("wire", "mode"),
    # Buffers that peers write to cannot have a symbol's size.
    [("all_gather", "fake"), ("all_to_all", "fake"), ("symmetric_memory", "fake"),
     ("all_gather", "symbolic"), pytest.param("all_to_all", "symbolic", marks=pytest.mark.slow)],
)  # fmt: skip
def test_no_size_is_data(ranks: int, wire: str, mode: str) -> None:
    """Without any values: no size is unbacked, and with fixed input sizes each is a number."""
    graph = traced(ranks, wire, torch.bfloat16, "random", mode)
    for value in values_of(graph, Tensor, torch.SymInt, torch.SymBool, torch.SymFloat):
        assert not free_unbacked_symbols(value)
    tensors = values_of(graph, Tensor)
    assert len(tensors) > 100
    if mode == "fake":
        assert all(type(size) is int for tensor in tensors for size in tensor.shape)


@transports
@groups_of(1, 8)
def test_every_tensor_is_the_same_size_for_every_routing(ranks: int, wire: str) -> None:
    """Operators, shapes, strides and dtypes in forward and backward of the whole layer."""
    seen = set()
    for kind in KINDS:
        layer = build(ranks, wire, torch.float32)
        chosen = routing_map(kind, TOKENS, experts_for(ranks), TOPK)
        probs = router_probs(chosen, torch.float32).requires_grad_()
        hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
        with ShapeRecorder() as recorder:
            output, _ = forced(layer, probs, chosen)(hidden)
            output.backward(torch.ones_like(output))
        seen.add(tuple(recorder.made))
    assert len(seen) == 1
    assert len(seen.pop()) > 100
