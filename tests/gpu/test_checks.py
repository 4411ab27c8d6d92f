"""The checks of ``tools/gpu_check.py``, stage 1, as tests."""

import sys

import launch
import pytest

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
sys.path.insert(0, str(launch.ROOT / "benchmarks" / "gpu"))

import capture_safety
import gpu_check
import kernel_checks
import offloading
from ranks import WaitingRanks
from record import Case, SkippedError

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_rank")]
CASES = [
    *kernel_checks.cases(False),
    *capture_safety.cases(False),
    offloading.bits(False),
    offloading.captured_bits(False),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.part}: {case.name}")
def test_check(case: Case) -> None:
    try:
        assert case.run()
    except SkippedError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("words", gpu_check.SHARING.values(), ids=gpu_check.SHARING)
def test_two_processes_on_one_device(words: list[str]) -> None:
    WaitingRanks(gpu_check.PEERS, words, 2, gpu_check.SHARED_DEVICE).run(120)
