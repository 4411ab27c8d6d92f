"""The simulator: exact plans, arithmetic by hand, one sentence where it refuses."""

import argparse
import dataclasses
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_echo.config import echo_fields
from megatron_echo.observe import simulate
from megatron_echo.observe.simulation import search, workloads
from megatron_echo.observe.simulation.cost_model import Costs
from megatron_echo.observe.simulation.inputs import CLUSTERS, MODELS, Cluster, Model, load
from megatron_echo.observe.simulation.layout import Layout, Run, Work, held
from megatron_echo.observe.simulation.output import megatron_flags, trace_lines
from megatron_echo.observe.simulation.placement import Placement, fullest_part, place
from megatron_echo.offload.config import OffloadConfig
from megatron_echo.planner import plan_clones
from megatron_echo.record.trace import RoutingTrace, read_traces

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
TINY = Model("tiny", 2, 64, 4, 4, 16, 256, 128, 64, 8, 2)
SMALL = Cluster("small", 8, 4, 100, 10, 40, 100, 50)
WORK = Work(sequence=128, micro_batch=1, global_batch=32)


def traces_in(folder: Path, calls: int = 6, tolerance: float = 0.02) -> Path:
    trace = RoutingTrace(str(folder), every=1)
    generator = torch.Generator().manual_seed(0)
    for call in range(calls):
        counts = torch.randint(0, 200, (4, 8), generator=generator)
        trace.record(1 + call % 2, 0, plan_clones(counts, 2, tolerance))
    trace.end_step(7)
    return folder


def run(*words: str) -> list[str]:
    return simulate.simulate(simulate.parser().parse_args(list(words)))


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        simulate.main(list(words))
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.startswith("simulate: error: ")
    return text


COLUMNS = {
    "clones": "clones",
    "leave rank": "leave_rank",
    "leave node": "leave_node",
}
PLANNERS = {
    "no clones": (lambda full: 0, 0.0, False),
    "ours S=E/R": (lambda full: full, 0.0, False),
    "ours S=E/R, 2 %": (lambda full: full, 0.02, False),
    "ours S=E/R, nodes": (lambda full: full, 0.0, True),
    "ours S=2": (lambda full: 2, 0.0, False),
    "ours S=1": (lambda full: 1, 0.0, False),
}


