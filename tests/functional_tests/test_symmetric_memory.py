"""Training over symmetric memory through the entry script."""

from pathlib import Path

import launch
import pytest

from megatron_echo.record.metrics import read_metrics

ONE_SIDED = {
    "moe_echo_token_transport": "symmetric_memory",
    "moe_echo_expert_dispatcher_type": "symmetric_memory",
}
CLONES = {"expert_model_parallel_size": 2, "moe_enable_echo": True, "moe_echo_force_skew": 1.0}
LAYOUTS = {
    "ep2": {"recompute_granularity": "selective", "recompute_modules": "moe"},
    "ep2_pp2": {"pipeline_model_parallel_size": 2, "moe_received_token_capacity": 1.5,
                "moe_echo_row_alignment": 16},
}  # fmt: skip


@pytest.mark.parametrize("layout", ["ep2", pytest.param("ep2_pp2", marks=pytest.mark.slow)])
def test_the_losses_of_the_collectives(layout: str, tmp_path: Path) -> None:
    """With clones, evaluation and a check of a layer in between."""
    ranks = 4 if layout == "ep2_pp2" else 2
    curves = []
    for name, ways in (("collectives", {}), ("one_sided", ONE_SIDED)):
        flags = {**CLONES, **LAYOUTS[layout], **ways, "train_iters": 5, "moe_echo_check_every": 2,
                 "eval_iters": 1, "eval_interval": 3, "run_dir": tmp_path / name}  # fmt: skip
        launch.run(launch.tiny_model(**flags), ranks).check()
        lines = read_metrics(tmp_path / name)
        curves.append([[line[key] for line in lines] for key in ("lm loss", "grad-norm")])
    assert len(curves[0][0]) == 5
    for expected, found in zip(*curves, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
