"""ModuleSpecs: which module stands where in a model.

``gpt_moe_block_spec`` is what ``pretrain_gpt_moe.py`` uses, and what another Megatron script
takes with ``--spec megatron_echo.layer_specs gpt_moe_block_spec``. Scripts that hand the named
object to ``GPTModel`` without calling it take ``gpt_moe_layer_spec``; a ``HybridModel`` takes
``moe_module_spec(config)`` as the ``mlp`` of its MoE layer.
"""

import dataclasses
import functools
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_layer_local_submodules,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import (
    hybrid_stack_spec as megatron_hybrid_stack,
)
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    BaseTransformerLayer,
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_echo.config import EchoConfigMixin
from megatron_echo.local_modules import LocalCoreAttention, LocalHybridStack, LocalNorm
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.step.step_end import StepEnd
from megatron_echo.transformer_layer import EchoTransformerLayer

ECHO_GPT_BUILDER = "megatron_echo.model_builder.EchoGPTModelBuilder"
"""The builder that gives MTP layers the modules of :func:`gpt_mtp_block_spec`."""

_LOCAL_MODULES = {WrappedTorchNorm: LocalNorm, DotProductAttention: LocalCoreAttention}


def replace_modules(spec: Any, replacements: dict[Any, Any]) -> Any:
    """A copy of a spec tree in which module classes are replaced by others.

    The tree may have ``ModuleSpec``s, dataclasses of submodules, ``functools.partial`` (Megatron's
    builders), lists of those, and module classes.
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


def _uses_echo(config: TransformerConfig) -> bool:
    """With Megatron's plain configuration, naming our spec is what asks for our layer."""
    if config.num_moe_experts is None:
        return False
    return config.moe_enable_echo if isinstance(config, EchoConfigMixin) else True


def _our_layer(config: TransformerConfig) -> dict[Any, Any]:
    if not _uses_echo(config):
        return {}
    stock = (TransformerLayer, MoETransformerLayer)
    return {MoELayer: EchoMoELayer, **dict.fromkeys(stock, EchoTransformerLayer)}


def _replacements(config: TransformerConfig) -> dict[Any, Any]:
    return {**_LOCAL_MODULES, **_our_layer(config)}


def _options(config: TransformerConfig) -> dict[str, Any]:
    """What Megatron's functions of specs want to know of a configuration beside itself."""
    return {
        "use_transformer_engine": _uses_transformer_engine(config),
        "normalization": config.normalization,
        "qk_l2_norm": config.qk_l2_norm,
    }


