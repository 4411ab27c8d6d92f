"""The sync-free MoE layer over one to four expert-parallel ranks, by its worker's checks."""

from pathlib import Path

import launch

WORKER = Path(__file__).resolve().parent / "workers" / "moe_layer.py"


def run(check: str, ranks: int) -> None:
    launch.run([check], ranks, script=WORKER).check()


@launch.on_ranks(1, 3, slow=(2, 4))
def test_dense(ranks: int) -> None:
    """Output and all gradients against a loop over experts; all routings, top-k, transports."""
    run("dense_fp64", ranks)


@launch.on_ranks(2, slow=(1, 3, 4))
def test_dense_in_fp32(ranks: int) -> None:
    run("dense_fp32", ranks)


def test_dense_in_bf16() -> None:
    run("dense_bf16", 3)


@launch.on_ranks(1, 3)
def test_same_bits(ranks: int) -> None:
    """Every run gives the same bits, also with NaN in all uninitialised memory."""
    run("same_bits", ranks)


@launch.on_ranks(1, 3)
def test_nan_in_the_weights_of_one_expert(ranks: int) -> None:
    run("nan_weights", ranks)


@launch.on_ranks(1, 3)
def test_probabilities_of_zero_and_padding_tokens(ranks: int) -> None:
    run("special_choices", ranks)


@launch.on_ranks(1, 2, slow=(3, 4))
def test_no_host_sync(ranks: int) -> None:
    """No hit in forward and backward, whatever the routing; with Megatron's router too."""
    run("no_host_sync", ranks)


@launch.on_ranks(1, 2, slow=(4,))
def test_static_shapes(ranks: int) -> None:
    """Every operator makes tensors of the same shapes, whatever the routing and the rank."""
    run("static_shapes", ranks)


@launch.on_ranks(2, slow=(4,))
def test_overflow_raises(ranks: int) -> None:
    """The same message on every rank, and the capacity in it suffices."""
    run("overflow_raises", ranks)


@launch.on_ranks(2, slow=(3,))
def test_overflow_drops(ranks: int) -> None:
    """The last groups' pairs are dropped, counted, and as if they had not been chosen."""
    run("overflow_drops", ranks)


def test_evaluation_never_overflows() -> None:
    run("evaluation_never_overflows", 2)


def test_recomputation() -> None:
    """The whole layer recomputed in backward: the same bits, drops counted once."""
    run("recomputation", 2)


def test_calls_in_flight() -> None:
    """Two forward passes before the first backward."""
    run("calls_in_flight", 2)


@launch.on_ranks(1, 2, slow=(3,))
def test_peer_capacity(ranks: int) -> None:
    """A smaller all-to-all cuts tokens off, counts them, and names the part that suffices."""
    run("peer_capacity", ranks)


def test_advice_of_two_limits() -> None:
    """Both capacities of a message together suffice."""
    run("advice_of_two_limits", 2)
