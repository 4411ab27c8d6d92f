import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_echo import preflight
from megatron_echo.config import EchoTransformerConfig
from megatron_echo.offload.training import offload_config
from megatron_echo.preflight import layout, places

LOSSES = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_moe_experts": 8,
    "add_bias_linear": False,
    "moe_enable_echo": True,
}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--moe-echo-tolerance nan", "--moe-echo-tolerance nan is not a finite number"),
        ("--moe-received-token-capacity inf", "--moe-received-token-capacity inf is not a finite"),
        ("--moe-z-loss-coeff inf", "--moe-z-loss-coeff inf is not a finite number"),
        ("--moe-aux-loss-coeff nan", "--moe-aux-loss-coeff nan is not a finite number"),
        ("--lr=-inf", "--lr -inf is not a finite number"),
        (f"--moe-echo-min-tokens-per-clone {10**30}", "does not fit into 64 bits"),
        (f"--train-iters {2**63}", f"--train-iters {2**63} does not fit into 64 bits"),
        ("--wandb-project x", "--wandb-project x has no folder to write to"),
        ("--full-validation", "--full-validation needs --multiple-validation-sets"),
        ("--pipeline-model-parallel-size 0", "--pipeline-model-parallel-size 0 is no size. Use 1"),
        ("--num-attention-heads=-1", "--num-attention-heads -1 is no size"),
        (
            "--global-batch-size 3 --micro-batch-size 2",
            "size 3 is not divisible by --micro-batch-size 2 x 1 data-parallel ranks. Use 2 or 4",
        ),
        ("--num-experts 2 --moe-router-topk 3", "--moe-router-topk 3 is above the 2 experts"),
        (
            "--num-experts 8 --moe-router-topk 5 --moe-router-num-groups 4 "
            "--moe-router-group-topk 2",
            "--moe-router-topk 5 is above the 4 experts that",
        ),
    ],
)
def test_what_no_run_could_use(parsed, flags: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preflight.check_flags(parsed("--mock-data", *flags.split()))


def test_experts_want_sequence_parallelism(parsed) -> None:
    words = ["--mock-data", "--num-experts", "8", "--tensor-model-parallel-size", "2"]
    with pytest.raises(ValueError, match="size 2 with experts needs --sequence-parallel"):
        preflight.check_flags(parsed(*words, world_size=2))
    preflight.check_flags(parsed(*words, "--sequence-parallel", world_size=2))


@pytest.mark.parametrize(
    "flags",
    [
        "--clip-grad inf",
        f"--train-iters {2**63 - 1}",
        "--global-batch-size 3 --micro-batch-size 2 --decrease-batch-size-if-needed",
        "--num-experts 8 --moe-router-topk 4 --moe-router-num-groups 4 --moe-router-group-topk 2",
    ],
)
def test_what_a_run_may_use(parsed, flags: str) -> None:
    preflight.check_flags(parsed("--mock-data", *flags.split()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--pipeline-model-parallel-size 2", "parallel-size 2 leaves a stage some of them. Use 1"),
        (
            "--save x --save-interval 1 --moe-enable-echo --num-experts 8",
            "under one name in --save x. Add --disable",
        ),
    ],
)
def test_megatron_fsdp(parsed, monkeypatch: pytest.MonkeyPatch, flags: str, message: str) -> None:
    monkeypatch.setattr(layout.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ValueError, match=message):
        preflight.check_flags(parsed("--mock-data", "--use-megatron-fsdp", *flags.split()))


def test_packages_that_are_missing(parsed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout.importlib.util, "find_spec", lambda name: None)
    for flags, message in (
        ("--num-distributed-optimizer-instances 2", "instances 2 needs the package einops"),
        ("--wandb-project x --wandb-save-dir y --wandb-exp-name z", "x needs the package wandb"),
        ("--hybrid-layer-pattern M*E", r"M\*E needs the package mamba_ssm"),
        ("--hybrid-layer-pattern *E/GE", r"\*E/GE needs the package fla"),
        (
            "--experimental-attention-variant gated_delta_net",
            "gated_delta_net needs the package fl",
        ),
        ("--use-megatron-fsdp", "--use-megatron-fsdp of Megatron-Core needs the package einops"),
        ("--optimizer muon", "--optimizer muon needs the package emerging_optimizers"),
    ):
        with pytest.raises(ValueError, match=message):
            preflight.check_flags(parsed("--mock-data", *flags.split()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_echo_force_skew": 1e300}, "--moe-echo-force-skew 1e.300 is above 100"),
        ({"moe_echo_tolerance": float("nan")}, "--moe-echo-tolerance nan is not a finite number"),
        ({"moe_echo_min_tokens_per_clone": 2**64}, "does not fit into 64 bits"),
        ({"moe_z_loss_coeff": 1e300}, "^--moe-z-loss-coeff 1e.300 is no strength. Use 0 to 1e.06"),
        (
            {"moe_aux_loss_coeff": float("nan"), "moe_router_load_balancing_type": "aux_loss"},
            "^--moe-aux-loss-coeff nan is no strength",
        ),
    ],
)
def test_numbers_in_a_configuration(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EchoTransformerConfig(**LOSSES, **fields)


@pytest.mark.parametrize("field", ["moe_echo_planner_backend", "moe_echo_grouped_gemm"])
def test_kernels_on_a_cpu(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    EchoTransformerConfig(**LOSSES, **{field: "triton"})  # the interpreter is on in the tests
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="triton needs a GPU"):
        EchoTransformerConfig(**LOSSES, **{field: "triton"})


@pytest.mark.parametrize(
    "flag", ["--run-dir", "--tensorboard-dir", "--moe-echo-trace-dir", "--moe-echo-capture-routing"]
)
def test_folders_that_cannot_be_made(parsed, flag: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for bad in ("/proc/nope", tmp_path / "file"):
        with pytest.raises(ValueError, match=rf"^{flag} {bad} cannot be made \("):
            places.check_places(parsed(flag, str(bad)))
    places.check_places(parsed(flag, str(tmp_path / "new/folder")))
    assert (tmp_path / "new/folder").is_dir()


def test_the_file_of_the_ledger(parsed, tmp_path: Path) -> None:
    for bad, fault in (("/proc/nope/x.json", "cannot be made"), (str(tmp_path), "is a folder")):
        with pytest.raises(ValueError, match=rf"^--memory-ledger {bad} {fault}"):
            places.check_places(parsed("--memory-ledger", bad))


def test_files_of_a_tokenizer(parsed) -> None:
    for flags in (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model /nowhere/model",
        "--tokenizer-type SentencePieceTokenizer --tokenizer-model nowhere.model",
        "--vocab-file nowhere/vocab.json",
        "--merge-file nowhere/merges.txt",
    ):
        with pytest.raises(ValueError, match=r"nowhere\S* is not there. Check the path"):
            places.check_places(parsed(*flags.split()))
    hub = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "someone/model")
    places.check_places(parsed(*hub))


def test_a_word_that_argparse_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said by the caller, once, and not by each rank's parser."""
    from megatron.training.arguments import parse_args

    from pretrain_gpt_moe import extra_args_provider

    for words, message in (
        (["--moe-enable-ecko"], "unrecognized arguments: --moe-enable-ecko. See --help."),
        (["--moe-num-echo-experts", "many"], "invalid int or auto value: 'many'. See --help."),
    ):
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt_moe.py", *words])
        with pytest.raises(ValueError, match=message):
            parse_args(extra_args_provider)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"offload_max_slowdown": float("nan")}, "--offload-max-slowdown nan is too large. Use "),
        ({"offload_max_slowdown": -1.0}, "--offload-max-slowdown -1.0 is too small. Use 0 or more"),
        ({"offload_target_bytes": 0}, "--offload-target-bytes 0 is too small. Use 1 or more"),
        ({"echo_min_offloaded_tensor_size": -2}, "--min-offloaded-tensor-size -2 is too small"),
        ({"offload_host_bytes": 2**64}, "--offload-host-bytes 18446744073709551616 is too large"),
    ],
)
def test_offloading_names_the_flag(flags: dict, message: str) -> None:
    args = Namespace(
        echo_fine_grained_activation_offloading=True, echo_offload_modules=["moe_act"],
        echo_activation_offload_fraction=1.0, echo_min_offloaded_tensor_size=1024,
        echo_delta_offload_bytes_across_pp_ranks=0, cuda_graph_impl="none",
        cuda_graph_warmup_steps=3, echo_delay_offload_until_cuda_graph=False,
        echo_fine_grained_offloading_max_inflight_offloads=None,
        overlap_moe_expert_parallel_comm=False, cpu_offloading_num_layers=0,
        offload_target_bytes=None, offload_max_slowdown=0.0, offload_host_bytes=None,
        offload_policy="largest", offload_implementation="echo", offload_strict=False,
        params_dtype=torch.float32,
    )  # fmt: skip
    assert offload_config(args) is not None
    vars(args).update(flags)
    for is_on in (True, False):
        args.echo_fine_grained_activation_offloading = is_on
        with pytest.raises(ValueError, match=message):
            offload_config(args)