def gpt_moe_block_spec(
    gpt_model_config: GPTModelConfig, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, dense and MoE as ``--moe-layer-freq`` says.

    The model's ``transformer`` may be an :class:`~megatron_echo.config.EchoTransformerConfig` or a
    plain one. ``vp_stage`` is the virtual pipeline stage, None without interleaving.
    """
    config = gpt_model_config.transformer
    if _uses_echo(config):
        if config.mtp_num_layers is not None and gpt_model_config.builder != ECHO_GPT_BUILDER:
            raise ValueError(
                f"--mtp-num-layers {config.mtp_num_layers} with --spec builds Megatron's own MoE "
                "layer into the MTP layers, whatever the spec names. Use pretrain_gpt_moe.py, or "
                "build the model from megatron_echo.model_builder.EchoGPTModelConfig."
            )
        StepEnd.of(config)  # on every rank, also where a pipeline stage has no MoE layer
    if config.experimental_attention_variant is not None:  # its attention stays as it is
        return replace_modules(default_layer_spec(gpt_model_config, vp_stage), _our_layer(config))
    if config.num_moe_experts is None and _uses_transformer_engine(config):
        return default_layer_spec(gpt_model_config, vp_stage)
    spec = get_gpt_decoder_block_spec(config, vp_stage=vp_stage, **_options(config))
    return replace_modules(spec, _replacements(config))


def gpt_mtp_block_spec(
    gpt_model_config: GPTModelConfig, vp_stage: int | None = None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token-prediction layers of this stage, with the same modules as the decoder.

    Megatron's builder derives them from its own layer specs, whatever decoder spec was given. None
    where this stage has no MTP layer.
    """
    config = gpt_model_config.transformer
    if config.mtp_num_layers is None:
        return None
    layers = get_gpt_decoder_layer_specs(config, vp_stage=vp_stage, **_options(config))
    use_te = _uses_transformer_engine(config)
    spec = get_gpt_mtp_block_spec(
        config, layers[-1], use_transformer_engine=use_te, vp_stage=vp_stage
    )
    return replace_modules(spec, _replacements(config))


def moe_module_spec(config: TransformerConfig) -> functools.partial:
    """The MoE layer alone: the ``mlp`` of a ``TransformerLayerSubmodules``, for any model.

    Megatron's ``HybridModel`` takes it in the ``moe_layer`` of its stack spec. Call it on every
    rank, also on those of pipeline stages without MoE layers: they take part in the checks at the
    end of a step.
    """
    if config.cuda_graph_impl == "local":
        raise ValueError(
            "--cuda-graph-impl local replays a layer of training in evaluation, where ours needs "
            "larger buffers. Use --cuda-graph-impl transformer_engine or full_iteration."
        )
    StepEnd.of(config)
    spec = get_moe_module_spec(
        use_te=_uses_transformer_engine(config),
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=True,
    )
    return replace_modules(spec, {MoELayer: EchoMoELayer})


def hybrid_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """The layers of a ``HybridModel``, for ``--hybrid-layer-pattern``, with our MoE layer.

    With Transformer Engine they are Megatron's. Without it all but sparse attention (``D``) are
    local ones; those of Mamba and of gated delta nets bring kernels of other packages.
    """
    if _uses_echo(config):
        StepEnd.of(config)  # on every rank, also where a pipeline stage has no MoE layer
    if _uses_transformer_engine(config):
        return replace_modules(megatron_hybrid_stack, _our_layer(config))

    def local(**options: Any) -> TransformerLayerSubmodules:
        return get_gpt_layer_local_submodules(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization, **options
        )

    def attention(module: Any) -> ModuleSpec:
        only = TransformerLayerSubmodules(
            input_layernorm=norm, self_attention=module, self_attn_bda=plain.self_attn_bda
        )
        return ModuleSpec(TransformerLayer, submodules=only)

    def feed_forward(layer: type, mlp: Any) -> ModuleSpec:
        only = TransformerLayerSubmodules(
            pre_mlp_layernorm=plain.pre_mlp_layernorm, mlp=mlp, mlp_bda=plain.mlp_bda
        )
        return ModuleSpec(layer, submodules=only)

    plain = local()
    norm = plain.input_layernorm
    linears: Any = {"in_proj": ColumnParallelLinear, "out_proj": RowParallelLinear}
    moe = get_moe_module_spec(use_te=False, num_experts=config.num_moe_experts)
    gated_delta_net = GatedDeltaNetSubmodules(out_norm=norm, **linears)
    mixer = ModuleSpec(MambaMixer, submodules=MambaMixerSubmodules(**linears))
    mamba = MambaLayerSubmodules(norm=norm, mixer=mixer, mamba_bda=plain.self_attn_bda)
    prediction = MultiTokenPredictionLayerSubmodules(
        enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, layer_norm=norm
    )
    predictions = MultiTokenPredictionBlockSubmodules(
        layer_specs=[ModuleSpec(MultiTokenPredictionLayer, submodules=prediction)]
    )
    layers = HybridStackSubmodules(
        mamba_layer=ModuleSpec(MambaLayer, submodules=mamba),
        gdn_layer=attention(ModuleSpec(GatedDeltaNet, submodules=gated_delta_net)),
        attention_layer=attention(plain.self_attention),
        mla_layer=attention(local(multi_latent_attention=True).self_attention),
        mlp_layer=feed_forward(MLPLayer, plain.mlp),
        moe_layer=feed_forward(MoETransformerLayer, moe),
        mtp_block_spec=ModuleSpec(MultiTokenPredictionBlock, submodules=predictions),
    )
    return replace_modules(ModuleSpec(LocalHybridStack, submodules=layers), _replacements(config))


class GPTMoELayer(BaseTransformerLayer):
    """Builds one transformer layer with our MoE layer, deciding on its modules when it is built.

    An object that ``--spec`` names is repeated for each layer and made before there is a
    configuration: norm, attention and backend can only be chosen here.
    """

    def __new__(cls, config: TransformerConfig, *args: Any, **kwargs: Any) -> Any:
        """The layer that :func:`gpt_moe_block_spec` would put there, where all are MoE layers."""
        frequency = config.moe_layer_freq
        pattern = frequency if isinstance(frequency, list) else [frequency]
        if any(is_moe != 1 for is_moe in pattern):
            raise ValueError(
                f"--moe-layer-freq {frequency} has no effect on a single layer spec: each layer "
                "would be a MoE layer. Use --spec megatron_echo.layer_specs gpt_moe_block_spec."
            )
        spec = get_gpt_decoder_layer_specs(config, **_options(config))[-1]
        layer = replace_modules(spec, _replacements(config))
        return layer.module(config, *args, submodules=layer.submodules, **kwargs)


gpt_moe_layer_spec = ModuleSpec(module=GPTMoELayer)
"""One layer, for ``--spec megatron_echo.layer_specs gpt_moe_layer_spec``."""
