"""The layer over symmetric memory on one to three ranks of a CPU, by its worker's checks."""

from pathlib import Path

import launch
import pytest

WORKER = Path(__file__).resolve().parents[1] / "workers" / "symmetric_memory.py"


def run(check: str, ranks: int, every: int = 1) -> None:
    launch.run([check], ranks, script=WORKER, env={"EVERY": str(every)}).check()


@launch.thinned_on_ranks(1, 2, slow=(3,), every=5)
def test_as_all_gather(ranks: int, every: int) -> None:
    """The all-gather's results, but for the order of a sum, with clones and without."""
    run("as_all_gather", ranks, every)


@pytest.mark.parametrize("ranks", [3])
def test_buffers_may_hold_anything(ranks: int) -> None:
    """NaN in all buffers before each movement, with calls in flight; and they do not multiply."""
    run("spoiled", ranks)


@launch.on_ranks(2, slow=(3,))
def test_ranks_that_are_late(ranks: int) -> None:
    """Delays anywhere, many times, and the right rows each time."""
    run("delays", ranks)


@pytest.mark.parametrize("ranks", [3])
def test_the_same_movement_again(ranks: int) -> None:
    run("the_same_movement_again", ranks)


@launch.thinned_on_ranks(2, slow=(3,), every=5)
def test_weights_of_clones(ranks: int, every: int) -> None:
    """What the collectives bring; no host read, ranks that are late, NaN in buffers."""
    run("weights", ranks, every)


def test_uneven_tokens() -> None:
    """One sentence on all ranks, before the optimizer; and the next step is clean."""
    run("uneven_tokens", 2)


@pytest.mark.parametrize("ranks", [2])
def test_inference_first(ranks: int) -> None:
    run("inference_first", ranks)


@pytest.mark.parametrize("ranks", [2])
def test_refusals(ranks: int) -> None:
    """Several machines, or memory that is not shared: one sentence, on all ranks."""
    run("refusals", ranks)


SLOW = pytest.mark.slow
SHARED = {"no_host_sync": 2, "static_shapes": 2, "overflow_raises": 2, "overflow_drops": 2}
SHARED |= {"evaluation_never_overflows": 2, "recomputation": 2, "nan_weights": 2, "same_bits": 1}
WHOLE = {**SHARED, "static_shapes": 3, "overflow_drops": 3, "dense_fp64": 3, "dense_bf16": 3}


@pytest.mark.parametrize(
    ("check", "ranks", "every"),
    [
        *((check, ranks, 3) for check, ranks in SHARED.items()),
        ("special_choices", 2, 1),
        *(pytest.param(check, ranks, 1, marks=SLOW) for check, ranks in WHOLE.items()),
    ],
)
def test_what_every_transport_does(check: str, ranks: int, every: int) -> None:
    run(f"moe_layer_{check}", ranks, every)


@pytest.mark.parametrize(
    ("check", "ranks"),
    [
        ("dense_topk", 3),
        ("no_host_sync", 2),
        ("flipping_router", 2),
        pytest.param("dense_fp64", 3, marks=pytest.mark.slow),
        pytest.param("pool", 3, marks=pytest.mark.slow),
        pytest.param("gradient_hooks", 3, marks=pytest.mark.slow),
        pytest.param("self_check", 3, marks=pytest.mark.slow),
        pytest.param("exception_then_a_clean_step", 2, marks=pytest.mark.slow),
    ],
)
def test_what_every_transport_does_with_clones(check: str, ranks: int) -> None:
    run(f"clones_{check}", ranks)


@launch.thinned_on_ranks(2)
def test_different_numbers_of_tokens(ranks: int, every: int) -> None:
    run("token_counts_dense", ranks, every)
