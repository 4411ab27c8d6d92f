"""``--moe-echo-replay-routing``: every token goes where it went in another run, in any layout."""

from pathlib import Path
from typing import Any

import launch
import numpy as np
import pytest

from megatron_echo.record.metrics import read_metrics
from megatron_echo.record.routing_capture import read_captures

FLAGS: dict[str, Any] = {
    "moe_enable_echo": True,
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "train_iters": 2,
    "eval_interval": 1,
    "eval_iters": 1,
}
OTHER_WEIGHTS = {"seed": 7}
STAGES = {
    "pipeline_model_parallel_size": 2,
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
SEQUENCES = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
}
CONTEXTS = {"context_parallel_size": 2, "expert_model_parallel_size": 2}


def train(folder: Path, ranks: int = 2, **flags: Any) -> tuple[list[float], list[np.ndarray]]:
    """Losses, and of each step the experts of its tokens ``[samples * S, L, K]``."""
    words = launch.tiny_model(
        **FLAGS, **flags, run_dir=folder, moe_echo_capture_routing=folder / "ids"
    )
    launch.run(words, ranks).check()
    losses = [line["lm loss"] for line in read_metrics(folder) if "lm loss" in line]
    return losses, [routing_of(folder / "ids", step) for step in (1, 2)]


def routing_of(folder: Path, step: int) -> np.ndarray:
    whole = np.full((8 * 64, 2, 2), -1)
    for capture in read_captures(folder, iteration=step):
        assert capture.layout is not None
        for (layer, microbatch), call in capture.calls.items():
            whole[capture.layout.positions(len(call.ids), microbatch), layer - 1] = call.ids
    assert (whole >= 0).all()
    return whole


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("recorded")
    return folder, *train(folder, expert_model_parallel_size=2)


def test_the_same_run_has_the_same_bits(recorded: Any, tmp_path: Path) -> None:
    """From ids as an inference engine has them, in another order."""
    _, losses, routing = recorded
    for step, ids in enumerate(routing, 1):
        np.savez(tmp_path / f"step-{step:08d}.npz", ids=ids[..., ::-1])
    found, again = train(
        tmp_path / "run", expert_model_parallel_size=2, moe_echo_replay_routing=tmp_path
    )
    assert found == losses
    assert all(map(np.array_equal, again, routing))


def test_a_resumed_run_replays_its_own_steps(recorded: Any, tmp_path: Path) -> None:
    folder, _, routing = recorded
    saved, ids = tmp_path / "saved", tmp_path / "ids"
    flags = {**FLAGS, **OTHER_WEIGHTS, "expert_model_parallel_size": 2, "exit_interval": 1}
    flags |= {"save": saved, "save_interval": 1, "moe_echo_capture_routing": ids}
    for goes_on in ({}, {"load": saved}):
        words = launch.tiny_model(**flags, **goes_on, moe_echo_replay_routing=folder / "ids")
        launch.run(words, 2).check()
    assert all(np.array_equal(routing_of(ids, step), routing[step - 1]) for step in (1, 2))


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(2, STAGES, id="stages_recomputed"),
        pytest.param(2, SEQUENCES, id="sequences", marks=pytest.mark.slow),
        pytest.param(2, CONTEXTS, id="contexts", marks=pytest.mark.slow),
        pytest.param(4, {"expert_model_parallel_size": 4}, id="four_ranks", marks=pytest.mark.slow),
    ],
)
def test_another_layout(recorded: Any, tmp_path: Path, ranks: int, layout: dict) -> None:
    """Other weights would route otherwise."""
    folder, _, routing = recorded
    flags = {**layout, **OTHER_WEIGHTS, "moe_echo_replay_routing": folder / "ids"}
    _, again = train(tmp_path, ranks, **flags)
    assert all(map(np.array_equal, again, routing))
