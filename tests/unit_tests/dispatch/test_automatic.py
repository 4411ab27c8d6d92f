"""What auto transports are, by topology; what is said of them; and that ranks decide together."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from moe_cases import layer_config
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_echo import collectives, flag_checks
from megatron_echo.dispatch.transports import automatic
from megatron_echo.dispatch.transports.automatic import Topology, Transports, choose, token_bytes
from megatron_echo.environment import Speeds
from megatron_echo.planner import ClonePrice

BF16, FP32 = torch.bfloat16, torch.float32
CPU = Topology(8, has_nccl=False)
LINKED = Topology(8, True, 8, has_peer_memory=True)
UNLINKED = Topology(8, True, 8)
NODES = Topology(16, True, 8, has_peer_memory=True)
NCCL_EP = Topology(16, True, 8, True, ("nccl_ep",))
BOTH = Topology(16, True, 8, True, ("hybrid_ep", "nccl_ep"))
SPREAD = Topology(16, True, 1, True, ("hybrid_ep",))


@pytest.mark.parametrize(
    ("topology", "tokens", "weights", "in_a_graph"),
    [
        (CPU, "all_gather", "p2p", "collective"),
        (LINKED, "symmetric_memory", "symmetric_memory", "symmetric_memory"),
        (UNLINKED, "all_gather", "p2p", "collective"),
        (NODES, "all_gather", "p2p", "collective"),
        (NCCL_EP, "nccl_ep", "p2p", "collective"),
        (BOTH, "hybrid_ep", "p2p", "collective"),
        (SPREAD, "hybrid_ep", "p2p", "collective"),
    ],
)
def test_what_is_chosen(topology: Topology, tokens: str, weights: str, in_a_graph: str) -> None:
    assert choose(topology, topology.ranks, has_graph=False) == (tokens, weights)
    assert choose(topology, topology.ranks, has_graph=True) == (tokens, in_a_graph)


@pytest.mark.parametrize(
    ("topology", "domain", "weights"),
    [
        (CPU, 4, "p2p"), (LINKED, 4, "symmetric_memory"), (UNLINKED, 4, "p2p"),
        (NODES, 8, "symmetric_memory"), (BOTH, 4, "symmetric_memory"), (SPREAD, 8, "p2p"),
        (Topology(32, True, 8, True), 16, "p2p"), (Topology(24, True, 8, True), 6, "p2p"),
    ],
)  # fmt: skip
def test_weights_inside_nodes(topology: Topology, domain: int, weights: str) -> None:
    """By symmetric memory where all of a node's ranks are on one machine that has it."""
    tokens, _ = choose(topology, topology.ranks, has_graph=False)
    in_a_graph = "collective" if weights == "p2p" else weights
    assert choose(topology, domain, has_graph=False) == (tokens, weights)
    assert choose(topology, domain, has_graph=True) == (tokens, in_a_graph)


def test_bytes_of_tokens() -> None:
    """DeepSeek-V3's sizes, 4,096 tokens a rank, eight ranks, both passes; then other settings."""

    def count(way: str, topk: int = 8, **fields: Any) -> int:
        config = layer_config(8, topk, BF16, hidden_size=7168, **fields)
        return token_bytes(way, config, 8, 4096)

    row = 4096 * 7168 * 2
    for way in ("all_gather", "all_to_all", "hybrid_ep", "nccl_ep", "symmetric_memory"):
        assert count(way) == 7 * row * 4
    wide = {"moe_echo_fp32_sums_on_the_wire": True}
    assert count("all_gather", **wide) == 7 * row * 6
    half = {"moe_echo_peer_capacity": 0.5, "moe_echo_token_transport": "all_to_all"}
    assert count("all_to_all", **half) == 7 * row * 2
    assert count("symmetric_memory", topk=2) == 2 * row * 4
    assert count("all_gather", moe_latent_size=1792) == 7 * row
    fp8 = {"moe_echo_expert_precision": "fp8-rowwise", "moe_ffn_hidden_size": 16}
    there = 4096 * (7168 + 16)
    for way in ("all_gather", "all_to_all", "symmetric_memory"):
        assert count(way, **fp8) == 7 * (there + 3 * row)
    assert count("all_gather", **fp8, **wide) == 7 * (there + 6 * row)
    assert count("hybrid_ep", **fp8) == 7 * row * 4


