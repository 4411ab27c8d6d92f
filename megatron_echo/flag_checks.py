# ruff: noqa: D103 (all are what the next lines say)
"""What is wrong with a value of a flag of ours, on the finished configuration, and what to use.

Each takes the value and the configuration and gives the words that follow the flag, or None.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from megatron_echo.compatibility import config_refusal
from megatron_echo.environment import (
    find_hybrid_ep,
    find_nccl_ep,
    interprets_triton,
    peer_memory_refusal,
)
from megatron_echo.flags import Check, Rows, first_refusal, nearest_multiples, within
from megatron_echo.planner.price import MAX_ROWS
from megatron_echo.planner.slots import auto_slots
from megatron_echo.precision import precision_refusal

MAX_ROW_ALIGNMENT = 1024
"""Kernels want 8 to 256 rows; each expert and slot of a rank may waste one less than this."""

_ENGINE: Rows = (
    (
        lambda c: c.expert_model_parallel_size == 1,
        "has no other rank to send to. Use all_gather, or a larger expert-parallel size.",
    ),
    (
        lambda c: c.params_dtype != torch.bfloat16,
        "adds in bf16, not {config.params_dtype}. Use --bf16, or all_to_all.",
    ),
)
"""With ``--moe-echo-token-transport hybrid_ep`` or ``nccl_ep``."""

_NCCL_EP: Rows = (
    (
        lambda c: getattr(c, "moe_echo_check_every", 0) > 0,
        "has one number of experts in a process. Leave --moe-echo-check-every out.",
    ),
    (
        lambda c: (rows := getattr(c, "moe_echo_row_alignment", 1)) & (rows - 1),
        "aligns to powers of two, not {config.moe_echo_row_alignment}. Use another "
        "--moe-echo-row-alignment.",
    ),
    (
        # With another number evaluation needs more rows than training.
        lambda c: (
            getattr(c, "moe_received_token_capacity", None) is not None
            or _given_or_auto_slots(c) not in (0, c.num_moe_experts)
        ),
        "has one size of buffer, for training and evaluation. Leave --moe-received-token-capacity "
        "out, and use --moe-num-echo-experts {config.num_moe_experts} or 0.",
    ),
)
"""Besides, with ``nccl_ep``."""

_PACKAGES: dict[str, tuple[Callable[[], Any], str]] = {
    "hybrid_ep": (
        lambda: find_hybrid_ep(),
        "needs DeepEP with HybridEPBuffer, and a version that takes non_blocking. Install the "
        "branch hybrid-ep of https://github.com/deepseek-ai/DeepEP, or use all_to_all.",
    ),
    "nccl_ep": (
        lambda: find_nccl_ep(),
        "needs Transformer Engine with NCCL EP, and NCCL 2.30.4. Install Transformer Engine "
        "2.20 built with NVTE_BUILD_WITH_NCCL_EP=1, or use all_to_all.",
    ),
}


def _given_or_auto_slots(config: Any) -> int:
    """``--moe-num-echo-experts``, or what stands for it where it is not given."""
    total, ranks = getattr(config, "moe_num_echo_experts", None), config.expert_model_parallel_size
    return ranks * auto_slots(ranks, config.num_moe_experts) if total is None else total


def engine_refusal(way: str, config: Any) -> str | None:
    """Why ``hybrid_ep`` or ``nccl_ep`` cannot be used here, and what to do; None if it can."""
    find, missing = _PACKAGES[way]
    rows = (*_ENGINE, *(_NCCL_EP if way == "nccl_ep" else ()), (lambda _: find() is None, missing))
    return first_refusal(rows, config)


def _without_graph(refusal: str) -> Check:
    def check(value: Any, config: Any) -> str | None:
        has_graph = config.cuda_graph_impl != "none"
        return refusal if value is not None and has_graph else None

    return check


capture = _without_graph(
    "copies into a new place each step, which a CUDA graph cannot. Leave one out."
)
replay = _without_graph(
    "brings other ids in each step, which a CUDA graph cannot. Leave one of the two out."
)
positive = within(1, math.inf, "is below 1. Use 1 or more.")
not_negative = within(0, math.inf, "is negative. Use 0 or more.")
tolerance = within(0, 100, "is not between 0 and 100. Use 0.02 for 2 %.")


def enable_echo(value: bool, config: Any) -> str | None:
    return config_refusal(config) if value else None


def num_echo_experts(value: int | None, config: Any) -> str | None:
    ranks = config.expert_model_parallel_size
    if value is None:
        return None
    if value < 0:
        return f"is negative. Use a multiple of the expert-parallel size {ranks}, or 0."
    if value % ranks:
        choice = nearest_multiples(value, ranks)
        return f"is not divisible by the expert-parallel size {ranks}. Use {choice}."
    experts = config.num_moe_experts
    if experts is not None and value > (most := experts * ranks):
        return f"is above one slot a rank for each of {experts} experts. Use {most} or fewer."
    return None


def capacity(value: float | None, config: Any) -> str | None:
    if value is not None and not 0 < value < float("inf"):
        return "is not a positive number. Use 1.0 for perfect balance, more for skew, or auto."
    return None


def token_transport(value: str, config: Any) -> str | None:
    if value in ("hybrid_ep", "nccl_ep"):
        return engine_refusal(value, config)
    if value != "symmetric_memory":
        return None
    return peer_memory_refusal(config.expert_model_parallel_size)


def peer_capacity(value: float, config: Any) -> str | None:
    if not 0 < value <= 1:
        return "is not above 0 and up to 1. Use 1.0 for a part that is never over-full."
    if value < 1 and config.moe_echo_token_transport != "all_to_all":
        return "belongs to --moe-echo-token-transport all_to_all. Leave one of the two out."
    return None


def rows_per_clone(value: int | None, config: Any) -> str | None:
    if value is None:
        return None
    if config.moe_echo_tolerance is not None:
        return "belongs to --moe-echo-tolerance auto. Leave one of the two out."
    return None if 0 <= value <= MAX_ROWS else f"is out of range. Use 0 to {MAX_ROWS}."


def within_node(value: bool, config: Any) -> str | None:
    if value and config.moe_echo_ranks_per_node is None:
        return "knows no nodes. Give --moe-echo-ranks-per-node."
    return None


def ranks_per_node(value: int | None, config: Any) -> str | None:
    ranks = config.expert_model_parallel_size
    if value is not None and (value < 1 or ranks % value):
        return f"does not divide the expert-parallel size {ranks}. Use a divisor, or leave it out."
    return None


def skew(value: float, config: Any) -> str | None:
    if value > 100:
        return "is above 100. Use 1.0 for Zipf's law."
    return not_negative(value, config)


def expert_dispatcher(value: str, config: Any) -> str | None:
    if value == "p2p" and config.cuda_graph_impl != "none":
        return "reads the plan on the host, which a CUDA graph cannot. Use auto."
    if value != "symmetric_memory":
        return None
    node = config.moe_echo_ranks_per_node
    if config.moe_echo_clones_within_node and node:
        return peer_memory_refusal(node, "node", "--moe-echo-ranks-per-node")
    return peer_memory_refusal(config.expert_model_parallel_size)


def kernels(value: str, config: Any) -> str | None:
    # The CPU backend leaves torch.accelerator truthful.
    if value == "triton" and not (torch.accelerator.is_available() or interprets_triton()):
        return "needs a GPU. Use auto or torch."
    return None


def expert_precision(value: str, config: Any) -> str | None:
    return None if value in ("auto", "params-dtype") else precision_refusal(value, config)


def every(value: int, config: Any) -> str | None:
    if value and config.cuda_graph_impl != "none":
        return "adds work in some steps, which a CUDA graph cannot. Leave one of the two out."
    if value and config.moe_echo_overflow == "drop":
        return "cannot tell a dropped pair from a wrong one. Use --moe-echo-overflow raise."
    return not_negative(value, config)


def row_alignment(value: int, config: Any) -> str | None:
    if value > MAX_ROW_ALIGNMENT:
        return f"is above {MAX_ROW_ALIGNMENT}, more than any kernel wants. Use a smaller one."
    return None if value >= 1 else "is below 1. Use 1, or the multiple that a kernel wants."
