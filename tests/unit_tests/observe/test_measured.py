"""The form of the simulator's cost of a layer call, against CPU step times at EP=2.

Without clones a call takes ``a x GFLOP of the fullest rank + b x elements of its rows``; a and b
come from the balanced layers of ``moe_layer.json``. With clones it takes a constant more, for
planning and the exchange of weights, by ``collective`` in ``moe_layer.json`` and by ``p2p`` in
``echo.json``. Each figure is predicted with the constants of the *others*.
Nothing of this carries over to a GPU but the form.
"""

import json
import statistics

import launch
import numpy as np
import pytest

from megatron_echo.observe.simulation.cost_model import Costs
from megatron_echo.observe.simulation.inputs import Cluster, Model
from megatron_echo.observe.simulation.layout import Layout, Run, Work
from megatron_echo.observe.simulation.placement import place

RESULTS = launch.ROOT / "benchmarks" / "results"
LAYERS = {
    "Mixtral-8x7B / 8": (512, 1792, 1024),
    "Qwen3-30B-A3B / 8": (256, 96, 4096),
    "DeepSeek-V3 / 8": (896, 256, 2048),
}
"""H, F and rows of a rank in the benchmark of layers."""
CALLS, JOB = 4, (128, 128, 4096)
"""Layer calls of a step, and the same of the training runs."""
OVERLOADS = {"natural": (1.058, 1.018), "skew 1.0": (1.611, 1.020)}
"""Max/mean of the training runs of ``moe_layer.json``, before and after planning: means over
iterations 5 to 24 of runs with the same flags and seed (the file itself does not have them)."""


def features(hidden: int, ffn: int, rows: int) -> np.ndarray:
    """GFLOP of a layer call as the simulator counts them, and millions of elements of its rows."""
    cluster = Cluster("1 TFLOP/s", 2, 2, 1, 1, 1, 1, 1, efficiency=1)
    model = Model("layer", 1, hidden, 1, 1, 1, 1, 1, ffn, experts=2, topk=1)
    placed = place(np.full((1, 2, 2), rows // 2), 0, 0.0, 2)
    costs = Costs(Run(cluster, model, Work(rows, 1, 2)), Layout(2, 2), placed)
    return np.array([1e3 * costs.calls[0].item(), 1e-6 * hidden * rows])


def fit(layers: dict[str, float]) -> np.ndarray:
    """Milliseconds for each GFLOP and million elements, with least relative error."""
    scaled = [features(*LAYERS[name]) / milliseconds for name, milliseconds in layers.items()]
    return np.linalg.lstsq(np.array(scaled), np.ones(len(scaled)), rcond=None)[0]


def measured_layers() -> dict[str, float]:
    """Milliseconds of the balanced layers."""
    found = json.loads((RESULTS / "moe_layer.json").read_text())
    return {name: found[f"{name}, balanced"]["ours ms"] for name in LAYERS}


def measured_pairs() -> dict[str, tuple[float, float, float, float]]:
    """Step without clones in ms, ratio of the one with, max/mean before and after, at EP=2."""
    layers = json.loads((RESULTS / "moe_layer.json").read_text())
    run = "training run, main job"
    off, on = layers[f"{run}, natural"], layers[f"{run}, natural, ours with clones"]
    skewed = layers[f"{run}, skew 1.0, clones (ours) against none (stock)"]
    pairs = {
        "natural, moe_layer.json": (
            on["stock ms"] * off["time ratio"],
            on["time ratio"] / off["time ratio"],
            *OVERLOADS["natural"],
        ),
        "skew 1.0, moe_layer.json": (
            skewed["stock ms"],
            skewed["time ratio"],
            *OVERLOADS["skew 1.0"],
        ),
    }
    (echo,) = (r for r in json.loads((RESULTS / "echo.json").read_text())["results"]
               if r["ranks"] == 2)  # fmt: skip
    stock, direct = echo["ratios"], "clones, skew 1.0 / no clones, skew 1.0"
    ratios = {  # of rounds, whose turns share the machine's load
        "natural": stock["clones, natural / stock, natural"]
        / stock["no clones, natural / stock, natural"],
        "skew 1.0": stock[direct],
    }
    for skew, ratio in ratios.items():
        balance = echo["balance"][f"clones, {skew}"]
        pairs[f"{skew}, echo.json"] = (
            echo["seconds"][f"no clones, {skew}"] * 1e3,
            ratio,
            balance["overload_routed"],
            balance["overload_placed"],
        )
    return pairs


def predicted_ratios(
    layers: dict[str, float], pairs: dict[str, tuple[float, float, float, float]]
) -> dict[str, float]:
    """Steps with clones over those without, each by what clones took in the other runs."""
    call = float(fit(layers) @ features(*JOB))
    gain = {name: call * (before - after) for name, (_, _, before, after) in pairs.items()}
    extra = {
        name: (ratio - 1) * step / CALLS + gain[name] for name, (step, ratio, _, _) in pairs.items()
    }
    found = {}
    for name, (step, *_) in pairs.items():
        others = statistics.fmean(value for other, value in extra.items() if other != name)
        found[name] = 1 + CALLS * (others - gain[name]) / step
    return found


def test_layers_that_the_fit_has_not_seen() -> None:
    layers = measured_layers()
    errors = {}
    for name, milliseconds in layers.items():
        others = fit({other: ms for other, ms in layers.items() if other != name})
        errors[name] = float(others @ features(*LAYERS[name])) / milliseconds - 1
    assert errors == pytest.approx(dict(zip(LAYERS, (-0.27, -0.20, 0.13))), abs=0.005)


def test_steps_with_clones() -> None:
    pairs = measured_pairs()
    predicted = predicted_ratios(measured_layers(), pairs)
    for name, (_, ratio, _, _) in pairs.items():
        assert predicted[name] == pytest.approx(ratio, rel=0.15), name
    assert predicted["natural, echo.json"] == pytest.approx(1.040, abs=5e-4)
    assert predicted["skew 1.0, echo.json"] == pytest.approx(1.035, abs=5e-4)
    assert pairs["natural, echo.json"][1] == pytest.approx(0.992, abs=5e-4)
    assert pairs["skew 1.0, echo.json"][1] == pytest.approx(0.970, abs=5e-4)


def test_known_constants_come_back() -> None:
    """Of made-up results every prediction is exact."""
    constants = np.array([20.0, 60.0])
    layers = {name: float(constants @ features(*sizes)) for name, sizes in LAYERS.items()}
    assert fit(layers) == pytest.approx(constants)
    call, pairs = float(constants @ features(*JOB)), {}
    for name, before in (("a", 1.2), ("b", 1.5)):
        without, clones = 300 + CALLS * call * before, 300 + CALLS * (call * 1.01 + 7)
        pairs[name] = (without, clones / without, before, 1.01)
    predicted = predicted_ratios(layers, pairs)
    assert predicted == pytest.approx({name: pair[1] for name, pair in pairs.items()})
