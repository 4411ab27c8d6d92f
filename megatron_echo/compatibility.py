"""What the MoE layer of this package cannot work with, and what to do instead.

A test fires each row; ``tests/functional_tests/flag_table.py`` tries the flags of most in a run,
and makes ``docs/flags.md`` of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from megatron.core.transformer.cuda_graph_config import normalize_cuda_graph_modules
from megatron.core.transformer.enums import CudaGraphModule

from megatron_echo.environment import HAVE_TRANSFORMER_ENGINE
from megatron_echo.flags import Rows, first_refusal
from megatron_echo.planner.bound import MAX_EXPERTS, MAX_RANKS
from megatron_echo.precision import expert_precision

_PARTS_OF_MOE = (CudaGraphModule.moe_router, CudaGraphModule.moe_preprocess)
_MOE = (CudaGraphModule.moe, *_PARTS_OF_MOE)

MUON = ("muon", "dist_muon")
"""Words of ``--optimizer`` for Megatron's Muon, which takes matrices."""


def moe_layer_pattern(config: Any) -> list[bool]:
    """For each layer of the decoder whether ``--moe-layer-freq`` makes it a MoE layer."""
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(config.num_layers)]
    return [bool(is_moe) for is_moe in frequency]


def has_layer_graphs(config: Any) -> bool:
    """Whether single layers are in CUDA graphs, and not the whole step."""
    return config.cuda_graph_impl in ("local", "transformer_engine")


_CONFIG: Rows = (
    (
        lambda c: c.num_moe_experts is None,
        "needs a mixture of experts. Give --num-experts, or leave the flag out.",
    ),
    (
        lambda c: (
            c.expert_model_parallel_size > 1
            and getattr(c, "moe_num_echo_experts", None) != 0
            and (c.expert_model_parallel_size > MAX_RANKS or c.num_moe_experts > MAX_EXPERTS)
        ),
        f"plans clones for up to {MAX_RANKS} expert-parallel ranks and {MAX_EXPERTS} experts. Use "
        "--moe-num-echo-experts 0, or fewer.",
    ),
    (
        lambda c: c.moe_expert_capacity_factor is not None,
        "is dropless, but --moe-expert-capacity-factor {config.moe_expert_capacity_factor} drops "
        "tokens. Leave one of the two out.",
    ),
    (
        lambda c: c.moe_expert_rank_capacity_factor is not None,
        "sizes its buffers by its own flag, not --moe-expert-rank-capacity-factor "
        "{config.moe_expert_rank_capacity_factor}. Use --moe-received-token-capacity.",
    ),
    (
        lambda c: c.add_bias_linear and c.moe_shared_expert_intermediate_size,
        "has shared experts without biases, as Megatron. Use --disable-bias-linear.",
    ),
    (
        lambda c: c.overlap_moe_expert_parallel_comm and c.cuda_graph_impl != "none",
        "runs in stages of several microbatches with --overlap-moe-expert-parallel-comm, which "
        "--cuda-graph-impl {config.cuda_graph_impl} does not capture. Leave one of the two out.",
    ),
    (
        lambda c: c.overlap_moe_expert_parallel_comm and not moe_layer_pattern(c)[-1],
        "would lose the model's last norm behind a dense layer in Megatron's schedule of "
        "--overlap-moe-expert-parallel-comm. Make the last one a MoE layer with --moe-layer-freq, "
        "or leave the flag out.",
    ),
    (
        lambda c: c.delay_wgrad_compute and not c.overlap_moe_expert_parallel_comm,
        "computes weight gradients later in the schedule of --overlap-moe-expert-parallel-comm "
        "only. Add that flag, or leave --delay-wgrad-compute out.",
    ),
    (
        lambda c: c.overlap_dispatch_backward_with_experts_wgrad,
        "computes weight gradients with the other gradients, or with --delay-wgrad-compute after "
        "them. Leave --overlap-dispatch-backward-with-experts-wgrad out.",
    ),
    (
        lambda c: c.moe_mlp_glu_interleave_size is not None,
        "keeps gate and up projections apart, as all of Megatron's experts but its TEGroupedMLP. "
        "Leave --moe-mlp-glu-interleave-size out.",
    ),
    (
        lambda c: (
            c.variable_seq_lengths and getattr(c, "moe_echo_max_tokens_per_rank", None) is None
        ),
        "has buffers of one size, but variable_seq_lengths is set. Say how many tokens a rank "
        "brings to a layer at most: --moe-echo-max-tokens-per-rank.",
    ),
    (
        lambda c: c.variable_seq_lengths and c.cuda_graph_impl != "none",
        "cannot put sequences of variable lengths (variable_seq_lengths) into one CUDA graph. Use "
        "--cuda-graph-impl none, or pad each microbatch to one length.",
    ),
    (
        lambda c: c.moe_router_fusion and (c.moe_enable_routing_replay or _replays_files(c)),
        "routes as it is told, which Megatron's fused routing cannot. Leave --moe-router-fusion "
        "out, or --moe-enable-routing-replay and --moe-echo-replay-routing.",
    ),
    (
        lambda c: (
            _replays_files(c)
            and (
                c.moe_router_load_balancing_type in ("sinkhorn", "quantile_balancing")
                or c.mtp_use_repeated_layer
            )
        ),
        "replays routers that choose the top-k once for each token, not sinkhorn, quantile "
        "balancing or --mtp-use-repeated-layer. Leave --moe-echo-replay-routing out.",
    ),
    (
        lambda c: c.cuda_graph_impl == "transformer_engine" and not HAVE_TRANSFORMER_ENGINE,
        "is put into graphs by Transformer Engine, which is not installed. Install it, or use "
        "--cuda-graph-impl local or full_iteration.",
    ),
    (
        lambda c: has_layer_graphs(c) and not set(_PARTS_OF_MOE).isdisjoint(c.cuda_graph_modules),
        "is whole in a graph: cut at --cuda-graph-modules {config.cuda_graph_modules} it would "
        "lose its plan. Leave --cuda-graph-modules out, or use EchoTransformerConfig.",
    ),
    (
        # They ask autograd for the gradients of a layer; a recomputation within adds its own aside.
        lambda c: c.cuda_graph_impl == "local" and _recomputes(c, "layernorm", "mla_up_proj"),
        "would lose the gradients of what --recompute-modules layernorm and mla_up_proj recompute "
        "in Megatron's local graphs. Leave them out, or use --cuda-graph-impl full_iteration.",
    ),
    (
        # Megatron's local graphs are made after a first step without, in any case.
        lambda c: (
            c.cuda_graph_impl in ("full_iteration", "transformer_engine")
            and c.cuda_graph_warmup_steps < 1
        ),
        "makes its buffers in the first step, before the graph. Use --cuda-graph-warmup-steps 1 or "
        "more.",
    ),
    (
        lambda c: c.transformer_impl == "inference_optimized",
        "is a training layer. Use --transformer-impl transformer_engine or local.",
    ),
    (
        lambda c: (
            c.use_cpu_initialization
            and (c.expert_model_parallel_size > 1 or c.expert_tensor_parallel_size > 1)
        ),
        "needs different experts on each rank, but --use-cpu-initialization makes them the same. "
        "Leave it out.",
    ),
    (
        lambda c: c.fine_grained_activation_offloading,
        "is unknown to Megatron's offloading manager. Leave --offload-implementation megatron out.",
    ),
    (
        lambda c: c.cuda_graph_impl != "none" and _is_sinkhorn(c),
        "never reads the device, but sinkhorn routing does so in a loop, which a CUDA graph "
        "cannot. Use another --moe-router-load-balancing-type, or --cuda-graph-impl none.",
    ),
)

