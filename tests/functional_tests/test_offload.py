"""``--fine-grained-activation-offloading`` in real training: the same bits, and what it says."""

from pathlib import Path

import launch
import pytest

from megatron_echo.record.metrics import read_metrics

ALL = ["attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"]
OFFLOAD = {
    "fine_grained_activation_offloading": True,
    "offload_modules": [*ALL, "router"],
    "min_offloaded_tensor_size": 16,
}
ECHO = {"moe_enable_echo": True, "moe_echo_force_skew": 1.0}
INTERLEAVED = {
    "pipeline_model_parallel_size": 2,
    "num_layers": 4,
    "num_layers_per_virtual_pipeline_stage": 1,
}


def curve(folder: Path, ranks: int, **flags: object) -> tuple[list[dict], str]:
    words = launch.tiny_model(**{"expert_model_parallel_size": 2, **flags}, run_dir=folder)
    output = launch.run(words, ranks).check().output
    return read_metrics(folder), output


@pytest.mark.parametrize(
    ("flags", "ranks"),
    [
        ({**ECHO, "bf16": True, "eval_iters": 1, "eval_interval": 2}, 2),
        ({**ECHO, **INTERLEAVED, "expert_model_parallel_size": 1}, 2),
        pytest.param({**ECHO, **INTERLEAVED, "use_distributed_optimizer": True}, 4,
                     marks=pytest.mark.slow),
        pytest.param(
            {"recompute_granularity": "selective", "recompute_modules": ["moe", "layernorm"],
             "mtp_num_layers": 1, "step_batch_size_schedule": ["0:8 1024:16"],
             "global_batch_size": None}, 2, marks=pytest.mark.slow,
        ),
    ],
    ids=["clones_bf16_eval", "interleaved", "clones_interleaved_dist_optimizer",
         "stock_recompute_mtp_rampup"],
)  # fmt: skip
def test_the_same_bits(flags: dict, ranks: int, tmp_path: Path) -> None:
    """Losses and gradient norms of a run are those of its twin without offloading."""
    plain, _ = curve(tmp_path / "plain", ranks, **flags)
    offloaded, output = curve(tmp_path / "offloaded", ranks, **flags, **OFFLOAD)
    for name in ("lm loss", "grad-norm", "batch-size"):
        assert [line[name] for line in offloaded] == [line[name] for line in plain], name
    for line in offloaded:
        assert line["offload/bytes"] > 0
        assert line["offload/live_storages"] == 0
        parts = ("reloaded", "forwarded", "dropped")
        assert line["offload/bytes"] == sum(line[f"offload/{part}_bytes"] for part in parts)
        back = line["offload/hidden_bytes"] + line["offload/exposed_bytes"]
        assert line["offload/reloaded_bytes"] == back
        kept = sum(value for name, value in line.items() if name.startswith("offload/kept_"))
        assert line["offload/candidate_bytes"] == line["offload/bytes"] + kept
    planned = [line["offload/planned_bytes"] for line in offloaded]
    assert planned[0] == 0 < max(planned)
    assert "activation offloading by this package's manager" in output
    assert "module             offloaded" in output


def test_fraction_zero_offloads_nothing(tmp_path: Path) -> None:
    flags = {**ECHO, **OFFLOAD, "activation_offload_fraction": 0}
    lines, _ = curve(tmp_path, 2, **flags)
    assert [line["offload/bytes"] for line in lines] == [0] * 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"offload_modules": None}, "needs names. Give --offload-modules."),
        ({"offload_modules": ["attention"]}, "The offload module 'attention' is not known. Use"),
        ({"activation_offload_fraction": 1.5}, "The offload fraction 1.5 is no share."),
        ({"delta_offload_bytes_across_pp_ranks": 1}, "knows no --delta-offload-bytes-across-pp"),
        ({"offload_implementation": "megatron", "offload_modules": ["moe_act"]},
         "only supported with transformer_engine implementation"),
    ],
)  # fmt: skip
def test_bad_flags(flags: dict, message: str) -> None:
    """Refused before anything starts; the stock manager by Megatron's own words."""
    words = launch.tiny_model(expert_model_parallel_size=2, **{**OFFLOAD, **flags})
    result = launch.run(words, 1, timeout=60, world_size=2)
    assert any(result.codes)
    assert message in result.output
