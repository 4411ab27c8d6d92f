"""What a user meets: help, records, flags, other scripts."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest
import torch
from golden import read_tensorboard
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_echo import cpu_backend
from megatron_echo.record.metrics import read_metrics

STOCK_SCRIPT = Path(__file__).resolve().parent / "stock_pretrain.py"
CPU_BACKEND = Path(cpu_backend.__file__).with_name("__main__.py")


def test_help_shows_our_groups_and_megatrons() -> None:
    text = launch.run(["--help"]).check().output
    assert "usage: pretrain_gpt_moe.py [flags]" in text
    for words in ("megatron_echo: echo", "--moe-enable-echo", "--run-dir", "--num-experts"):
        assert words in text


def test_run_directory(tmp_path: Path) -> None:
    """``run.json`` and ``metrics.jsonl`` beside TensorBoard: same names, same values."""
    argv = launch.tiny_model(
        expert_model_parallel_size=2,
        train_iters=5,
        eval_iters=2,
        eval_interval=2,
        log_interval=2,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=1e-2,
        run_dir=tmp_path,
        tensorboard_dir=tmp_path / "tb",
    )
    launch.run(argv, 2).check()
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["layout"] == {
        "world": 2,
        "tensor": 1,
        "pipeline": 1,
        "virtual_pipeline": None,
        "context": 1,
        "data": 2,
        "expert": 2,
        "expert_tensor": 1,
    }
    assert record["flags"]["moe_router_topk"] == 2
    assert record["flags"]["distributed_backend"] == "gloo"
    assert "decided" not in record  # Megatron's layer

    lines = read_metrics(tmp_path)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]
    names = ("lm loss", "grad-norm", "learning-rate", "load_balancing_loss")
    for name, curve in read_tensorboard(tmp_path / "tb", names).items():
        assert all(math.isclose(line[name], curve[line["iteration"]]) for line in lines)
    assert all(0 < line["iteration-time"] < 60 for line in lines)
    assert [bool(line.get("lm loss validation")) for line in lines] == [0, 1, 0, 1, 1]


def test_each_line_has_its_own_iteration(tmp_path: Path) -> None:
    """The console's second line averages two iterations; ours must not."""
    log = launch.run(launch.tiny_model(train_iters=3, run_dir=tmp_path)).check().output
    printed = [float(loss) for loss in re.findall(r"lm loss: (\S+) \|", log)]
    own = [line["lm loss"] for line in read_metrics(tmp_path)]
    assert printed[1] == pytest.approx((own[0] + own[1]) / 2, rel=1e-5)
    assert abs(printed[1] - own[1]) > 1e-3
    assert printed[2] == pytest.approx(own[2], rel=1e-5)


def test_frozen_layers(tmp_path: Path) -> None:
    """``--freeze-all-layers``, which Megatron does not read where a configuration builds it.

    And ``run.json`` says what ``auto`` became.
    """
    flags = launch.tiny_model(
        train_iters=2, expert_model_parallel_size=2, moe_enable_echo=True, freeze_all_layers=True,
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, run_dir=tmp_path,
    )  # fmt: skip
    launch.run(flags, 2).check()
    assert [line["grad-norm"] for line in read_metrics(tmp_path)] == [0, 0]
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["flags"]["moe_echo_token_transport"] == "auto"
    assert record["decided"] == {
        "moe_echo_token_transport": "all_gather",
        "moe_echo_expert_dispatcher_type": "p2p",
        "moe_echo_ranks_per_node": None,
        "moe_echo_clones_within_node": False,
    }


