"""Checks of the machine, the parallel layout and the flags against each other."""

import importlib.util
from argparse import Namespace

from megatron_echo import cpu_backend, environment
from megatron_echo.arguments import refuse_heterogeneous_layers
from megatron_echo.compatibility import MUON, argument_refusal
from megatron_echo.flags import flag_name, nearest_multiples, number_refusal

_UNSUPPORTED = ("fim_data", "hybrid_context_parallel", "logits_load_dir")
_SIZES = (
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "expert_tensor_parallel_size",
    "num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
    "num_distributed_optimizer_instances", "micro_batch_size", "global_batch_size",
    "eval_micro_batch_size", "eval_global_batch_size", "seq_length", "num_layers", "hidden_size",
    "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size",
    "make_vocab_size_divisible_by", "moe_router_topk", "moe_ffn_hidden_size", "moe_layer_freq",
    "recompute_num_layers",
)  # fmt: skip
"""Megatron divides by most of these, or builds empty modules, before it looks at them."""
_NEED_TRANSFORMER_ENGINE = {"layernorm", "moe_act", "mla_up_proj"}


def check_flags(args: Namespace) -> None:
    """Check what the command line says by itself; no file is read."""
    _check_numbers(args)
    _check_backend(args)
    _check_layout(args)
    _check_choices(args)
    _check_batch(args)
    _check_unsupported(args)
    _check_packages(args)
    _check_fsdp(args)


def check_schedule(args: Namespace) -> None:
    """Check, of validated arguments, what would stop or spoil a pipeline of virtual stages."""
    if args.virtual_pipeline_model_parallel_size is None:
        return
    _check_mtp_rank(args)
    batches = [("--global-batch-size", args.global_batch_size, args.micro_batch_size)]
    if args.eval_iters:
        evaluated = args.eval_global_batch_size, args.eval_micro_batch_size
        batches.append(("--eval-global-batch-size", *evaluated))
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    for flag, batch, micro_batch in batches:
        if batch is None:
            continue
        samples = micro_batch * args.data_parallel_size
        microbatches = batch // samples
        if microbatches < group or 0 < microbatches % group < stages:
            raise ValueError(
                f"{flag} {batch} is {microbatches} microbatches for each pipeline, which virtual "
                f"stages cannot run in groups of {group}. Use a multiple of {group * samples}."
            )


def _check_mtp_rank(args: Namespace) -> None:
    """MTP layers use the embedding; its copies are made equal between ranks, not within one.

    Their stage on the first rank would enter the all-reduce that does so a second time, which hangs
    if the output layer is tied; untied, its copy would stay zero.
    """
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    given = args.pipeline_model_parallel_layout
    if given is None or args.pipeline_model_parallel_size == 1:
        return
    ranks = PipelineParallelLayerLayout(given, args.pipeline_model_parallel_size).layout
    if not any(LayerType.mtp in stage for stage in ranks[0]):
        return
    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
    stages = ["".join(letters.get(layer, "") for layer in s) for row in zip(*ranks) for s in row]
    moved = "|".join(stages).replace("L", "m" * args.mtp_num_layers + "L")
    raise ValueError(
        f"--pipeline-model-parallel-layout {given} puts MTP layers on the first pipeline rank, "
        f"where they would not share the embedding. Use {moved}, or another rank for them."
    )


def _check_numbers(args: Namespace) -> None:
    """Refuse numbers that end in NaN or in an overflow, whoever's flag it is."""
    for name, value in vars(args).items():
        for number in value if isinstance(value, list) else [value]:
            if name == "clip_grad" and number == float("inf"):
                continue  # no clipping, but the norm is logged
            problem = number_refusal(number)
            if problem is not None:
                raise ValueError(f"{flag_name(name)} {number} {problem}")
    for name in _SIZES:
        size = getattr(args, name)
        if isinstance(size, int) and size < 1:
            raise ValueError(f"{flag_name(name)} {size} is no size. Use 1 or more.")


