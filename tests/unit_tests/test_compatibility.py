"""Every row of the refusals fires for its setting, alone, and none for a plain one."""

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import CudaGraphModule

from megatron_echo import compatibility, flag_checks, precision

PLAIN = SimpleNamespace(
    num_moe_experts=8, expert_model_parallel_size=2, moe_num_echo_experts=None,
    moe_expert_capacity_factor=None, moe_expert_rank_capacity_factor=None,
    expert_tensor_parallel_size=1, fp8=None, fp8_recipe="delayed", fp4=None,
    first_last_layers_bf16=False, add_bias_linear=False, moe_latent_size=None,
    moe_apply_probs_on_input=False, moe_router_padding_for_quantization=False,
    moe_shared_expert_overlap=False, overlap_moe_expert_parallel_comm=False,
    delay_wgrad_compute=False, overlap_dispatch_backward_with_experts_wgrad=False,
    use_transformer_engine_op_fuser=False, moe_mlp_glu_interleave_size=None,
    moe_router_fusion=False, moe_enable_routing_replay=False, mtp_use_repeated_layer=False,
    variable_seq_lengths=False, recompute_granularity=None, recompute_modules=["moe"],
    cuda_graph_impl="none", cuda_graph_warmup_steps=3, cuda_graph_modules=[],
    experimental_attention_variant=None,
    transformer_impl="local", use_cpu_initialization=False,
    fine_grained_activation_offloading=False, moe_router_load_balancing_type="aux_loss",
    use_torch_fsdp2=False, use_megatron_fsdp=False, moe_use_upcycling=False,
    optimizer_cuda_graph=False, overlap_param_gather_with_optimizer_step=False, fp16=False,
    rampup_batch_size=None,
    step_batch_size_schedule=None, check_for_spiky_loss=False, timing_log_level=0,
    log_straggler=False, params_dtype=torch.bfloat16, moe_echo_check_every=0,
    moe_echo_row_alignment=16, moe_received_token_capacity=None, hidden_size=64,
    moe_ffn_hidden_size=64, moe_echo_grouped_gemm="auto",
    moe_shared_expert_intermediate_size=None, optimizer="adam", num_layers=4, moe_layer_freq=1,
    hybrid_layer_pattern=None,
)  # fmt: skip
MXFP8 = precision.FORMATS["mxfp8"]
LAYERS = {"cuda_graph_impl": "local"}
GRAPH = {"cuda_graph_impl": "full_iteration"}
OF_CONFIG = (
    {"num_moe_experts": None, "expert_model_parallel_size": 1}, {"num_moe_experts": 2048},
    {"moe_expert_capacity_factor": 1.0},
    {"moe_expert_rank_capacity_factor": 1.5},
    {"add_bias_linear": True, "moe_shared_expert_intermediate_size": 64},
    {"overlap_moe_expert_parallel_comm": True, "cuda_graph_impl": "local"},
    {"overlap_moe_expert_parallel_comm": True, "moe_layer_freq": 2},
    {"overlap_moe_expert_parallel_comm": True, "moe_layer_freq": [1, 1, 1, 0]},
    {"delay_wgrad_compute": True}, {"overlap_dispatch_backward_with_experts_wgrad": True},
    {"moe_mlp_glu_interleave_size": 32},
    {"variable_seq_lengths": True},
    {"moe_router_fusion": True, "moe_enable_routing_replay": True},
    {"moe_router_fusion": True, "moe_echo_replay_routing": "ids"},
    {"mtp_use_repeated_layer": True, "moe_echo_replay_routing": "ids"},
    {**GRAPH, "variable_seq_lengths": True, "moe_echo_max_tokens_per_rank": 4096},
    {"cuda_graph_impl": "transformer_engine"},
    {**LAYERS, "cuda_graph_modules": [CudaGraphModule.attn, CudaGraphModule.moe_router]},
    {**LAYERS, "recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
    {**GRAPH, "cuda_graph_warmup_steps": 0},
    {"transformer_impl": "inference_optimized"}, {"use_cpu_initialization": True},
    {"fine_grained_activation_offloading": True},
    {**GRAPH, "moe_router_load_balancing_type": ["sinkhorn"]},
)  # fmt: skip
TAKEN_OVER = (
    {"fp8": "hybrid"}, {"fp4": "e2m1"},
    {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]},
    {"moe_router_padding_for_quantization": True}, {"use_transformer_engine_op_fuser": True},
    {"delay_wgrad_compute": True}, {**LAYERS, "recompute_granularity": "selective"},
    {**LAYERS, "cuda_graph_modules": [CudaGraphModule.moe]},
    {"moe_router_load_balancing_type": ["sinkhorn"]},
)  # fmt: skip
OF_ARGUMENTS = (
    {"use_torch_fsdp2": True}, {"use_megatron_fsdp": True, **LAYERS}, {"moe_use_upcycling": True},
    {"overlap_moe_expert_parallel_comm": True, "hybrid_layer_pattern": "*E*E"},
    {"fine_grained_activation_offloading": True},
    {**GRAPH, "rampup_batch_size": [2, 2, 8]}, {**LAYERS, "step_batch_size_schedule": "0:8"},
    {"optimizer": "muon", "muon_split_qkv": False}, {"optimizer": "adaptive_muon"},
    {"optimizer": "soap"},
)  # fmt: skip
OF_GRAPHS = (
    {"optimizer_cuda_graph": True}, {"overlap_param_gather_with_optimizer_step": True},
    {"fp16": True},
    {"check_for_spiky_loss": True}, {"timing_log_level": 1}, {"log_straggler": True},
)  # fmt: skip