@pytest.mark.parametrize(("ranks", "experts", "topk"), [(8, 64, 4), (16, 128, 8), (64, 256, 8)])
def test_the_planner_table(ranks: int, experts: int, topk: int) -> None:
    """Loads and plans are those of the planner's benchmark, in every workload."""
    table = json.loads((RESULTS / "planner.json").read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    names = list(PLANNERS) if ranks < 64 else ["no clones", "ours S=E/R"]
    seen = 0
    for row in rows:
        size = (row["R"], row["E"], row["K"])
        if size != (ranks, experts, topk) or row["planner"] not in names:
            continue
        slots, tolerance, by_node = PLANNERS[row["planner"]]
        draws = [(draw, 0) for draw in range(5)]
        counts = workloads.synthetic(row["workload"]).draw(ranks, experts, topk, 1024, draws)
        found = place(counts, slots(experts // ranks), tolerance, 8, by_node)
        assert found.overload_placed.mean() == pytest.approx(row["max/mean"], abs=1e-5)
        assert found.overload_placed.max() == pytest.approx(row["worst max/mean"], abs=1e-5)
        for column, name in COLUMNS.items():
            figure = getattr(found, name).mean()
            assert figure == pytest.approx(row[column], abs=1e-5), (row["workload"], column)
        seen += 1
    assert seen == len(names) * len(workloads.WORKLOADS)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([(2, 8), (4, 8), (8, 16)]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.05]),
    st.booleans(),
    st.integers(0, 2**30),
)
def test_plans_of_many_calls_are_those_of_each(
    size: tuple[int, int], slots: int, tolerance: float, by_node: bool, seed: int
) -> None:
    ranks, experts = size
    counts = np.random.default_rng(seed).integers(0, 50, (5, ranks, experts))
    counts[0] = 0
    counts[0, 0, 0] = 7
    found = place(counts, slots, tolerance, 2, by_node)
    for call, each in enumerate(counts):
        node = 2 if by_node and ranks > 2 else None
        plan = plan_clones(torch.from_numpy(each), slots, tolerance, 0, node)
        assert found.placed[call] == plan.load_after.max()
        assert found.routed[call] == plan.load_before.max()
        assert found.clones[call] == plan.num_clones
        received = int((plan.slot_expert >= 0).sum(1).max())
        assert found.clones_inside[call] + found.clones_across[call] >= received


def test_rows_that_leave_without_clones() -> None:
    """By hand: two nodes of two ranks, one expert each; rank 0's expert is everyone's."""
    counts = np.array([[[5, 1, 0, 0], [4, 0, 0, 0], [3, 0, 0, 2], [2, 0, 1, 0]]])
    found = place(counts, 0, 0.0, 2)
    assert found.routed[0] == 14
    assert found.pairs_inside[0] == 4
    assert found.pairs_across[0] == 5
    assert found.leave_rank[0] == pytest.approx(13 / 18)
    assert found.leave_node[0] == pytest.approx(5 / 18)
    assert fullest_part(counts, found) == 5  # rank 0 to itself
    assert found.fullest == 14


@pytest.mark.parametrize("tolerance", [0.0, 0.1])
def test_a_trace_gives_its_own_figures(tmp_path: Path, tolerance: float) -> None:
    folder = traces_in(tmp_path / "traces", tolerance=tolerance)
    (trace,) = read_traces(folder)
    mean = trace.counts.sum((1, 2)) / 4
    routed, placed = trace.load_before.max(1) / mean, trace.load_after.max(1) / mean
    measured, planned = trace_lines([trace], tolerance, None)
    assert measured == (
        "Trace, 6 layer calls, measured: max/mean load of ranks as routed "
        f"{routed.mean():.4f} (max {routed.max():.4f}), as computed "
        f"{placed.mean():.4f} (max {placed.max():.4f})."
    )
    assert planned.endswith("is the recorded one in 6 of 6 calls.")
    other = trace_lines([trace], 0.5, None)[1]  # another tolerance is noticed
    assert "6 of 6" not in other
    assert other.endswith("Give the run's own --tolerance and --by-node.")


def test_a_trace_as_loads(tmp_path: Path) -> None:
    tokens = 100
    trace = RoutingTrace(str(tmp_path), every=1)
    rows = torch.tensor([[150, 50, 0, 0], [100, 40, 30, 30]])
    trace.record(3, 0, plan_clones(rows, 1))
    trace.end_step(1)
    loads = workloads.load_workload(str(tmp_path))
    assert np.array_equal(loads.draw(2, 4, 2, tokens, [(0, 0)])[0], rows.numpy())
    wider = loads.draw(4, 4, 2, tokens, [(0, 0)])[0]
    assert (wider.sum(1) == 200).all()
    assert wider.sum(0) / 800 == pytest.approx(rows.sum(0).numpy() / 400, abs=0.06)
    with pytest.raises(ValueError, match="has 4 experts, the model 8"):
        loads.draw(2, 8, 2, tokens, [(0, 0)])


@pytest.mark.parametrize("overload", [1.3, 2.0, 4.01])
def test_an_overload_is_reached(overload: float) -> None:
    calls = workloads.layer_calls(60, 1, 60)
    counts = workloads.at_overload("x", overload, "").draw(64, 128, 8, 4096, calls)
    assert place(counts, 0, 0.0, 8).overload_routed.mean() == pytest.approx(overload, rel=0.15)


@pytest.mark.parametrize(("most", "length"), [(0, 960), (64, 64), (5000, 960), (7, 7)])
def test_layer_calls(most: int, length: int) -> None:
    calls = workloads.layer_calls(60, 16, most)
    assert len(set(calls)) == len(calls) == length
    assert all(0 <= layer < 60 and 0 <= microbatch < 16 for layer, microbatch in calls)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 46.7),
        ("qwen3-30b-a3b", 30.5),
        ("qwen3-235b-a22b", 235.1),
        ("deepseek-v3", 671.0),
        ("kimi-k2", 1026.4),
        ("nemotron-3-nano", 31.58),
    ],
)
def test_published_parameters(name: str, billions: float) -> None:
    assert MODELS[name].parameters / 1e9 == pytest.approx(billions, rel=0.002)


def two_calls(slots: int) -> tuple[Run, Placement]:
    counts = workloads.synthetic("one hot expert").draw(8, 8, 2, 128, [(0, 0), (1, 0)])
    return Run(SMALL, TINY, WORK), place(counts, slots, 0.0, 4)


