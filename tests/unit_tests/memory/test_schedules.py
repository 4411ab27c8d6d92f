"""Replayed schedules: Megatron's own order, the known live counts, and an end with nothing held."""

from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.pipeline_parallel.schedules import (
    get_pp_rank_microbatches,
    get_schedule_table,
)

from megatron_echo.memory.schedules import BACKWARD_SHARE, Pipeline

SIZES = [
    ("1f1b", 4, 1, None),
    ("1f1b", 1, 1, 3),
    ("1f1b", 5, 1, 2),
    ("interleaved", 4, 2, None),
    ("interleaved", 2, 3, 4),
    ("interleaved", 3, 2, 9),
    ("interleaved-ep-overlap", 4, 2, None),
    ("interleaved-ep-overlap", 2, 3, 2),
]


@pytest.mark.parametrize(("schedule", "ranks", "chunks", "microbatches"), SIZES)
def test_every_pass_once_and_nothing_left(schedule, ranks, chunks, microbatches):
    pipeline = Pipeline.make(schedule, ranks, chunks, microbatches)
    every = {(c, m) for c in range(chunks) for m in range(pipeline.microbatches)}
    for rank in range(ranks):
        turns, open_now = pipeline.turns(rank), set()
        for turn in turns:
            if turn.forward is not None:
                assert turn.forward not in open_now
                open_now.add(turn.forward)
            if turn.backward is not None:
                open_now.remove(turn.backward)
        assert not open_now
        assert {s.forward for s in turns} - {None} == every
        assert {s.backward for s in turns} - {None} == every


@pytest.mark.parametrize(("schedule", "ranks", "chunks", "microbatches"), SIZES)
def test_time_is_at_least_the_work_and_runs_to_the_end(schedule, ranks, chunks, microbatches):
    pipeline = Pipeline.make(schedule, ranks, chunks, microbatches)
    work = 2.0 * chunks * pipeline.microbatches
    assert pipeline.step_time([2.0] * (ranks * chunks)) >= work * (1 - 1e-12)


def test_time_of_one_forward_one_backward():
    assert Pipeline.make("1f1b", 4, 1, 16).step_time([3.0] * 4) == pytest.approx((16 + 3) * 3)
    interleaved = Pipeline.make("interleaved", 4, 2, 16)
    assert interleaved.step_time([3.0] * 8) == pytest.approx(2 * 16 * 3 + 3 * 3)


def replayed(pipeline: Pipeline, seconds: list[float]) -> float:
    """A step, pass by pass: a turn begins when its rank is free and what it needs is made."""
    share = {"F": 1 - BACKWARD_SHARE, "B": BACKWARD_SHARE}
    todo = {rank: pipeline.turns(rank) for rank in range(pipeline.ranks)}
    ends, free, last = {}, dict.fromkeys(todo, 0.0), pipeline.ranks * pipeline.chunks - 1
    while any(todo.values()):
        for rank, turns in todo.items():
            if not turns:
                continue
            works = [("F", turns[0].forward), ("B", turns[0].backward)]
            passes = [(w, pipeline.stage(rank, work[0]), work[1]) for w, work in works if work]
            needs = []
            for way, stage, number in passes:
                if way == "B":
                    needs.append(("B", stage + 1, number) if stage < last else ("F", last, number))
                elif stage > 0:
                    needs.append(("F", stage - 1, number))
            if ends.keys() >= set(needs):
                turns.pop(0)
                begin = max([free[rank], *(ends[need] for need in needs)])
                free[rank] = begin + sum(share[way] * seconds[stage] for way, stage, _ in passes)
                ends |= dict.fromkeys(passes, free[rank])
    return max(free.values())


@pytest.mark.parametrize(("schedule", "ranks", "chunks", "microbatches"), SIZES)
def test_many_layouts_are_replayed_at_once(schedule, ranks, chunks, microbatches):
    pipeline = Pipeline.make(schedule, ranks, chunks, microbatches)
    seconds = np.random.default_rng(0).uniform(0, 9, (3, 2, ranks * chunks))
    steps = pipeline.step_time(seconds)
    expected = [[replayed(pipeline, row) for row in rows] for rows in seconds.tolist()]
    assert steps == pytest.approx(np.array(expected), rel=1e-12)


def megatron_order(pipeline: Pipeline, rank: int) -> tuple[int, list]:
    """Warm-up passes and the table, from Megatron's own functions."""
    communicator = SimpleNamespace(
        pp_group=SimpleNamespace(size=lambda: pipeline.ranks, rank=lambda: rank),
        virtual_pipeline_model_parallel_size=pipeline.chunks if pipeline.chunks > 1 else None,
    )
    _, _, warmup, _ = get_pp_rank_microbatches(
        pipeline.microbatches,
        pipeline.chunks,
        pipeline.group,
        overlap_moe_expert_parallel_comm=pipeline.schedule == "interleaved-ep-overlap",
        p2p_communicator=communicator,
    )
    table = get_schedule_table(pipeline.microbatches, pipeline.chunks, pipeline.group)
    return warmup, [(chunk, microbatch) for microbatch, chunk in table]


@pytest.mark.parametrize("group", [None, 6])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "interleaved-ep-overlap"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_order_is_megatrons(schedule, ranks, group):
    pipeline = Pipeline.make(schedule, ranks, 1 if schedule == "1f1b" else 3, None, group)
    for rank in range(ranks):
        if schedule == "1f1b" and ranks == 1:
            continue
        warmup, order = megatron_order(pipeline, rank)
        turns = pipeline.turns(rank)
        assert [s.forward for s in turns if s.forward] == order
        backwards = [(pipeline.chunks - 1 - chunk, m) for chunk, m in order]
        assert [s.backward for s in turns if s.backward] == backwards
        assert all(s.backward is None for s in turns[:warmup])
        first = next(i for i, s in enumerate(turns) if s.backward)
        assert first == warmup + (schedule != "interleaved-ep-overlap")


@pytest.mark.parametrize("ranks", [2, 4, 7])
def test_live_counts(ranks):
    one = Pipeline.make("1f1b", ranks)
    two = Pipeline.make("interleaved", ranks, 2)
    overlap = Pipeline.make("interleaved-ep-overlap", ranks, 2)
    for rank in range(ranks):
        assert one.live(rank) == [(ranks - rank,)]
        total = 2 * (ranks - rank - 1) + ranks + 1
        assert max(map(sum, two.live(rank))) == total
        assert max(map(sum, overlap.live(rank))) == total + 1
    assert Pipeline.make("interleaved", 4, 2).live(0) == [(7, 4), (8, 3)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("zigzag", 2), "no schedule"),
        (("1f1b", 0), "no pipeline"),
        (("1f1b", 2, 2), "exactly 1"),
        (("interleaved-ep-overlap", 2, 1), "2 or more"),
        (("interleaved", 4, 2, 9), "multiple of 4"),
        (("interleaved", 4, 2, 2), "multiple of 4"),
        (("interleaved", 4, 2, 8, 3), "below the 4 ranks"),
        (("1f1b", 2, 1, 0), "1 or more"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(ValueError, match=words):
        Pipeline.make(*arguments)
