"""``--cuda-graph-impl full_iteration`` on a CPU: captured once, replayed, the same bits as eager.

Megatron's own wrapper captures the step; ``cpu_backend/recorded_graph.py`` stands in for the CUDA
graph, so Python does not run in a replayed step, just as on a GPU. It checks at the capture that
streams are joined and that what they do to the same memory is ordered.
"""

import json
from collections.abc import Sequence
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
COUNT_OPERATORS = Path(__file__).resolve().parent / "count_operators.py"
TE_GRAPHS = Path(__file__).resolve().parent / "te_graphs.py"
LAYERS = {"cuda_graph_impl": "local", "cuda_graph_warmup_steps": 1}
VIRTUAL = {"num_layers": 4, "num_layers_per_virtual_pipeline_stage": 1}
RECOMPUTED = {"recompute_granularity": "selective", "recompute_modules": "moe layernorm"}
SLOW = pytest.mark.slow


def fast_first(cases: Sequence) -> list:
    """All but the first marked slow; a case is a name, or a tuple of values."""
    rest = [case if isinstance(case, tuple) else (case,) for case in cases[1:]]
    return [cases[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in rest)]


LAYOUTS = (
    "moe_loss_batch_ep2",  # the fast one
    "moe_clones_ep2",
    "moe_echo_ep1",
    "moe_echo_ep2_bf16",
    "moe_echo_tp2_sp_ep2",
    "moe_echo_cp2",
    "moe_echo_mla_ep2",
    "moe_clones_ep2_pp2",
    "moe_clones_ep2_dist_optimizer",
    "moe_clones_ep2_recompute",
    "moe_clones_ep2_fp8",
    "moe_loss_batch_ep2_pp2",
    "moe_loss_seq_ep2",
    "moe_skewed_clones_ep4",
)
MODULES = ["attn_norm", "qkv_linear", "core_attn", "mlp_norm", "expert_fc1", "moe_act", "router"]
OFFLOAD = {
    "fine_grained_activation_offloading": True,
    "offload_modules": " ".join(MODULES),
    "min_offloaded_tensor_size": 16,
}
WARM_UP = 2  # steps to learn the plan


def run_case(
    case: golden.Case, where: Path, script: Path = launch.SCRIPT, **flags: object
) -> tuple[list[dict], list]:
    """Metrics of each iteration without times, and traces."""
    has_clones = "--moe-num-echo-experts" not in case.model_args
    traces = where / "traces" if has_clones else None
    flags |= {"log_interval": 2, "eval_interval": 3, "eval_iters": 2, "run_dir": where,
              "moe_echo_trace_dir": traces}  # fmt: skip
    launch.run(case.argv(**flags), case.world_size, script, case.env_vars).check()
    lines = [
        {key: value for key, value in line.items() if "time" not in key}
        for line in read_metrics(where)
    ]
    return lines, read_traces(traces) if traces else []


def assert_same_plans(graph: list, eager: list) -> None:
    for graph_trace, eager_trace in zip(graph, eager, strict=True):
        for field, array in vars(eager_trace).items():
            assert np.array_equal(vars(graph_trace)[field], array), (eager_trace.iteration, field)


@pytest.mark.parametrize(
    ("name", "steps"), fast_first([(LAYOUTS[0], 5), *((name, 10) for name in LAYOUTS)])
)
def test_curves_plans_and_metrics_are_those_of_eager_steps(
    name: str, steps: int, tmp_path: Path
) -> None:
    """All but the first routing are replayed: every logged number and every plan, bit by bit."""
    assert_same_bits(name, GRAPH, tmp_path, train_iters=steps)


@pytest.mark.parametrize(
    ("name", "graph"),
    [
        pytest.param("moe_clones_ep2_dist_optimizer", GRAPH, marks=SLOW),
        pytest.param("moe_clones_ep2_dist_optimizer", LAYERS, marks=SLOW),
        pytest.param("moe_clones_ep2_recompute", GRAPH, marks=SLOW),
        pytest.param("moe_clones_ep2_fp8", GRAPH, marks=SLOW),
        pytest.param("moe_skewed_clones_ep4", GRAPH, marks=SLOW),
    ],
)
def test_clones_beside_compute(name: str, graph: dict, tmp_path: Path) -> None:
    """Over symmetric memory, with both overlaps of the distributed optimizer."""
    ways = ("moe_echo_token_transport", "moe_echo_expert_dispatcher_type")
    assert_same_bits(name, graph, tmp_path, **dict.fromkeys(ways, "symmetric_memory"))


def assert_same_bits(
    name: str, graph: dict, tmp_path: Path, script: Path = launch.SCRIPT, **changes: object
) -> None:
    """Ten steps of a golden case with graphs, and without, or as many as ``changes`` says."""
    case, changes = golden.load_case(name), {"train_iters": 10, **changes}
    eager, eager_traces = run_case(case, tmp_path / "eager", script, **changes)
    replayed, traces = run_case(case, tmp_path / "graph", script, **changes, **graph)
    assert replayed == eager
    assert len(eager) == changes["train_iters"]
    assert_same_plans(traces, eager_traces)


