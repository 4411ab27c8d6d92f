"""What one MoE layer sends and touches, counted: forward and backward, by transport and slots.

    python benchmarks/traffic.py [--output benchmarks/results/traffic] [--quick]

The real layer runs on fake tensors, one rank of a pretended group; see ``traffic_counter.py``.
Routing is drawn (experts wanted by a lognormal of spread 1.0) and planned by the real planner. Each
figure is of a mean rank. *Necessary*: each token once to each rank that computes it, in bf16, there
and back in both passes; each clone's weights twice, its gradient once, in bf16. Megatron's own
dispatchers have this package's experts, so that the dispatchers compare. *FP8*: experts compute in
it, in a microbatch that finds its weights quantised. *Between*: of the bytes over links, those to
ranks of other nodes, of 8 ranks each; necessary is each token once to each other node, and clones
from there. *In nodes*: clones stay in theirs, and weights are exchanged there. ``hybrid_ep`` and
``nccl_ep`` are counted by what they state that they send, see ``traffic_engines.py``.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from megatron_echo import cpu_backend, environment  # noqa: E402

cpu_backend.enable(verbose=False)

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from processes import as_table  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from megatron_echo.observe.simulation.inputs import MODELS as PUBLISHED  # noqa: E402

TOKENS = 4096
RANKS_PER_NODE = 8
WEIGHTS = ("collective", "p2p", "symmetric_memory")
WIRES = ("all_gather", "all_to_all", "symmetric_memory")
IN_NODES = ", in nodes"
COLUMNS = ("model", "EP", "tokens", "weights", "S", "link GB", "x necessary", "between GB",
           "x necessary between", "memory GB", "operators", "collectives",
           "host reads")  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A layer's sizes: hidden, expert ffn, experts, top-k."""

    hidden: int
    ffn: int
    experts: int
    topk: int

    @property
    def expert_elements(self) -> int:
        """Elements of the weights of one expert, SwiGLU."""
        return 3 * self.hidden * self.ffn


LABELS = {
    "deepseek-v3": "DeepSeek-V3",
    "qwen3-235b-a22b": "Qwen3-235B-A22B",
    "qwen3-30b-a3b": "Qwen3-30B-A3B",
    "mixtral-8x7b": "Mixtral-8x7B",
}
Rows = Callable[[str, int], Iterable[dict[str, Any]]]
MODELS = {
    label: Shape(model.hidden, model.moe_ffn, model.experts, model.topk)
    for label, model in ((label, PUBLISHED[name]) for name, label in LABELS.items())
}


@dataclass(frozen=True)
class Routing:
    """One drawn routing under one plan.

    Attributes:
        slot_expert: of the plan, ``[R, S]``.
        away: pairs of a mean rank that go to another one.
        leads: its tokens, counted once for each rank that they go to.
        visits: its tokens, counted once for each other rank that they go to.
        node_visits: its tokens, counted once for each other node.
        clones: of a mean rank.
        node_clones: those whose home is on another node.
        far_away: of ``away``, pairs that go to another node.
        far_visits: of ``visits``, those on other nodes.
        forwarded: of them, those beside the rank of the source's number in the node.
        forwarded_pairs: likewise of ``far_away``.
    """

    slot_expert: list[list[int]]
    away: float
    leads: float
    visits: float
    node_visits: float
    clones: float
    node_clones: float
    far_away: float = 0
    far_visits: float = 0
    forwarded: float = 0
    forwarded_pairs: float = 0

    def facts(self, ranks: int, pairs: int) -> Any:
        """What the counter must know."""
        from traffic_counter import Facts

        return Facts(
            ranks, pairs, self.away, self.leads, self.visits, self.clones, self.slot_expert,
            RANKS_PER_NODE, self.far_away, self.far_visits, self.node_visits, self.forwarded,
            self.node_clones, self.forwarded_pairs,
        )  # fmt: skip

    def necessary(self, shape: Shape) -> float:
        """Bytes that a mean rank must send to others."""
        return _necessary(shape, self.visits, self.clones)

    def necessary_between_nodes(self, shape: Shape) -> float:
        """Bytes that it must send to other nodes."""
        return _necessary(shape, self.node_visits, self.node_clones)


