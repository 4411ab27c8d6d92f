"""Every case of ``test_cases`` against its recorded curves."""

import dataclasses
from pathlib import Path

import golden
import pytest

# What another machine's instruction set does to rounding; the goldens must not notice.
OTHER_INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}


@pytest.mark.parametrize("name", golden.case_names())
def test_curve(name: str, tmp_path: Path) -> None:
    case = golden.load_case(name)
    assert (
        golden.compare(golden.run_case(case, tmp_path), golden.read_golden(case.golden_file)) == []
    )


def test_curve_with_other_instructions(tmp_path: Path) -> None:
    """One case again through a real torchrun, with AVX2 arithmetic."""
    case = dataclasses.replace(golden.load_case("moe_allgather_ep2"), env_vars=OTHER_INSTRUCTIONS)
    assert (
        golden.compare(golden.run_case(case, tmp_path), golden.read_golden(case.golden_file)) == []
    )


@pytest.mark.parametrize("metric", ["lm loss", "grad-norm"])
def test_a_curve_that_is_off_by_1e_4_fails(metric: str) -> None:
    expected = golden.read_golden(golden.load_case("moe_allgather_ep2").golden_file)
    moved = {name: dict(curve) for name, curve in expected.items()}
    moved[metric] = {step: value * (1 + 1e-4) for step, value in moved[metric].items()}
    assert golden.compare(expected, expected) == []
    (problem,) = golden.compare(moved, expected)
    assert metric in problem


def test_a_single_step_that_is_off_fails() -> None:
    expected = golden.read_golden(golden.load_case("moe_allgather_ep2").golden_file)
    moved = {name: dict(curve) for name, curve in expected.items()}
    moved["lm loss"][20] *= 1 - 1e-4
    assert len(golden.compare(moved, expected)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_a_number_fails(value: float) -> None:
    expected = golden.read_golden(golden.load_case("moe_allgather_ep2").golden_file)
    moved = {name: dict(curve) for name, curve in expected.items()}
    moved["lm loss"][7] = value
    assert len(golden.compare(moved, expected)) == 1


def test_a_missing_step_or_metric_fails() -> None:
    expected = golden.read_golden(golden.load_case("moe_allgather_ep2").golden_file)
    short = {name: dict(curve) for name, curve in expected.items()}
    del short["lm loss"][20], short["grad-norm"]
    assert len(golden.compare(short, expected)) == 2


def test_layouts_of_one_model_agree() -> None:
    """Parallel layouts that start from the same weights have the same recorded losses."""
    single = golden.read_golden(golden.load_case("moe_allgather_ep2").golden_file)["lm loss"]
    for name in ("moe_alltoall_ep2", "moe_allgather_ep2_dist_optimizer"):
        other = golden.read_golden(golden.load_case(name).golden_file)["lm loss"]
        assert golden.compare({"lm loss": other}, {"lm loss": single}, 1e-6) == []