def test_time_by_hand() -> None:
    model, placed = two_calls(0)
    time = Costs(model, Layout(8, 8), placed).step_time()
    calls = TINY.moe_layers * 4  # 32 sequences on 8 GPUs
    rate = 100e12 * model.cluster.efficiency
    assert time.compute == pytest.approx(18 * 64 * 64 * placed.placed.mean() * calls / rate)
    inside, across = placed.pairs_inside * 128 / 80e9, placed.pairs_across * 128 / 8e9
    assert time.tokens == pytest.approx(
        4 * calls * (np.maximum(inside, across).mean() + model.cluster.exchange_us * 1e-6)
    )
    assert time.clones == time.bubble == 0
    assert time.total == pytest.approx(time.compute + time.tokens + time.rest + time.exposed)


def test_clones_by_hand() -> None:
    model, placed = two_calls(1)
    layout = Layout(8, 8, tokens_by="all_gather", weights_by="p2p")
    time = Costs(model, layout, placed).step_time()
    size = 3 * 64 * 64 * (2 + 2 + 4)
    busy = np.maximum(placed.clones_inside * size / 80e9, placed.clones_across * size / 8e9)
    fixed = (6 * model.cluster.exchange_us + model.cluster.plan_us) * 1e-6
    assert time.clones == pytest.approx(8 * (busy.mean() + fixed))
    collective = Costs(
        model, dataclasses.replace(layout, weights_by="collective"), placed
    ).step_time()
    assert collective.clones == pytest.approx(8 * (4 * size / 8e9 + fixed))


