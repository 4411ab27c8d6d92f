import contextlib
import copy
import functools
from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider as Local
from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants
from megatron.core.models.gpt.experimental_attention_variant_module_specs import GatedDeltaNet
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig, transformer_block, transformer_config
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import moe_layer
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.training.models.gpt import GPTModelConfig

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.layer_specs import (
    gpt_moe_block_spec,
    gpt_moe_layer_spec,
    gpt_mtp_block_spec,
    hybrid_stack_spec,
    moe_module_spec,
    replace_modules,
)
from megatron_echo.local_modules import LocalCoreAttention, LocalNorm
from megatron_echo.model_builder import EchoGPTModelBuilder, EchoGPTModelConfig, freeze
from megatron_echo.moe_layer import EchoMoELayer

pytestmark = pytest.mark.usefixtures("single_rank")
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def model_config(**fields: object) -> EchoGPTModelConfig:
    settings = {
        "num_layers": 3,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_moe_experts": 4,
        "moe_layer_freq": [0, 1, 1],
        "transformer_impl": "local",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        **fields,
    }
    return EchoGPTModelConfig(transformer=TransformerConfig(**settings), vocab_size=16)


def test_local_modules_stand_where_stock_ones_refuse() -> None:
    spec = gpt_moe_block_spec(model_config())
    assert spec.layer_norm is LocalNorm
    assert len(spec.layer_specs) == 3
    for layer in spec.layer_specs:
        assert layer.submodules.input_layernorm is LocalNorm
        assert layer.submodules.self_attention.submodules.core_attention is LocalCoreAttention
    text = repr(spec)
    assert "WrappedTorchNorm" not in text
    assert "dot_product_attention.DotProductAttention" not in text


def test_layer_frequency_is_kept() -> None:
    dense, *moe = [layer.submodules.mlp for layer in gpt_moe_block_spec(model_config()).layer_specs]
    assert "MoELayer" not in repr(dense)
    assert all("MoELayer" in repr(mlp) for mlp in moe)


def test_a_dense_model_has_the_same_spec() -> None:
    spec = gpt_moe_block_spec(model_config(num_moe_experts=None, moe_layer_freq=1))
    assert "MoELayer" not in repr(spec)
    assert spec.layer_norm is LocalNorm


def test_mtp_layers_have_the_decoders_modules() -> None:
    assert gpt_mtp_block_spec(model_config()) is None
    text = repr(gpt_mtp_block_spec(model_config(mtp_num_layers=1)))
    assert "LocalNorm" in text
    assert "LocalCoreAttention" in text
    assert "WrappedTorchNorm" not in text


def test_replacing_copies_and_reaches_every_kind_of_spec() -> None:
    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    changed = replace_modules(stock, {WrappedTorchNorm: LocalNorm})
    assert stock.submodules.input_layernorm is WrappedTorchNorm
    assert changed.submodules.input_layernorm is LocalNorm
    assert changed.submodules.self_attention.submodules.core_attention is DotProductAttention
    partial = functools.partial(dict, inner=ModuleSpec(module=WrappedTorchNorm))
    replaced = replace_modules([partial], {WrappedTorchNorm: LocalNorm})[0]
    assert replaced.keywords["inner"].module is LocalNorm


