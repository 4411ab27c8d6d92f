"""Builds Megatron's ``GPTModel`` with this package's layers, MTP layers included."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_echo.layer_specs import ECHO_GPT_BUILDER, gpt_moe_block_spec, gpt_mtp_block_spec
from megatron_echo.transformer_layer import keep_padding


def freeze(models: list[MegatronModule]) -> list[MegatronModule]:
    """Train nothing, expert biases included: ``--freeze-all-layers``, as a pre-wrap hook.

    Megatron-Core 0.19.2 reads that flag only where it builds a model without a configuration.
    """
    for model in models:
        model.requires_grad_(False)
        for module in model.modules():
            if hasattr(module, "frozen_expert_bias"):
                module.frozen_expert_bias = True
    return models


class EchoGPTModel(GPTModel):
    """Megatron's; ``--overlap-moe-expert-parallel-comm`` keeps the padding mask."""

    def build_schedule_plan(self, *args: Any, **kwargs: Any) -> Any:
        """Of Megatron's model, which gives ``padding_mask``, bool ``[b, s]``, to no MoE layer."""
        plan = super().build_schedule_plan(*args, **kwargs)
        if plan.state.padding_mask is not None:
            for layer_plan in plan._transformer_layers:
                keep_padding(layer_plan)
        return plan


@dataclass(kw_only=True)
class EchoGPTModelConfig(GPTModelConfig):
    """Megatron's ``GPTModelConfig``, built by :class:`EchoGPTModelBuilder`."""

    builder: ClassVar[str] = ECHO_GPT_BUILDER


class EchoGPTModelBuilder(GPTModelBuilder):
    """Megatron's builder, except that MTP layers get the same modules as the decoder's."""

    def build_model(
        self,
        pg_collection: ProcessGroupCollection,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> GPTModel:
        """Build one pipeline stage.

        Args:
            pg_collection: the process groups.
            pre_process: with the embedding; None asks the pipeline position.
            post_process: with the output layer; None asks the pipeline position.
            vp_stage: the virtual pipeline stage, None without interleaving.
        """
        config = self._model_config
        vp_size = config.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, vp_size) and is_pp_first_stage(
                pg_collection.pp
            )
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, vp_size) and is_pp_last_stage(
                pg_collection.pp
            )
        vocab_size = config.vocab_size
        if config.should_pad_vocab:
            vocab_size = calculate_padded_vocab_size(
                vocab_size,
                config.make_vocab_size_divisible_by,
                config.transformer.tensor_model_parallel_size,
            )
        same_name = (
            "fp16_lm_cross_entropy",
            "parallel_output",
            "share_embeddings_and_output_weights",
            "position_embedding_type",
            "rotary_percent",
            "rotary_base",
            "rope_scaling",
            "rope_scaling_factor",
            "seq_len_interpolation_factor",
            "scatter_embedding_sequence_parallel",
        )
        return EchoGPTModel(
            config=config.transformer,
            transformer_layer_spec=gpt_moe_block_spec(config, vp_stage=vp_stage),
            mtp_block_spec=gpt_mtp_block_spec(config, vp_stage=vp_stage),
            vocab_size=vocab_size,
            max_sequence_length=config.seq_length,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            **{name: getattr(config, name) for name in same_name},
        )
