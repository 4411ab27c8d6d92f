"""The table of ``docs/flags.md``: which of Megatron's settings the MoE layer works with.

    python tests/functional_tests/flag_table.py      # writes docs/flags.md

``test_flag_table.py`` runs every row. The second table is that of ``upstream_matrix.py``.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).resolve().parent)]

import upstream_matrix  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting: its flags, and the words of the refusal, or None where it works.

    Attributes:
        is_elsewhere: that it works is also shown by a golden curve or a test of its own.
    """

    setting: str
    flags: dict[str, Any]
    refusal: str | None = None
    ranks: int = 2
    note: str = ""
    is_elsewhere: bool = False


SHARED = {"moe_shared_expert_intermediate_size": 64}
SELECTIVE = {"recompute_granularity": "selective"}
FULL = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
GRAPH = {"cuda_graph_impl": "full_iteration", "no_check_for_nan_in_loss_and_grad": True}
OFFLOAD = {"fine_grained_activation_offloading": True, "offload_modules": "moe_act"}
OVERLAP = {
    "overlap_moe_expert_parallel_comm": True,
    "delay_wgrad_compute": True,
    "moe_token_dispatcher_type": "alltoall",
    "bf16": True,
}
ROWS = (
    Row("tensor and sequence parallelism, whole experts",
        {"tensor_model_parallel_size": 2, "sequence_parallel": True,
         "expert_tensor_parallel_size": 1}, is_elsewhere=True),
    Row("expert-tensor parallelism",
        {"tensor_model_parallel_size": 2, "sequence_parallel": True,
         "expert_model_parallel_size": 1}, note="Megatron's default with tensor parallelism",
        is_elsewhere=True),
    Row("pipeline parallelism", {"pipeline_model_parallel_size": 2}, ranks=4, is_elsewhere=True),
    Row("context parallelism", {"context_parallel_size": 2}, is_elsewhere=True),
    Row("either dispatcher flag of Megatron", {"moe_token_dispatcher_type": "alltoall"},
        note="ours takes its place: --moe-echo-token-transport"),
    Row("Megatron's flex dispatcher, without DeepEP", {"moe_token_dispatcher_type": "flex"},
        note="it is not built"),
    Row("tokens over symmetric memory", {"moe_echo_token_transport": "symmetric_memory"}),
    Row("weights of clones over symmetric memory",
        {"moe_echo_expert_dispatcher_type": "symmetric_memory"}),
    Row("a peer capacity over symmetric memory",
        {"moe_echo_token_transport": "symmetric_memory", "moe_echo_peer_capacity": 0.5},
        "belongs to --moe-echo-token-transport all_to_all."),
    Row("--moe-grouped-gemm", {"moe_grouped_gemm": True}, note="our experts always are"),
    Row("distributed optimizer, both overlaps",
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
         "overlap_param_gather": True}, is_elsewhere=True),
    Row("bf16", {"bf16": True}, is_elsewhere=True),
    Row("fp16", {"fp16": True}),
    Row("router in fp64", {"moe_router_dtype": "fp64"}),
    Row("shared expert", SHARED),
    Row("shared expert, recomputed",
        {**SHARED, **SELECTIVE, "recompute_modules": "shared_experts"}),
    Row("multi-token prediction", {"mtp_num_layers": 1}, is_elsewhere=True),
    Row("all layers frozen", {"freeze_all_layers": True}, is_elsewhere=True),
    Row("dense layers between", {"moe_layer_freq": 2}),
    Row("full recomputation", FULL, is_elsewhere=True),
    Row("MoE layer recomputed", {**SELECTIVE, "recompute_modules": "moe"}, is_elsewhere=True),
    Row("sigmoid router with expert bias",
        {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}),
    Row("group-limited routing", {"moe_router_num_groups": 2, "moe_router_group_topk": 1}),
    Row("squared ReLU", {"swiglu": None, "squared_relu": True}),
    Row("loss per token", {"calculate_per_token_loss": True}),
    Row("sequence-wise loss and z loss, exact",
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1e-2,
         "moe_z_loss_coeff": 1e-3}),
    Row("batch-wise loss, counts of the last step filled in",
        {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1e-2,
         "moe_echo_aux_count_source": "late+previous"}),
    Row("count source without a batch-wise loss", {"moe_echo_aux_count_source": "cumulative"},
        "is for a batch-wise loss. Use --moe-router-load-balancing-type global_aux_loss"),
    Row("balanced routing by force", {"moe_router_force_load_balancing": True}),
    Row("documents packed in a sequence",
        {"reset_position_ids": True, "reset_attention_mask": True}),
    Row("whole-step CUDA graph", {**GRAPH, "cuda_graph_warmup_steps": 1},
        note="captured in the second step", is_elsewhere=True),
    Row("whole-step CUDA graph from the first step", {**GRAPH, "cuda_graph_warmup_steps": 0},
        "makes its buffers in the first step, before the graph."),
    Row("whole-step CUDA graph and one of the optimizer", {**GRAPH, "optimizer_cuda_graph": True},
        "checks between the graph of the step and the optimizer whether everything fitted."),
    Row("whole-step CUDA graph, timed inside", {**GRAPH, "timing_log_level": 1},
        "cannot be timed inside a graph"),
    Row("whole-step CUDA graph, weights gathered in the forward pass",
        {**GRAPH, "cuda_graph_warmup_steps": 1, "use_distributed_optimizer": True,
         "overlap_grad_reduce": True, "overlap_param_gather": True},
        note="each replay gathers", is_elsewhere=True),
    Row("whole-step CUDA graph in fp16", {**GRAPH, "fp16": True}, "Use --bf16."),
    Row("whole-step CUDA graph of a growing batch",
        {**GRAPH, "step_batch_size_schedule": "0:4 8:8", "global_batch_size": None},
        "keeps the number of microbatches of the capture."),
    Row("whole-step CUDA graph, spiky losses looked for", {**GRAPH, "check_for_spiky_loss": True},
        "cannot look at the loss inside a graph."),
    Row("whole-step CUDA graph, weights of clones by p2p",
        {**GRAPH, "moe_echo_expert_dispatcher_type": "p2p"}, "Use auto."),
    Row("whole-step CUDA graph and our own check", {**GRAPH, "moe_echo_check_every": 1},
        "adds work in some steps, which a CUDA graph cannot."),
    Row("asynchronous saving", {"async_save": True, "save": "{folder}", "save_interval": 1}),
    Row("no experts", {"num_experts": None, "expert_model_parallel_size": None},
        "needs a mixture of experts. Give --num-experts, or leave the flag out."),
    Row("more experts than the planner takes", {"num_experts": 2048},
        "plans clones for up to 256 expert-parallel ranks and 1024 experts."),
    Row("expert capacity",
        {"moe_expert_capacity_factor": 1.0, "moe_token_dispatcher_type": "alltoall"},
        "is dropless, but --moe-expert-capacity-factor 1.0 drops tokens."),
    Row("expert capacity with padding to it",
        {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True,
         "moe_token_dispatcher_type": "alltoall"},
        "is dropless, but --moe-expert-capacity-factor 1.0 drops tokens."),
    Row("capacity of an expert-parallel rank",
        {"moe_expert_rank_capacity_factor": 1.5, "moe_token_dispatcher_type": "flex",
         "moe_flex_dispatcher_backend": "ncclep"}, "Use --moe-received-token-capacity."),
    Row("fp8", {"fp8_format": "hybrid"}, "transformer-engine>=1.7.0 supports MoE FP8",
        note="with it, for all but our experts"),
    Row("fp4", {"fp4_format": "e2m1"}, "--fp4-format requires Transformer Engine",
        note="with it, for all but our experts"),
    Row("experts with biases, GPT-OSS's activation",
        {"disable_bias_linear": None, "swiglu": None, "quick_geglu": True,
         "activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
        note="clones bring them", is_elsewhere=True),
    Row("experts and shared experts with biases", {**SHARED, "disable_bias_linear": None},
        "has shared experts without biases, as Megatron. Use --disable-bias-linear."),
    Row("experts with biases, expert-tensor parallelism",
        {"tensor_model_parallel_size": 2, "sequence_parallel": True,
         "expert_model_parallel_size": 1, "disable_bias_linear": None},
        "Bias in Moe is only supported when ETP==1", note="by Megatron itself"),
    Row("interleaved gate and up projections", {"moe_mlp_glu_interleave_size": 32},
        "keeps gate and up projections apart, as all of Megatron's experts"),
    Row("probabilities on the input",
        {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
        is_elsewhere=True),
    Row("shared expert overlapped",
        {**SHARED, "moe_shared_expert_overlap": True, "moe_token_dispatcher_type": "alltoall"},
        note="on a side stream, beside dispatch and combine", is_elsewhere=True),
    Row("EP-communication overlap",
        {name: value for name, value in OVERLAP.items() if name != "delay_wgrad_compute"},
        note="dispatch and combine beside the backward pass of another microbatch",
        is_elsewhere=True),
    Row("EP-communication overlap, delayed weight gradients", OVERLAP,
        note="of experts and clones", is_elsewhere=True),
    Row("EP-communication overlap in a CUDA graph",
        {**OVERLAP, "cuda_graph_impl": "local"},
        "runs in stages of several microbatches with --overlap-moe-expert-parallel-comm"),
    Row("EP-communication overlap, last layer dense", {**OVERLAP, "moe_layer_freq": 2},
        "would lose the model's last norm behind a dense layer"),
    Row("EP-communication overlap of a hybrid model",
        {**OVERLAP, "hybrid_layer_pattern": "*E*E", "num_layers": None},
        "which knows no hybrid models."),
    Row("EP-communication overlap, MoE layer recomputed",
        {**OVERLAP, **SELECTIVE, "recompute_modules": "moe"},
        "disable moe in recompute_modules", note="by Megatron itself"),
    Row("delayed weight gradients alone", {"delay_wgrad_compute": True},
        "computes weight gradients later in the schedule of --overlap-moe-expert-parallel-comm"),
    Row("Transformer Engine's op fuser", {"use_transformer_engine_op_fuser": True},
        note="for dense layers and the shared expert"),
    Row("activation recomputed alone",
        {**SELECTIVE, "recompute_modules": "moe_act", "moe_grouped_gemm": True},
        note="our experts always do"),
    Row("CUDA graphs of single layers", {"cuda_graph_impl": "local"},
        note="whole layers, captured after the first step", is_elsewhere=True),
    Row("CUDA graphs of routers", {"cuda_graph_impl": "local", "cuda_graph_modules": "moe_router"},
        note="with our layer of all of it; `moe_preprocess` and `moe` likewise"),
    Row("CUDA graphs of single layers by Transformer Engine",
        {"cuda_graph_impl": "transformer_engine"},
        "is put into graphs by Transformer Engine, which is not installed.",
        note="works with Transformer Engine"),
    Row("CUDA graphs of single layers, traced plans",
        {"cuda_graph_impl": "local", "moe_echo_trace_dir": "{folder}"}, is_elsewhere=True),
    Row("CUDA graphs of single layers, MoE layer recomputed",
        {"cuda_graph_impl": "local", **SELECTIVE, "recompute_modules": "moe"},
        note="a layer in a graph keeps its activations", is_elsewhere=True),
    Row("CUDA graphs of single layers, norms recomputed",
        {"cuda_graph_impl": "local", **SELECTIVE, "recompute_modules": "layernorm"},
        "would lose the gradients of what --recompute-modules layernorm and mla_up_proj"),
    Row("CUDA graphs of single layers, growing batch",
        {"cuda_graph_impl": "local", "step_batch_size_schedule": "0:4 8:8",
         "global_batch_size": None}, "keeps the number of microbatches of the capture."),
    Row("sinkhorn routing",
        {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
        note="Megatron's routing reads the device: not free of host synchronisation"),
    Row("sinkhorn routing in a whole-step CUDA graph",
        {**GRAPH, "moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
        "never reads the device, but sinkhorn routing does so in a loop, which a CUDA graph"),
    Row("torch FSDP2", {"use_torch_fsdp2": True}, "keeps its experts whole."),
    Row("Megatron-FSDP", {"use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor"},
        "needs the package einops.",
        note="with it all of `--data-parallel-sharding-strategy`, clones included; checkpoints are "
        "read by our layer at the same expert-parallel size only"),
    Row("Megatron-FSDP in CUDA graphs",
        {"use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor", "cuda_graph_impl": "local"},
        "was never captured with parameters that --use-megatron-fsdp gathers in hooks"),
    Row("Megatron-FSDP over pipeline stages",
        {"use_megatron_fsdp": True, "ckpt_format": "fsdp_dtensor",
         "pipeline_model_parallel_size": 2},
        "needs the package einops.", note="with it refused: its mesh knows no pipeline stages"),
    Row("upcycling", {"moe_use_upcycling": True},
        "cannot be built from a dense checkpoint: --moe-use-upcycling knows"),
    Row("Muon", {"optimizer": "muon"}, "needs the package emerging_optimizers.",
        note="with it expert by expert"),
    Row("Muon with fused projections whole", {"optimizer": "muon", "muon_no_split_qkv": True},
        "keeps experts in stacks, which --muon-no-split-qkv leaves whole."),
    Row("SOAP", {"optimizer": "soap"},
        "keeps experts in stacks, which --optimizer soap cannot take apart."),
    Row("initialisation on the CPU", {"use_cpu_initialization": True},
        "gives every expert-parallel rank the same experts."),
    Row("fine-grained offloading", OFFLOAD,
        note="by our manager", is_elsewhere=True),
    Row("fine-grained offloading in a whole-step CUDA graph",
        {**GRAPH, **OFFLOAD, "cuda_graph_warmup_steps": 2},
        note="captured in the third step", is_elsewhere=True),
    Row("fine-grained offloading delayed until the graph",
        {**GRAPH, **OFFLOAD, "cuda_graph_warmup_steps": 2, "delay_offload_until_cuda_graph": True},
        note="its copies are in the graph"),
    Row("fine-grained offloading, delayed without a graph",
        {**OFFLOAD, "delay_offload_until_cuda_graph": True},
        "takes --delay-offload-until-cuda-graph for copies that are in the graph of the step."),
    Row("fine-grained offloading, captured in the second step",
        {**GRAPH, **OFFLOAD, "cuda_graph_warmup_steps": 1},
        "learns its plan in the steps before the graph."),
    Row("fine-grained offloading with Megatron's limit of copies in flight",
        {**OFFLOAD, "fine_grained_offloading_max_inflight_offloads": 1},
        "has no queue of its own for --fine-grained-offloading-max-inflight-offloads."),
    Row("documents packed in a sequence, as packed sequences (THD)",
        {"dataloader_inter_document_masking": True}, is_elsewhere=True),
    Row("conversations packed in a sequence", {"sft": True},
        "--sft of conversations needs the package datasets."),
    Row("hybrid model of attention, MLP and MoE layers",
        {"hybrid_layer_pattern": "*E|-E", "num_layers": None, "pipeline_model_parallel_size": 2,
         "expert_model_parallel_size": 1}),
    Row("hybrid model with Mamba layers", {"hybrid_layer_pattern": "M*E", "num_layers": None},
        "needs the package mamba_ssm.", note="with it and einops they are Megatron's"),
    Row("hybrid model with sparse attention", {"hybrid_layer_pattern": "DE", "num_layers": None},
        "has sparse attention (D), which needs Transformer Engine.", note="with it they are"),
    Row("hybrid model of MLA, MoE and prediction layers",
        {"hybrid_layer_pattern": "+E/+E", "num_layers": None, "multi_latent_attention": True}),
    Row("dropping at capacity 0.8",
        {"moe_received_token_capacity": 0.8, "moe_echo_overflow": "drop"}, is_elsewhere=True),
)  # fmt: skip


def render() -> str:
    """``docs/flags.md``."""
    lines = [
        "# Megatron's settings with `--moe-enable-echo`",
        "",
        "Made by `python tests/functional_tests/flag_table.py`; a test runs every row, on gloo "
        "ranks of a CPU and without Transformer Engine.",
        "",
        "| setting | flags | |",
        "|---|---|---|",
    ]
    for row in ROWS:
        words = " ".join(
            f"without --{name.replace('_', '-')}"
            if value is None
            else "--" + name.replace("_", "-") + ("" if value is True else f" {value}")
            for name, value in row.flags.items()
        )
        verdict = "works" if row.refusal is None else f"refused: {row.refusal}"
        verdict += f" ({row.note})" if row.note else ""
        lines.append(f"| {row.setting} | `{words.replace('{folder}', 'DIR')}` | {verdict} |")
    return "\n".join(lines) + "\n\n" + upstream_matrix.render()


if __name__ == "__main__":
    PAGE.write_text(render())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
