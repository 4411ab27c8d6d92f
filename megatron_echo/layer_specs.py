"""ModuleSpecs: which module stands where in a GPT model.

``gpt_moe_block_spec`` is what ``pretrain_gpt_moe.py`` uses, and what another Megatron script
takes with ``--spec megatron_echo.layer_specs gpt_moe_block_spec``.
"""

import dataclasses
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_echo.local_modules import LocalCoreAttention, LocalNorm

_LOCAL_MODULES: dict[Any, Any] = {
    WrappedTorchNorm: LocalNorm,
    DotProductAttention: LocalCoreAttention,
}


def replace_modules(spec: Any, replacements: dict[Any, Any]) -> Any:
    """A copy of a spec tree in which some modules are replaced by others.

    Args:
        spec: a ``ModuleSpec``, a dataclass of submodules, a ``functools.partial`` (Megatron's
            builders), a list of those, or a module class.
        replacements: module class to module class.
    """
    if isinstance(spec, type):
        return replacements.get(spec, spec)
    if isinstance(spec, (list, tuple)):
        return type(spec)(replace_modules(item, replacements) for item in spec)
    if isinstance(spec, functools.partial):
        keywords = {k: replace_modules(v, replacements) for k, v in spec.keywords.items()}
        return functools.partial(replace_modules(spec.func, replacements), *spec.args, **keywords)
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):  # mypy asks for the latter
        changes = {
            field.name: replace_modules(getattr(spec, field.name), replacements)
            for field in dataclasses.fields(spec)
            if field.init
        }
        return dataclasses.replace(spec, **changes)
    return spec


def _uses_transformer_engine(config: TransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


def gpt_moe_block_spec(
    gpt_model_config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, dense and MoE as ``--moe-layer-freq`` says.

    Args:
        gpt_model_config: Megatron's model configuration; its ``transformer`` may be an
            :class:`~megatron_echo.config.EchoTransformerConfig` or a plain one.
        vp_stage: the virtual pipeline stage, None without interleaving.
    """
    config = gpt_model_config.transformer
    is_dense_te = config.num_moe_experts is None and _uses_transformer_engine(config)
    if config.experimental_attention_variant is not None or is_dense_te:
        return default_layer_spec(gpt_model_config, vp_stage)
    spec = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=_uses_transformer_engine(config),
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    return replace_modules(spec, _LOCAL_MODULES)


def gpt_mtp_block_spec(
    gpt_model_config: GPTModelConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token-prediction layers of this stage, with the same modules as the decoder.

    Megatron's builder derives them from its own layer specs, whatever decoder spec was given.

    Returns:
        None where this stage has no MTP layer.
    """
    config = gpt_model_config.transformer
    if config.mtp_num_layers is None:
        return None
    use_te = _uses_transformer_engine(config)
    last_layer: ModuleSpec = get_gpt_decoder_layer_specs(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )[-1]
    spec = get_gpt_mtp_block_spec(
        config, last_layer, use_transformer_engine=use_te, vp_stage=vp_stage
    )
    return replace_modules(spec, _LOCAL_MODULES)