def test_recomputation() -> None:
    model, placed = two_calls(0)
    layout = Layout(8, 4)
    plain = Costs(model, layout, placed).step_time()
    again = Costs(model, dataclasses.replace(layout, recompute=True), placed).step_time()
    assert again.compute == pytest.approx(plain.compute * 4 / 3)
    kept = Costs(model, layout, placed).memory().activations
    assert (
        Costs(model, dataclasses.replace(layout, recompute=True), placed).memory().activations
        < kept
    )


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(2, 1), (4, 1), (2, 2), (4, 2), (2, 4)]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([False, True]),
)
def test_the_bubble_is_that_of_the_replayed_schedule(
    sizes: tuple[int, int], groups: int, planned: bool
) -> None:
    """Exactly for 1F1B with equal stages; at most 0.7 / microbatches more where they are not."""
    pipeline, virtual = sizes
    number = pipeline * virtual
    shape = dataclasses.replace(TINY, layers=16, dense_layers=3)
    model = Run(SMALL, shape, Work(128, 1, 8 * groups))
    layers = (16 // number + 1, *[16 // number] * (number - 2), 16 // number - 1)
    layout = Layout(8, 2, pipeline, virtual, layers=layers if planned else None)
    counts = workloads.synthetic("zipf 0.6").draw(2, 8, 2, 128, [(0, 0), (1, 0)])
    placed = place(counts, 0, 0.0, 2)
    layout.check(shape, model.work)
    costs = Costs(model, layout, placed)
    seconds = [sum(costs.kinds[k].seconds for k in stage) for stage in layout.stages(shape)]
    replayed = layout.schedule(model.work).step_time(seconds)
    time = Costs(model, layout, placed).step_time()
    more = (time.total - time.exposed) / replayed - 1
    assert -1e-9 < more < 0.7 / layout.microbatches(model.work)
    if virtual == 1 and not planned:
        assert more < 1e-9


def test_a_pipeline_does_the_same_work() -> None:
    model, placed = two_calls(0)
    plain, piped = (Costs(model, Layout(8, 4, stages), placed).step_time() for stages in (1, 2))
    # The same layer calls a rank, half the layers and twice the microbatches, and a bubble.
    assert piped.compute == pytest.approx(plain.compute)
    assert 0 < piped.bubble < (piped.total - piped.bubble) / 8


def test_tensor_and_context_parallelism_by_hand() -> None:
    """Rows, products and states are divided, and the exchanges cost what they carry."""
    counts = workloads.synthetic("uniform").draw(8, 8, 2, 32, [(0, 0)])
    model, layout = Run(SMALL, TINY, WORK), Layout(8, 8, tensor=2, context=2)
    placed, one = place(counts, 0, 0.0, 4), Layout(8, 8)
    layout.check(TINY, WORK)
    assert (layout.tokens(WORK), layout.data, layout.dense_copies) == (32, 2, 4)
    time, plain = Costs(model, layout, placed).step_time(), Costs(model, one, placed).step_time()
    assert time.rest == pytest.approx(plain.rest)  # a quarter of the rows, 4 times as often
    tensor = 5 * (2 * 32 * 1 * 64 / 80e9 + 20e-6)
    context = 3 * (2 * 32 * 1 * 2 * 4 * 16 / 80e9 + 20e-6)
    assert time.shards == pytest.approx(2 * 16 * (tensor + context))
    assert plain.shards == 0
    assert Costs(model, layout, placed)._shards("*-") == pytest.approx(2 * tensor + context)
    dense = (2 * (4 * 64 * 64 + 64 * 8) + 2 * 256 * 64) / 2
    states = 2 * 3 * 64 * 64 * (6 + 12) + dense * (6 + 12 / 4)
    assert Costs(model, layout, placed).memory().states * 2**30 == pytest.approx(states)
    with pytest.raises(ValueError, match=r"TP=3 x CP=1 does not divide 128 tokens and 4 heads\."):
        Layout(9, 1, tensor=3).check(TINY, WORK)


def test_a_hybrid_by_hand() -> None:
    """Each layer is one part, with one norm; experts and MLPs here have no gate."""
    shape = dataclasses.replace(
        TINY, layers=4, pattern="M*-E", matrices=2, mamba_heads=4, mamba_head_dim=32,
        mamba_groups=2, mamba_state=8,
    )  # fmt: skip
    inner, others = 4 * 32, 2 * 2 * 8 + 4
    mamba = 64 * (3 * inner + others)
    dense = mamba + 4 * 64 * 64 + 2 * 64 * 128 + 64 * 8
    assert shape.parameters == dense + 8 * 2 * 64 * 64 + 2 * 256 * 64
    layout = Layout(8, 8)
    assert layout.stages(shape) == [["M", "*", "-", "E", "embedding", "output"]]
    costs = Costs(Run(SMALL, shape, WORK), layout, two_calls(0)[1])
    assert costs.kinds["M"].seconds == pytest.approx(128 * (6 * mamba + 12 * inner * 8) / 50e12)
    assert costs.kinds["M"].kept == 2 * 128 * (2 * 64 + 5 * inner + 2 * others)
    both = costs.kinds["*"].kept + costs.kinds["-"].kept
    assert both == 2 * 128 * (4 * 64 + 2 * 8 * 16 + 2 * 128)
    with pytest.raises(ValueError, match=r"has 5 layers, but pattern M\*-E has 4\. Give a letter"):
        dataclasses.replace(shape, layers=5)


def test_offloading_by_hand() -> None:
    """What the link moves in a forward pass is gone, but for two layers on their way."""
    model, placed = two_calls(0)
    layout = Layout(8, 8, offload=0.5)
    plain, memory = (
        Costs(model, Layout(8, 8), placed).memory(),
        Costs(model, layout, placed).memory(),
    )
    kept = 2 * 128 * (4 * 64 + 4 * 64) + placed.fullest * 2 * (64 + 3 * 64)
    assert memory.host * 2**30 == pytest.approx(2 * kept / 2)
    assert memory.activations == pytest.approx(plain.activations)  # two layers: all in transit
    deep = Run(SMALL, dataclasses.replace(TINY, layers=20), WORK)
    gone = (
        Costs(deep, Layout(8, 8), placed).memory().activations
        - Costs(deep, layout, placed).memory().activations
    )
    assert gone * 2**30 == pytest.approx(18 * kept / 2)
    assert (
        Costs(model, layout, placed).step_time() == Costs(model, Layout(8, 8), placed).step_time()
    )
    slow = Run(dataclasses.replace(SMALL, host_gb_s=0.01), TINY, WORK)
    seconds = Costs(slow, layout, placed).kinds["*E"].seconds
    assert Costs(slow, layout, placed).memory().host * 2**30 == pytest.approx(2 * 8e6 * seconds / 3)


def test_just_the_rows_that_leave() -> None:
    """Inside a node with symmetric memory, between nodes by HybridEP."""
    model, placed = two_calls(1)
    layout = Layout(8, 8, tokens_by="symmetric_memory", weights_by="p2p")
    time = Costs(model, layout, placed).step_time()
    inside = placed.placed * (placed.leave_rank - placed.leave_node) * 128 / 80e9
    across = placed.placed * placed.leave_node * 128 / 8e9
    latency = model.cluster.exchange_us * 1e-6
    assert time.tokens == pytest.approx(32 * (np.maximum(inside, across).mean() + latency))
    gathered = dataclasses.replace(layout, tokens_by="all_gather")
    assert time.tokens < Costs(model, gathered, placed).step_time().tokens
    assert (
        Costs(model, layout, placed).memory().working
        < Costs(model, gathered, placed).memory().working
    )
    ways = {ranks: list(search.transports(search_for("uniform"), ranks, 0.5)) for ranks in (4, 8)}
    assert ways[4] == ["all_gather", "all_to_all", "symmetric_memory"]
    assert ways[8] == ["all_gather", "all_to_all", "hybrid_ep"]


def test_memory_by_hand() -> None:
    model, placed = two_calls(0)
    memory = Costs(model, Layout(8, 8), placed).memory()
    dense = 2 * (4 * 64 * 64 + 64 * 8) + 2 * 256 * 64
    states = 2 * 3 * 64 * 64 * (6 + 12) + dense * (6 + 12 / 8)
    assert memory.states * 2**30 == pytest.approx(states)
    kept = 2 * 128 * (4 * 64 + 4 * 64) + placed.fullest * 2 * (64 + 3 * 64)
    assert memory.activations * 2**30 == pytest.approx(2 * kept)
    assert memory.clones == 0
    with_clones = two_calls(1)[1]
    layout = Layout(8, 8, tokens_by="all_gather", weights_by="p2p")
    assert Costs(model, layout, with_clones).capacity is None  # a slot for each expert: auto
    assert Costs(model, layout, with_clones).buffer_rows == 256
    assert Costs(model, layout, with_clones).memory().clones > 0
    assert Costs(model, layout, with_clones).memory().activations < memory.activations


def test_stages() -> None:
    """DeepSeek-V3 on 16 stages: three dense layers, and one layer at the end."""
    layout = Layout(128, 8, 16)
    found = layout.stages(MODELS["deepseek-v3"])
    assert found[0] == ["*-"] * 3 + ["*E", "embedding"]
    assert found[1:-1] == [["*E"] * 4] * 14
    assert found[-1] == ["*E", "output"]
    moments = held(layout.schedule(Work(4096, 1, 80)))
    assert [moment for ((moment,),) in moments] == [10] * 7 + list(range(9, 0, -1))


def search_for(loads: str, run: Run | None = None, **changes: Any) -> search.Search:
    """A search of a cluster and a model that have no names."""
    fields = {"ep": (2, 4, 8), "pp": (1, 2), "slots": ("1",), "calls": 8} | changes
    made = search.Search(loads=loads, **fields)
    vars(made)["run"] = run or Run(SMALL, TINY, WORK)
    return made


def test_the_search_takes_the_fastest_that_fits() -> None:
    found, left_out = search.candidates(search_for("one hot expert", ep=(3, 2, 4, 8)))
    assert left_out == ["EP=3 does not divide 8 experts. Use a divisor of 8."]
    best = search.fastest(found, 40)
    assert best is not None
    assert best.time.total == min(one.time.total for one in found)
    totals = sorted(one.memory.total for one in found)
    tight = search.fastest(found, totals[0])
    assert tight is not None
    assert tight.memory.total == totals[0]
    assert search.fastest(found, 0.1) is None
    names = {one.name for one in search.best_by_name(found, 40)}
    assert names == {"plain EP", "ECHO S=1, 2%"}


def test_what_is_faster_is_never_slower() -> None:
    found = {
        name: search.fastest(
            search.candidates(search_for("zipf 0.9", Run(cluster, TINY, WORK)))[0], 40
        )
        for name, cluster in {
            "slow": SMALL,
            "network": dataclasses.replace(SMALL, network_gb_s=20),
            "products": dataclasses.replace(SMALL, tflops=200),
        }.items()
    }
    slow, network, products = (one.time.total for one in found.values() if one)
    assert max(network, products) <= slow


def real_parser() -> argparse.ArgumentParser:
    """That of ``pretrain_gpt_moe.py``."""
    from megatron.training.arguments import add_megatron_arguments

    from megatron_echo.arguments import add_echo_arguments
    from megatron_echo.offload.training import add_offload_arguments

    parser = add_echo_arguments(add_megatron_arguments(argparse.ArgumentParser()))
    add_offload_arguments(parser, [])
    return parser


def test_planned_layouts() -> None:
    """A heavy output moves layers off the last stage, and Megatron reads the same stages."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    shape = dataclasses.replace(TINY, layers=13, vocab=300_000)
    model = Run(SMALL, shape, WORK)
    found, _ = search.candidates(search_for("uniform", model, ep=(4,), pp=(2,)))
    planned = [one for one in found if one.layout.layers and one.kind == "plain"]
    assert {one.layout.virtual for one in planned} == {1, 2}
    for one in planned:
        even = dataclasses.replace(one.layout, layers=None)
        if one.layout.virtual == 1:
            assert one.time.total < Costs(model, even, one.placed).step_time().total
            assert one.layout.layers[0] > one.layout.layers[1]
        words = shlex.split(" ".join(megatron_flags(model, one)))
        args, unknown = real_parser().parse_known_args(words)
        assert unknown == []
        read = PipelineParallelLayerLayout(args.pipeline_model_parallel_layout, 2)
        read.validate_layer_layout(13, 0)
        assert read.virtual_pipeline_model_parallel_size == one.layout.virtual
        assert sum(one.layout.layers) == 13


@pytest.mark.parametrize("virtual", [1, 2])
def test_flags_of_the_other_groups(virtual: int) -> None:
    model, placed = two_calls(0)
    layout = Layout(8, 2, 1, 1, 2, 2, offload=0.5)
    if virtual == 2:
        layout = Layout(8, 2, 1, 2, 2, 2, offload=0.5)
    one = search.Candidate.of(model, layout, placed)
    args, unknown = real_parser().parse_known_args(
        shlex.split(" ".join(megatron_flags(model, one)))
    )
    assert unknown == []
    assert args.tensor_model_parallel_size == args.context_parallel_size == 2
    assert args.sequence_parallel
    assert args.expert_tensor_parallel_size == 1
    assert args.num_virtual_stages_per_pipeline_rank == (2 if virtual == 2 else None)
    assert args.echo_fine_grained_activation_offloading
    assert args.echo_activation_offload_fraction == 0.5
    OffloadConfig(modules=tuple(args.echo_offload_modules))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(16, 2, 2, 2, 2, 2, (1, 2, 2, 1), tokens_by="all_gather", weights_by="collective"),
        Layout(16, 4, 2, 1, recompute=True, tokens_by="all_to_all", weights_by="p2p",
               peer_capacity=0.9),
        Layout(16, 8, 1),
        Layout(16, 2, 2, 3),
    ],
)  # fmt: skip
def test_megatron_accepts_the_flags(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own validation, and the configurations of the model."""
    from megatron.core import num_microbatches_calculator
    from megatron.training import global_vars

    from megatron_echo import environment
    from megatron_echo.memory import estimate
    from megatron_echo.preflight import check_command_line

    shape = dataclasses.replace(TINY, layers=6, dense_layers=1)
    model = Run(SMALL, shape, Work(64, 1, 64))
    layout.check(shape, model.work)
    tokens = layout.tokens(model.work)
    counts = workloads.synthetic("zipf 0.9").draw(layout.expert, 8, 2, tokens, [(0, 0), (1, 0)])
    placed = place(counts, 1 if layout.weights_by else 0, 0.02, layout.expert)
    words = shlex.split(" ".join(megatron_flags(model, search.Candidate.of(model, layout, placed))))
    words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "256", "--mock-data"]
    words += ["--lr", "1e-3", "--train-iters", "2"]
    words = environment.add_missing_flags(words, False, verbose=False)
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", layout.gpus)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("sys.argv", ["train", *words])
    try:
        args, container = estimate._parse()
    finally:
        global_vars.destroy_global_vars()
        num_microbatches_calculator.destroy_num_microbatches_calculator()
    check_command_line(args)
    assert args.data_parallel_size == layout.data
    assert args.virtual_pipeline_model_parallel_size == (
        layout.virtual if layout.virtual > 1 else None
    )
    assert container.model.transformer.num_layers == 6


