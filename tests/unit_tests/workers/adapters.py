"""Frozen parts of a layer, and adapters in its experts; the argument names a check."""

import contextlib
import itertools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import launch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from moe_cases import HIDDEN, experts_for, forced
from torch import Tensor, nn
from unit_tests.workers.clones import case_of, cloned, plain
from unit_tests.workers.moe_layer import (
    RESULTS,
    TRANSPORTS,
    Problem,
    biases,
    dense,
    errors,
    main,
    report,
    weights,
)

from megatron_echo import cpu_backend
from megatron_echo.config import EchoTransformerConfig
from megatron_echo.dispatch.transports import PeerToPeerWeights
from megatron_echo.experts import adapted
from megatron_echo.experts.fp8 import FP8
from megatron_echo.model_builder import EchoGPTModelBuilder, EchoGPTModelConfig
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

RANK, ALPHA = 3, 6.0
WAYS = ("collective", "p2p", "symmetric_memory")
BOTH = ("linear_fc1", "linear_fc2")


def with_adapters(layer: EchoMoELayer, names: tuple[str, ...] = BOTH) -> EchoMoELayer:
    """Adapters that do something, which is another on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    for name in names:
        linear = adapted(getattr(layer.experts, name), RANK, ALPHA)
        weight = linear.adapter.linear_out.weight
        noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        weight.data.copy_(noise)
    return layer


def adapter_results(layer: EchoMoELayer, case: Problem) -> dict[str, Tensor]:
    """Output and gradients of tokens, and of the adapters by their names."""
    mine = case.mine()
    hidden, probs = (t.clone().requires_grad_() for t in (mine.hidden[:, None], mine.probs))
    layer.zero_grad()
    reads = isinstance(layer.token_dispatcher._weights, PeerToPeerWeights)
    with contextlib.nullcontext() if reads else no_host_sync("raise"):
        output, _ = forced(layer, probs, mine.chosen)(hidden)
        output.backward(mine.weight[:, None])
    StepEnd.of(layer.config).overflow.check()
    assert all(w.grad is None for w in (*weights(layer), *biases(layer)) if not w.requires_grad)
    tensors = (output.detach()[:, 0], hidden.grad[:, 0], probs.grad)
    trained = {n: p.grad for n, p in layer.experts.named_parameters() if ".adapter." in n}
    return dict(zip(RESULTS, tensors, strict=False)) | trained


def dense_results(layer: EchoMoELayer, case: Problem, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The same from a dense loop over experts whose weights have the adapters in them."""
    merged, scale = plain(2, torch.float64), ALPHA / RANK
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for name in names:
        adapter = getattr(layer.experts, name).adapter
        parts[name] = adapter.linear_in.weight.detach(), adapter.linear_out.weight.detach()
        getattr(merged.experts, name).weight.data += scale * parts[name][1] @ parts[name][0]
    found = dense(merged, case)
    for name, grad in zip(BOTH, (found.pop("dfc1"), found.pop("dfc2")), strict=True):
        if name in parts:
            into, out = parts[name]
            found[f"{name}.adapter.linear_in.weight"] = scale * out.mT @ grad
            found[f"{name}.adapter.linear_out.weight"] = scale * grad @ into.mT
    return found


def check_dense() -> None:
    """Adapters in either projection or both, over each transport; without clones too."""
    worst = 0.0
    somewhere, wires = itertools.cycle((BOTH, BOTH[:1], BOTH[1:])), itertools.cycle(TRANSPORTS)
    for kind, way in itertools.product(("hot", "idle rank", "random"), (None, *WAYS)):
        names, wire = next(somewhere), next(wires)
        case = case_of(kind, 2, torch.float64)
        settings = {} if way is None else {"moe_echo_expert_dispatcher_type": way}
        make = plain if way is None else cloned
        layer = make(2, torch.float64, moe_echo_token_transport=wire, **settings)
        found = adapter_results(with_adapters(layer, names), case)
        expected = dense_results(layer, case, names)
        assert set(found) == set(expected)
        worst = max(worst, *errors(found, expected).values())
    assert worst <= 1e-12, worst
    report("worst error with adapters", {"fp64": f"{worst:.1e}"})


def check_no_gradient_of_the_base_travels() -> None:
    """Only matrices as wide as the adapter come home; with biases and in FP8 too."""
    for way, precision in itertools.product(WAYS, ("params-dtype", "fp8-rowwise")):
        layer = cloned(
            2, torch.float32, moe_echo_expert_dispatcher_type=way, add_bias_linear=True,
            moe_echo_expert_precision=precision, moe_ffn_hidden_size=16,
        )  # fmt: skip
        transport, came = layer.token_dispatcher._weights, []
        bring_home = transport.bring_home

        def note(grads: Tensor, *rest: Any, bring: Any = bring_home, came: Any = came) -> Tensor:
            came.append(grads.shape)
            return bring(grads, *rest)

        transport.bring_home = note  # type: ignore[method-assign]
        adapter_results(with_adapters(layer), case_of("hot", 2, torch.float32))
        assert len(came) == 4, (way, precision, came)
        assert all(RANK in shape[1:] for shape in came)
        kept = {buffer.dtype for buffer in layer.experts.parameters()}
        assert FP8 not in kept