OF_ENGINES = ({"expert_model_parallel_size": 1}, {"params_dtype": torch.float32})
OF_NCCL_EP = (
    {"moe_echo_check_every": 5}, {"moe_echo_row_alignment": 48},
    {"moe_received_token_capacity": 1.5}, {"moe_num_echo_experts": 4},
)  # fmt: skip
OF_FP8 = (
    {"hidden_size": 48}, {"moe_latent_size": 80}, {"moe_ffn_hidden_size": 80},
    {"expert_tensor_parallel_size": 8}, {"params_dtype": torch.float16},
)  # fmt: skip


def fired(table: tuple, setting: dict) -> set[int]:
    namespace = SimpleNamespace(**vars(PLAIN) | setting)
    return {number for number, (refuses, _) in enumerate(table) if refuses(namespace)}


@pytest.mark.parametrize(
    ("table", "settings"),
    [
        (compatibility._CONFIG, OF_CONFIG),
        (compatibility._TAKEN_OVER, TAKEN_OVER),
        (compatibility._ARGUMENTS, OF_ARGUMENTS),
        (compatibility._WHOLE_STEP_GRAPH, OF_GRAPHS),
        (flag_checks._ENGINE, OF_ENGINES),
        (flag_checks._NCCL_EP, OF_NCCL_EP),
        (precision._refusals(MXFP8)[:-1], OF_FP8),
    ],
    ids=["config", "taken over", "arguments", "graphs", "engines", "nccl_ep", "fp8"],
)
def test_every_row_fires(
    table: tuple, settings: tuple[dict, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert fired(table, {}) == set()
    rows = [fired(table, setting) for setting in settings]
    assert all(len(row) == 1 for row in rows), list(zip(settings, rows, strict=True))
    assert set.union(*rows) == set(range(len(table)))


def test_the_message_is_that_of_the_row() -> None:
    assert compatibility.config_refusal(PLAIN) is None
    assert compatibility.argument_refusal(PLAIN) is None
    changed = SimpleNamespace(**vars(PLAIN) | {"moe_expert_capacity_factor": 1.5})
    assert "--moe-expert-capacity-factor 1.5 drops" in str(compatibility.config_refusal(changed))
    graph = SimpleNamespace(**vars(PLAIN) | GRAPH | {"fp16": True})
    assert "Use --bf16" in str(compatibility.argument_refusal(graph))
    without_graph = SimpleNamespace(**vars(PLAIN) | {"fp16": True})
    assert compatibility.argument_refusal(without_graph) is None


def test_what_is_said_beside_fp8_of_transformer_engine() -> None:
    changed = SimpleNamespace(**vars(PLAIN) | {"fp8": "hybrid"})
    (line,) = compatibility.settings_taken_over(changed)
    assert "our experts keep their parameters in bfloat16 and compute in bfloat16" in line
    changed.moe_echo_expert_precision = "fp8-rowwise"
    (line,) = compatibility.settings_taken_over(changed)
    assert "our experts keep their parameters in bfloat16 and compute in fp8-rowwise" in line


def test_auto_is_the_format_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can be had; else experts stay as they are, and start-up says why."""

    def chosen(**fields) -> tuple[str, str]:
        config = SimpleNamespace(**vars(PLAIN) | {"fp8": "e4m3"} | fields)
        (line,) = compatibility.settings_taken_over(config)
        return precision.expert_precision(config)[0], line.partition(" compute in ")[2]

    assert precision.expert_precision(SimpleNamespace(**vars(PLAIN))) == ("params-dtype", None)
    off = SimpleNamespace(**vars(PLAIN) | {"fp8_recipe": "mxfp8"})
    assert precision.expert_precision(off) == ("params-dtype", None)
    for recipe in ("delayed", "tensorwise", "custom"):
        assert chosen(fp8_recipe=recipe) == ("params-dtype", "bfloat16")
    assert chosen(fp8_recipe="mxfp8") == ("mxfp8", "mxfp8")
    wide = {"hidden_size": 256, "moe_ffn_hidden_size": 128}
    assert chosen(fp8_recipe="blockwise", **wide) == ("fp8-blockwise", "fp8-blockwise")
    word, line = chosen(fp8_recipe="blockwise")
    assert word == "params-dtype"
    assert line.startswith(
        "bfloat16 (fp8-blockwise needs a width of a multiple of 128. Use another"
    )
    word, line = chosen(fp8_recipe="mxfp8", first_last_layers_bf16=True)
    assert (word, "unlike --first-last-layers-bf16" in line) == ("params-dtype", True)
    assert chosen(fp8_recipe="mxfp8", moe_echo_expert_precision="params-dtype")[1] == "bfloat16"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    word, line = chosen(fp8_recipe="mxfp8")
    assert (word, "10.0 (B200, GB200)" in line) == ("params-dtype", True)
    assert chosen(fp8_recipe="blockwise", **wide)[0] == "fp8-blockwise"


def test_precisions_that_cannot_be_had_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name with what would do; FP8 on another card, and without a card not at all."""
    refusal = precision.precision_refusal
    assert str(refusal("nvfp4", PLAIN)).endswith("with cuBLAS 13.3 or newer. Use mxfp8.")
    wide = SimpleNamespace(**vars(PLAIN) | {"hidden_size": 256, "moe_ffn_hidden_size": 128})
    assert [refusal(name, wide) for name in precision.FORMATS] == [None] * 3
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    lacks = {"fp8-rowwise": "H100", "mxfp8": "B200", "fp8-blockwise": "8.9 or newer"}
    for capability, by_auto in (
        ((9, 0), ("mxfp8",)), ((8, 9), ("fp8-rowwise", "mxfp8")), ((10, 0), ("fp8-rowwise",)),
        ((12, 0), ("fp8-rowwise", "mxfp8")), ((8, 0), tuple(lacks)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda it=capability: it)
        for gemm in ("auto", "torch", "triton"):
            config = SimpleNamespace(**vars(wide) | {"moe_echo_grouped_gemm": gemm})
            refused = {name for name, words in lacks.items() if words in str(refusal(name, config))}
            expected = set(by_auto)
            if gemm == "torch":
                expected.add("fp8-blockwise")
            elif gemm == "triton":
                expected = set(lacks) if capability == (8, 0) else set()
            assert refused == expected, (capability, gemm)