_TAKEN_OVER: Rows = (
    (
        lambda c: c.fp8 or c.fp4,
        "--fp8-format or --fp4-format: in the layers of Transformer Engine (attention, dense "
        "layers, shared expert); our experts keep their parameters in {parameters} and compute in "
        "{computed}",
    ),
    (
        lambda c: _recomputes(c, "moe_act"),
        "--recompute-modules moe_act: the activation of our experts is recomputed in any case",
    ),
    (
        lambda c: c.moe_router_padding_for_quantization,
        "--moe-router-padding-for-quantization: rows are padded by --moe-echo-row-alignment",
    ),
    (
        lambda c: c.use_transformer_engine_op_fuser,
        "--use-transformer-engine-op-fuser: for dense layers and the shared expert, not for our "
        "experts",
    ),
    (
        lambda c: c.delay_wgrad_compute and c.transformer_impl == "local",
        "--delay-wgrad-compute: of our experts; local modules compute theirs with the other "
        "gradients",
    ),
    (
        lambda c: has_layer_graphs(c) and _recomputes(c, "moe"),
        "--recompute-modules moe: a layer in a graph keeps its activations",
    ),
    (
        lambda c: has_layer_graphs(c) and CudaGraphModule.moe in c.cuda_graph_modules,
        "--cuda-graph-modules moe: the whole MoE layer, also for moe_router and moe_preprocess",
    ),
    (
        lambda c: _is_sinkhorn(c),
        "--moe-router-load-balancing-type sinkhorn: Megatron's routing reads the device, so that "
        "the step is not free of host synchronisation",
    ),
)
"""Settings that ask for what the layer does anyway, or in its own way."""