@pytest.fixture
def group() -> Iterator[dist.ProcessGroup]:
    """Eight pretended ranks, of which this is the first."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield dist.group.WORLD
    dist.destroy_process_group()


ONE, TWO = [7] * 8, [7] * 4 + [9] * 4


def pretend(monkeypatch: pytest.MonkeyPatch, others: list[int] | None = None, **found: Any) -> None:
    """GPUs over NCCL; what other ranks have, in the order in which ranks tell each other."""
    for name, value in {"find_hybrid_ep": None, "find_nccl_ep": None, **found}.items():
        if name != "has_peer_memory":
            monkeypatch.setattr(flag_checks, name, lambda value=value: value)
    monkeypatch.setattr(automatic, "has_peer_memory", lambda: found.get("has_peer_memory", True))
    monkeypatch.setattr(automatic, "machine_number", lambda: 7)
    monkeypatch.setattr(dist, "get_backend_config", lambda group: "cuda:nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def highest(values: list[int], *_: Any) -> list[int]:
        return [max(pair) for pair in zip(values, others or [0, 0, 0, *ONE], strict=True)]

    monkeypatch.setattr(automatic, "highest", highest)


@pytest.mark.parametrize(
    ("found", "others", "dtype", "expected"),
    [
        ({}, [0, 1, 1, *ONE], BF16, Topology(8, True, 8, True)),
        ({}, [0, 1, 1, *TWO], BF16, Topology(8, True, 4, True)),
        ({}, [0, 1, 1, *[7, 9, 7, 9, 7, 9, 7, 9]], BF16, Topology(8, True, 1, True)),
        ({}, [0, 1, 1, *[7, 7, 7, 9, 9, 9, 9, 9]], BF16, Topology(8, True, 1, True)),
        ({}, [1, 1, 1, *ONE], BF16, Topology(8, True, 8, False)),
        ({"has_peer_memory": False}, [0, 1, 1, *ONE], BF16, Topology(8, True, 8, False)),
        ({"find_nccl_ep": 1}, [0, 1, 0, *TWO], BF16, Topology(8, True, 4, True, ("nccl_ep",))),
        ({"find_nccl_ep": 1}, [0, 0, 1, *TWO], BF16, Topology(8, True, 4, True)),
        ({"find_hybrid_ep": 1, "find_nccl_ep": 1}, [0, 0, 0, *ONE], BF16,
         Topology(8, True, 8, True, ("hybrid_ep", "nccl_ep"))),
        ({"find_hybrid_ep": 1}, [0, 1, 1, *ONE], FP32, Topology(8, True, 8, True)),
    ],
    ids=["linked", "nodes", "in turn", "unequal", "one lacks links", "this lacks links",
         "an engine", "an engine that one lacks", "two engines", "fp32"],
)  # fmt: skip
def test_ranks_decide_by_what_all_have(
    found: dict[str, Any], others: list[int] | None, dtype: torch.dtype, expected: Topology,
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    pretend(monkeypatch, others, **found)
    assert Topology.of(group, layer_config(8, 2, dtype)) == expected


def test_without_nccl_nothing_is_asked(group: dist.ProcessGroup) -> None:
    """Nor by a word of the flags, nor twice in a model."""
    with mock.patch.object(automatic, "highest", side_effect=AssertionError):
        config = layer_config(8, 2, BF16)
        assert Topology.of(group, config) == Topology(8, has_nccl=False)
        ways = Transports.of(config, config, group)
        assert (ways.tokens, ways.weights) == ("all_gather", "collective")
        assert Transports.of(config, config, group) is ways


def line_of(group: dist.ProcessGroup, slots: int = 4, **fields: Any) -> str:
    config = layer_config(8, 2, BF16, hidden_size=1000, moe_ffn_hidden_size=500, **fields)
    return Transports(config, group).line(1000, slots)


def test_what_is_said(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen, why, the bytes of a layer, and what would be better."""
    text = line_of(group)
    assert text.startswith("tokens by all_gather: at most 56.0 MB a rank and layer; weights of")
    assert (
        "by collective: 336.0 MB, whatever the plan; both passes. Chosen by auto, without NCCL."
        in text
    )
    by_hand = {"moe_echo_token_transport": "all_to_all", "moe_echo_expert_dispatcher_type": "p2p"}
    text = line_of(group, **by_hand)
    assert "by all_to_all: at most 56.0 MB a rank and layer; weights of clones by p2p" in text
    assert text.endswith(": 12.0 MB a clone in use; both passes.")
    assert "clones" not in line_of(group, slots=0, **by_hand)
    for precision, megabytes in (("params-dtype", 12.6), ("fp8-rowwise", 9.4)):
        config = layer_config(8, 2, BF16, hidden_size=1024, moe_ffn_hidden_size=512, **by_hand,
                              moe_echo_expert_precision=precision)  # fmt: skip
        assert f": {megabytes} MB a clone in use" in Transports(config, group).line(1000, 2)
    pretend(monkeypatch)
    assert line_of(group).endswith(
        "Chosen by auto: one machine whose GPUs reach each other's memory."
    )
    pretend(monkeypatch, [1, 1, 1, *TWO])
    assert line_of(group).endswith(
        "several machines, engines found: none. Better: hybrid_ep (DeepEP's branch hybrid-ep), or "
        "nccl_ep (Transformer Engine >= 2.20 with NCCL EP and NCCL >= 2.30.4)."
    )
    pretend(monkeypatch, [1, 0, 1, *TWO], find_hybrid_ep=1)
    assert line_of(group).endswith("several machines, engines found: hybrid_ep.")
    pretend(monkeypatch, has_peer_memory=False)
    assert "Chosen by auto: one machine without peer memory" in line_of(group)


