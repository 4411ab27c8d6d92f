"""The layer in Megatron's schedule of overlapped expert communication, by its worker's checks."""

from pathlib import Path

import launch

WORKER = Path(__file__).resolve().parent / "workers" / "overlap.py"


@launch.on_ranks(2, slow=(4,))
def test_stages(ranks: int) -> None:
    """A dense loop's results from two calls in flight; the same bits however they are computed."""
    checks = [
        "dense",
        "padding",
        "same_bits",
        "weight_gradients_of_two_calls",
        "mutants",
        "early_frees",
    ]
    print(launch.run(checks, ranks, script=WORKER).check().output)