def test_every_transport_is_tried() -> None:
    """By default all that the flag takes, so that the winner's flags can be used."""
    (field,) = (f for f in echo_fields() if f.name == "moe_echo_token_transport")
    assert set(search.TRANSPORTS) == set(field.metadata["choices"]) - {"auto", "nccl_ep"}


@pytest.mark.parametrize("name", [*MODELS, "tiny"])
def test_flags_are_megatrons(name: str) -> None:
    """The winner's flags go through the real parser."""
    shape = MODELS.get(name, TINY)
    ranks = min(8, shape.experts)
    calls = [(0, 0), (1, 0)]
    counts = workloads.synthetic("zipf 0.9").draw(ranks, shape.experts, shape.topk, 64, calls)
    model = Run(CLUSTERS["h100-nvl8"], shape, Work(64, 1, 64))
    layout = Layout(
        64, ranks, 2, recompute=True, tokens_by="all_to_all", weights_by="p2p", peer_capacity=0.5
    )
    placed = place(counts, 1, 0.02, 8)
    one = search.Candidate.of(model, layout, placed)
    words = shlex.split(" ".join(megatron_flags(model, one, by_node=True)))
    args, unknown = real_parser().parse_known_args(words)
    assert unknown == []
    assert args.num_experts == shape.experts
    assert args.moe_num_echo_experts == ranks
    assert args.moe_echo_peer_capacity == 0.5
    freq = args.moe_layer_freq
    first = shape.dense_layers
    assert freq == ([0] * first + [1] * (shape.layers - first) if first else 1)
    if shape.pattern:
        assert args.hybrid_layer_pattern == f"{shape.pattern[:26]}|{shape.pattern[26:]}"
        assert args.mamba_num_heads * args.mamba_head_dim == shape.mamba_widths[0]
        assert args.squared_relu
        return
    last = args.decoder_last_pipeline_num_layers
    assert last == (None if shape.layers % 2 == 0 else shape.layers // 2)


def test_the_whole_of_it(tmp_path: Path) -> None:
    model = tmp_path / "tiny.json"
    model.write_text(json.dumps({k: v for k, v in dataclasses.asdict(TINY).items() if k != "name"}))
    cluster = tmp_path / "small.json"
    cluster.write_text(json.dumps(dataclasses.asdict(SMALL)))
    traces = traces_in(tmp_path / "traces")
    lines = run(
        *("--model", str(model), "--cluster", str(cluster), "--loads", str(traces)),
        *("--seq-length", "64", "--calls", "4"),
    )
    text = "\n".join(lines)
    for part in ("Trace, 6 layer calls, measured", "6 of 6 calls", "Best: ", "Assumed, not measu"):
        assert part in text
    assert "plain EP" in text
    assert "ECHO" in text
    assert load(MODELS, str(model)) == dataclasses.replace(TINY, name="tiny")


@pytest.mark.slow
def test_sixty_layers_of_sixteen_microbatches_within_a_minute() -> None:
    """At EP=64, every layer call planned, on one core."""
    shape = dataclasses.replace(MODELS["deepseek-v3"], layers=60, dense_layers=0)
    cluster = dataclasses.replace(CLUSTERS["h100-nvl8"], gpus=1024)
    model = Run(cluster, shape, Work(4096, 1, 16 * 1024))
    wanted = search_for("lognormal 1.0", model, ep=(64,), pp=(1,), calls=0, slots=("all", "1"))
    started = time.process_time()
    found, _ = search.candidates(wanted)
    assert time.process_time() - started < 60
    assert all(len(one.placed.placed) == 60 * 16 for one in found)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--ep 3", "EP=3 does not divide 256 experts"),
        ("--gpus 24 --ep 16", "24 GPUs are not divisible by EP=16"),
        ("--gpus 12", "12 GPUs do not fill nodes of 8"),
        ("--gpus 0", "gpus is 0"),
        ("--global-batch-size 7 --ep 8", "The global batch 7 is not divisible"),
        ("--loads nonsense", "nonsense is no workload"),
        ("--loads", None),
        ("--slots many", "--slots many is not a number of slots"),
        ("--model gpt", "There is no model gpt. Use mixtral"),
        ("--cluster moon", "There is no cluster moon. Use h100"),
        ("--cluster moon.json", "There is no cluster file moon.json"),
        ("--ep 0 8", "--ep 0 is below 1"),
        ("--pp 0 1", "--pp 0 is below 1"),
        ("--slots 0", "--slots 0 is not a number of slots"),
        ("--tolerance -1", "--tolerance -1.0 is not between"),
        ("--vpp 0", "--vpp 0 is below 1"),
        ("--tp 0", "--tp 0 is below 1"),
        ("--tp 3 --ep 8", "64 GPUs are not divisible by TP=3 x CP=1 x PP=1"),
        ("--offload-fraction 2", "--offload-fraction 2.0 is no share"),
    ],
)
def test_bad_values(capsys: pytest.CaptureFixture[str], words: str, says: str | None) -> None:
    if says is None:
        assert "overload x is not a number" in refusal(capsys, "--loads", "overload x")
        return
    assert says in refusal(capsys, *words.split())


