"""``--cuda-graph-impl full_iteration`` on a CPU: captured once, replayed, the same bits as eager.

Megatron's own wrapper captures the step; ``cpu_backend/recorded_graph.py`` stands in for the CUDA
graph, so Python does not run in a replayed step, just as on a GPU. What only a GPU shows (streams,
memory reuse) is not tested here.
"""

from pathlib import Path

import golden
import launch
import numpy as np
import pytest
from test_overflow import SHOW_WEIGHTS, overflow_messages

from megatron_echo.record.metrics import read_metrics
from megatron_echo.record.trace import read_traces

GRAPH = {
    "cuda_graph_impl": "full_iteration",
    "no_check_for_nan_in_loss_and_grad": True,
    "cuda_graph_warmup_steps": 1,
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("moe_clones_ep2", marks=SLOW),
        pytest.param("moe_echo_ep1", marks=SLOW),
        pytest.param("moe_echo_ep2_bf16", marks=SLOW),
        pytest.param("moe_echo_tp2_sp_ep2", marks=SLOW),
        pytest.param("moe_echo_cp2", marks=SLOW),
        pytest.param("moe_echo_mla_ep2", marks=SLOW),
        pytest.param("moe_clones_ep2_pp2", marks=SLOW),
        pytest.param("moe_clones_ep2_dist_optimizer", marks=SLOW),
        pytest.param("moe_clones_ep2_recompute", marks=SLOW),
        pytest.param("moe_clones_ep2_fp8", marks=SLOW),
        "moe_loss_batch_ep2",
        pytest.param("moe_loss_batch_ep2_pp2", marks=SLOW),
        pytest.param("moe_loss_seq_ep2", marks=SLOW),
        pytest.param("moe_skewed_clones_ep4", marks=SLOW),
    ],
)
def test_curves_plans_and_metrics_are_those_of_eager_steps(name: str, tmp_path: Path) -> None:
    """Ten routings, nine of them replayed: every logged number and every plan has the same bits."""
    case = golden.load_case(name)
    has_clones = "--moe-num-echo-experts" not in case.model_args
    flags = {"train_iters": 10, "log_interval": 2, "eval_interval": 3, "eval_iters": 2,
             "overlap_param_gather": False}  # fmt: skip
    lines, traces = {}, {}
    for way, graph in (("eager", {}), ("graph", GRAPH)):
        where = tmp_path / way
        flags |= {"run_dir": where, "moe_echo_trace_dir": where / "traces" if has_clones else None}
        launch.run(case.argv(**flags, **graph), case.world_size, env=case.env_vars).check()
        lines[way] = [
            {key: value for key, value in line.items() if "time" not in key}
            for line in read_metrics(where)
        ]
        traces[way] = read_traces(where / "traces") if has_clones else []
    assert lines["graph"] == lines["eager"]
    assert len(lines["eager"]) == 10
    for graph_trace, eager_trace in zip(traces["graph"], traces["eager"], strict=True):
        for field, array in vars(eager_trace).items():
            assert np.array_equal(vars(graph_trace)[field], array), (eager_trace.iteration, field)


def test_an_overflow_in_a_replay_stops_every_rank_before_the_optimizer(tmp_path: Path) -> None:
    """The step that overflows is a replayed one; it changes no weight, and all ranks say so."""
    script = tmp_path / "watched.py"
    script.write_text(SHOW_WEIGHTS)
    flags = {**GRAPH, "moe_enable_echo": True, "moe_num_echo_experts": 0, "train_iters": 12,
             "expert_model_parallel_size": 2, "moe_received_token_capacity": 1.2}  # fmt: skip
    result = launch.run(launch.tiny_model(**flags), 2, script=script)
    assert all(result.codes)
    assert result.output.count("UNTOUCHED=True") == 2
    assert len(set(overflow_messages(result.output))) == 1
    done = sum(" iteration " in line and "elapsed" in line for line in result.output.splitlines())
    assert done > GRAPH["cuda_graph_warmup_steps"] + 1


def test_dropped_pairs_are_counted_in_every_replay(tmp_path: Path) -> None:
    """With ``drop``: the same warnings at the same steps as without a graph."""
    flags = {"moe_enable_echo": True, "moe_num_echo_experts": 0, "expert_model_parallel_size": 2,
             "moe_received_token_capacity": 1.02, "moe_echo_overflow": "drop"}  # fmt: skip
    warnings = []
    for graph in ({}, GRAPH):
        output = launch.run(launch.tiny_model(**flags, **graph), 2).check().output
        warnings.append([line for line in output.splitlines() if "pairs dropped in" in line])
    assert warnings[0] == warnings[1]
    assert len(warnings[0]) == 4


def test_a_stock_layer_cannot_be_captured() -> None:
    """Megatron's own dropless layer reads the routing on the host: the stand-in says so."""
    flags = {**GRAPH, "moe_token_dispatcher_type": "allgather"}
    result = launch.run(launch.tiny_model(**flags), 1)
    assert "cannot be captured: the host would read a value of the device" in result.output