def documents(prefix: Path) -> Path:
    """A dataset of short documents, each with the tokenizer's end behind it."""
    numbers = np.random.default_rng(1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in numbers.integers(3, 40, size=200).tolist():
        words = torch.from_numpy(np.append(numbers.integers(0, 127, size=length), 127))
        builder.add_document(words, [length + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(
    "layout",
    [
        {"expert_model_parallel_size": 2},
        pytest.param({"tensor_model_parallel_size": 2, "sequence_parallel": True,
                      "moe_router_load_balancing_type": "aux_loss"}, marks=pytest.mark.slow),
        pytest.param({"pipeline_model_parallel_size": 2, "micro_batch_size": 1,
                      "transformer_impl": "local"}, marks=pytest.mark.slow),
    ],
    ids=["ep2", "tp2", "pp2"],
)  # fmt: skip
def test_packed_sequences_train_as_masked_ones(layout: dict, tmp_path: Path) -> None:
    """``packed_seq_params`` through attention and MoE layer, against masks that say the same."""
    common: dict[str, Any] = {
        "train_iters": 2, "mock_data": None, "data_path": documents(tmp_path / "text"),
        "split": "100,0,0", "moe_enable_echo": True, "moe_aux_loss_coeff": 0.1,
        "moe_router_load_balancing_type": "seq_aux_loss", **layout,
    }  # fmt: skip
    masked = {"reset_position_ids": True, "reset_attention_mask": True}
    curves = []
    for name, flags in (
        ("masked", masked),
        ("packed", {"dataloader_inter_document_masking": True}),
        ("whole", {}),
    ):
        argv = launch.tiny_model(**common, **flags, run_dir=tmp_path / name)
        launch.run(argv, 2).check()
        curves.append(
            [
                [line[n] for n in line if n in ("lm loss", "grad-norm") or "load_balancing" in n]
                for line in read_metrics(tmp_path / name)
            ]
        )
    assert curves[1] == [pytest.approx(line, rel=1e-5) for line in curves[0]]
    assert curves[2][0] != pytest.approx(curves[0][0], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "nprocs"),
    [
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "eval_micro_batch_size": 4},
         2),
        pytest.param({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
                      "sequence_parallel": True, "mtp_num_layers": 1, "eval_micro_batch_size": 1,
                      "eval_global_batch_size": 16}, 4, marks=pytest.mark.slow),
    ],
    ids=["tp2", "tp2_pp2_mtp"],
)  # fmt: skip
def test_evaluation_with_microbatches_of_its_own(flags: dict, nprocs: int, tmp_path: Path) -> None:
    """The validation loss is the one of the same samples in training's microbatches."""
    common = {"train_iters": 1, "eval_iters": 1, **flags}
    runs = ({}, {"eval_micro_batch_size": None})
    for number, changes in enumerate(runs):
        folder = tmp_path / str(number)
        argv = launch.tiny_model(**common | changes, run_dir=folder)
        launch.run(argv, nprocs, timeout=120).check()
    own, training = (read_metrics(tmp_path / str(number))[0] for number in range(len(runs)))
    name = "lm loss validation"
    assert own[name] == pytest.approx(training[name], rel=1e-6)


