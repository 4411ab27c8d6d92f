"""The counts of ``benchmarks/traffic.py``: against sizes worked out by hand, and its command."""

import sys

import launch
import pytest
import torch

sys.path.insert(0, str(launch.ROOT / "benchmarks"))

import kept_bytes
import traffic

from megatron_echo.planner import auto_slots

SHAPE = traffic.Shape(hidden=64, ffn=32, experts=16, topk=2)
LARGE = ("DeepSeek-V3", "Qwen3-235B-A22B", "Mixtral-8x7B")
RANKS, ROW = 8, 64 * 2  # bytes of a token in bf16


@pytest.fixture(scope="module", autouse=True)
def _ranks():  # type: ignore[no-untyped-def]
    with traffic.pretended_ranks(RANKS):
        yield


def count(wire: str, slots: int = 0, weights: str = "collective") -> dict:
    return traffic.count_layer(SHAPE, RANKS, slots, wire, weights)[1]


def test_necessary_bytes() -> None:
    """By a loop over the tokens of a routing without clones."""
    chosen = traffic.choices(SHAPE, RANKS)
    visits = sum(
        len({expert // 2 for expert in token.tolist()} - {rank})
        for rank, experts in enumerate(chosen)
        for token in experts[:200]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(traffic, "TOKENS", 200)
        patch.setattr(traffic, "choices", lambda *_: chosen[:, :200])
        drawn = traffic.routing.__wrapped__(SHAPE, RANKS, 0)
    assert drawn.visits == visits / RANKS
    assert drawn.necessary(SHAPE) == visits / RANKS * ROW * 4
    assert drawn.node_visits == drawn.clones == 0


def test_bytes_of_all_to_all() -> None:
    """A place for each token at each other rank, four times; ids and probabilities beside it."""
    counted = count("all_to_all")
    tokens = (RANKS - 1) * traffic.TOKENS
    assert tokens * ROW * 4 <= counted["link"] <= tokens * (ROW * 4 + 2 * (3 * 4 + 4))


def test_symmetric_memory_sends_what_is_necessary() -> None:
    """Beside it 24 bytes of a pair: probabilities, their gradients, and who leads (K = 2)."""
    drawn = traffic.routing(SHAPE, RANKS, 2)
    assert 0 < drawn.clones < 2
    counted = count("symmetric_memory", 2, "symmetric_memory")["link"]
    beside = drawn.away * (4 + 4 + 3 * 8)
    assert counted == pytest.approx(drawn.necessary(SHAPE) + beside, rel=0.02)


@pytest.mark.parametrize("wire", traffic.WIRES)
def test_tokens_travel_in_half_the_bytes_to_experts_in_fp8(wire: str) -> None:
    """H + 16 bytes in place of 2 H, in the one of four movements that FP8 can make."""
    drawn = traffic.routing(SHAPE, RANKS, 0)
    copies = drawn.visits if wire == "symmetric_memory" else (RANKS - 1) * traffic.TOKENS
    plain, packed = (
        traffic.count_layer(SHAPE, RANKS, 0, f"{wire}{words}", "collective")
        for words in ("", ", FP8")
    )
    for before, after in zip(plain, packed, strict=True):  # forward, and both passes
        saved = before["link"] - after["link"]
        assert saved == pytest.approx(copies * (ROW - SHAPE.hidden - 16), rel=1e-6)
        assert after["host_reads"] == 0


def test_slots_that_are_not_used_cost_nothing() -> None:
    """With symmetric memory; and with collectives no operators."""
    few, many = (count("symmetric_memory", slots, "symmetric_memory") for slots in (1, 2))
    assert many["operators"] == few["operators"]
    assert many["memory"] == pytest.approx(few["memory"], rel=0.05)
    few, many = (count("all_gather", slots, "collective") for slots in (1, 2))
    assert many["collectives"] == few["collectives"]


NODE, OF_NODES = 4, traffic.Shape(hidden=128, ffn=32, experts=16, topk=2)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four ranks each; no other test has this shape."""
    monkeypatch.setattr(traffic, "RANKS_PER_NODE", NODE)


def test_bytes_between_nodes(nodes: None) -> None:
    """Of tokens to each rank there; of clones inside nodes none, by any transport of weights."""

    def between(wire: str, slots: int, weights: str) -> float:
        counted = traffic.count_layer(OF_NODES, RANKS, slots, wire, weights)[1]
        assert counted["between"] < counted["link"]
        return counted["between"]

    without = between("all_gather", 0, "collective")
    tokens = NODE * traffic.TOKENS
    row = OF_NODES.hidden * 2
    assert tokens * row * 4 <= without <= tokens * (row * 4 + 2 * (3 * 4 + 4))
    counts = NODE * OF_NODES.experts * 8
    inside = traffic.routing(OF_NODES, RANKS, 2, in_nodes=True)
    assert inside.clones > 0 == inside.node_clones
    for weights in traffic.WEIGHTS:
        assert between("all_gather", 2, f"{weights}{traffic.IN_NODES}") == without + counts
    drawn = traffic.routing(OF_NODES, RANKS, 2)
    assert drawn.node_clones > 0
    crossing = between("all_gather", 2, "symmetric_memory") - without - counts
    assert crossing == pytest.approx(drawn.node_clones * OF_NODES.expert_elements * 2 * 3)


def test_bytes_of_hybrid_ep(nodes: None) -> None:
    """A token once to a node, four times; beside it probabilities and the gathered routing."""
    slots, in_nodes = 1, f"symmetric_memory{traffic.IN_NODES}"
    drawn = traffic.routing(OF_NODES, RANKS, slots, in_nodes=True)
    counted = traffic.count_layer(OF_NODES, RANKS, slots, "hybrid_ep", in_nodes)[1]
    experts = OF_NODES.experts + RANKS * slots
    routing, counts = NODE * traffic.TOKENS * experts, NODE * OF_NODES.experts * 8
    probs = 2 * 4 * experts // 2  # there and their gradients back, of a node
    sent = OF_NODES.hidden * 2 * 4 + probs
    assert counted["between"] == pytest.approx(drawn.node_visits * sent + routing + counts)
    hops = drawn.node_visits + drawn.forwarded + drawn.visits - drawn.far_visits
    assert drawn.visits <= hops
    weights = drawn.clones * OF_NODES.expert_elements * 2 * 3
    gathered = (routing + counts) * (RANKS - 1) / NODE
    assert counted["link"] == pytest.approx(hops * sent + gathered + weights)
    assert counted["host_reads"] == 0


def test_bytes_of_nccl_ep(nodes: None) -> None:
    """Between nodes as HybridEP; inside them a token once for each expert, its own pairs too."""
    in_nodes = f"symmetric_memory{traffic.IN_NODES}"
    drawn = traffic.routing(OF_NODES, RANKS, 2, in_nodes=True)
    hybrid, counted = (
        traffic.count_layer(OF_NODES, RANKS, 2, way, in_nodes)[1]
        for way in ("hybrid_ep", "nccl_ep")
    )
    pairs = traffic.TOKENS * OF_NODES.topk
    assert drawn.forwarded <= drawn.forwarded_pairs < drawn.far_away < drawn.away < pairs
    more = drawn.away - drawn.far_away + drawn.forwarded_pairs
    more -= drawn.visits - drawn.far_visits + drawn.forwarded
    probs = 2 * 4 * (OF_NODES.experts + RANKS * 2) // 2
    sent = OF_NODES.hidden * 2 * 4 + probs
    assert counted["link"] - hybrid["link"] == pytest.approx(more * sent)
    assert counted["between"] == pytest.approx(hybrid["between"])
    assert counted["host_reads"] == 0


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer keeps does not depend on the routing."""

    def nothing(shape: traffic.Shape, ranks: int, slots: int, *_: bool) -> traffic.Routing:
        return traffic.Routing([[-1] * slots] * ranks, 0, 0, 0, 0, 0, 0)

    monkeypatch.setattr(traffic, "routing", nothing)


def test_kept_bytes(undrawn: None) -> None:
    """Rows of the experts' input and first product, and in Megatron of the activation; maps."""
    pairs, maps = traffic.TOKENS * SHAPE.topk, 4 * 4 * RANKS * traffic.TOKENS * SHAPE.topk
    ours = kept_bytes.kept(SHAPE, RANKS, 1, "all_gather")
    rows = round(1.25 * pairs) * (SHAPE.hidden + 2 * SHAPE.ffn) * 2
    assert rows < ours < rows + maps
    stock = kept_bytes.kept(SHAPE, RANKS, 0, "Megatron allgather")
    rows = pairs * (SHAPE.hidden + 3 * SHAPE.ffn) * 2
    assert rows < stock < rows + maps


@pytest.mark.parametrize(
    "model",
    [
        "Qwen3-30B-A3B",
        "GPT-OSS-120B",
        *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE),
    ],
)
def test_a_layer_keeps_no_more_than_megatron(model: str, undrawn: None) -> None:
    """At the model's widths and the default capacity, within a tenth; counted."""
    shape = kept_bytes.MODELS[model]
    stock = min(kept_bytes.kept(shape, RANKS, 0, wire) for wire in kept_bytes.DISPATCHERS)
    slots = auto_slots(RANKS, shape.experts)
    for wire in traffic.WIRES:
        assert kept_bytes.kept(shape, RANKS, slots, wire) <= 1.1 * stock


def test_operators_of_megatron_are_counted_with_its_host_reads() -> None:
    for wire, reads in (("Megatron alltoall", 5), ("Megatron allgather", 2)):
        counted = count(wire)
        assert counted["host_reads"] == reads
        assert counted["collectives"] == 7
        assert 40 < counted["operators"] < 80


@pytest.mark.parametrize("wire", kept_bytes.DISPATCHERS)
def test_a_row_does_not_depend_on_those_before_it(wire: str) -> None:
    """Megatron gathers into a buffer of the process, which a larger layer leaves larger."""
    wide = traffic.Shape(hidden=4 * SHAPE.hidden, ffn=32, experts=16, topk=2)
    first = count(wire)
    traffic.count_layer(wide, RANKS, 0, wire, "collective")
    assert count(wire) == first


def test_an_operator_reads_and_writes_once() -> None:
    from traffic_counter import Counter, Facts

    with Counter(Facts(1, 4, 0, 4, 0, 0)) as counter:
        left, right = torch.ones(8, 4), torch.ones(1, 4)
        counter.reset()
        total = left + right.expand(8, 4)
        total[2:4].view(-1)
        total.index_select(0, torch.zeros(2, dtype=torch.int64))
    assert counter.count.operators == 3  # the index is one
    assert counter.count.memory == (32 + 4 + 32) * 4 + 2 * 8 + (2 * 8 * 4 + 2 * 8)
