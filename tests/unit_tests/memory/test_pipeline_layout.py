"""``plan_layout`` against every layout there is, Megatron's parser, and the even split."""

import dataclasses
import itertools
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_echo.memory
from megatron_echo.memory import layout_search
from megatron_echo.memory.layout_search import Measures
from megatron_echo.memory.pipeline_layout import (
    LayerCost,
    PipelineLayout,
    _search,
    evaluate_layout,
    even_split,
    explain,
    plan_layout,
    read_costs,
)
from megatron_echo.memory.schedules import Pipeline

GIB = 2**30


def write_costs(layers: list[LayerCost], path: Path) -> None:
    """The file that ``read_costs`` reads."""
    path.write_text(json.dumps({"layers": [dataclasses.asdict(layer) for layer in layers]}))


SCHEDULES = [
    ("1f1b", 1),
    ("interleaved", 2),
    ("interleaved-ep-overlap", 2),
]


def deepseek_like(decoders: int = 61, dense: int = 3, mtp: int = 1) -> list[LayerCost]:
    """Made-up costs in the proportions of DeepSeek-V3."""
    return [
        LayerCost("E", 0.1, 0.05 * GIB, 1.5 * GIB),
        *[LayerCost("t", 0.7, 0.4 * GIB, 0.5 * GIB)] * dense,
        *[LayerCost("t", 1.0, 0.6 * GIB, 1.2 * GIB)] * (decoders - dense),
        *[LayerCost("m", 1.1, 0.7 * GIB, 1.3 * GIB)] * mtp,
        LayerCost("L", 0.5, 0.3 * GIB, 1.5 * GIB, 1.0 * GIB),
    ]


def criteria(layers, pipeline, every) -> list[tuple[float, float, float, float]]:
    """Step, longest stage, busiest rank and peak of each layout, written as they are defined."""
    parts = [[layers[a:b] for a, b in itertools.pairwise(cuts)] for cuts in every]
    steps = pipeline.step_time([[sum(x.seconds for x in part) for part in p] for p in parts])
    return [(step, *measure(layers, pipeline, cuts)) for step, cuts in zip(steps, every)]


def measure(layers, pipeline, cuts) -> tuple[float, float, float]:
    """The three criteria, written down as they are defined."""
    stage_time, rank_time, peak = [], [], []
    for rank in range(pipeline.ranks):
        stages = [pipeline.stage(rank, chunk) for chunk in range(pipeline.chunks)]
        held = [layers[cuts[s] : cuts[s + 1]] for s in stages]
        seconds = [sum(layer.seconds for layer in part) for part in held]
        activation = [sum(layer.activation_bytes for layer in part) for part in held]
        all_of_them = [layer for part in held for layer in part]
        worst = max(sum(n * a for n, a in zip(live, activation)) for live in pipeline.live(rank))
        stage_time.append(max(seconds))
        rank_time.append(sum(seconds))
        static = sum(layer.static_bytes for layer in all_of_them)
        peak.append(static + worst + max(layer.workspace_bytes for layer in all_of_them))
    return max(stage_time), max(rank_time), max(peak)


def is_legal(layers, pipeline, cuts) -> bool:
    """Megatron's rules for MTP layers; its own parser is asked in another test."""
    letters = "".join(layer.kind for layer in layers)
    mtp = letters.count("m")
    for rank, chunk in itertools.product(range(pipeline.ranks), range(pipeline.chunks)):
        stage = pipeline.stage(rank, chunk)
        here = letters[cuts[stage] : cuts[stage + 1]].count("m")
        if here not in (0, mtp):
            return False
        first = rank == 0 and pipeline.ranks > 1 and pipeline.chunks > 1
        misplaced = chunk != pipeline.chunks - 1 or first
        if here and misplaced:
            return False
    return True


def in_order(values, even_step, prefer) -> tuple[float, ...]:
    """What the plan has the least of, the first one first."""
    step, *times, peak = (float(f"{value:.9g}") for value in values)
    if prefer == "time":
        return (step, *times, peak)
    return (max(step, float(f"{even_step:.9g}")), peak, step, *times)


