"""Functional regression tests: a training run's TensorBoard scalars against recorded ones.

The layout is Megatron's: ``test_cases/<case>/model_config.yaml`` names the flags,
``test_cases/<case>/golden_values.json`` holds the curve of each metric, and beside the curves the
CPU and torch release that recorded them. ``record_goldens.py`` records them again.
"""

import dataclasses
import json
import math
import platform
from pathlib import Path
from typing import Any

import launch
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_echo import environment

CASES = Path(__file__).resolve().parent / "test_cases"
COMMON = CASES / "common.yaml"
RELATIVE_TOLERANCE = 1e-5
Curves = dict[str, dict[int, float]]
"""Metric name to iteration to value."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One functional test: what to run and which scalars to compare."""

    name: str
    world_size: int
    model_args: dict[str, Any]
    env_vars: dict[str, str]
    metrics: tuple[str, ...]
    twin: str | None = None
    """A case whose curves this one must follow too."""

    @property
    def golden_file(self) -> Path:
        return CASES / self.name / "golden_values.json"

    def argv(self, **overrides: object) -> list[str]:
        """The command line; ``overrides`` are flag names with underscores."""
        named = {"--" + name.replace("_", "-"): value for name, value in overrides.items()}
        words: list[str] = []
        for name, value in {**self.model_args, **named}.items():
            if value is False or value is None:
                continue
            words += [name] if value is True else [name, *str(value).split()]
        return words


def load_case(name: str) -> Case:
    """Read ``test_cases/<name>/model_config.yaml`` on top of ``common.yaml``."""
    common = yaml.safe_load(COMMON.read_text())
    config = yaml.safe_load((CASES / name / "model_config.yaml").read_text())
    return Case(
        name=name,
        world_size=config["WORLD_SIZE"],
        model_args={**common["MODEL_ARGS"], **config["MODEL_ARGS"]},
        env_vars={k: str(v) for k, v in config.get("ENV_VARS", {}).items()},
        metrics=tuple(config.get("METRICS", common["METRICS"])),
        twin=config.get("TWIN"),
    )


def case_names() -> list[str]:
    """Every folder with a ``model_config.yaml``."""
    return sorted(path.parent.name for path in CASES.glob("*/model_config.yaml"))


def read_tensorboard(folder: Path, metrics: tuple[str, ...]) -> Curves:
    """The named scalars of a TensorBoard folder.

    Raises:
        KeyError: a metric was not recorded.
    """
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in metrics}


def run_case(case: Case, folder: Path, real_torchrun: bool = False, **overrides: object) -> Curves:
    """Train the case, writing TensorBoard events to ``folder``, and read them back.

    A case with ``ENV_VARS`` gets a torchrun of its own: most are read when torch is imported.
    """
    start = launch.torchrun if real_torchrun or case.env_vars else launch.run
    argv = case.argv(tensorboard_dir=folder, **overrides)
    start(argv, case.world_size, env=case.env_vars).check()
    return read_tensorboard(folder, case.metrics)


def as_golden(curves: Curves, env_vars: dict[str, str]) -> dict[str, Any]:
    """Curves in the form of ``golden_values.json``, recorded under ``env_vars``."""
    golden: dict[str, Any] = {
        "recorded_with": {
            "cpu": environment.device_name(),
            "machine": platform.machine(),
            "instructions": env_vars or torch.backends.cpu.get_cpu_capability(),
            "versions": environment.versions(),
        }
    }
    for name, curve in curves.items():
        golden[name] = {
            "start_step": min(curve),
            "end_step": max(curve),
            "step_interval": 1,
            "values": {str(step): curve[step] for step in sorted(curve)},
        }
    return golden


def read_golden(path: Path) -> Curves:
    """Curves of a ``golden_values.json``."""
    content = json.loads(path.read_text())
    content.pop("recorded_with")
    return {
        name: {int(step): value for step, value in curve["values"].items()}
        for name, curve in content.items()
    }


def difference(actual: float, expected: float) -> float:
    """Relative difference; infinite where one of the two is not a number."""
    if not (math.isfinite(actual) and math.isfinite(expected)):
        return math.inf
    return abs(actual - expected) / max(abs(expected), 1e-30)


def compare(actual: Curves, expected: Curves, tolerance: float = RELATIVE_TOLERANCE) -> list[str]:
    """What differs by more than ``tolerance`` (relative); empty if the curves agree."""
    problems = []
    for name, curve in expected.items():
        values = actual.get(name, {})
        if values.keys() != curve.keys():
            problems.append(f"{name}: steps {sorted(values)} where {sorted(curve)} are recorded")
            continue
        step = max(curve, key=lambda s: difference(values[s], curve[s]))
        worst = difference(values[step], curve[step])
        if not worst <= tolerance:
            problems.append(
                f"{name}: {values[step]!r} at step {step} where {curve[step]!r} is recorded, "
                f"relative difference {worst:.2e} > {tolerance:.0e}"
            )
    return problems
