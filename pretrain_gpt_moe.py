"""Pretrain a GPT with a mixture of experts: Megatron's ``pretrain()`` with megatron_echo's layers.

Takes every flag of Megatron's ``pretrain_gpt.py`` and those of megatron_echo (``--help`` lists
both)::

    torchrun --nproc-per-node 8 pretrain_gpt_moe.py --num-experts 64 --moe-enable-echo ...

Runs on a machine without a GPU as well (see ``megatron_echo/cpu_backend``).
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from megatron_echo import cpu_backend, environment

cpu_backend.enable()  # before Megatron is imported; does nothing where CUDA works

import torch  # noqa: E402
from megatron.core import mpu  # noqa: E402
from megatron.core.datasets.blended_megatron_dataset_builder import (  # noqa: E402
    BlendedMegatronDatasetBuilder,
)
from megatron.core.datasets.gpt_dataset import (  # noqa: E402
    GPTDataset,
    GPTDatasetConfig,
    MockGPTDataset,
)
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.rerun_state_machine import get_rerun_state_machine  # noqa: E402
from megatron.core.transformer.multi_token_prediction import (  # noqa: E402
    get_mtp_ranks,
    mtp_on_this_rank,
)
from megatron.core.transformer.pipeline_parallel_layer_layout import (  # noqa: E402
    PipelineParallelLayerLayout,
)
from megatron.core.utils import (  # noqa: E402
    StragglerDetector,
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import (  # noqa: E402
    get_args,
    get_timers,
    get_tokenizer,
    inprocess_restart,
    pretrain,
    print_rank_0,
)
from megatron.training.argument_utils import (  # noqa: E402
    gpt_config_from_args,
    hybrid_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args, parse_args  # noqa: E402
from megatron.training.datasets.sft_dataset import SFTDataset  # noqa: E402
from megatron.training.models.gpt import GPTModelConfig  # noqa: E402
from megatron.training.models.hybrid import HybridModelConfig  # noqa: E402
from megatron.training.utils import get_blend_and_blend_per_split  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.elastic.multiprocessing.errors import record  # noqa: E402

from megatron_echo.arguments import (  # noqa: E402
    add_echo_arguments,
    echo_config_from_args,
    repair_help,
)
from megatron_echo.compatibility import MUON, settings_taken_over  # noqa: E402
from megatron_echo.dispatch.transports import Transports  # noqa: E402
from megatron_echo.experts.clones import kept_clone_bytes  # noqa: E402
from megatron_echo.experts.grouped_mlp import experts_as_matrices, experts_for_fsdp  # noqa: E402
from megatron_echo.layer_specs import hybrid_stack_spec  # noqa: E402
from megatron_echo.model_builder import EchoGPTModelConfig, freeze  # noqa: E402
from megatron_echo.offload.config import OffloadConfig  # noqa: E402
from megatron_echo.offload.training import (  # noqa: E402
    OffloadedTraining,
    add_offload_arguments,
    announcement,
    offload_config,
)
from megatron_echo.preflight import check_files, check_flags, check_schedule  # noqa: E402
from megatron_echo.preflight.failures import one_sentence  # noqa: E402
from megatron_echo.preflight.ranks import Ranks  # noqa: E402
from megatron_echo.record.ledger_of_first_step import LedgerOfFirstStep  # noqa: E402
from megatron_echo.record.metrics import install_metrics_writer  # noqa: E402
from megatron_echo.record.run_record import add_decisions, write_run_record  # noqa: E402

straggler_timer = StragglerDetector()
SPIKY_LOSS_FACTOR = 10
BATCH_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
MODEL_KEYS = ("labels", "loss_mask", "packed_seq_params")
PACKING_KEYS = ("cu_seqlens", "max_seqlen")


def is_packed() -> bool:
    """True where a sample is several sequences, each of which sees itself only."""
    args = get_args()
    return args.sft or args.dataloader_inter_document_masking


def needs_data(vp_stage: int | None) -> bool:
    """True where the embedding, the loss, an MTP layer or an attention over packed sequences is.

    The other stages read no batch.
    """
    return (
        is_packed()
        or mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        or mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        or has_mtp(vp_stage)
    )


@functools.cache
def parsed_layout(layout: str, stages: int) -> PipelineParallelLayerLayout:
    """``--pipeline-model-parallel-layout``, which the arguments keep as they were given."""
    return PipelineParallelLayerLayout(layout, stages)


def has_mtp(vp_stage: int | None) -> bool:
    """True where this stage holds multi-token-prediction layers."""
    args = get_args()
    layout = args.pipeline_model_parallel_layout
    if layout is not None:
        layout = parsed_layout(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(
        layout=layout,
        mtp_num_layers=args.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(
    data_iterator: Iterator, vp_stage: int | None = None, is_training: bool = True
) -> dict[str, Tensor | None]:
    """The next microbatch for this rank.

    Args:
        data_iterator: what brings it; read on the first tensor-parallel rank only.
        vp_stage: the virtual pipeline stage, None without interleaving.
        is_training: False in evaluation, whose microbatches may have another size.

    Returns:
        ``packed_seq_params``, where a sample is several sequences: then ``b`` is 1, and ``s`` that
        of all samples. And
        ``tokens``, ``labels``, ``position_ids``: int64 ``[b, s]``; ``loss_mask``: fp32 ``[b, s]``;
        ``attention_mask``: bool ``[b, 1, s, s]`` or None. Under context parallelism ``s`` is this
        rank's part of the sequence. What this pipeline stage does not use is None.
    """
    if not needs_data(vp_stage):
        return dict.fromkeys(BATCH_KEYS)
    args = get_args()
    keys = (*BATCH_KEYS, *PACKING_KEYS) if is_packed() else BATCH_KEYS
    batch: dict[str, Any] = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        for key in keys:
            batch[key] = sample[key].cuda(non_blocking=True) if key in sample else None
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=is_packed(),
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size if is_training else args.eval_micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=has_mtp(vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(False, vp_stage),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(False, vp_stage),
    )
    batch = {key: batch.get(key) for key in keys}
    if is_packed():
        batch = flatten_batch_for_packed_sequences(batch)
        ends, longest = batch.pop("cu_seqlens")[0], int(batch.pop("max_seqlen"))
        batch["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest,
            max_seqlen_kv=longest, tokens_per_sample=args.seq_length,
        )  # fmt: skip
        return batch
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def loss_func(loss_mask: Tensor, output_tensor: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the masked token losses.

    Args:
        loss_mask: fp32 ``[b, s]``, 1 where a token counts.
        output_tensor: ``[b, s]``, the cross entropy of each token in nats.

    Returns:
        The sum of the losses, the int number of tokens that counted, and for the log
        ``{"lm loss": [sum, tokens]}``; Megatron divides after summing over ranks.
    """
    losses = output_tensor.view(-1).float()
    mask = loss_mask.view(-1).float()
    loss = torch.sum(losses * mask)
    if get_args().check_for_nan_in_loss_and_grad:
        for rejected, name in ((torch.isnan, "nan"), (torch.isinf, "inf")):
            get_rerun_state_machine().validate_result(
                result=loss,
                rejection_func=rejected,
                message=f"found {name} in local forward loss calculation",
            )
    if get_args().check_for_spiky_loss:
        machine = get_rerun_state_machine()
        machine.validate_result(
            result=loss,
            rejection_func=functools.partial(
                machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
            ),
            message="Spiky loss",
            fatal=False,
        )
    num_tokens = mask.sum().clone().detach().to(torch.int)
    logged = torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": logged}


