"""Which transports a run uses: as its flags say, and by its topology where they say ``auto``."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_echo.compatibility import engine_refusal
from megatron_echo.config import echo_setting
from megatron_echo.dispatch.layout import wide_dtype
from megatron_echo.dispatch.transports.peer_memory import highest
from megatron_echo.environment import has_peer_memory, machine_number
from megatron_echo.per_model import PerModel

ENGINES = ("hybrid_ep", "nccl_ep")
"""Token transports of others, the one to be preferred first."""

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
        is_one_machine: all ranks run on one machine.
        has_peer_memory: each GPU reaches the memory of the others of its machine.
        engines: those of :data:`ENGINES` that all ranks can use with their flags.
    """

    ranks: int
    has_nccl: bool
    is_one_machine: bool = True
    has_peer_memory: bool = False
    engines: tuple[str, ...] = ()

    @property
    def is_linked(self) -> bool:
        """Every rank reaches the memory of every other."""
        return self.is_one_machine and self.has_peer_memory

    @classmethod
    def of(cls, group: dist.ProcessGroup, config: Any) -> "Topology":
        """Ask all ranks of a group; they call it together, and on GPUs the host waits once."""
        ranks = group.size()
        if ranks == 1 or "nccl" not in str(dist.get_backend_config(group)):
            return cls(ranks, has_nccl=False)
        lacks = [int(engine_refusal(engine, config) is not None) for engine in ENGINES]
        machine = machine_number()
        device = torch.device("cuda", torch.cuda.current_device())
        most, least, lacks_peers, *lacks = highest(
            [machine, -machine, not has_peer_memory(), *lacks], group, device
        )
        engines = (
            engine for engine, is_absent in zip(ENGINES, lacks, strict=True) if not is_absent
        )
        return cls(ranks, True, most == -least, not lacks_peers, tuple(engines))


def choose(topology: Topology, dtype: torch.dtype, has_graph: bool) -> tuple[str, str]:
    """What ``auto`` is for tokens and for the weights of clones: the one place where it is decided.

    =============================  ==========================  ===================================
    ranks of a group               tokens                      weights of clones
    =============================  ==========================  ===================================
    one, or not over NCCL          all_gather                  collective
    one machine, memory in reach   symmetric_memory            symmetric_memory
    else, an engine is installed   the engine                  p2p; in a CUDA graph collective
    else                           the fewer bytes of          p2p; in a CUDA graph collective
                                   all_to_all and all_gather
    =============================  ==========================  ===================================

    The bytes are those of :func:`token_bytes`; of equal ones the all-gather, which sorts less.

    Args:
        topology: of the group.
        dtype: of the tokens.
        has_graph: whether the step becomes a CUDA graph, in which the host cannot read a plan.
    """
    if not topology.has_nccl:
        return "all_gather", "collective"
    if topology.is_linked:
        return "symmetric_memory", "symmetric_memory"
    weights = "collective" if has_graph else "p2p"
    if topology.engines:
        return topology.engines[0], weights
    sizes = {way: token_bytes(way, topology.ranks, 1, 1, 1, dtype)
             for way in ("all_gather", "all_to_all")}  # fmt: skip
    return min(sizes, key=sizes.__getitem__), weights


def token_bytes(
    way: str, ranks: int, tokens: int, hidden: int, topk: int, dtype: torch.dtype,
    peer_capacity: float = 1.0,
) -> int:  # fmt: skip
    """Bytes of rows that a rank sends to others at most, there and back; backward is the same.

    With b bytes an element and w in the wide dtype: ``all_gather`` ``(R - 1) T H (b + w)``,
    ``all_to_all`` ``(R - 1) C H 2 b``, the engines ``min(K, R - 1) T H 2 b``, ``symmetric_memory``
    ``K T H 2 b``.
    """
    width, wide = dtype.itemsize, wide_dtype(dtype).itemsize
    there_and_back = tokens * hidden * 2 * width
    if way == "all_gather":
        return (ranks - 1) * tokens * hidden * (width + wide)
    if way == "all_to_all":
        return round((ranks - 1) * there_and_back * peer_capacity)
    return there_and_back * (topk if way == "symmetric_memory" else min(topk, ranks - 1))


def clone_bytes(config: Any) -> int:
    """Bytes of a clone in both passes: weights, twice if brought again, and a wide gradient."""
    matrices = 3 if config.gated_linear_unit else 2
    elements = matrices * config.hidden_size * config.moe_ffn_hidden_size
    times = 2 if echo_setting(config, "moe_echo_recompute_expert_dispatch") else 1
    dtype = config.params_dtype
    return elements * (times * dtype.itemsize + wide_dtype(dtype).itemsize)


class Transports(PerModel):
    """The transports of a model, decided once.

    Attributes:
        tokens: a word of ``--moe-echo-token-transport`` but ``auto``.
        weights: likewise of ``--moe-echo-expert-dispatcher-type``.
    """

    def __init__(self, config: Any, group: dist.ProcessGroup) -> None:
        """Decide. All ranks of the group call it together.

        Args:
            config: the transformer's configuration.
            group: the expert-parallel group, R ranks.
        """
        self._config, self._group = config, group
        self._topology: Topology | None = None
        self.tokens = echo_setting(config, "moe_echo_token_transport")
        self.weights = echo_setting(config, "moe_echo_expert_dispatcher_type")
        if "auto" in (self.tokens, self.weights):
            self._topology = Topology.of(group, config)
            has_graph = config.cuda_graph_impl != "none"
            tokens, weights = choose(self._topology, config.params_dtype, has_graph)
            self.tokens = tokens if self.tokens == "auto" else self.tokens
            self.weights = weights if self.weights == "auto" else self.weights
        is_pretended = group.size() > 1 and dist.get_backend(group) == "fake"
        self._is_silent = group.size() == 1 or is_pretended or dist.get_rank() != 0

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
        config, ranks = self._config, self._group.size()
        moved = token_bytes(
            self.tokens, ranks, tokens, config.hidden_size, config.moe_router_topk,
            config.params_dtype, echo_setting(config, "moe_echo_peer_capacity"),
        )  # fmt: skip
        text = f"tokens by {self.tokens}: at most {_megabytes(2 * moved)} a rank and layer"
        each = clone_bytes(config)
        if slots and self.weights == "collective":
            every = _megabytes((ranks - 1) * slots * each)
            text += f"; weights of clones by collective: {every}, whatever the plan"
        elif slots:
            text += f"; weights of clones by {self.weights}: {_megabytes(each)} a clone in use"
        text += "; both passes."
        return text + (self._reason() if self._topology is not None else "")

    def _reason(self) -> str:
        topology = self._topology
        assert topology is not None
        if not topology.has_nccl:
            return " Chosen by auto, without NCCL."
        if topology.is_linked:
            return " Chosen by auto: one machine whose GPUs reach each other's memory."
        place = "one machine without peer memory" if topology.is_one_machine else "several machines"
        text = f" Chosen by auto: {place}, engines found: {', '.join(topology.engines) or 'none'}."
        if not topology.engines and self._config.params_dtype == torch.bfloat16:
            text += " Better: " + ", or ".join(f"{way} ({INSTALL[way]})" for way in ENGINES) + "."
        return text


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