def brute_force(layers, pipeline, prefer, budget) -> tuple[float, ...] | None:
    """The best criteria over all legal layouts, in the order of preference."""
    stages = pipeline.ranks * pipeline.chunks
    inner = itertools.combinations(range(1, len(layers)), stages - 1)
    every = [even_split(layers, stages), *([0, *cuts, len(layers)] for cuts in inner)]
    every = [cuts for cuts in every if is_legal(layers, pipeline, cuts)]
    even, *found = criteria(layers, pipeline, every)
    limits = even if budget is None else (np.inf, np.inf, np.inf, budget)
    if prefer == "memory":
        limits = (np.inf, *even[1:3], limits[3])
    inside = [v for v in found if all(a <= b * (1 + 1e-9) for a, b in zip(v, limits))]
    return min((in_order(v, even[0], prefer) for v in inside), default=None)


def planned_order(layout: PipelineLayout, prefer: str) -> tuple[float, ...]:
    """The same of a plan."""
    values = (layout.step_seconds, *layout.measures)
    return in_order(values, layout.even.step_seconds, prefer)


COST = st.integers(0, 12)


@st.composite
def models(draw, least: int = 0) -> list[LayerCost]:
    """Up to ten layers of unrelated costs."""
    mtp = draw(st.integers(0, 2))
    kinds = "E" + "t" * draw(st.integers(max(least, 0), 10 - mtp)) + "m" * mtp + "L"
    return [LayerCost(kind, draw(COST), *(draw(COST) for _ in range(3))) for kind in kinds]


@pytest.mark.parametrize("prefer", ["time", "memory"])
@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_equals_brute_force(schedule, chunks, prefer, data):
    ranks = data.draw(st.integers(1, 4))
    layers = data.draw(models(least=ranks * chunks - 2))
    pipeline = Pipeline.make(schedule, ranks, chunks)
    layout = plan_layout(layers, ranks, chunks, schedule, prefer=prefer)
    expected = brute_force(layers, pipeline, prefer, None)
    assert planned_order(layout, prefer) == expected
    assert tuple(layout.measures) == measure(layers, pipeline, layout.cuts)
    assert is_legal(layers, pipeline, layout.cuts)


@pytest.mark.parametrize("prefer", ["time", "memory"])
@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_budget_equals_brute_force(schedule, chunks, prefer, data):
    ranks = data.draw(st.integers(2, 3))
    layers = data.draw(models(least=ranks * chunks - 2))
    budget = data.draw(st.integers(20, 200))
    pipeline = Pipeline.make(schedule, ranks, chunks)
    expected = brute_force(layers, pipeline, prefer, budget)
    arguments = {"budget_bytes": budget, "prefer": prefer}
    if expected is None:
        with pytest.raises(ValueError, match=r"rank \d"):
            plan_layout(layers, ranks, chunks, schedule, **arguments)
    else:
        layout = plan_layout(layers, ranks, chunks, schedule, **arguments)
        assert planned_order(layout, prefer) == expected


