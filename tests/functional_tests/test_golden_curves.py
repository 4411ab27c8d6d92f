"""Every case of ``test_cases`` against its recorded curves."""

import dataclasses
from pathlib import Path

import golden
import pytest

# What another machine's instruction set does to rounding; the goldens must not notice.
OTHER_INSTRUCTIONS = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE"}


TWIN_STEPS = 15
"""Steps over which rounding alone does not part two runs by more than the tolerance."""


def first_steps(curves: golden.Curves, steps: int) -> golden.Curves:
    return {name: {s: v for s, v in curve.items() if s <= steps} for name, curve in curves.items()}


SLOW_CASES = (
    *("moe_allgather_ep2_bf16", "moe_allgather_pp2", "moe_allgather_tp2_sp", "moe_mla_ep2"),
    *("moe_allgather_cp2", "moe_allgather_ep1", "moe_allgather_ep2_pp2", "moe_alltoall_ep2"),
    *("moe_allgather_ep2_dist_optimizer", "moe_allgather_tp2_sp_ep2", "moe_skewed_ep4"),
    *("moe_echo_ep1", "moe_echo_ep2_bf16", "moe_echo_ep2_dist_optimizer", "moe_echo_ep2_pp2"),
    *("moe_echo_ep2_recompute", "moe_loss_batch_ep2", "moe_loss_seq_ep2_pp2", "moe_clones_ep2"),
    *("moe_echo_ep2", "moe_clones_ep2_pp2", "moe_clones_ep2_recompute", "moe_loss_seq_ep2"),
    *("moe_gpt_oss_ep2", "moe_clones_ep2_fp8"),
)
"""Cases of which another one, with more parallelism or our layer, or another test runs the code."""
QUICK_STEPS = 5
"""What ``make test`` compares of a curve; of one case, and with ``make test-all``, all 20."""


QUICK_CASES = [name for name in golden.case_names() if name not in SLOW_CASES]


@pytest.mark.parametrize("name", [name for name in QUICK_CASES if name != "moe_allgather_ep2"])
def test_the_begin_of_a_curve(name: str, tmp_path: Path) -> None:
    """The schedule of the learning rate is that of all 20 steps."""
    case = golden.load_case(name)
    curves = golden.run_case(case, tmp_path, exit_interval=QUICK_STEPS)
    for follows in filter(None, (name, case.twin)):
        expected = golden.read_golden(golden.load_case(follows).golden_file)
        assert golden.compare(curves, first_steps(expected, QUICK_STEPS)) == []


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name != "moe_allgather_ep2" else [])
        for name in golden.case_names()
    ],
)
def test_curve(name: str, tmp_path: Path) -> None:
    case = golden.load_case(name)
    curves = golden.run_case(case, tmp_path)
    assert golden.compare(curves, golden.read_golden(case.golden_file)) == []
    if case.twin is not None:
        expected = golden.read_golden(golden.load_case(case.twin).golden_file)
        begin, twin = first_steps(curves, TWIN_STEPS), first_steps(expected, TWIN_STEPS)
        assert golden.compare(begin, twin) == []


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("twin", "steps"),
    [
        ("moe_allgather_cp2", QUICK_STEPS),
        pytest.param("moe_allgather_cp2", None, marks=pytest.mark.slow),
        pytest.param("moe_alltoall_ep2", None, marks=pytest.mark.slow),
    ],
)
def test_layouts_of_one_model_agree(twin: str, steps: int | None, tmp_path: Path) -> None:
    """Runs that start from the same weights: the same losses, whatever was recorded.

    Without the auxiliary loss, whose stock version depends on how tokens are spread over ranks.
    """
    reference = "moe_allgather_ep1" if twin == "moe_allgather_cp2" else "moe_allgather_ep2"
    curves = []
    for name in (reference, twin):
        case = dataclasses.replace(golden.load_case(name), metrics=("lm loss", "grad-norm"))
        plain = {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0}
        plain["exit_interval"] = steps
        curves.append(golden.run_case(case, tmp_path / name, **plain))
    assert golden.compare(curves[1], curves[0], 1e-6) == []