def forward_step(
    data_iterator: Iterator, model: GPTModel, return_schedule_plan: bool = False
) -> tuple[Any, functools.partial]:
    """One microbatch forward.

    Args:
        data_iterator: where the next microbatch comes from.
        model: this stage.
        return_schedule_plan: give the model's schedule plan in place of its output, for
            ``--overlap-moe-expert-parallel-comm``.

    Returns:
        The model's output, and the function that turns it into the loss.
    """
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with straggler_timer(bdata=True):
        stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, stage, is_training=model.training)
    timers("batch-generator").stop()
    run = model.build_schedule_plan if return_schedule_plan else model
    with straggler_timer:
        output = run(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            **{key: batch[key] for key in MODEL_KEYS if key in batch},
        )
    return output, functools.partial(loss_func, batch["loss_mask"])


def dataset_config() -> GPTDatasetConfig:
    """Megatron's dataset configuration from the command line; same names are copied."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    values = {
        field.name: getattr(args, field.name)
        for field in dataclasses.fields(GPTDatasetConfig)
        if field.init and hasattr(args, field.name)
    }
    sizes = args.per_dataset_sequences_path
    values.update(
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=json.loads(Path(sizes).read_text()) if sizes else None,
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        create_attention_mask=args.create_attention_mask_in_dataloader,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    return GPTDatasetConfig(**values)


def train_valid_test_datasets_provider(
    num_samples: tuple[int, int | None, int], vp_stage: int | None = None
) -> tuple[Any, Any, Any]:
    """The three datasets, built on the ranks that read data.

    Args:
        num_samples: samples to draw for training, validation and test.
        vp_stage: the virtual pipeline stage, None without interleaving.
    """

    def is_built_here() -> bool:
        return needs_data(vp_stage) and mpu.get_tensor_model_parallel_rank() == 0

    dataset = MockGPTDataset if get_args().mock_data else GPTDataset
    if get_args().sft:
        dataset = SFTDataset
    print_rank_0("> building train, validation, and test datasets for GPT ...")
    builder = BlendedMegatronDatasetBuilder(dataset, num_samples, is_built_here, dataset_config())
    return builder.build()


train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The global ranks of a pipeline that hold the word embedding or a copy of it."""
    ranks = {pp_ranks[0]}
    args = get_args()
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, echo_config_from_args(args)))
    return sorted(ranks)


