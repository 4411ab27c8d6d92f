"""Static shapes of the MoE layer with cloned experts, on pretended ranks."""

import re
from typing import Any

import moe_cases
import pytest
import torch
from moe_cases import (
    HIDDEN,
    ShapeRecorder,
    experts_for,
    forced,
    router_probs,
    routing_map,
)
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from unit_tests import test_moe_layer_shapes as without_clones
from unit_tests.test_moe_layer_shapes import (
    BATCH,
    KINDS,
    SEQUENCE,
    TOKENS,
    TOPK,
    WEIGHTS,
    Stages,
    groups_of,
    transports,
    values_of,
)

from megatron_echo.call_roles import Role
from megatron_echo.experts.clones import WeightPool
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.precision import FORMATS
from megatron_echo.step.step_end import StepEnd

ranks = without_clones.ranks  # the fixture


def build(
    ranks: int, wire: str, dtype: torch.dtype, slots: int | None, **fields: Any
) -> EchoMoELayer:
    """A layer with S slots on each rank; None: as many as experts."""
    fields["moe_num_echo_experts"] = experts_for(ranks) if slots is None else slots * ranks
    return without_clones.build(ranks, wire, dtype, **fields)


@transports
@groups_of(8, slow=(64,))
@pytest.mark.parametrize("slots", [1, 2, None])
def test_meta_tensors(ranks: int, wire: str, slots: int | None) -> None:
    """Forward and backward in bf16 with Megatron's router: no value is there to be read."""
    again = slots != 2
    layer = build(
        ranks, wire, torch.bfloat16, slots, moe_router_dtype="fp32",
        moe_echo_recompute_expert_dispatch=again, moe_echo_row_alignment=16 if again else 1,
        add_bias_linear=slots == 2,
    ).to("meta")  # fmt: skip
    shape = (SEQUENCE, BATCH, HIDDEN)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    output, _ = layer(hidden)
    output.sum().backward()
    assert (output.shape, output.dtype, output.device.type) == (shape, torch.bfloat16, "meta")
    assert hidden.grad is not None
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape
    per_rank = experts_for(ranks) // ranks
    stacks = WeightPool.of(layer.config).stacks
    assert {len(stack) for stack in stacks} == {per_rank + (per_rank if slots is None else slots)}
    assert all(stack.is_meta and stack.dtype == torch.bfloat16 for stack in stacks)
    StepEnd.of(layer.config).overflow.check()


@groups_of(8)
@pytest.mark.parametrize("slots", [1, 0])
@pytest.mark.parametrize("precision", ["fp8-rowwise", "mxfp8"])
def test_meta_tensors_in_fp8(
    ranks: int, slots: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's rules for its products on a GPU, strides of the stacks among them, are kept."""
    width = FORMATS[precision].alignment
    monkeypatch.setattr(moe_cases, "HIDDEN", width)
    layer = build(
        ranks, "all_gather", torch.bfloat16, slots, moe_router_dtype="fp32",
        moe_ffn_hidden_size=32, moe_echo_expert_precision=precision,
    ).to("meta")  # fmt: skip
    shape = (SEQUENCE, BATCH, width)
    hidden = torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    output, _ = layer(hidden)
    output.sum().backward()
    assert (output.shape, output.dtype) == (shape, torch.bfloat16)
    grads = [hidden.grad, *(parameter.grad for parameter in layer.parameters())]
    assert all(grad is not None and grad.dtype == torch.bfloat16 for grad in grads)
    assert all(rows % width == 0 for rows in map(layer.token_dispatcher.buffer_rows, (1, 7, 4096)))


@groups_of(8, 64)
@pytest.mark.parametrize("slots", [1, 2, None])
def test_rows_of_auto(ranks: int, slots: int | None) -> None:
    """With few slots 1.25 times perfect balance; evaluation has room for the worst routing."""
    dispatcher = build(ranks, "all_gather", torch.float32, slots).token_dispatcher
    share = 1.02 if slots is None else 1.25
    assert 4096 * TOPK <= dispatcher.buffer_rows(4096) <= 1.04 * share * 4096 * TOPK
    dispatcher.role = Role.UNRECORDED
    if slots is not None:
        assert dispatcher.buffer_rows(4096) >= ranks * 4096 * TOPK


def traced(layer: EchoMoELayer, kind: str, mode: str = "real") -> GraphModule:
    """The graph of forward and backward; map, probabilities and weights are its inputs."""
    stages = Stages(layer)

    def both(
        hidden: Tensor, probs: Tensor, chosen: Tensor, grad: Tensor, fc1: Tensor, fc2: Tensor
    ) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (hidden, probs, fc1, fc2)]
        weights = dict(zip(WEIGHTS, leaves[2:], strict=True))
        output = torch.func.functional_call(stages, weights, (leaves[0], leaves[1], chosen))
        return output.detach(), *torch.autograd.grad(output, leaves, grad)

    chosen = routing_map(kind, TOKENS, layer.config.num_moe_experts, TOPK)
    hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, dtype=torch.bfloat16)
    probs = router_probs(chosen, torch.float32)
    weights = [stages.get_parameter(name).detach() for name in WEIGHTS]
    trace = make_fx(both, tracing_mode=mode, _allow_non_fake_inputs=mode != "real")
    return trace(hidden, probs, chosen, torch.randn_like(hidden), *weights)