def _check_backend(args: Namespace) -> None:
    if not cpu_backend.is_enabled():
        return
    if args.distributed_backend == "nccl":
        raise ValueError(
            "--distributed-backend nccl needs a CUDA device and there is none. Leave it out, gloo "
            "is set for you."
        )
    if args.transformer_impl == "transformer_engine":
        raise ValueError(
            "--transformer-impl transformer_engine needs a CUDA device and there is none. Leave "
            "it out, local is set for you."
        )


def _check_layout(args: Namespace) -> None:
    experts, tensor = args.expert_model_parallel_size, args.tensor_model_parallel_size
    if experts > 1 and args.use_cpu_initialization:
        raise ValueError(
            "--use-cpu-initialization gives every expert-parallel rank the same experts. "
            f"Leave it out with --expert-model-parallel-size {experts}."
        )
    if args.num_experts and tensor > 1 and not (args.sequence_parallel or args.skip_train):
        raise ValueError(
            f"--tensor-model-parallel-size {tensor} with experts needs --sequence-parallel. Add it."
        )


def _check_choices(args: Namespace) -> None:
    """A token may choose among the experts of the groups that it has chosen."""
    groups = args.moe_router_num_groups or 1
    chosen = min(args.moe_router_group_topk or groups, groups)
    most = (args.num_experts or 0) // groups * chosen
    if args.num_experts and args.moe_router_topk > most:
        raise ValueError(
            f"--moe-router-topk {args.moe_router_topk} is above the {most} experts that "
            "--num-experts and --moe-router-group-topk leave a token. Use fewer."
        )


def _check_batch(args: Namespace) -> None:
    """Megatron would blame the batch of evaluation, which takes the size of training."""
    batch, micro_batch = args.global_batch_size, args.micro_batch_size
    if not batch or not micro_batch or args.decrease_batch_size_if_needed:
        return
    model = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    ranks = args.world_size // (model * args.context_parallel_size)
    samples = micro_batch * ranks
    if samples and batch % samples:
        raise ValueError(
            f"--global-batch-size {batch} is not divisible by --micro-batch-size {micro_batch} x "
            f"{ranks} data-parallel ranks. Use {nearest_multiples(batch, samples)}."
        )


def _check_unsupported(args: Namespace) -> None:
    refuse_heterogeneous_layers(args)
    for name in _UNSUPPORTED:
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} is not supported by pretrain_gpt_moe.py. Leave it "
                "out, or add --spec megatron_echo.layer_specs gpt_moe_block_spec to Megatron's "
                "own pretrain_gpt.py."
            )
    if args.create_all_gather_group:
        raise ValueError(
            "--create-all-gather-group has no effect on a model that Megatron-Core 0.19.2 builds "
            "from a configuration, as it does here. Leave it out."
        )
    problem = argument_refusal(args) if args.moe_enable_echo else None
    if problem is not None:
        raise ValueError(f"--moe-enable-echo {problem}")
    modules = set(args.recompute_modules or ())
    without_output = sorted(modules & _NEED_TRANSFORMER_ENGINE)
    if without_output and not (cpu_backend.is_enabled() or environment.HAVE_TRANSFORMER_ENGINE):
        raise ValueError(
            f"--recompute-modules {' '.join(without_output)} needs Transformer Engine in "
            "Megatron-Core 0.19.2. Install it, or recompute other modules."
        )
    is_local = args.transformer_impl == "local"
    pattern = args.hybrid_layer_pattern or args.hybrid_override_pattern or ""
    if "D" in pattern and is_local:
        raise ValueError(
            f"--hybrid-layer-pattern {pattern} has sparse attention (D), which needs Transformer "
            "Engine. Install it, or use other layers."
        )
    if args.reset_attention_mask and args.context_parallel_size > 1 and is_local:
        raise ValueError(
            "--reset-attention-mask with --context-parallel-size "
            f"{args.context_parallel_size} needs Transformer Engine: the local attention knows "
            "only the causal mask then. Leave one of the two out."
        )
    _check_packing(args)
    if args.save and args.save_interval is None:
        raise ValueError("--save needs --save-interval N: how many iterations between checkpoints.")
    if args.full_validation and not args.multiple_validation_sets:
        raise ValueError(
            "--full-validation needs --multiple-validation-sets: Megatron-Core 0.19.2 looks for a "
            "list of sets. Add it, or leave --full-validation out."
        )
    if not _has_data(args) and not args.skip_train:
        raise ValueError(
            "No data was given. Use --data-path PREFIX (of a .bin/.idx pair) or --mock-data."
        )


