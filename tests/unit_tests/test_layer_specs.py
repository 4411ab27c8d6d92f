import functools

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.training.models.gpt import GPTModelConfig

from megatron_echo.layer_specs import gpt_moe_block_spec, gpt_mtp_block_spec, replace_modules
from megatron_echo.local_modules import LocalCoreAttention, LocalNorm

pytestmark = pytest.mark.usefixtures("single_rank")


def model_config(**fields: object) -> GPTModelConfig:
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
    return GPTModelConfig(transformer=TransformerConfig(**settings), vocab_size=16)


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