def test_clones_within_nodes(group: dist.ProcessGroup) -> None:
    """An exchange is of a node's ranks alone, and is said to be."""
    nodes = {"moe_echo_ranks_per_node": 2, "moe_echo_clones_within_node": True}
    assert "by collective: 48.0 MB, whatever the plan, inside nodes; both" in line_of(
        group, **nodes
    )
    text = line_of(group, **nodes, moe_echo_expert_dispatcher_type="p2p")
    assert "by p2p: 12.0 MB a clone in use, inside nodes; both passes." in text


@pytest.mark.parametrize(
    ("fields", "machines", "node"),
    [
        ({}, TWO, 4),
        ({"moe_received_token_capacity": 2.5}, TWO, 4),
        ({"cuda_graph_impl": "full_iteration", "moe_echo_token_transport": "all_to_all"}, TWO, 4),
        ({}, ONE, None),
        ({}, [7, 7, 7, 9, 9, 9, 9, 9], None),
        ({"moe_received_token_capacity": 1.5}, TWO, None),
        ({"moe_echo_ranks_per_node": 4}, TWO, None),
        ({"moe_echo_expert_dispatcher_type": "p2p"}, TWO, None),
        ({"moe_num_echo_experts": 0}, TWO, None),
    ],
)
def test_auto_keeps_clones_inside_nodes(
    fields: dict[str, Any], machines: list[int], node: int | None, group: dist.ProcessGroup,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where no flag is about nodes or the buffer; it sets the flags and says so."""
    pretend(monkeypatch, [0, 1, 1, *machines])
    settings = {"moe_num_echo_experts": 8, **fields}
    config = layer_config(8, 2, BF16, hidden_size=1000, moe_ffn_hidden_size=500, **settings)
    before = config.moe_echo_ranks_per_node
    ways = Transports(config, group)
    text = ways.line(1000, 1)
    if node is None:
        assert (config.moe_echo_ranks_per_node, config.moe_echo_clones_within_node) == (
            before, False,
        )  # fmt: skip
        assert ways.clone_group is group
        assert "So clones" not in text
        return
    assert (config.moe_echo_ranks_per_node, config.moe_echo_clones_within_node) == (node, True)
    assert dist.get_process_group_ranks(ways.clone_group) == list(range(node))
    assert ways.weights == "symmetric_memory"
    assert ways.decided == {
        "moe_echo_token_transport": ways.tokens,
        "moe_echo_expert_dispatcher_type": "symmetric_memory",
        "moe_echo_ranks_per_node": 4,
        "moe_echo_clones_within_node": True,
    }
    assert "clones by symmetric_memory: 12.0 MB a clone in use, inside nodes; both" in text
    assert (
        "So clones stay among the 4 ranks of a node, as with --moe-echo-clones-within-node; "
        "--moe-echo-ranks-per-node alone lets them leave." in text
    )


def test_a_job_whose_groups_are_split(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bound to a device, new groups split a communicator, for which all of its ranks must come."""
    split = mock.Mock()
    monkeypatch.setattr(dist, "split_group", split)
    monkeypatch.setattr(collectives, "_bound_device", lambda: 0)
    assert collectives.part_of(group, 4) is split.return_value
    split.assert_called_once_with(group, [[0, 1, 2, 3], [4, 5, 6, 7]], None)


@pytest.mark.parametrize("device", [None, 0], ids=["made", "split off"])
def test_a_part_has_the_timeout_of_its_group(
    device: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--distributed-timeout-minutes``, which Megatron gives to the expert-parallel group."""
    options = FakeProcessGroup.Options()
    options._timeout = timedelta(minutes=7)
    dist.init_process_group(
        "fake", store=FakeStore(), rank=0, world_size=8, timeout=options._timeout,
        pg_options=options,
    )  # fmt: skip
    made, split = mock.Mock(), mock.Mock()
    monkeypatch.setattr(dist, "new_group", made)
    monkeypatch.setattr(dist, "split_group", split)
    monkeypatch.setattr(collectives, "_bound_device", lambda: device)
    collectives.part_of(dist.group.WORLD, 4)
    (call,) = made.call_args_list + split.call_args_list
    assert timedelta(minutes=7) in call.args
    dist.destroy_process_group()


def price_of(group: dist.ProcessGroup, **fields: Any) -> ClonePrice | None:
    config = layer_config(8, 2, BF16, hidden_size=1000, moe_ffn_hidden_size=500, **fields)
    return Transports(config, group).price


def test_the_price_of_a_clone(group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the layer's sizes and the device's speeds; the highest that a rank finds."""
    gpu = {"moe_echo_tolerance": None, "moe_echo_expert_dispatcher_type": "p2p"}
    monkeypatch.setattr(automatic, "device_speeds", lambda: Speeds(100e12, 400e9, 50e9))
    assert price_of(group) is None
    price = price_of(group, **gpu)
    assert price is not None
    # A clone of 1.5 M elements moves 12 MB, a row is 9 MFLOP, 90 ns.
    assert (price.inside, price.across) == (round(30e3 / 90), round(240e3 / 90))
    assert price.row_seconds == pytest.approx(90e-9)
    assert "A clone pays from 333 rows on." in line_of(group, **gpu)
    # By engines and peers a row travels, four times 2,000 bytes of 7 in 8 rows: 17.5 ns more.
    tokens = {"moe_echo_token_transport": "symmetric_memory"}
    price = price_of(group, **gpu, **tokens)
    assert price is not None
    assert price.inside == round(30e3 / 107.5)
    assert price_of(group, moe_echo_tolerance=None).inside == 0  # by collective, all the same
    given = price_of(group, **gpu, moe_echo_rows_per_clone=70)
    assert (given.inside, given.across) == (70, 560)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # two machines of which nobody told the planner
    assert price_of(group, **gpu).inside == price_of(group, **gpu).across == 2667
    nodes = {**gpu, "moe_echo_ranks_per_node": 4}
    assert price_of(group, **nodes).inside == 333
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    monkeypatch.setattr(automatic, "highest", lambda values, *_: [value + 1 for value in values])
    assert price_of(group, **nodes).inside == 334


def test_the_price_of_a_clone_in_fp8(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products are twice as fast, weights and one row of four travel in half the bytes."""
    fp8 = {
        "moe_echo_tolerance": None, "moe_echo_expert_dispatcher_type": "p2p", "bf16": True,
        "moe_echo_expert_precision": "fp8-rowwise",
    }  # fmt: skip
    sizes = {"hidden_size": 1024, "moe_ffn_hidden_size": 512}

    def price(**fields: Any) -> ClonePrice:
        price = Transports(layer_config(8, 2, BF16, **sizes, **fp8, **fields), group).price
        assert price is not None
        return price

    monkeypatch.setattr(automatic, "device_speeds", lambda: Speeds(100e12, 400e9, 50e9, 2.0))
    # Of 3 x 1024 x 512 elements: one byte each twice, and four of the gradient; a row 6 operations.
    clone, row = 1572864 * 6, 1572864 * 6 / 200e12
    assert price().row_seconds == pytest.approx(row)
    assert (price().inside, price().across) == (round(clone / 400e9 / row), 4000)
    # There in 1,024 + 16 bytes; back, and both ways in backward, in 2,048. 7 of 8 rows travel.
    by_plan = price(moe_echo_token_transport="symmetric_memory")
    assert by_plan.row_seconds == pytest.approx(row + 7 / 8 * (1040 + 3 * 2048) / 400e9)
    cpu = Speeds(100e12, 400e9, 50e9, 1.0)  # its reference multiplies in fp32
    monkeypatch.setattr(automatic, "device_speeds", lambda: cpu)
    assert price().row_seconds == pytest.approx(2 * row)


def test_it_is_said_once(
    group: dist.ProcessGroup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the first rank, and of ranks that are there."""
    config = layer_config(8, 2, BF16)
    Transports(config, group).announce(10, 0)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(dist, "get_backend", lambda group: "gloo")
    ways = Transports(config, group)
    ways.announce(10, 0)
    ways.announce(10, 0)
    assert capsys.readouterr().out == f"[megatron_echo] {ways.line(10, 0)}\n"
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    Transports(config, group).announce(10, 0)
    assert capsys.readouterr().out == ""