def test_clusters_and_models_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields, path = dataclasses.asdict(SMALL), tmp_path / "cluster.json"
    path.write_text(json.dumps(fields))
    assert load(CLUSTERS, str(path)) == SMALL
    path.write_text(json.dumps({"like": "h100-nvl8", "gpus": 128, "efficiency": 0.4}))
    assert load(CLUSTERS, str(path)) == dataclasses.replace(
        CLUSTERS["h100-nvl8"], name="cluster", gpus=128, efficiency=0.4
    )
    without = {k: v for k, v in fields.items() if k != "network_gb_s"}
    for text, says in (
        (json.dumps(without), "does not describe a cluster"),
        (json.dumps(without), "'network_gb_s'). Give name, gpus, "),
        (json.dumps({**fields, "speed": 1}), "'speed'). Give name, gpus, "),
        ("[]", "does not describe a cluster"),
        ("{", "is not valid JSON"),
        (
            json.dumps({**fields, "gpus": "many"}),
            "The cluster's gpus is 'many'. Give a positive whole",
        ),
        (
            json.dumps({**fields, "gpus": True}),
            "The cluster's gpus is True. Give a positive whole number.",
        ),
        (
            json.dumps({**fields, "gpus": 0}),
            "The cluster's gpus is 0. Give a positive whole number.",
        ),
        (json.dumps({**fields, "tflops": float("nan")}), "tflops is nan. Give a positive number."),
        (json.dumps({**fields, "tflops": float("inf")}), "tflops is inf. Give a positive number."),
        (json.dumps({**fields, "efficiency": 0}), "efficiency is 0. Give a positive number."),
        (json.dumps({**fields, "exchange_us": -1}), "exchange_us is -1. Give a positive number."),
        ('{"like": "moon"}', "is like moon, which is no cluster. Use h100-nvl8, "),
        ('{"like": ["moon"]}', "which is no cluster. Use h100-nvl8, "),
    ):
        path.write_text(text)
        assert says in refusal(capsys, "--cluster", str(path)), text
    for fields, says in (
        ({"like": "deepseek-v3", "layers": 2}, "3 dense of 2 layers. Make both parts smaller."),
        (
            {"like": "deepseek-v3", "layers": 2.5},
            "The model's layers is 2.5. Give a positive whole number.",
        ),
        ({"like": "h100-nvl8"}, "is like h100-nvl8, which is no model. Use mixtral-8x7b, "),
        ({"layers": 2}, "does not describe a model"),
    ):
        path.write_text(json.dumps(fields))
        assert says in refusal(capsys, "--model", str(path))


def test_bad_traces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no traces" in refusal(capsys, "--loads", str(tmp_path))
    folder = traces_in(tmp_path / "traces")
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cut short or not a routing trace" in refusal(capsys, "--loads", str(folder))
    np.savez(path, other=np.zeros(3))
    assert "cut short or not a routing trace" in refusal(capsys, "--loads", str(folder))
    np.savez(path, iteration=np.array([{}], dtype=object), stage=0)  # would be a pickle
    assert "cut short or not a routing trace" in refusal(capsys, "--loads", str(folder))
    path.write_bytes(whole)
    with np.load(path) as file:
        arrays = dict(file)
    arrays["load_after"] = arrays["load_after"] + 1
    np.savez(path, **arrays)
    assert "do not fit each other" in refusal(capsys, "--loads", str(folder))