def _check_packing(args: Namespace) -> None:
    """Samples of several sequences: what Megatron carries from the dataset to the attention."""
    packs = "--sft" if args.sft else "--dataloader-inter-document-masking"
    if not (args.sft or args.dataloader_inter_document_masking):
        return
    if args.context_parallel_size > 1 or args.cuda_graph_impl != "none":
        raise ValueError(
            f"{packs} keeps sequences whole and reads their lengths on the host, but "
            f"--context-parallel-size is {args.context_parallel_size} and --cuda-graph-impl "
            f"{args.cuda_graph_impl}. Use 1 and none."
        )
    samples = max(args.micro_batch_size or 1, args.eval_micro_batch_size or 1)
    if args.pipeline_model_parallel_size > 1 and samples > 1:
        raise ValueError(
            f"{packs} makes one row of {samples} samples, which pipeline stages do not expect. "
            "Use --micro-batch-size 1."
        )


def _check_fsdp(args: Namespace) -> None:
    """What Megatron-FSDP says in a traceback, or does not say."""
    stages = args.pipeline_model_parallel_size
    if args.use_megatron_fsdp and stages > 1:
        raise ValueError(
            "--use-megatron-fsdp lays its mesh over all ranks, but --pipeline-model-parallel-size "
            f"{stages} leaves a stage some of them. Use 1."
        )
    if args.use_megatron_fsdp and args.moe_enable_echo and args.save and args.add_bias_linear:
        # It tells ranks' weights apart by the number of an expert, and no biases.
        raise ValueError(
            "--use-megatron-fsdp would save the experts' biases of all expert-parallel ranks under "
            f"one name in --save {args.save}. Add --disable-bias-linear, or leave --save out."
        )


def _has_data(args: Namespace) -> bool:
    names = ("data_path", "data_args_path", "per_split_data_args_path", "train_data_path")
    return args.mock_data or any(getattr(args, name) for name in names)


def _check_packages(args: Namespace) -> None:
    """Packages that Megatron imports only once it needs them, on one rank at times."""
    if args.wandb_project and not (args.save or args.wandb_save_dir):
        raise ValueError(
            f"--wandb-project {args.wandb_project} has no folder to write to. Give --save or "
            "--wandb-save-dir."
        )
    instances = args.num_distributed_optimizer_instances
    pattern = args.hybrid_layer_pattern or args.hybrid_override_pattern or ""
    variant = args.experimental_attention_variant
    has_delta_net, is_fsdp = variant == "gated_delta_net", args.use_megatron_fsdp
    for flag, value, package in (
        ("--hybrid-layer-pattern", "M" in pattern and pattern, "mamba_ssm"),
        ("--hybrid-layer-pattern", "M" in pattern and pattern, "einops"),
        ("--hybrid-layer-pattern", "G" in pattern and pattern, "fla"),
        ("--experimental-attention-variant", has_delta_net and variant, "fla"),
        ("--num-distributed-optimizer-instances", instances if instances > 1 else None, "einops"),
        ("--use-megatron-fsdp", "of Megatron-Core" if is_fsdp else None, "einops"),
        ("--wandb-project", args.wandb_project, "wandb"),
        ("--optimizer", args.optimizer in MUON and args.optimizer, "emerging_optimizers"),
        ("--sft", "of conversations" if args.sft else None, "datasets"),
    ):
        if value and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{flag} {value} needs the package {package}. Install it, or leave the flag out."
            )
