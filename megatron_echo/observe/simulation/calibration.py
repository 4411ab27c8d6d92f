"""What the cost model says of runs that were measured: CPU step times at EP=2.

Of a layer call without clones it says ``a x 18 H F rows + b x H rows`` of the fullest rank; a and
b come from the balanced layers of ``moe_layer.json``. With clones a call takes a constant more,
for planning and the exchange of weights; it comes from training runs, and each run is predicted
with the constant of the *others*. Nothing of this carries over to a GPU but the form.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LAYERS = {
    "Mixtral-8x7B / 8": (512, 1792, 1024),
    "Qwen3-30B-A3B / 8": (256, 96, 4096),
    "DeepSeek-V3 / 8": (896, 256, 2048),
}
"""H, F and rows of a rank in the benchmark of layers."""

JOB_LAYERS, JOB_HIDDEN, JOB_FFN, JOB_ROWS = 4, 128, 128, 4096
"""Layer calls of a step, H, F and rows of a rank in the training runs at EP=2."""

OVERLOADS = {"natural": (1.058, 1.018), "skew 1.0": (1.611, 1.020)}
"""Max/mean of the training runs of ``moe_layer.json``, before and after planning: means over
iterations 5 to 24 of runs with the same flags and seed (the file itself does not have them)."""


@dataclass(frozen=True)
class Check:
    """One figure, measured and predicted.

    Attributes:
        name: what it is of.
        measured: milliseconds, or a ratio of step times.
        predicted: by constants that do not come from this figure.
    """

    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Calibration:
    """The constants and how well they predict.

    Attributes:
        gflops: rate of products of one rank, 10^9 a second.
        row_ns: nanoseconds for each element ``H x rows``: copies and exchange of tokens.
        clone_ms: what clones add to a layer call, None if no run tells.
        checks: figures against measured ones.
        notes: what is missing.
    """

    gflops: float
    row_ns: float
    clone_ms: float | None
    checks: tuple[Check, ...]
    notes: tuple[str, ...]


def _features(hidden: int, ffn: int, rows: float) -> tuple[float, float]:
    """GFLOP and millions of elements of a layer call."""
    return 18e-9 * hidden * ffn * rows, 1e-6 * hidden * rows


def _fit(points: list[tuple[tuple[float, float], float]]) -> np.ndarray:
    """Milliseconds for each GFLOP and million elements, with least relative error."""
    matrix = np.array([features for features, _ in points])
    times = np.array([milliseconds for _, milliseconds in points])
    scaled = matrix / times[:, None]
    constants = np.linalg.lstsq(scaled, np.ones(len(points)), rcond=None)[0]
    return np.maximum(constants, 1e-9)


@dataclass(frozen=True)
class _Pair:
    """A run with clones over the same without: milliseconds, and max/mean before and after."""

    name: str
    without: float
    ratio: float
    routed: float
    placed: float


def calibrate(results: Path) -> Calibration:
    """Read the benchmarks' results.

    Args:
        results: folder with ``moe_layer.json`` and, if it was made, ``echo.json``.

    Raises:
        ValueError: no ``moe_layer.json`` of a CPU, or one that is damaged.
    """
    try:
        measured = json.loads((results / "moe_layer.json").read_text())
        layers = {
            name: (_features(*sizes), float(measured[f"{name}, balanced"]["ours ms"]))
            for name, sizes in LAYERS.items()
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{results} has no CPU results of benchmarks/moe_layer.py ({error}). Run it there."
        ) from error
    constants = _fit(list(layers.values()))
    checks = []
    for name, (features, milliseconds) in layers.items():
        others = _fit([point for other, point in layers.items() if other != name])
        checks.append(Check(f"{name}, ms", milliseconds, float(others @ np.array(features))))
    more, notes = _pairs(results)
    pairs = [*_pairs_of_layers(measured), *more]
    extra = [_extra(pair, constants) for pair in pairs]
    for number, pair in enumerate(pairs):
        rest = extra[:number] + extra[number + 1 :]
        if rest:
            added = JOB_LAYERS * (statistics.fmean(rest) - _gain(pair, constants))
            checks.append(Check(pair.name, pair.ratio, 1 + added / pair.without))
    return Calibration(
        gflops=1e3 / float(constants[0]),
        row_ns=float(constants[1]),
        clone_ms=statistics.fmean(extra) if extra else None,
        checks=tuple(checks),
        notes=tuple(notes),
    )


def _gain(pair: _Pair, constants: np.ndarray) -> float:
    """Milliseconds that balance takes off a layer call."""
    features = np.array(_features(JOB_HIDDEN, JOB_FFN, JOB_ROWS))
    return float(constants @ features) * (pair.routed - pair.placed)


def _extra(pair: _Pair, constants: np.ndarray) -> float:
    """Milliseconds that clones added to a layer call of a measured run."""
    return (pair.ratio - 1) * pair.without / JOB_LAYERS + _gain(pair, constants)


def _pairs_of_layers(measured: dict[str, Any]) -> list[_Pair]:
    """The training runs of ``moe_layer.json``: all are relative to stock or to no clones."""
    run = "training run, main job"
    on, off = f"{run}, natural, ours with clones", f"{run}, natural"
    skewed = f"{run}, skew 1.0, clones (ours) against none (stock)"
    found = []
    if on in measured and off in measured:
        ratio = measured[on]["time ratio"] / measured[off]["time ratio"]
        without = measured[on]["stock ms"] * measured[off]["time ratio"]
        name = "clones / no clones, natural, moe_layer.json"
        found.append(_Pair(name, without, ratio, *OVERLOADS["natural"]))
    if skewed in measured:
        row = measured[skewed]
        name = "clones / no clones, skew 1.0, moe_layer.json"
        found.append(_Pair(name, row["stock ms"], row["time ratio"], *OVERLOADS["skew 1.0"]))
    return found


def _pairs(results: Path) -> tuple[list[_Pair], list[str]]:
    try:
        record = json.loads((results / "echo.json").read_text())
        pairs = [
            pair
            for result in record["results"]
            if result["ranks"] == 2
            for pair in _pairs_of(result)
        ]
    except FileNotFoundError:
        return [], [
            f"{results} has no echo.json (benchmarks/echo.py makes it): fewer step times with "
            "clones are checked."
        ]
    except (KeyError, TypeError, ValueError) as error:
        return [], [f"echo.json cannot be read ({error}): its step times are not checked."]
    return pairs, []


def _pairs_of(result: dict[str, Any]) -> list[_Pair]:
    """The runs with clones over those without, at skew 0 and 1."""
    found = []
    for skew in ("natural", "skew 1.0"):
        on, off = f"clones, {skew}", f"no clones, {skew}"
        balance, seconds = result["balance"][on], result["seconds"]
        ratio = _ratio(result.get("ratios", {}), on, off) or seconds[on] / seconds[off]
        routed, placed = balance["overload_routed"], balance["overload_placed"]
        found.append(
            _Pair(
                f"clones / no clones, {skew}, echo.json", seconds[off] * 1e3, ratio, routed, placed
            )
        )
    return found


def _ratio(ratios: dict[str, float], on: str, off: str) -> float | None:
    """Of two runs by the rounds' own ratios, whose turns share the machine's load.

    Their median, or that of each over stock, or None.
    """
    if (direct := ratios.get(f"{on} / {off}")) is not None:
        return direct
    stock = [ratios[name] for run in (on, off) if (name := f"{run} / stock, natural") in ratios]
    return stock[0] / stock[1] if len(stock) == 2 else None
