"""Which transports a run uses: as its flags say, and by its topology where they say ``auto``."""

import itertools
import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from megatron_echo.collectives import part_of
from megatron_echo.config import (
    EchoConfigMixin,
    clone_itemsize,
    dispatched_row_bytes,
    echo_setting,
    expert_elements,
    expert_width,
    fp8_format,
    num_clone_slots,
)
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.dispatch.transports.peer_memory import highest
from megatron_echo.environment import device_speeds, has_peer_memory, machine_number
from megatron_echo.flag_checks import engine_refusal
from megatron_echo.per_model import PerModel
from megatron_echo.plan_settings import NODE_CAPACITY, domain_ranks
from megatron_echo.planner.price import MAX_ROWS, ClonePrice

ENGINES = ("hybrid_ep", "nccl_ep")
"""Token transports of others, the one to be preferred first."""

BY_PLAN = ("hybrid_ep", "nccl_ep", "symmetric_memory")
"""Token transports whose traffic follows the plan: a token is sent once to a rank."""

INSTALL = {
    "hybrid_ep": "DeepEP's branch hybrid-ep",
    "nccl_ep": "Transformer Engine >= 2.20 with NCCL EP and NCCL >= 2.30.4",
}


@dataclass(frozen=True)
class Topology:
    """What ``auto`` decides by, of an expert-parallel group and the same on all of its ranks.

    Attributes:
        ranks: R.
        has_nccl: the group's tensors are on GPUs.
        node: consecutive ranks that share a machine, as many on each; 1 where that is not so.
        has_peer_memory: each GPU reaches the memory of the others of its machine.
        engines: those of :data:`ENGINES` that all ranks can use with their flags.
    """

    ranks: int
    has_nccl: bool
    node: int = 1
    has_peer_memory: bool = False
    engines: tuple[str, ...] = ()

    def is_linked(self, ranks: int) -> bool:
        """Whether each of so many consecutive ranks reaches the memory of the others."""
        return self.has_peer_memory and self.node % ranks == 0

    @classmethod
    def of(cls, group: dist.ProcessGroup, config: Any) -> "Topology":
        """Ask all ranks of a group; they call it together, and on GPUs the host waits once."""
        ranks = group.size()
        if ranks == 1 or "nccl" not in str(dist.get_backend_config(group)):
            return cls(ranks, has_nccl=False)
        lacks = [int(engine_refusal(engine, config) is not None) for engine in ENGINES]
        machines = [machine_number() if rank == group.rank() else 0 for rank in range(ranks)]
        lacks_peers, *found = highest(
            [int(not has_peer_memory()), *lacks, *machines], group, _device_of(group)
        )
        lacks, machines = found[: len(ENGINES)], found[len(ENGINES) :]
        engines = (
            engine for engine, is_absent in zip(ENGINES, lacks, strict=True) if not is_absent
        )
        return cls(ranks, True, node_of(machines), not lacks_peers, tuple(engines))


def node_of(machines: list[int]) -> int:
    """Consecutive ranks on each machine, of those of ranks; 1 where they have other numbers."""
    runs = [len(list(run)) for _, run in itertools.groupby(machines)]
    return runs[0] if len(set(runs)) == 1 else 1


def choose(topology: Topology, domain: int, has_graph: bool) -> tuple[str, str]:
    """What ``auto`` is for tokens and for the weights of clones: the one place where it is decided.

    ==========================  =======================  ===================================
    ranks                       tokens of all of them    weights, among those of clones
    ==========================  =======================  ===================================
    each other's memory in      symmetric_memory         symmetric_memory
    reach, over NCCL
    else, and on a CPU          an engine installed,     p2p; in a CUDA graph collective
                                or all_gather
    ==========================  =======================  ===================================

    ``all_to_all`` sends as many bytes as ``all_gather`` (:func:`token_bytes`) and sorts more.

    Args:
        topology: of the group.
        domain: consecutive ranks among which clones are made.
        has_graph: whether the host cannot read a plan: in a CUDA graph, or of fake tensors.
    """
    tokens = topology.engines[0] if topology.engines else "all_gather"
    weights = "collective" if has_graph else "p2p"
    return (
        "symmetric_memory" if topology.is_linked(topology.ranks) else tokens,
        "symmetric_memory" if topology.is_linked(domain) else weights,
    )


