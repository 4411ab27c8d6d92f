"""A run goes on with the other layer: Megatron's experts to ours and back, by flags only."""

from pathlib import Path
from typing import Any

import launch
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

from megatron_echo.record.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("single_rank")  # Megatron's checkpoint reader wants a group
LAYERS: dict[str, dict[str, Any]] = {"stock": {}, "ours": {"moe_enable_echo": True}}


def keys_and_shapes(folder: Path, iteration: int) -> dict[str, tuple[int, ...] | None]:
    """Every key of a checkpoint with its global shape; None for an object."""
    where = str(folder / f"iter_{iteration:07d}")
    return {
        key: item.global_shape if isinstance(item, ShardedTensor) else None
        for key, item in load_sharded_metadata(where).items()
    }


def train(
    flags: dict[str, Any], ranks: int, folder: Path, load: Path | None = None, **changes: Any
) -> list[dict]:
    """Train to ``train_iters`` and return the metrics of each step; saved at the intervals."""
    changes |= {"load": load} if load is not None else {}
    changes = {**flags, **changes}
    if changes["save_interval"] is not None:
        changes["save"] = folder / "ckpt"
    argv = launch.tiny_model(**changes, run_dir=folder)
    script = MUON_SCRIPT if changes.get("optimizer") == "muon" else launch.SCRIPT
    launch.run(argv, ranks, script).check()
    return read_metrics(folder)