def check_frozen_parts() -> None:
    """What is still trained has the bits that it has when nothing is frozen."""
    parts = (
        {"router": "router"},
        {"experts": "experts"},
        {"router": "router", "fc2": "linear_fc2"},
    )
    for way, frozen in itertools.product(WAYS, ({}, *parts)):
        layer = cloned(2, torch.float64, moe_echo_expert_dispatcher_type=way)
        for part in frozen.values():
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and part not in name)
        generator = torch.Generator().manual_seed(dist.get_rank())
        hidden = torch.randn(12, 1, HIDDEN, dtype=torch.float64, generator=generator)
        output, _ = layer(hidden.requires_grad_())
        output.square().sum().backward()
        grads = {"hidden": hidden.grad, **{n: p.grad for n, p in layer.named_parameters()}}
        if not frozen:
            expected = grads
        for name, grad in grads.items():
            if any(part in name for part in frozen.values()):
                assert grad is None, name
            else:
                assert torch.equal(grad, expected[name]), (name, way, frozen)


class Beside(nn.Module):
    """What PEFT libraries put around a linear layer or a router that they find by name."""

    def __init__(self, to_wrap: nn.Module) -> None:
        super().__init__()
        self.to_wrap, width = to_wrap, to_wrap.weight.shape
        self.adapter = nn.Parameter(torch.full(width, 0.01, dtype=to_wrap.weight.dtype))

    def forward(self, x: Tensor, *rest: Any) -> Any:
        delta = F.linear(x, self.adapter)
        if hasattr(self.to_wrap, "gating"):
            return self.to_wrap.routing(self.to_wrap.gating(x) + delta, *rest)
        output, bias = self.to_wrap(x, *rest)
        return output + delta, bias


def gpt(**fields: Any) -> nn.Module:
    """A model of two layers with clones; the same weights on every call."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    ranks = dist.get_world_size()
    config = EchoTransformerConfig(
        num_layers=2, hidden_size=HIDDEN, num_attention_heads=2, num_moe_experts=experts_for(ranks),
        moe_ffn_hidden_size=8, moe_router_topk=2, expert_model_parallel_size=ranks,
        moe_enable_echo=True, moe_num_echo_experts=experts_for(ranks), transformer_impl="local",
        normalization="RMSNorm", add_bias_linear=False, gated_linear_unit=True,
        activation_func=F.silu, moe_shared_expert_intermediate_size=8, hidden_dropout=0.0,
        attention_dropout=0.0, masked_softmax_fusion=False, **fields,
    )  # fmt: skip
    model = EchoGPTModelConfig(
        transformer=config, vocab_size=32, seq_length=16, should_pad_vocab=False,
        position_embedding_type="rope",
    )  # fmt: skip
    return EchoGPTModelBuilder(model).build_model(ProcessGroupCollection.use_mpu_process_groups())


def loss_of(model: nn.Module) -> Tensor:
    tokens = torch.arange(32).view(2, 16) * (dist.get_rank() + 3) % 32
    places = torch.arange(16).expand(2, 16)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).triu(1)
    return model(tokens, places, mask, labels=tokens.roll(-1, 1)).mean()


def trained(model: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def check_recipe() -> None:
    """That of the documentation: only adapters move, and their checkpoint is all that differs."""
    page = (launch.ROOT / "docs" / "post_training.md").read_text()
    recipe: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], recipe)
    model = gpt()
    before = {name: part.clone() for name, part in model.state_dict().items() if part is not None}
    recipe["adapt"]([model])
    start = loss_of(model).item()
    assert start == loss_of(gpt()).item()  # B is 0
    losses = trained(model)
    assert losses[0] == start
    assert losses[-1] < losses[1] < start, losses
    state = model.state_dict()
    assert all(torch.equal(state[name], part) for name, part in before.items())
    moved = [name for name in state if ".adapter." in name and ".experts." in name]
    assert len(moved) == len([name for name, p in model.named_parameters() if p.requires_grad])
    names = [None if dist.get_rank() else tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    assert names[0] is not None
    folder = Path(names[0])
    recipe["save"](model, folder)
    fresh = recipe["adapt"]([gpt()])[0]
    recipe["load"](fresh, folder)
    assert loss_of(fresh).item() == loss_of(model).item()
    if dist.get_rank() == 0:
        shutil.rmtree(folder)


def check_adapters_of_others() -> None:
    """Modules around linear layers and routers, found by Megatron-Bridge's names."""
    model = gpt(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1)
    found = {name for name, _ in model.named_modules()}
    is_expert = re.compile(r".*mlp\..*experts.*\.linear_fc[1-2]$")
    for name in BOTH:
        assert is_expert.match(f"decoder.layers.0.mlp.experts.{name}")
        assert f"decoder.layers.0.mlp.experts.{name}" in found
    model.requires_grad_(False)
    ends = ("linear_qkv", "linear_proj", "shared_experts.linear_fc1", "router")
    for name in sorted(name for name in found if name.endswith(ends)):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, Beside(model.get_submodule(name)))
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith(".adapter"), name
        assert parameter.grad is None or parameter.grad.any(), name
    assert len(trained(model)) == 3


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main(globals())