_ARGUMENTS: Rows = (
    (
        lambda a: a.use_torch_fsdp2,
        "keeps its experts whole. Leave --use-torch-fsdp2 out and use --use-distributed-optimizer.",
    ),
    (
        lambda a: a.use_megatron_fsdp and a.cuda_graph_impl != "none",
        "was never captured with parameters that --use-megatron-fsdp gathers in hooks and "
        "streams of its own. Leave it out, or --cuda-graph-impl {args.cuda_graph_impl}.",
    ),
    (
        lambda a: a.moe_use_upcycling,
        "cannot be built from a dense checkpoint: --moe-use-upcycling knows the weights of "
        "SequentialMLP and TEGroupedMLP by name. Upcycle without --moe-enable-echo, which saves, "
        "and load that checkpoint.",
    ),
    (
        lambda a: a.overlap_moe_expert_parallel_comm and a.hybrid_layer_pattern,
        "follows Megatron's schedule of --overlap-moe-expert-parallel-comm, which knows no hybrid "
        "models. Leave it out, or --hybrid-layer-pattern.",
    ),
    (
        # They take a parameter as one matrix, or leave it to Adam.
        lambda a: a.optimizer in ("adaptive_muon", "soap"),
        "keeps experts in stacks, which --optimizer {args.optimizer} cannot take apart. Use muon, "
        "or adam.",
    ),
    (
        lambda a: a.optimizer in MUON and not a.muon_split_qkv,
        "keeps experts in stacks, which --muon-no-split-qkv leaves whole. Leave it out.",
    ),
    (
        lambda a: a.fine_grained_activation_offloading,
        "is unknown to Megatron's offloading manager. Leave --offload-implementation megatron out.",
    ),
    (
        lambda a: (
            a.cuda_graph_impl != "none" and (a.rampup_batch_size or a.step_batch_size_schedule)
        ),
        "keeps the number of microbatches of the capture. Leave --rampup-batch-size and "
        "--step-batch-size-schedule out.",
    ),
)


_WHOLE_STEP_GRAPH: Rows = (
    (
        lambda a: a.optimizer_cuda_graph,
        "checks between the graph of the step and the optimizer whether everything fitted. Leave "
        "--optimizer-cuda-graph out.",
    ),
    (
        lambda a: a.overlap_param_gather_with_optimizer_step,
        "gathers weights inside the graph only, not in the optimizer's step. Leave "
        "--overlap-param-gather-with-optimizer-step out.",
    ),
    (
        lambda a: a.fp16,
        "goes on with the loss scale of the capture. Use --bf16.",
    ),
    (
        lambda a: a.check_for_spiky_loss,
        "cannot look at the loss inside a graph. Leave --check-for-spiky-loss out.",
    ),
    (
        lambda a: a.timing_log_level or a.log_straggler,
        "cannot be timed inside a graph, where the host must not wait. Leave --timing-log-level "
        "and --log-straggler out.",
    ),
)
"""With ``--cuda-graph-impl full_iteration``."""


def _replays_files(config: Any) -> bool:
    return getattr(config, "moe_echo_replay_routing", None) is not None


def _recomputes(config: Any, *modules: str) -> bool:
    is_selective = config.recompute_granularity == "selective"
    return is_selective and not set(modules).isdisjoint(config.recompute_modules)


def _is_sinkhorn(config: Any) -> bool:
    return "sinkhorn" in config.moe_router_load_balancing_type


def settings_taken_over(config: Any) -> list[str]:
    """What a user should know about accepted settings, a line each."""
    parameters = str(config.params_dtype).removeprefix("torch.")
    precision, reason = expert_precision(config)
    computed = parameters if precision == "params-dtype" else precision
    computed += f" ({reason.removesuffix('.')})" if reason else ""
    words = {"parameters": parameters, "computed": computed}
    return [note.format(**words) for applies, note in _TAKEN_OVER if applies(config)]


@contextlib.contextmanager
def whole_layer_in_graph(config: Any) -> Iterator[None]:
    """Leaves ``moe`` in ``--cuda-graph-modules``, which Megatron refuses for its dropless layers.

    ``moe_router`` and ``moe_preprocess`` are what it captures of those; of ours it is all.
    """
    given = []
    if config.moe_enable_echo and has_layer_graphs(config):
        given, *_ = normalize_cuda_graph_modules(config.cuda_graph_modules)
        config.cuda_graph_modules = [module for module in given if module not in _MOE]
    yield
    if any(module in _MOE for module in given):
        config.cuda_graph_modules.append(CudaGraphModule.moe)


def config_refusal(config: Any) -> str | None:
    """What in a transformer configuration the layer of this package cannot work with, or None.

    The words follow the flag that turns the layer on: what is wrong, then what to do.
    """
    return first_refusal(_CONFIG, config)


def argument_refusal(args: Any) -> str | None:
    """The same for settings that stand on the command line only, from Megatron's namespace."""
    has_graph = args.cuda_graph_impl == "full_iteration"
    return first_refusal((*_ARGUMENTS, *(_WHOLE_STEP_GRAPH if has_graph else ())), args)