@pytest.mark.parametrize("first", ["stock", pytest.param("ours", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_other_layer(first: str, tmp_path: Path, text_flags: dict) -> None:
    """Saved at EP=2 by one layer, continued by both: the same curve and the same checkpoint.

    At the same expert-parallel size Adam's moments go with the weights; Megatron itself cannot
    reshard them to another one, so there the weights alone are loaded, by both.
    """
    second = "ours" if first == "stock" else "stock"
    flags = {**text_flags, "train_iters": 8, "save_interval": 4}
    saved = tmp_path / "saved"
    train(flags, 2, saved, expert_model_parallel_size=2, exit_interval=4, **LAYERS[first])
    weights_only = {"no_load_optim": True, "no_load_rng": True, "save_interval": None}
    for ep_size, options in ((2, {}), (1, weights_only)):
        curves = {}
        for name in (first, second):
            lines = train(
                flags, ep_size, tmp_path / f"{name}{ep_size}", saved / "ckpt",
                expert_model_parallel_size=ep_size, **options, **LAYERS[name],
            )  # fmt: skip
            curves[name] = [(line["lm loss"], line["grad-norm"]) for line in lines]
            assert [line["iteration"] for line in lines] == [5, 6, 7, 8]
        for theirs, ours in zip(curves[first], curves[second], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)
    stock, other = (keys_and_shapes(tmp_path / f"{name}2" / "ckpt", 8) for name in LAYERS)
    assert stock == other


SHARED_EXPERTS = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
"""Megatron then gives each rank a slice of every expert (expert tensor parallelism)."""


GPT_OSS = {
    "expert_model_parallel_size": 2,
    "disable_bias_linear": None,
    "swiglu": None,
    "quick_geglu": True,
    "activation_func_clamp_value": 1.0,
    "glu_linear_offset": 1.0,
    "no_bias_gelu_fusion": True,
}
"""Experts with biases."""


MUON_SCRIPT = Path(__file__).resolve().parent / "muon_stand_in.py"
MUON = {"expert_model_parallel_size": 2, "optimizer": "muon", "ckpt_format": "torch_dist"}
"""Momentum of experts as matrices."""

HYBRID = {"expert_model_parallel_size": 2, "num_layers": None, "hybrid_layer_pattern": "*E-E"}


@pytest.mark.parametrize(
    ("layout", "first"),
    [
        pytest.param(SHARED_EXPERTS, "stock", id="slices", marks=pytest.mark.slow),
        pytest.param(HYBRID, "stock", id="hybrid model", marks=pytest.mark.slow),
        pytest.param(GPT_OSS, "stock", id="biases"),
        pytest.param(GPT_OSS, "ours", id="biases, and back", marks=pytest.mark.slow),
        pytest.param(MUON, "stock", id="Muon", marks=pytest.mark.slow),
        pytest.param(MUON, "ours", id="Muon, and back", marks=pytest.mark.slow),
    ],
)
def test_other_models(layout: dict, first: str, tmp_path: Path, text_flags: dict) -> None:
    """The other layer goes on from the third step as the first does; the same keys."""
    second = "ours" if first == "stock" else "stock"
    flags = {**text_flags, **layout, "train_iters": 6, "save_interval": 3}
    stock = train(flags, 2, tmp_path / first, **LAYERS[first])
    load = tmp_path / first / "ckpt"
    ours = train(flags, 2, tmp_path / second, load, ckpt_step=3, **LAYERS[second])
    assert [line["iteration"] for line in ours] == [4, 5, 6]
    for theirs, line in zip(stock[3:], ours, strict=True):
        for name in ("lm loss", "grad-norm"):
            assert line[name] == pytest.approx(theirs[name], rel=1e-5)
    stock_keys, our_keys = (keys_and_shapes(tmp_path / name / "ckpt", 6) for name in LAYERS)
    assert stock_keys == our_keys


CLONES = {
    "expert_model_parallel_size": 2,
    "moe_ffn_hidden_size": 32,
    "moe_enable_echo": True,
    "moe_echo_force_skew": 1.0,
}


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_goes_on_in_fp8_and_back(bf16: bool, tmp_path: Path, text_flags: dict) -> None:
    """With clones: the same keys and dtypes; curves of the other precision to 2 %."""
    flags = {**text_flags, **CLONES, "bf16": True if bf16 else None, "save_interval": 2}
    fp8 = {"moe_echo_expert_precision": "fp8-rowwise"}
    flags = {**flags, "train_iters": 6}
    saved = train(flags, 2, tmp_path / "plain", exit_interval=4)
    load = tmp_path / "plain" / "ckpt"
    there = train(flags, 2, tmp_path / "fp8", load, ckpt_step=2, exit_interval=4, **fp8)
    load = tmp_path / "fp8" / "ckpt"
    back = train(flags, 2, tmp_path / "back", load)
    assert [line["iteration"] for line in (*there, *back)] == [3, 4, 5, 6]
    for found, expected in zip(there, saved[2:], strict=True):
        assert found["lm loss"] != expected["lm loss"]
        assert found["lm loss"] == pytest.approx(expected["lm loss"], rel=0.02)
    assert all(line["lm loss"] < 1.1 * saved[-1]["lm loss"] for line in back)
    kinds = []
    for name in ("plain", "fp8"):
        items = load_sharded_metadata(str(tmp_path / name / "ckpt" / "iter_0000004")).items()
        kinds.append({key: (getattr(item, "dtype", None), item.key) for key, item in items})
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"expert_model_parallel_size": 2}, id="experts", marks=pytest.mark.slow),
        pytest.param(SHARED_EXPERTS, id="slices"),
        pytest.param(HYBRID, id="hybrid model"),
    ],
)
def test_the_same_initial_weights(layout: dict, tmp_path: Path, text_flags: dict) -> None:
    """Before the first step, on two ranks: the same keys, shapes and bits."""
    tensors = {}
    for name, layer in LAYERS.items():
        folder = tmp_path / name
        flags = {**text_flags, "lr": 0.0, "weight_decay": 0.0, "save_interval": 1}
        train(flags, 2, folder, train_iters=1, **layout, **layer)
        content = dist_checkpointing.load_plain_tensors(str(folder / "ckpt" / "iter_0000001"))
        tensors[name] = {key: value for key, value in content.items() if key.startswith("decoder")}
    assert tensors["stock"].keys() == tensors["ours"].keys()
    for key, value in tensors["stock"].items():
        assert torch.equal(value, tensors["ours"][key]), key
