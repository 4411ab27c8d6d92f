"""The sync-free MoE layer over one to four expert-parallel ranks, by its worker's checks."""

from pathlib import Path

import launch

WORKER = Path(__file__).resolve().parent / "workers" / "moe_layer.py"


def run(check: str, ranks: int, every: int = 1) -> None:
    launch.run([check], ranks, script=WORKER, env={"EVERY": str(every)}).check()


@launch.thinned_on_ranks(1, 3, slow=(2, 4))
def test_dense(ranks: int, every: int) -> None:
    """Output and all gradients against a loop over experts; all routings, top-k, transports."""
    run("dense_fp64", ranks, every)


@launch.thinned_on_ranks(2, slow=(1, 3, 4))
def test_dense_in_fp32(ranks: int, every: int) -> None:
    run("dense_fp32", ranks, every)


@launch.thinned_on_ranks(3)
def test_dense_in_bf16(ranks: int, every: int) -> None:
    run("dense_bf16", ranks, every)


@launch.thinned_on_ranks(1, 3)
def test_same_bits(ranks: int, every: int) -> None:
    """Every run gives the same bits, also with NaN in all uninitialised memory."""
    run("same_bits", ranks, every)


@launch.thinned_on_ranks(1, 3)
def test_nan_in_the_weights_of_one_expert(ranks: int, every: int) -> None:
    run("nan_weights", ranks, every)


@launch.on_ranks(1, 3)
def test_probabilities_of_zero_and_padding_tokens(ranks: int) -> None:
    run("special_choices", ranks)


@launch.thinned_on_ranks(1, 2, slow=(3, 4))
def test_no_host_sync(ranks: int, every: int) -> None:
    """No hit in forward and backward, whatever the routing; with Megatron's router too."""
    run("no_host_sync", ranks, every)


@launch.thinned_on_ranks(1, 2, slow=(4,))
def test_static_shapes(ranks: int, every: int) -> None:
    """Every operator makes tensors of the same shapes, whatever the routing and the rank."""
    run("static_shapes", ranks, every)


@launch.thinned_on_ranks(2, slow=(4,))
def test_overflow_raises(ranks: int, every: int) -> None:
    """The same message on every rank, and the capacity in it suffices."""
    run("overflow_raises", ranks, every)


@launch.thinned_on_ranks(2, slow=(3,))
def test_overflow_drops(ranks: int, every: int) -> None:
    """The last groups' pairs are dropped, counted, and as if they had not been chosen."""
    run("overflow_drops", ranks, every)


@launch.thinned_on_ranks(2)
def test_evaluation_never_overflows(ranks: int, every: int) -> None:
    run("evaluation_never_overflows", ranks, every)


@launch.thinned_on_ranks(2)
def test_recomputation(ranks: int, every: int) -> None:
    """The whole layer recomputed in backward: the same bits, drops counted once."""
    run("recomputation", ranks, every)


def test_calls_in_flight() -> None:
    """Two forward passes before the first backward."""
    run("calls_in_flight", 2)


@launch.thinned_on_ranks(1, 2, slow=(3,))
def test_peer_capacity(ranks: int, every: int) -> None:
    """A smaller all-to-all cuts tokens off, counts them, and names the part that suffices."""
    run("peer_capacity", ranks, every)


def test_advice_of_two_limits() -> None:
    """Both capacities of a message together suffice."""
    run("advice_of_two_limits", 2)