def wants_nodes(topology: Topology, config: Any) -> bool:
    """Whether ``auto`` weights keep clones inside nodes, though no flag says so.

    There they need no host read and no link between nodes, for a balance of each node by itself,
    which wants a larger receive buffer: so only where the ranks of each of several machines reach
    each other's memory, and no flag is about nodes or gives a buffer that is too small.

    Args:
        topology: of the expert-parallel group.
        config: the transformer's configuration.
    """
    capacity = echo_setting(config, "moe_received_token_capacity")
    return (
        isinstance(config, EchoConfigMixin)
        and config.moe_echo_expert_dispatcher_type == "auto"
        and config.moe_echo_ranks_per_node is None
        and num_clone_slots(config) > 0
        and topology.has_peer_memory
        and 1 < topology.node < topology.ranks
        and (capacity is None or capacity >= NODE_CAPACITY)
    )


def _travels_in_fp8(way: str, config: Any) -> bool:
    return fp8_format(config) is not None and way not in ENGINES


def token_bytes(way: str, config: Any, ranks: int, tokens: int) -> int:
    """Bytes of rows that a rank sends to others at most, there and back in both passes.

    A row travels four times, in b bytes an element; there in FP8 in one, where experts compute in
    it; sums back in fp32, if they are to. ``all_gather`` sends ``(R - 1) T`` rows each time,
    ``all_to_all`` ``(R - 1) C``; the others, which send a token once to a rank,
    ``min(K, R - 1) T``.

    Args:
        way: a word of ``--moe-echo-token-transport`` but ``auto``.
        config: the transformer's configuration.
        ranks: R.
        tokens: T.
    """
    is_packed, copies = _travels_in_fp8(way, config), ranks - 1
    row = back = expert_width(config) * config.params_dtype.itemsize
    if way == "all_gather" and echo_setting(config, "moe_echo_fp32_sums_on_the_wire"):
        back = expert_width(config) * wide_dtype(config.params_dtype).itemsize
    elif way == "all_to_all":
        copies *= echo_setting(config, "moe_echo_peer_capacity")
    elif way != "all_gather":
        copies = min(config.moe_router_topk, copies)
    # Gradients of packed rows go home as results do.
    times = dispatched_row_bytes(config, is_packed) + 2 * back + (back if is_packed else row)
    return round(copies * tokens * times)


def clone_bytes(config: Any) -> int:
    """Bytes of a clone in both passes: weights, twice if brought again, and a wide gradient."""
    times = 2 if echo_setting(config, "moe_echo_recompute_expert_dispatch") else 1
    gradient = wide_dtype(config.params_dtype).itemsize
    return expert_elements(config) * (times * clone_itemsize(config) + gradient)