@pytest.mark.parametrize(
    ("name", "fraction", "replays"),
    fast_first(
        [(LAYOUTS[0], 0.5, 3), *((name, 1.0 - n % 2 / 2, 10) for n, name in enumerate(LAYOUTS))]
    ),
)
def test_offloading_in_the_graph_changes_no_bit(
    name: str, fraction: float, replays: int, tmp_path: Path
) -> None:
    """Replays with offloading against eager steps without; statistics of each replay."""
    case = golden.load_case(name)
    iterations = WARM_UP + replays
    flags = {**OFFLOAD, "activation_offload_fraction": fraction,
             "cuda_graph_warmup_steps": WARM_UP}  # fmt: skip
    eager, eager_traces = run_case(case, tmp_path / "eager", train_iters=iterations)
    graph, graph_traces = run_case(
        case, tmp_path / "graph", train_iters=iterations, **{**GRAPH, **flags}
    )
    offloaded = [
        {key: line.pop(key) for key in list(line) if key.startswith("offload/")} for line in graph
    ]
    assert graph == eager
    assert_same_plans(graph_traces, eager_traces)
    assert [line == offloaded[-1] for line in offloaded[WARM_UP:]] == [True] * replays
    last = offloaded[-1]
    has_saved = not name.endswith("recompute")  # there every module is recomputed
    assert last["offload/bytes"] == last["offload/planned_bytes"]
    assert (last["offload/bytes"] > 0) == has_saved
    assert (last["offload/kept_fraction_bytes"] > 0) == (has_saved and fraction < 1)
    assert last["offload/kept_host_full_bytes"] == last["offload/live_storages"] == 0


def test_statistics_of_replays_are_those_of_eager_steps(tmp_path: Path) -> None:
    flags = {"moe_enable_echo": True, **OFFLOAD, "offload_modules": MODULES, "train_iters": 5}
    lines = []
    for way, graph in (("eager", {}), ("graph", {**GRAPH, "cuda_graph_warmup_steps": WARM_UP})):
        words = launch.tiny_model(**flags, **graph, run_dir=tmp_path / way)
        launch.run(words, 1).check()
        lines.append(
            [{k: line[k] for k in line if "offload/" in k} for line in read_metrics(tmp_path / way)]
        )
    assert lines[0] == lines[1]
    assert lines[0][-1]["offload/planned_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("moe_loss_batch_ep2", {"train_iters": 4}),
        pytest.param("moe_loss_batch_ep2", {}, marks=SLOW),
        pytest.param("moe_echo_ep2", {"num_layers": 4, "moe_layer_freq": 2}, marks=SLOW),
        pytest.param("moe_echo_ep2_bf16", {"cuda_graph_modules": "attn moe_router"}, marks=SLOW),
        pytest.param("moe_echo_tp2_sp_ep2", {}, marks=SLOW),
        pytest.param("moe_echo_cp2", {}, marks=SLOW),
        pytest.param("moe_echo_mla_ep2", {}, marks=SLOW),
        pytest.param("moe_loss_batch_ep2_pp2", {}, marks=SLOW),
        pytest.param("moe_clones_ep2_pp2", VIRTUAL, marks=SLOW),
        pytest.param("moe_clones_ep2_dist_optimizer", {}, marks=SLOW),
        pytest.param("moe_clones_ep2", {**RECOMPUTED, "recompute_modules": "moe"}, marks=SLOW),
        pytest.param("moe_loss_seq_ep2", {}, marks=SLOW),
        pytest.param("moe_clones_ep2_fp8", {}, marks=SLOW),
        pytest.param("moe_skewed_clones_ep4", {}, marks=SLOW),
    ],
)
def test_layers_in_graphs_of_their_own(name: str, changes: dict, tmp_path: Path) -> None:
    """One capture of a layer serves all microbatches: counts, statistics and plans are the same."""
    assert_same_bits(name, LAYERS, tmp_path, **changes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("moe_loss_batch_ep2", {"train_iters": 4}),
        pytest.param("moe_loss_batch_ep2", {}, marks=SLOW),
        pytest.param("moe_echo_ep2", {"cuda_graph_modules": "attn"}, marks=SLOW),
        pytest.param("moe_clones_ep2", {"cuda_graph_modules": "moe", **RECOMPUTED}, marks=SLOW),
        pytest.param(
            "moe_clones_ep2_dist_optimizer",
            {"cuda_graph_modules": "attn moe_router moe_preprocess"},
            marks=SLOW,
        ),
        pytest.param("moe_loss_batch_ep2_pp2", {}, marks=SLOW),
        pytest.param("moe_clones_ep2_pp2", VIRTUAL, marks=SLOW),
    ],
)
def test_layers_in_graphs_of_transformer_engine(name: str, changes: dict, tmp_path: Path) -> None:
    """Its function has a stand-in; Megatron makes its inputs in bf16."""
    graph = {"cuda_graph_impl": "transformer_engine", "cuda_graph_warmup_steps": 1}
    assert_same_bits(name, graph, tmp_path, TE_GRAPHS, bf16=True, **changes)