def test_our_fields_survive_multi_latent_attention(tmp_path: Path) -> None:
    """Megatron replaces a custom configuration class under MLA; the model must still get ours."""
    script = tmp_path / "show_config.py"
    script.write_text(
        "import pretrain_gpt_moe\n"
        "from megatron.core.utils import get_model_config\n"
        "step = pretrain_gpt_moe.forward_step\n"
        "def show(data_iterator, model):\n"
        "    config = get_model_config(model)\n"
        "    print('CONFIG', type(config).__name__, config.moe_num_echo_experts,\n"
        "          config.num_echo_slots_per_rank, config.kv_lora_rank, flush=True)\n"
        "    return step(data_iterator, model)\n"
        "if __name__ == '__main__':\n"
        "    pretrain_gpt_moe.forward_step = show\n"
        "    pretrain_gpt_moe.main()\n"
    )
    flags = launch.tiny_model(
        expert_model_parallel_size=2,
        train_iters=1,
        multi_latent_attention=True,
        q_lora_rank=32,
        kv_lora_rank=24,
        qk_head_dim=16,
        qk_pos_emb_head_dim=8,
        v_head_dim=16,
        moe_enable_echo=True,
        moe_num_echo_experts=6,
    )
    result = launch.run(flags, 2, script=script).check()
    assert "CONFIG EchoMLATransformerConfig 6 3 24" in result.output


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [
        pytest.param({"recompute_granularity": "full", "recompute_method": "uniform",
                      "recompute_num_layers": 1}, 0, marks=pytest.mark.slow),
        pytest.param({"recompute_granularity": "selective", "recompute_modules": "moe"}, 0,
                     marks=pytest.mark.slow),
        # The layer norm's recomputation sums its gradients in another order.
        ({"recompute_granularity": "selective", "recompute_modules": "layernorm"}, 1e-6),
    ],
    ids=["full", "moe", "layernorm"],
)  # fmt: skip
def test_settings_that_must_not_change_the_loss(
    flags: dict, tolerance: float, tmp_path: Path
) -> None:
    """Recomputation: the same curve as without."""
    common = {"expert_model_parallel_size": 2}
    plain = launch.tiny_model(**common, run_dir=tmp_path / "plain")
    launch.run(plain, 2).check()
    launch.run(launch.tiny_model(**common, **flags, run_dir=tmp_path / "other"), 2).check()
    expected, actual = read_metrics(tmp_path / "plain"), read_metrics(tmp_path / "other")
    for name in ("lm loss", "grad-norm"):
        curve = [line[name] for line in expected]
        assert [line[name] for line in actual] == pytest.approx(curve, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("flags", "nprocs"),
    [
        ({"num_layers": 4, "pipeline_model_parallel_size": 2,
          "num_layers_per_virtual_pipeline_stage": 1}, 2),
        pytest.param({"mtp_num_layers": 1, "tensor_model_parallel_size": 2,
                      "sequence_parallel": True}, 2, marks=pytest.mark.slow),
        ({"moe_layer_freq": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1}, 1),
        ({"num_experts": None}, 1),
        ({"check_for_spiky_loss": True, "log_straggler": True,
          "tensorboard_log_interval": 1}, 1),
    ],
    ids=["interleaved", "mtp_tp2", "dense_layers_dropout", "dense_model", "spiky_straggler"],
)  # fmt: skip
def test_other_layouts_train(flags: dict, nprocs: int, tmp_path: Path) -> None:
    launch.run(launch.tiny_model(**flags, run_dir=tmp_path), nprocs).check()
    losses = [line["lm loss"] for line in read_metrics(tmp_path)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize(
    "spec",
    [pytest.param("gpt_moe_block_spec", marks=pytest.mark.slow), "gpt_moe_layer_spec"],
)
def test_any_megatron_script_takes_our_layer(spec: str, tmp_path: Path) -> None:
    """A script that knows nothing of this package, with ``-m megatron_echo.cpu_backend``.

    Our layer reaches it through ``--spec``, and its losses equal those of
    ``pretrain_gpt_moe.py --moe-enable-echo``. A torchrun of its own starts the first.
    """
    common = {"expert_model_parallel_size": 2, "train_iters": 3}
    stock = launch.tiny_model(**common, tensorboard_dir=tmp_path / "stock")
    words = [*stock, "--spec", "megatron_echo.layer_specs", spec]
    if spec == "gpt_moe_block_spec":
        result = launch.torchrun(words, 2, STOCK_SCRIPT, module="megatron_echo.cpu_backend").check()
        assert result.output.count("CUDA entry points now run on the CPU") == 1
    else:
        launch.run([STOCK_SCRIPT, *words], 2, CPU_BACKEND).check()
    ours = launch.tiny_model(**common, moe_enable_echo=True, tensorboard_dir=tmp_path / "ours")
    launch.run(ours, 2).check()
    metrics = ("lm loss", "grad-norm")
    assert read_tensorboard(tmp_path / "stock", metrics) == read_tensorboard(
        tmp_path / "ours", metrics
    )


def test_make_without_python_says_so(tmp_path: Path) -> None:
    """One clear sentence on a machine without ``python3.12``."""
    for name in ("Makefile", "setup.py", "constraints.txt"):
        (tmp_path / name).write_bytes((launch.ROOT / name).read_bytes())
    (tmp_path / "bin").mkdir()
    for tool in ("make", "sh", "touch"):
        (tmp_path / "bin" / tool).symlink_to(Path("/usr/bin") / tool)
    finished = subprocess.run(
        ["make", "train"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode != 0
    assert "megatron_echo needs Python 3.12" in finished.stderr
    assert sys.version_info[:2] == (3, 12)