def _necessary(shape: Shape, visits: float, clones: float) -> float:
    return visits * shape.hidden * 2 * 4 + clones * shape.expert_elements * 2 * 3


@functools.cache
def choices(shape: Shape, ranks: int) -> Tensor:
    """Chosen experts, int64 ``[R, T, K]``: top-k of noise on log-popularity."""
    generator = torch.Generator().manual_seed(1)
    wanted = torch.randn(shape.experts, generator=generator)
    uniform = (torch.rand(TOKENS, shape.experts, generator=generator) for _ in range(ranks))
    noisy = (wanted - (-u.clamp(min=1e-9).log()).log() for u in uniform)
    return torch.stack([logits.topk(shape.topk).indices.sort().values for logits in noisy])


@functools.cache
def routing(shape: Shape, ranks: int, slots: int, in_nodes: bool = False) -> Routing:
    """Draw, plan, inside nodes if told, and follow each pair to the rank that computes it."""
    from megatron_echo.dispatch.reroute import physical_experts
    from megatron_echo.planner import plan_clones

    chosen = choices(shape, ranks)
    counts = torch.stack([c.reshape(-1).bincount(minlength=shape.experts) for c in chosen])
    nodes = {"ranks_per_node": RANKS_PER_NODE, "within_node": True} if in_nodes else {}
    plan = plan_clones(counts, slots, 0.02, **nodes)
    groups = shape.experts // ranks + slots
    rank_node = torch.arange(ranks) // RANKS_PER_NODE
    away = leads = visits = node_visits = far_away = far_visits = forwarded = pairs = 0
    number = torch.arange(ranks) % RANKS_PER_NODE
    for rank, experts in enumerate(chosen):
        target = physical_experts(experts.int(), plan, plan.split_for(rank)).long() // groups
        away += int((target != rank).sum())
        is_far = rank_node[target] != rank_node[rank]
        far_away += int(is_far.sum())
        pairs += int((is_far & (number[target] != number[rank])).sum())
        reached = torch.zeros(TOKENS, ranks).scatter_(1, target, 1)
        leads += int(reached.sum())
        reached[:, rank] = 0
        visits += int(reached.sum())
        far = reached * (rank_node != rank_node[rank])
        far_visits += int(far.sum())
        forwarded += int(far[:, number != number[rank]].sum())
        nodes = torch.zeros(TOKENS, int(rank_node[-1]) + 1)
        nodes = nodes.scatter_(1, rank_node[target], 1)
        nodes[:, rank_node[rank]] = 0
        node_visits += int(nodes.sum())
    used = plan.slot_expert >= 0
    home_node = rank_node[(plan.slot_expert // (shape.experts // ranks)).clamp(min=0)]
    elsewhere = used & (home_node != rank_node[:, None])
    totals = (
        away, leads, visits, node_visits, int(used.sum()), int(elsewhere.sum()), far_away,
        far_visits, forwarded, pairs,
    )  # fmt: skip
    return Routing(plan.slot_expert.tolist(), *(total / ranks for total in totals))


@contextlib.contextmanager
def pretended_ranks(ranks: int) -> Iterator[None]:
    """An expert-parallel group; this process is its first rank."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=ranks, create_gloo_process_groups=False
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def build(
    shape: Shape, ranks: int, slots: int, wire: str, weights: str, stock_experts: Any = None
) -> torch.nn.Module:
    """Our layer; with one of Megatron's dispatchers as ``wire``, its layer.

    With ``, FP8`` behind ``wire`` the experts compute in it.

    Args:
        shape: its sizes.
        ranks: of the expert-parallel group.
        slots: S.
        wire: a token transport, or ``Megatron`` and a dispatcher of its.
        weights: how weights of clones travel; with ``, in nodes`` behind it, inside them.
        stock_experts: of Megatron's layer, by default ours.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules

    from megatron_echo.config import EchoTransformerConfig
    from megatron_echo.experts import EchoGroupedMLP
    from megatron_echo.moe_layer import EchoMoELayer

    wire, _, precision = wire.partition(", ")
    stock = wire.removeprefix("Megatron ")
    fields: dict[str, Any] = (
        {"moe_token_dispatcher_type": stock, "bias_activation_fusion": True}
        if stock != wire
        else {
            "moe_enable_echo": True,
            "moe_num_echo_experts": slots * ranks,
            "moe_echo_token_transport": wire,
            "moe_echo_expert_dispatcher_type": weights.removesuffix(IN_NODES),
            "moe_echo_clones_within_node": weights.endswith(IN_NODES),
            "moe_echo_ranks_per_node": RANKS_PER_NODE if weights.endswith(IN_NODES) else None,
            "moe_echo_expert_precision": "fp8-rowwise" if precision else "params-dtype",
        }
    )
    config = EchoTransformerConfig(
        num_layers=1, hidden_size=shape.hidden, num_attention_heads=4, ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn, num_moe_experts=shape.experts, moe_router_topk=shape.topk,
        expert_model_parallel_size=ranks, gated_linear_unit=True, add_bias_linear=False,
        activation_func=torch.nn.functional.silu, moe_router_load_balancing_type="none",
        bf16=True, params_dtype=torch.bfloat16, moe_router_dtype="fp32",
        perform_initialization=False, **fields,
    )  # fmt: skip
    if stock == wire:
        return EchoMoELayer(config)

    class FromCounts(EchoGroupedMLP):
        """Megatron's dispatchers count the rows of each expert."""

        def forward(self, rows: Tensor, counts: Tensor, probs: Tensor) -> Any:
            return super().forward(rows, counts.cumsum(0).int(), probs)

    return MoELayer(config, MoESubmodules(experts=stock_experts or FromCounts), layer_number=1)


@contextlib.contextmanager
def fake_tensors(shape: Shape, ranks: int, slots: int, in_nodes: bool = False) -> Iterator[Any]:
    """Build and run layers of one routing here, within the counter that this gives."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe import token_dispatcher
    from traffic_counter import Counter, kernels

    parallel_state.get_global_memory_buffer().buffer.clear()  # which only grows
    drawn, pairs = routing(shape, ranks, slots, in_nodes), TOKENS * shape.topk
    counter = Counter(drawn.facts(ranks, pairs))

    def move(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        """In place of ``maybe_move_tensor_to_cpu``: splits are known, each a host read."""
        if not isinstance(tensor, Tensor):
            return tensor
        counter.count.host_reads += 1
        if not as_numpy:
            return tensor
        rest = round(drawn.away) // (ranks - 1)
        return np.array([pairs - rest * (ranks - 1), *[rest] * (ranks - 1)])

    def sort_chunks(rows: Tensor, *_: Any, probs: Any = None, **__: Any) -> tuple[Tensor, Any]:
        """In place of the function of this name, as one kernel each."""
        return rows.roll(1, 0), None if probs is None else probs.roll(1, 0)

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        kernels(counter),
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", move),
        mock.patch.object(token_dispatcher, "sort_chunks_by_idxs", sort_chunks),
    ):
        yield counter


def count_layer(
    shape: Shape, ranks: int, slots: int, wire: str, weights: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Counts of the forward pass, and of both."""
    with fake_tensors(shape, ranks, slots, weights.endswith(IN_NODES)) as counter:
        layer = build(shape, ranks, slots, wire, weights)
        size = (TOKENS, 1, shape.hidden)
        # Buffers are made in the first call.
        for _ in range(2):
            hidden = torch.empty(size, dtype=torch.bfloat16, requires_grad=True)
            grad = torch.empty(size, dtype=torch.bfloat16)
            counter.reset()
            with counter:
                output, _ = layer(hidden)
                forward = dataclasses.asdict(counter.count)
                output.backward(grad)
            layer.zero_grad()
    return forward, dataclasses.asdict(counter.count)


def rows_of(model: str, ranks: int, wires: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """All transports and numbers of slots of one layer."""
    from megatron_echo.planner import auto_slots

    shape = MODELS[model]
    home = shape.experts // ranks
    ours = [(wire, 0, "-") for wire in wires]
    slots = dict.fromkeys((auto_slots(ranks, shape.experts), home))
    ours += itertools.product(wires, slots, WEIGHTS)
    ours += [(f"{wire}, FP8", min(slots), WEIGHTS[-1]) for wire in wires]
    if ranks > RANKS_PER_NODE:
        inside = (f"symmetric_memory{IN_NODES}", f"collective{IN_NODES}")
        ways = (*inside, "symmetric_memory", "p2p")
        ours += [(wires[0], min(slots), way) for way in inside]
        ours += [("hybrid_ep", 0, "-"), *(("hybrid_ep", min(slots), way) for way in ways)]
        ours += [("nccl_ep", 0, "-"), ("nccl_ep", home, inside[0])]
    stock = [("Megatron alltoall", 0, "-"), ("Megatron allgather", 0, "-")]
    for wire, number, weights in [*stock, *ours]:
        drawn = routing(shape, ranks, number, weights.endswith(IN_NODES))
        forward, both = count_layer(shape, ranks, number, wire, weights.replace("-", "collective"))
        yield {
            "model": model,
            "EP": ranks,
            "tokens": wire,
            "weights": weights,
            "S": number,
            "link GB": both["link"] / 1e9,
            "x necessary": both["link"] / drawn.necessary(shape),
            **_between(both["between"], drawn.necessary_between_nodes(shape)),
            "memory GB": both["memory"] / 1e9,
            "operators": both["operators"],
            "collectives": both["collectives"],
            "host reads": both["host_reads"],
            "clones a rank": drawn.clones,
            "necessary GB": drawn.necessary(shape) / 1e9,
            "necessary GB between nodes": drawn.necessary_between_nodes(shape) / 1e9,
            "forward": forward,
        }


def _between(sent: float, necessary: float) -> dict[str, float]:
    """Cells of the bytes between nodes, where there are several."""
    if not necessary:
        return {}
    return {"between GB": sent / 1e9, "x necessary between": sent / necessary}


def count_all(models: dict[str, Shape], sizes: list[int], rows_of: Rows) -> list[dict[str, Any]]:
    """Rows of all layers, in one process."""
    rows: list[dict[str, Any]] = []
    for ranks in sizes:
        with pretended_ranks(ranks):
            for model, shape in models.items():
                if shape.experts >= ranks:
                    rows += rows_of(model, ranks)
                    print(f"{model}, EP={ranks}", file=sys.stderr, flush=True)
    return rows


def main(
    doc: str, models: dict[str, Shape], rows_of: Rows, render: Callable[[list[dict[str, Any]]], str]
) -> None:
    """Count, print the table, and write it.

    Args:
        doc: of the script; behind its command line is what its table is headed by.
        models: to count.
        rows_of: counts one of them with so many ranks.
        render: rows as a table.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--output", type=Path, help="without suffix: .json and .md are written")
    parser.add_argument("--quick", action="store_true", help="Qwen3-30B-A3B at EP=8 only")
    args = parser.parse_args()
    quick = "Qwen3-30B-A3B"
    chosen, sizes = ({quick: models[quick]}, [8]) if args.quick else (models, [8, 64])
    rows = count_all(chosen, sizes, rows_of)
    table = render(rows)
    print(table)
    if args.output is not None:
        record = {"versions": environment.versions(), "results": rows}
        args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        title = f"# {doc.splitlines()[0]}\n\n{doc.split('[--quick]')[1].strip()}\n\n"
        args.output.with_suffix(".md").write_text(f"{title}{table}\n")


if __name__ == "__main__":
    main(
        __doc__, MODELS, functools.partial(rows_of, wires=WIRES),
        functools.partial(as_table, columns=COLUMNS),
    )  # fmt: skip
