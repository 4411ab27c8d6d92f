"""``--moe-echo-tolerance auto``, by the simulator's figures: clones only where they win."""

import numpy as np
import pytest

from megatron_echo.observe import simulate
from megatron_echo.observe.simulation.cost_model import Costs, clone_price
from megatron_echo.observe.simulation.inputs import CLUSTERS, MODELS
from megatron_echo.observe.simulation.layout import Layout, Run, Work
from megatron_echo.observe.simulation.output import megatron_flags
from megatron_echo.observe.simulation.placement import Placement, place
from megatron_echo.observe.simulation.search import candidates
from megatron_echo.observe.simulation.workloads import PUBLISHED, WORKLOADS, load_workload

MOST = 1.02


@pytest.mark.parametrize(
    ("model", "ranks", "slots", "tokens", "calls"),
    [
        ("deepseek-v3", 8, 6, 4096, 1),
        pytest.param("deepseek-v3", 8, 32, 4096, 3, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", 8, 6, 512, 3, marks=pytest.mark.slow),
        pytest.param("qwen3-30b-a3b", 8, 4, 4096, 3, marks=pytest.mark.slow),
        pytest.param("deepseek-v3", 64, 2, 4096, 2, marks=pytest.mark.slow),
    ],
)
def test_it_is_never_slower_than_the_better_of_no_clones_and_balance(
    model: str, ranks: int, slots: int, tokens: int, calls: int
) -> None:
    """In no layer call by more than 2 %, on the workloads and the published skews.

    Without clones, the layer still plans: what that costs is in all three.
    """
    run = Run(CLUSTERS["h100-nvl8"], MODELS[model], Work(tokens, 1, 512))
    way = "symmetric_memory" if ranks <= 8 else "hybrid_ep"
    layout = Layout(64, ranks, tokens_by=way, weights_by="p2p")
    node = run.cluster.ranks_per_node(ranks)
    price = clone_price(run, ranks, way, by_node=False)

    def seconds(placed: Placement) -> np.ndarray:
        return np.sum(Costs(run, layout, placed).calls, axis=0)

    none, fewer = 0, 0
    for name in (*WORKLOADS, *PUBLISHED):
        layer_calls = [(layer, 0) for layer in range(calls)]
        counts = load_workload(name).draw(
            ranks, run.model.experts, run.model.topk, tokens, layer_calls
        )
        auto = place(counts, slots, None, node, price=price)
        exact, plain = place(counts, slots, 0.0, node), place(counts, 0, 0.0, node)
        better = np.minimum(seconds(exact), seconds(plain))
        assert (seconds(auto) <= MOST * better).all(), (name, seconds(auto) / better)
        none += int((auto.clones == 0).sum())
        fewer += int((auto.clones < exact.clones).sum())
    assert fewer > len(WORKLOADS) * calls // 2
    if tokens == 512:
        assert none > len(WORKLOADS), "few rows are not worth a clone of this size"


def test_it_is_a_row_of_the_simulator(capsys: pytest.CaptureFixture[str]) -> None:
    """With the flags that start it."""
    words = (
        "--model qwen3-30b-a3b --gpus 8 --ep 8 --pp 1 --vpp 1 --offload-fraction 0 --calls 2 "
        "--tolerance 0 auto --slots 2 --token-transports symmetric_memory all_gather "
    )
    simulate.main(words.split())
    assert "ECHO S=2, auto" in capsys.readouterr().out
    search = simulate.search_of(simulate.parser().parse_args(words.split()))
    auto = [one for one in candidates(search)[0] if one.name == "ECHO S=2, auto"]
    assert {one.layout.tokens_by for one in auto} == {"symmetric_memory", "all_gather"}
    for one in auto:
        assert one.placed.tolerance is None
        assert "--moe-echo-tolerance auto" in " ".join(megatron_flags(search.run, one))
    with pytest.raises(SystemExit):
        simulate.main(["--tolerance", "most"])