def clone_price(config: Any, group: dist.ProcessGroup, tokens: str, weights: str) -> ClonePrice:
    """What a clone costs in rows, for ``--moe-echo-tolerance auto``; the same on all ranks.

    No copy is taken to hide behind a product. Where ranks are on several machines and the planner
    is not told, each clone costs what it costs between them.

    Args:
        config: the transformer's configuration.
        group: the expert-parallel group, R ranks, which call it together; the host waits once.
        tokens: how they travel.
        weights: how those of clones do; by ``collective`` a clone more costs nothing.
    """
    ranks, speeds = group.size(), device_speeds()
    if fp8_format(config) is not None:
        speeds = replace(speeds, flops=speeds.flops * speeds.fp8_gain)
    node = echo_setting(config, "moe_echo_ranks_per_node")
    local = node or math.gcd(ranks, int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    row = 3 * dispatched_row_bytes(config, is_packed=False)
    row += dispatched_row_bytes(config, _travels_in_fp8(tokens, config))
    row = row if tokens in BY_PLAN else 0
    clone = 0 if weights == "collective" else clone_bytes(config)
    price = ClonePrice.of_layer(speeds, expert_elements(config), row, clone, ranks, local)
    given = echo_setting(config, "moe_echo_rows_per_clone")
    inside, across = price.inside, price.across
    if given is not None:
        inside, across = given, min(round(given * speeds.inside / speeds.across), MAX_ROWS)
    inside = inside if node or local == ranks else across
    if ranks > 1 and not _is_pretended(group):  # what ranks see may differ, and plans may not
        inside, across = highest([inside, across], group, _device_of(group))
    return replace(price, inside=inside, across=across)


def _is_pretended(group: dist.ProcessGroup) -> bool:
    return group.size() > 1 and dist.get_backend(group) == "fake"


def _device_of(group: dist.ProcessGroup) -> torch.device:
    if "nccl" not in str(dist.get_backend_config(group)):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class Transports(PerModel):
    """The transports of a model, decided once.

    Attributes:
        tokens: a word of ``--moe-echo-token-transport`` but ``auto``.
        weights: likewise of ``--moe-echo-expert-dispatcher-type``.
        clone_group: ranks among which clones are made.
        price: of a clone; None where the tolerance is a number.
    """

    def __init__(self, config: Any, group: dist.ProcessGroup) -> None:
        """Decide. All ranks of the group call it together.

        Args:
            config: the transformer's configuration; where :func:`wants_nodes`, gets the flags for
                that.
            group: the expert-parallel group, R ranks.
        """
        self._config, self._group = config, group
        self._topology: Topology | None = None
        self.tokens = echo_setting(config, "moe_echo_token_transport")
        self.weights = echo_setting(config, "moe_echo_expert_dispatcher_type")
        if "auto" in (self.tokens, self.weights):
            self._topology = topology = Topology.of(group, config)
            self._chose_nodes = wants_nodes(topology, config)
            if self._chose_nodes:
                config.moe_echo_ranks_per_node = topology.node
                config.moe_echo_clones_within_node = True
        domain = domain_ranks(config, group.size())
        if self._topology is not None:
            has_graph = config.cuda_graph_impl != "none" or _is_pretended(group)
            tokens, weights = choose(self._topology, domain, has_graph)
            self.tokens = tokens if self.tokens == "auto" else self.tokens
            self.weights = weights if self.weights == "auto" else self.weights
        self.clone_group = part_of(group, domain)
        self.price: ClonePrice | None = None
        if echo_setting(config, "moe_echo_tolerance") is None:
            self.price = clone_price(config, group, self.tokens, self.weights)
        is_alone = group.size() == 1
        self._is_silent = is_alone or _is_pretended(group) or dist.get_rank() != 0

    @property
    def decided(self) -> dict[str, Any]:
        """The flags of transports and nodes, by name, as they are now."""
        nodes = ("moe_echo_ranks_per_node", "moe_echo_clones_within_node")
        return {
            "moe_echo_token_transport": self.tokens,
            "moe_echo_expert_dispatcher_type": self.weights,
            **{name: echo_setting(self._config, name) for name in nodes},
        }

    def announce(self, tokens: int, slots: int) -> None:
        """Print once, on the job's first rank, what moves how, why, and how many bytes.

        Args:
            tokens: T.
            slots: S.
        """
        if not self._is_silent:
            print(f"[megatron_echo] {self.line(tokens, slots)}", flush=True)
        self._is_silent = True

    def line(self, tokens: int, slots: int) -> str:
        """What :meth:`announce` prints."""
        config, ranks, domain = self._config, self._group.size(), self.clone_group.size()
        moved = token_bytes(self.tokens, config, ranks, tokens)
        text = f"tokens by {self.tokens}: at most {_megabytes(moved)} a rank and layer"
        each = clone_bytes(config)
        if slots and self.weights == "collective":
            every = _megabytes((domain - 1) * slots * each)
            text += f"; weights of clones by collective: {every}, whatever the plan"
        elif slots:
            text += f"; weights of clones by {self.weights}: {_megabytes(each)} a clone in use"
        if slots and domain < ranks:
            text += ", inside nodes"
        text += "; both passes."
        if slots and self.price is not None:
            text += f" A clone pays from {self.price.inside:,} rows on."
        return text + (self._reason() if self._topology is not None else "")

    def _reason(self) -> str:
        topology = self._topology
        assert topology is not None
        if not topology.has_nccl:
            return " Chosen by auto, without NCCL."
        if topology.is_linked(topology.ranks):
            return " Chosen by auto: one machine whose GPUs reach each other's memory."
        is_one = topology.node == topology.ranks
        place = "one machine without peer memory" if is_one else "several machines"
        text = f" Chosen by auto: {place}, engines found: {', '.join(topology.engines) or 'none'}."
        if self._chose_nodes:
            text += (
                f" So clones stay among the {topology.node} ranks of a node, as with "
                "--moe-echo-clones-within-node; --moe-echo-ranks-per-node alone lets them leave."
            )
        if not topology.engines and self._config.params_dtype == torch.bfloat16:
            text += " Better: " + ", or ".join(f"{way} ({INSTALL[way]})" for way in ENGINES) + "."
        return text


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
