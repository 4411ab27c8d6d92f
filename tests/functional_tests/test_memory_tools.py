"""A planned pipeline layout in training, and the ledger of a run."""

import json
from pathlib import Path

import launch
import pytest

from megatron_echo.memory import LayerCost, plan_layout
from megatron_echo.record.metrics import read_metrics

LAYERS = 6


def planned(virtual_size: int) -> str:
    """A layout that is not the even split: the head is as long as two layers."""
    layers = [LayerCost("E", 0.1, 1, 10), *[LayerCost("t", 1.0, 100, 10)] * LAYERS]
    layers.append(LayerCost("L", 2.0, 50, 10))
    layout = plan_layout(layers, 2, virtual_size, budget_bytes=1e9)
    layout.check_with_megatron()
    return layout.string


@pytest.mark.slow
def test_planned_layouts_train_as_the_even_split(tmp_path: Path, text_flags: dict) -> None:
    """From one checkpoint, in two stages and in two virtual ones on each rank: the same losses."""
    common = {**text_flags, "num_layers": LAYERS, "moe_enable_echo": True, "save_interval": None,
              "expert_model_parallel_size": 1}  # fmt: skip
    saved = tmp_path / "saved"
    words = launch.tiny_model(**{**common, "save": saved, "save_interval": 1, "exit_interval": 1})
    launch.run(words, 1).check()
    start = {**common, "load": saved, "finetune": True, "train_iters": 10,
             "no_load_optim": True, "no_load_rng": True, "save": None}  # fmt: skip
    layouts = {"even": None, "planned": planned(1), "planned_virtual": planned(2)}
    assert "EtttL" not in layouts.values()
    curves = {}
    for name, layout in layouts.items():
        folder = tmp_path / name
        flags = {**start, "run_dir": folder, "pipeline_model_parallel_size": 2,
                 "pipeline_model_parallel_layout": layout}  # fmt: skip
        launch.run(launch.tiny_model(**flags), 2).check()
        curves[name] = [line["lm loss"] for line in read_metrics(folder)]
    assert len(curves["even"]) == 10
    for name in ("planned", "planned_virtual"):
        assert curves[name] == pytest.approx(curves["even"], rel=1e-6), layouts[name]


def test_ledger_of_a_run(tmp_path: Path) -> None:
    """A file and a picture for each stage; everything is free again; offloading is seen."""
    flags = {
        "expert_model_parallel_size": 1, "pipeline_model_parallel_size": 2, "train_iters": 2,
        "moe_enable_echo": True, "fine_grained_activation_offloading": True,
        "offload_modules": "moe_act", "min_offloaded_tensor_size": 16,
        "memory_ledger": tmp_path / "ledger.json",
    }  # fmt: skip
    output = launch.run(launch.tiny_model(**flags), 2).check().output
    for stage, name in enumerate(("ledger", "ledger-stage1")):
        content = json.loads((tmp_path / f"{name}.json").read_text())
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
        entries = content["entries"]
        assert content["peak_bytes"] > 0
        assert content["live_bytes"] == 0
        assert {entry["microbatch"] for entry in entries} >= {0, 1}
        by_offload = [entry for entry in entries if entry["taken"]]
        assert by_offload
        assert {entry["module"].split(".")[1] for entry in by_offload} == {"experts"}
        assert f"{name}.json" in output, stage