def refuse_word(message: str) -> NoReturn:
    """What argparse does with a word that it cannot read; it would say so on every rank."""
    raise ValueError(f"{message}. See --help.")


def extra_args_provider(parser: Any) -> Any:
    """Our flags beside Megatron's, and a usage line in place of all 800 of them."""
    parser.error = refuse_word
    parser.usage = "pretrain_gpt_moe.py [flags]   (--help explains them all)"
    repair_help(parser)
    add_offload_arguments(parser, sys.argv[1:])
    return add_echo_arguments(parser)


def model_config_from_args(args: Any) -> GPTModelConfig | HybridModelConfig:
    """Our model, or with ``--spec`` what the user names there, on our configuration."""
    if args.hybrid_layer_pattern is not None:
        config = hybrid_config_from_args(args, echo_config_from_args(args))
        config.hybrid_stack_spec = config.hybrid_stack_spec or hybrid_stack_spec(config.transformer)
    else:
        config_class = EchoGPTModelConfig if args.spec is None else GPTModelConfig
        config = gpt_config_from_args(args, echo_config_from_args(args), config_class)
    if args.freeze_all_layers:
        config.pre_wrap_hooks.append(freeze)
    if args.optimizer in MUON:
        config.pre_wrap_hooks.append(experts_as_matrices)
    if args.use_megatron_fsdp:
        config.pre_wrap_hooks.append(experts_for_fsdp)
    return config


def announce(args: Any, config: Any) -> None:
    """Say what clones cost that are kept until backward, and which settings are taken over."""
    if args.rank or not args.moe_enable_echo:
        return
    for note in settings_taken_over(config):
        print(f"[megatron_echo] {note}", flush=True)
    if config.moe_echo_recompute_expert_dispatch:
        return
    samples = args.micro_batch_size * args.data_parallel_size
    batch = args.global_batch_size  # None with --step-batch-size-schedule
    kept = kept_clone_bytes(config, batch // samples if batch is not None else None)
    print(
        f"[megatron_echo] --no-moe-echo-recompute-expert-dispatch keeps up to {kept / 2**20:.1f} "
        "MiB of clones on a rank until backward",
        flush=True,
    )


def record_decisions(run_dir: str, chunks: list[Any]) -> list[Any]:
    """Note how tokens and clones of a model will travel; called with its chunks, once built."""
    ways = Transports.find(chunks[0].config)
    if ways is not None:
        add_decisions(run_dir, ways.decided)
    return chunks


def train(
    args: Any,
    model_config: GPTModelConfig | HybridModelConfig,
    offloading: OffloadConfig | None,
    command: tuple[str, ...],
    ranks: Ranks,
) -> None:
    """Hand a checked command line over to Megatron.

    Args:
        args: Megatron's namespace, validated.
        model_config: what to build.
        offloading: settings of the offloader, None without it.
        command: the command line as the user gave it, for the record.
        ranks: told when the first step begins.
    """
    announce(args, model_config.transformer)
    offloaded = None
    if offloading is not None:
        offloaded = OffloadedTraining(offloading, model_config)
        if args.rank == 0:
            print(announcement(offloading), flush=True)
    if args.memory_ledger is not None:
        LedgerOfFirstStep(args.memory_ledger, model_config)
    if args.run_dir is not None:
        if args.rank == 0:
            write_run_record(args.run_dir, args, command)
            model_config.pre_wrap_hooks.append(functools.partial(record_decisions, args.run_dir))
        install_metrics_writer(args.run_dir)

    @functools.wraps(forward_step)
    def step(*inputs: Any, **options: Any) -> Any:
        ranks.begin_training()
        return forward_step(*inputs, **options)

    run, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    run(
        pretrain_cfg_container_from_args(args, model_config),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        step,
        get_embedding_ranks=get_embedding_ranks,
        store=store,
    )
    ranks.begin_training()  # there may have been no step
    if offloaded is not None and args.rank == 0:
        print(offloaded.offloader.report(), flush=True)


@record
def main() -> None:
    """Check the command line, then train."""
    command = tuple(sys.argv)
    sys.argv[1:] = environment.add_missing_flags(sys.argv[1:], not cpu_backend.is_enabled())
    environment.skip_dataset_compilation()
    with one_sentence():
        args = parse_args(extra_args_provider)
        check_flags(args)
    ranks = Ranks(args)
    with ranks.end_together():
        check_files(args)
        ranks.wait_for_first()
        args = parse_and_validate_args(extra_args_provider)
        args.create_attention_mask_in_dataloader &= not args.sft  # its dataset makes none
        check_schedule(args)
        train(args, model_config_from_args(args), offload_config(args), command, ranks)


if __name__ == "__main__":
    main()