@pytest.mark.parametrize(
    ("enabled", "expected"), [(True, [EchoMoELayer] * 3), (False, [MoELayer] * 3)]
)
def test_decoder_and_mtp_have_the_layer_that_the_flag_asks_for(
    enabled: bool, expected: list[type]
) -> None:
    """Two MoE layers of three in the decoder, one in the MTP block; nothing in between."""
    model_parallel_cuda_manual_seed(1)
    settings = vars(model_config(mtp_num_layers=1).transformer)
    fields = {name: settings[name] for name in (
        "num_layers", "hidden_size", "num_attention_heads", "num_moe_experts", "moe_layer_freq",
        "transformer_impl", "normalization", "add_bias_linear", "mtp_num_layers",
    )}  # fmt: skip
    config = EchoGPTModelConfig(
        transformer=EchoTransformerConfig(
            **fields, moe_enable_echo=enabled, moe_num_echo_experts=0
        ),
        vocab_size=16, seq_length=8, should_pad_vocab=False,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = EchoGPTModelBuilder(config).build_model(groups)
    found = [(name, type(m)) for name, m in model.named_modules() if isinstance(m, MoELayer)]
    assert [kind for _, kind in found] == expected
    assert sum("mtp" in name for name, _ in found) == 1


def test_frozen_models_keep_their_expert_bias_too() -> None:
    model_parallel_cuda_manual_seed(1)
    bias = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    config = model_config(mtp_num_layers=1, **bias, moe_ffn_hidden_size=8)
    model = EchoGPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    assert freeze([model]) == [model]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    routers = [module.router for module in model.modules() if isinstance(module, MoELayer)]
    assert [router.frozen_expert_bias for router in routers] == [True] * 3


def test_the_overlapping_schedule_keeps_the_padding_mask() -> None:
    """The MoE layer sees the microbatch's state while its first stage runs, and no longer."""
    model_parallel_cuda_manual_seed(1)
    config = model_config(moe_ffn_hidden_size=8)
    model = EchoGPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    (layer,) = [one for one in model.decoder.layers if isinstance(one.mlp, EchoMoELayer)][:1]
    for mask in (torch.ones(1, 8, dtype=torch.bool), None):
        node = SimpleNamespace(chunk_state=SimpleNamespace(padding_mask=mask))
        stage = SimpleNamespace(submodule=lambda *_: layer.mlp.schedule_state)
        plan = SimpleNamespace(
            state=node.chunk_state,
            _transformer_layers=[SimpleNamespace(layer=layer, pre_dispatch_computation=stage)],
        )
        with mock.patch.object(GPTModel, "build_schedule_plan", return_value=plan):
            assert model.build_schedule_plan("tokens") is plan
        assert stage.submodule(node) is (None if mask is None else node.chunk_state)
        assert layer.mlp.schedule_state is None


def test_a_hybrid_model_takes_the_layer() -> None:
    """Attention and MoE layers in turn, as the pattern says."""
    model_parallel_cuda_manual_seed(1)
    base = model_config(num_layers=4, moe_layer_freq=1)
    attention = gpt_moe_block_spec(base).layer_specs[0]
    moe = ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=LocalNorm,
            mlp=moe_module_spec(base.transformer),
            mlp_bda=attention.submodules.mlp_bda,
        ),
    )
    only_attention = ModuleSpec(
        module=attention.module,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LocalNorm,
            self_attention=attention.submodules.self_attention,
            self_attn_bda=attention.submodules.self_attn_bda,
        ),
    )
    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(attention_layer=only_attention, moe_layer=moe),
    )
    model = HybridModel(
        base.transformer,
        stack,
        vocab_size=16,
        max_sequence_length=8,
        hybrid_layer_pattern="*E*E",
        post_process=False,  # the final norm is Transformer Engine's
    )
    assert sum(isinstance(module, EchoMoELayer) for module in model.modules()) == 2
    tokens = torch.arange(8)[None]
    model(tokens, tokens, attention_mask=None).sum().backward()
    assert all(
        m.experts.linear_fc1.weight.grad.any()
        for m in model.modules()
        if isinstance(m, EchoMoELayer)
    )


def test_the_stack_of_a_hybrid_model() -> None:
    """Local layers without Transformer Engine, MLA among them; Megatron's with it."""
    model_parallel_cuda_manual_seed(1)
    base = model_config(num_layers=5, moe_layer_freq=1)
    config = base.transformer
    pattern = "*E-E"
    model = HybridModel(config, hybrid_stack_spec(config), 16, 8, hybrid_layer_pattern=pattern)
    kinds = [type(getattr(layer, "mlp", None)) for layer in model.decoder.layers]
    assert kinds == [IdentityOp, EchoMoELayer, MLP, EchoMoELayer]
    tokens = torch.arange(8)[None]
    model(tokens, tokens, attention_mask=None).sum().backward()
    assert model.decoder.final_norm.weight.grad.any()
    with_engine = copy.copy(config)
    with_engine.transformer_impl = "transformer_engine"
    stack = hybrid_stack_spec(with_engine)
    assert stack.module is HybridStack
    assert "EchoMoELayer" in str(stack.submodules.moe_layer.submodules.mlp)


@pytest.mark.parametrize("backend", ["deepep", "hybridep", "ncclep"])
@pytest.mark.parametrize("kind", [TransformerConfig, EchoTransformerConfig])
def test_megatrons_own_dispatcher_is_not_built(kind: type, backend: str) -> None:
    """Flex needs packages that are not here; the layer keeps the configuration that it got."""
    model_parallel_cuda_manual_seed(1)
    fields = dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_ffn_hidden_size"), 8)
    config = kind(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=4, **fields,
        add_bias_linear=False, transformer_impl="local", normalization="RMSNorm",
        moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=backend,
    )  # fmt: skip
    layer = moe_module_spec(config)(config=config)
    layer.set_layer_number(1)
    parts = (layer, layer.router, layer.experts, layer.token_dispatcher)
    assert all(part.config is config for part in parts)
    assert layer.shared_experts.config.moe_token_dispatcher_type == "flex"  # of a copy, Megatron's
    output, _ = layer(torch.ones(2, 1, 8, requires_grad=True))
    output.sum().backward()
    assert layer.experts.linear_fc1.weight.grad.any()