@pytest.mark.parametrize(
    "before",
    [{"eval_interval": 3}, pytest.param({"save": "saved", "save_interval": 3}, marks=SLOW)],
)
def test_each_step_gathers_the_weights(before: dict, tmp_path: Path) -> None:
    """``--overlap-param-gather``, gathered before the capture by an evaluation or a save already.

    All weights but those of the experts are gathered from two ranks. The capture is the fourth
    step, and nothing else gathers until the sixth.
    """
    case = golden.load_case("moe_clones_ep2_dist_optimizer")
    assert case.model_args["--overlap-param-gather"]
    lines = []
    for way, graph in (("eager", {}), ("graph", {**GRAPH, "cuda_graph_warmup_steps": 3})):
        flags = {"train_iters": 6, "log_interval": 1, "eval_iters": 1, **before, **graph}
        flags["run_dir"] = tmp_path / way
        if "save" in flags:
            flags["save"] = tmp_path / way / flags["save"]
        launch.run(case.argv(**flags), case.world_size, env=case.env_vars).check()
        lines.append(read_metrics(tmp_path / way))
    for eager, replayed in zip(*lines, strict=True):
        for name in ("lm loss", "grad-norm", "lm loss validation"):
            assert eager.get(name) == replayed.get(name), (eager["iteration"], name)
    assert len({line["lm loss"] for line in lines[0]}) == 6


@pytest.mark.parametrize("graph", [GRAPH, pytest.param(LAYERS, marks=SLOW)], ids=["step", "layers"])
def test_an_overflow_in_a_replay_stops_every_rank_before_the_optimizer(
    graph: dict, tmp_path: Path
) -> None:
    """The step that overflows is a replayed one; it changes no weight, and all ranks say so."""
    script = tmp_path / "watched.py"
    script.write_text(SHOW_WEIGHTS)
    flags = {**graph, "moe_enable_echo": True, "moe_num_echo_experts": 0, "train_iters": 12,
             "expert_model_parallel_size": 2, "moe_received_token_capacity": 1.2}  # fmt: skip
    result = launch.run(launch.tiny_model(**flags), 2, script=script)
    assert all(result.codes)
    assert result.output.count("UNTOUCHED=True") == 2
    assert len(set(overflow_messages(result.output))) == 1
    done = sum(" iteration " in line and "elapsed" in line for line in result.output.splitlines())
    assert done > graph["cuda_graph_warmup_steps"] + 1


def test_dropped_pairs_are_counted_in_every_replay(tmp_path: Path) -> None:
    """With ``drop``: the same warnings at the same steps as without a graph."""
    flags = {"moe_enable_echo": True, "moe_num_echo_experts": 0, "expert_model_parallel_size": 2,
             "moe_received_token_capacity": 1.02, "moe_echo_overflow": "drop"}  # fmt: skip
    warnings = []
    for graph in ({}, GRAPH, LAYERS):
        output = launch.run(launch.tiny_model(**flags, **graph), 2).check().output
        warnings.append([line for line in output.splitlines() if "pairs dropped in" in line])
    assert warnings[0] == warnings[1] == warnings[2]
    assert len(warnings[0]) == 4


@pytest.mark.parametrize(("graph", "most"), [(GRAPH, 70), (LAYERS, 280)], ids=["step", "layers"])
def test_what_is_outside_the_graphs(graph: dict, most: int) -> None:
    """Of 3,281 operators of a step: the optimizer's, data and losses, and 18 of our end of it.

    With graphs of layers also embedding, output layer and loss; nothing of a MoE layer.
    """
    flags = launch.tiny_model(moe_enable_echo=True, expert_model_parallel_size=2, **graph)
    output = launch.run(flags, 2, script=COUNT_OPERATORS).check().output
    found = [line.split(" ", 2)[1:] for line in output.splitlines() if line.startswith("OUTSIDE")]
    assert sorted({part for part, _ in found}) == ["end", "optimizer", "rest"]
    for part, text in found:
        operators = json.loads(text)
        number = sum(operators.values())
        assert number <= {"end": 20, "optimizer": 200, "rest": most}[part], (part, operators)
        assert not any("grouped_mm" in name or "alltoall" in name for name in operators)


def test_a_stock_layer_cannot_be_captured() -> None:
    """Megatron's own dropless layer reads the routing on the host: the stand-in says so."""
    flags = {**GRAPH, "moe_token_dispatcher_type": "allgather"}
    result = launch.run(launch.tiny_model(**flags), 1)
    assert "cannot be captured: the host would read a value of the device" in result.output