@pytest.mark.parametrize(
    ("ranks", "slots", "wire", "again", "kinds"),
    [
        pytest.param(2, None, "all_gather", False, ("hot", "no tokens"), marks=pytest.mark.slow),
        (2, 1, "all_to_all", True, ("hot", "balanced")),
        pytest.param(8, None, "all_to_all", True, ("hot", "padding"), marks=pytest.mark.slow),
    ],
    indirect=["ranks"],
    ids=["2_ranks-all_slots", "2_ranks-one_slot", "8_ranks-all_slots"],
)
def test_the_graph_is_the_same_for_every_routing(
    ranks: int, slots: int | None, wire: str, again: bool, kinds: tuple[str, ...]
) -> None:
    """Its text, in which a value that had been read would be a constant, and all its shapes."""
    graphs = []
    for kind in kinds:
        fields = {"moe_echo_recompute_expert_dispatch": again, "moe_echo_row_alignment": 4}
        layer = build(ranks, wire, torch.bfloat16, slots, **fields)
        graphs.append(traced(layer, kind))
    codes = {graph.code for graph in graphs}
    assert len(codes) == 1
    # Counts; weights of fc1 and fc2 there, there again, and their gradients back, for all slots at
    # once; tokens.
    collectives = 1 + 2 * (3 if again else 2) + 7
    assert len(re.findall(r"torch\.ops\.c10d", codes.pop())) == collectives
    shapes = {tuple((t.shape, t.stride(), t.dtype) for t in values_of(g, Tensor)) for g in graphs}
    assert len(shapes) == 1
    assert len(shapes.pop()) > 200


@groups_of(2)
def test_no_size_is_data(ranks: int) -> None:
    """Without any values: no size is unbacked, and each is a number."""
    layer = build(ranks, "all_gather", torch.bfloat16, 1)
    graph = traced(layer, "random", "fake")
    values = values_of(graph, Tensor, torch.SymInt, torch.SymBool, torch.SymFloat)
    assert not any(free_unbacked_symbols(value) for value in values)
    assert all(type(size) is int for t in values_of(graph, Tensor) for size in t.shape)


@transports
@groups_of(4)
@pytest.mark.parametrize("slots", [1, None])
def test_every_tensor_is_the_same_size_for_every_routing(
    ranks: int, wire: str, slots: int | None
) -> None:
    """Operators, shapes, strides and dtypes in forward and backward of the whole layer."""
    seen = set()
    for kind in KINDS:
        layer = build(ranks, wire, torch.float32, slots)
        chosen = routing_map(kind, TOKENS, experts_for(ranks), TOPK)
        probs = router_probs(chosen, torch.float32).requires_grad_()
        hidden = torch.randn(SEQUENCE, BATCH, HIDDEN, requires_grad=True)
        with ShapeRecorder() as recorder:
            output, _ = forced(layer, probs, chosen)(hidden)
            output.backward(torch.ones_like(output))
        seen.add(tuple(recorder.made))
    assert len(seen) == 1
    assert len(seen.pop()) > 200