@pytest.mark.parametrize("changes", [{}, {"moe_shared_expert_gate": True}, RECOMPUTED])
def test_an_overlapped_shared_expert_has_the_same_bits(changes: dict) -> None:
    """Beside dispatch and combine: forward, backward, evaluation, and two calls in flight.

    The input's gradient is summed over the layer's branches in another order.
    """
    results = []
    for overlap in (False, True):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)  # the gate's weight is drawn outside the tracker
        config = EchoTransformerConfig(
            num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=4,
            moe_shared_expert_intermediate_size=8, moe_ffn_hidden_size=8, add_bias_linear=False,
            transformer_impl="local", normalization="RMSNorm", moe_token_dispatcher_type="alltoall",
            moe_shared_expert_overlap=overlap, **changes,
        )  # fmt: skip
        layer = moe_module_spec(config)(config=config)
        layer.set_layer_number(1)
        assert (layer.token_dispatcher.shared_experts is not None) == overlap
        inputs = [torch.randn(6, 2, 8, requires_grad=True) for _ in range(3)]
        outputs = [layer(tokens)[0] for tokens in inputs[:2]]
        for output in reversed(outputs):
            output.square().sum().backward()
        layer.eval()
        outputs.append(layer(inputs[2])[0])
        grads = [tensor.grad for tensor in (*inputs[:2], *layer.parameters())]
        assert all(grad.any() for grad in grads)
        results.append([*grads, *outputs])
    for place, (alone, beside) in enumerate(zip(*results, strict=True)):
        assert torch.allclose(alone, beside, rtol=1e-5) if place < 2 else torch.equal(alone, beside)


def test_our_layer_beside_an_attention_variant() -> None:
    """Megatron builds these layers with Transformer Engine only, so here with other linear ones."""
    config = EchoTransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=2, num_moe_experts=4,
        moe_ffn_hidden_size=8, moe_layer_freq=[0, 1], add_bias_linear=False, moe_enable_echo=True,
        normalization="RMSNorm", transformer_impl="transformer_engine",
        linear_attention_freq=[1, 1],
        experimental_attention_variant="gated_delta_net", linear_conv_kernel_dim=4,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2,
    )  # fmt: skip
    with mock.patch.object(variants, "_get_backend_spec_provider", return_value=Local()):
        spec = gpt_moe_block_spec(
            EchoGPTModelConfig(transformer=config, seq_length=8, vocab_size=8)
        )
    dense, moe = (layer.submodules for layer in spec.layer_specs)
    assert moe.mlp.func is EchoMoELayer
    assert dense.mlp.func is not EchoMoELayer
    assert moe.self_attention.module is dense.self_attention.module is GatedDeltaNet


class _Checkpoint(torch.autograd.Function):
    """As Transformer Engine's: run without gradients, and again in backward."""

    @staticmethod
    def forward(ctx: Any, function: Any, *inputs: Any) -> Any:
        ctx.function, ctx.inputs = function, inputs
        return function(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        first, *others = ctx.inputs
        leaf = first.detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.function(leaf, *others)
        torch.autograd.backward(outputs[:1], grads[:1])
        return None, leaf.grad, *(None for _ in others)


@pytest.mark.parametrize("quantised", [{"fp8": "hybrid", "fp8_param": True}, {"fp4": "e2m1"}])
@pytest.mark.parametrize("changes", [{}, RECOMPUTED])
def test_beside_quantised_layers_of_transformer_engine(quantised: dict, changes: dict) -> None:
    """Built and called in its contexts, recomputed by its checkpoint: the bits of without.

    The contexts stand in for ``fp8_model_init`` and ``fp8_autocast``: they only count.
    """
    contexts: Counter[bool] = Counter()

    def context(*_: Any, is_init: bool = False) -> contextlib.nullcontext:
        contexts[is_init] += 1
        return contextlib.nullcontext()

    def checkpoint(function: Any, *arguments: Any) -> Any:
        return _Checkpoint.apply(function, *arguments[3:])

    results = []
    for settings in ({}, quantised):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)
        with (
            mock.patch.object(transformer_config, "is_te_min_version", return_value=True),
            mock.patch.object(transformer_block, "get_fp8_context", context),
            mock.patch.object(transformer_block, "get_fp4_context", context),
            mock.patch.object(moe_layer, "te_checkpoint", checkpoint),
        ):
            config = model_config(
                **settings, **changes, moe_ffn_hidden_size=8, params_dtype=torch.bfloat16, bf16=True
            )
            spec = gpt_moe_block_spec(config)
            block = TransformerBlock(config.transformer, spec, post_process=False)
            hidden = torch.randn(6, 2, 8, requires_grad=True)
            output = block(hidden.bfloat16(), None)
            output.float().square().sum().backward()
        experts = [p for name, p in block.named_parameters() if "experts" in name]
        assert experts
        assert all(type(p) is torch.nn.Parameter and p.dtype == torch.bfloat16 for p in experts)
        results.append([output, hidden.grad, *(p.grad for p in block.parameters())])
    assert contexts == {True: 3, False: 1 if "fp8" in quantised else 3}  # of the pass, or of layers
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_a_spec_would_drop_silently_is_refused() -> None:
    """Dense layers with a single layer spec; MTP layers with Megatron's own builder."""
    frequent = model_config().transformer
    with pytest.raises(ValueError, match=r"--moe-layer-freq \[0, 1, 1\] has no effect"):
        gpt_moe_layer_spec.module(frequent)
    transformer = model_config(mtp_num_layers=1).transformer
    with pytest.raises(ValueError, match="--mtp-num-layers 1 with --spec"):
        gpt_moe_block_spec(GPTModelConfig(transformer=transformer, vocab_size=16))