@pytest.mark.parametrize("few", [layout_search.FEW, 0])
@pytest.mark.parametrize("prefer", ["time", "memory"])
@pytest.mark.parametrize(("schedule", "chunks"), [*SCHEDULES, ("interleaved", 3)])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_never_worse_than_even(schedule, chunks, prefer, few, data):
    """Neither where every layout is tried nor where moves look for one."""
    ranks = data.draw(st.integers(1, 3))
    layers = data.draw(models(least=ranks * chunks - 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_search, "FEW", few)
        layout = plan_layout(layers, ranks, chunks, schedule, prefer=prefer)
    assert layout.measures.keeps(layout.even.measures)
    assert layout.step_seconds <= layout.even.step_seconds * (1 + 1e-9)
    assert is_legal(layers, layout.pipeline, layout.cuts)


def unit_costs(seconds: str) -> list[LayerCost]:
    """A model of given times, such as ``0 2 3 0``: embedding, layers, loss."""
    first, *middle, last = map(float, seconds.split())
    middle_layers = [LayerCost("t", value, 1, 1) for value in middle]
    return [LayerCost("E", first, 0, 0), *middle_layers, LayerCost("L", last, 0, 0)]


def test_the_longest_stage_does_not_outweigh_the_step():
    """The shortest stages, ``Et|t|t|ttL``, make the busiest rank 6 and the step 50 seconds."""
    layout = plan_layout(unit_costs("0 2 3 1 2 1 0"), 2, 2, num_microbatches=8)
    assert layout.measures.rank_time <= 5
    assert layout.step_seconds <= 42.67
    assert plan_layout(deepseek_like(mtp=0), 8).slowdown < 1e-9  # so it is with one chunk a rank


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
def test_moves_come_close_to_the_best(schedule, chunks, monkeypatch):
    """On 12 random models each: at most one is missed, by less than 3 %."""
    draw = np.random.default_rng(5)
    gaps = []
    for _ in range(12):
        ranks = int(draw.integers(2, 4))
        layers = unit_costs(" ".join(map(str, [0, *draw.integers(1, 9, 9), 2])))
        monkeypatch.undo()
        best = plan_layout(layers, ranks, chunks, schedule).step_seconds
        monkeypatch.setattr(layout_search, "FEW", 0)
        gaps.append(plan_layout(layers, ranks, chunks, schedule).step_seconds / best - 1)
    assert min(gaps) > -1e-9
    assert sum(gap > 1e-9 for gap in gaps) <= 1
    assert max(gaps) < 0.03


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_least_peak_equals_brute_force(schedule, chunks, data):
    """Whether a budget can be kept is known for a model of any size."""
    ranks = data.draw(st.integers(1, 3))
    layers = data.draw(models(least=ranks * chunks - 2))
    pipeline = Pipeline.make(schedule, ranks, chunks)
    cuts, free = even_split(layers, ranks * chunks), Measures(np.inf, np.inf, np.inf)
    inner = itertools.combinations(range(1, len(layers)), ranks * chunks - 1)
    every = ([0, *places, len(layers)] for places in inner)
    legal = (c for c in every if is_legal(layers, pipeline, c))
    least = min(measure(layers, pipeline, c)[2] for c in legal)
    search = _search(layers, pipeline)
    assert search.measures(search.best(cuts, "peak", free)).peak == least


def test_a_budget_may_make_it_slower_and_says_so():
    layers = [LayerCost("t", 1, 8, 0)] * 8
    layers = [LayerCost("E", 0, 0, 0), *layers, LayerCost("L", 0, 0, 0)]
    even = plan_layout(layers, 4).even
    layout = plan_layout(layers, 4, budget_bytes=even.peak_bytes - 1)
    assert layout.slowdown == pytest.approx(layout.step_seconds / even.step_seconds - 1)
    assert layout.slowdown > 0.1
    assert f"{layout.slowdown:.1%} slower than the even split" in explain(layout)
    assert "slower" not in explain(even)


def test_mtp_on_the_first_rank_only_beside_the_embedding():
    """In another chunk of that rank, two copies of the embedding would drift apart."""
    heavy_loss = [LayerCost(kind, 1, 1, 1) for kind in "Ettm"] + [LayerCost("L", 9, 1, 1)]
    layout = plan_layout(heavy_loss, 2, budget_bytes=100)
    assert layout.string == "Ettm|L"
    layout.check_with_megatron()
    for few in (layout_search.FEW, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout_search, "FEW", few)
            assert plan_layout(heavy_loss, 2, 2, budget_bytes=100).stages[3] == "mL"


def test_noise_of_sums_does_not_hide_the_better_peak():
    """0.1 + 0.2 is not 0.3, but the two stages are equally long."""
    layers = [
        LayerCost("E", 0.1, 0, 0), LayerCost("t", 0.2, 8, 0), LayerCost("t", 0.3, 1, 0),
        LayerCost("t", 0.3, 8, 0), LayerCost("L", 0.0, 0, 0),
    ]  # fmt: skip
    assert plan_layout(layers, 3).measures.stage_time == pytest.approx(0.3)


@pytest.mark.parametrize("prefer", ["time", "memory"])
@pytest.mark.parametrize(
    ("ranks", "chunks", "schedule"),
    [
        (8, 1, None),
        (16, 1, None),
        (8, 2, None),
        pytest.param(16, 2, "interleaved-ep-overlap", marks=pytest.mark.slow),
        (2, 3, None),
    ],
)
def test_full_size_is_never_worse_than_even(ranks, chunks, schedule, prefer):
    layers = deepseek_like(61 if chunks < 3 else 16)
    layout = plan_layout(layers, ranks, chunks, schedule, prefer=prefer)
    even = evaluate_layout(layers, layout.pipeline, even_split(layers, ranks * chunks))
    assert layout.measures.keeps(even.measures)
    assert layout.step_seconds <= even.step_seconds * (1 + 1e-9)
    assert "".join(layout.stages) == "".join(layer.kind for layer in layers)
    assert all(layout.stages)
    layout.check_with_megatron()
    assert "even split" in explain(layout)


def test_memory_goes_to_late_ranks():
    layers = deepseek_like(27, dense=0, mtp=0)
    layers[0] = dataclasses.replace(layers[0], seconds=2.0)  # or a late layer slows the step
    layers[-1] = dataclasses.replace(layers[-1], seconds=0.1)
    sizes = [stage.count("t") for stage in plan_layout(layers, 4, prefer="memory").stages]
    assert sizes == sorted(sizes)


@settings(max_examples=15, deadline=None)
@given(
    index=st.integers(0, 12),
    field=st.sampled_from(["activation_bytes", "static_bytes", "workspace_bytes"]),
)
def test_peak_grows_with_costs(index, field):
    layers = deepseek_like(10, 2)
    index %= len(layers)
    more = list(layers)
    value = getattr(layers[index], field) + GIB
    more[index] = dataclasses.replace(layers[index], **{field: value})
    before = plan_layout(layers, 4, prefer="memory").peak_bytes
    assert plan_layout(more, 4, prefer="memory").peak_bytes >= before


@pytest.mark.parametrize(
    ("decoders", "stages", "counts"),
    [(8, 4, [2, 2, 2, 2]), (9, 4, [2, 3, 2, 2]), (11, 4, [3, 3, 3, 2]), (2, 4, [0, 1, 1, 0]),
     (5, 1, [5]), (5, 2, [3, 2])],
)  # fmt: skip
def test_even_split(decoders, stages, counts):
    layers = deepseek_like(decoders, 0)
    cuts = even_split(layers, stages)
    letters = "".join(layer.kind for layer in layers)
    assert [letters[a:b].count("t") for a, b in itertools.pairwise(cuts)] == counts
    assert (cuts[0], cuts[-1]) == (0, len(layers))


def test_over_budget_names_the_binding_rank():
    with pytest.raises(ValueError, match=r"rank \d+ \(.*t.*\) needs .* GiB\. Use more"):
        plan_layout(deepseek_like(), 16, 2, budget_bytes=10 * GIB)


@pytest.mark.parametrize(
    ("layers", "arguments", "words"),
    [
        (deepseek_like()[1:], {}, "Order the layers"),
        (deepseek_like(2, 0, 0), {"pipeline_size": 8}, "Use fewer stages"),
        (deepseek_like(), {"prefer": "luck"}, "cannot prefer"),
        ([LayerCost("E", -1, 0, 0), LayerCost("L", 0, 0, 0)], {}, "negative cost"),
        ([LayerCost("E", float("nan"), 0, 0), LayerCost("L", 0, 0, 0)], {}, "finite"),
        ([LayerCost("E", "1.5", 0, 0), LayerCost("L", 0, 0, 0)], {}, "no number"),
        ([LayerCost("E", 1, None, 0), LayerCost("L", 0, 0, 0)], {}, "no number"),
        ([LayerCost("E", 1, 0, 10**400), LayerCost("L", 0, 0, 0)], {}, "finite"),
        ([LayerCost(3, 1, 0, 0), LayerCost("L", 0, 0, 0)], {}, "no kind 3"),
        ([LayerCost(["E"], 1, 0, 0), LayerCost("L", 0, 0, 0)], {}, "no kind"),
        ([LayerCost("Et", 1, 0, 0), LayerCost("L", 0, 0, 0)], {}, "no kind 'Et'"),
        (deepseek_like(), {"budget_bytes": float("nan")}, "no size"),
    ],
)
def test_refusals(layers, arguments, words):
    with pytest.raises(ValueError, match=words):
        plan_layout(layers, **{"pipeline_size": 2, **arguments})


def test_megatron_reads_another_layout():
    layout = plan_layout(deepseek_like(8, 0, 0), 2, 2)
    twisted = dataclasses.replace(layout, pipeline=layout.pipeline._replace(ranks=4, chunks=1))
    twisted.check_with_megatron()  # the same string, four ranks of one chunk
    with pytest.raises(AssertionError):
        dataclasses.replace(layout, cuts=(0, 0, *layout.cuts[1:])).check_with_megatron()


def test_costs_in_a_file(tmp_path):
    layers = deepseek_like(5, 1)
    write_costs(layers, tmp_path / "costs.json")
    assert read_costs(tmp_path / "costs.json") == layers
    entry = {"kind": "t", "count": 3, "seconds": 1, "activation_bytes": 2, "static_bytes": 3}
    (tmp_path / "short.json").write_text(json.dumps({"layers": [entry]}))
    assert read_costs(tmp_path / "short.json") == [LayerCost("t", 1, 2, 3)] * 3
    (tmp_path / "bad.json").write_text('{"layers": [{"kind": "t", "secs": 1}]}')
    with pytest.raises(ValueError, match="fields kind, seconds"):
        read_costs(tmp_path / "bad.json")


def test_command_line(tmp_path, capsys, monkeypatch):
    write_costs(deepseek_like(), tmp_path / "costs.json")
    words = [str(tmp_path / "costs.json"), "-p", "8", "-v", "2", "--prefer", "memory"]
    monkeypatch.setattr(sys, "argv", ["plan_layout", *words])
    runpy.run_module("megatron_echo.memory.plan_layout", run_name="__main__")
    printed = capsys.readouterr().out
    layout = plan_layout(deepseek_like(), 8, 2, prefer="memory")
    assert f'--pipeline-model-parallel-layout "{layout.string}"' in printed
    monkeypatch.setattr(sys, "argv", ["plan_layout", *words, "--budget-gib", "1"])
    with pytest.raises(SystemExit):
        runpy.run_module("megatron_echo.memory.plan_layout", run_name="__main__")
    assert "No layout fits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "message"),
    [("fast", "no number"), ([1], "no number"), (None, "holds no layer costs")],
)
def test_command_line_refuses_in_a_sentence(tmp_path, capsys, monkeypatch, seconds, message):
    if seconds is not None:
        write_costs(
            [LayerCost("E", seconds, 0, 0), *unit_costs("0 1 1 0")[1:]], tmp_path / "c.json"
        )
    monkeypatch.setattr(sys, "argv", ["plan_layout", str(tmp_path / "c.json"), "-p", "2"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("megatron_echo.memory.plan_layout", run_name="__main__")
    error = capsys.readouterr().err
    assert error.startswith("plan_layout: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_module_and_function_share_a_name():
    assert callable(megatron_echo.memory.plan_layout)
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m"]
    help_text = subprocess.run(
        [*command, "megatron_echo.memory.plan_layout", "--help"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert "--budget-gib" in help_text.stdout
    assert isinstance(plan_layout(deepseek_like(8, 0), 2), PipelineLayout)
    assert np.isfinite(plan_layout(deepseek_like(8, 0), 2).step_seconds)
