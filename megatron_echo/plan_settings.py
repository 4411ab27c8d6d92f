"""What the planner is told by a configuration, and the buffer that this takes."""

from typing import Any

from megatron_echo.config import echo_setting
from megatron_echo.planner.bound import MAX_TOLERANCE

AUTO_CAPACITY = 1.25
"""Of perfect balance: the buffer where too few slots to promise it would need one for the worst,
and what ``--moe-echo-tolerance auto`` may use."""

NODE_CAPACITY = 2.0
"""Of perfect balance: how much more than the others a node may have to compute. The fullest of 8
nodes of DeepSeek-V3 at EP=64 has up to 2.08 where ranks have 4 on average, 1.08 where they have 1.3
(the simulator's published loads)."""


def domain_ranks(config: Any, ranks: int) -> int:
    """Ranks among which clones are made: those of a node, or all R."""
    is_within_node = echo_setting(config, "moe_echo_clones_within_node")
    return echo_setting(config, "moe_echo_ranks_per_node") if is_within_node else ranks


def plan_tolerance(config: Any) -> float:
    """``--moe-echo-tolerance``; with ``auto`` what the receive buffer leaves room for."""
    tolerance = echo_setting(config, "moe_echo_tolerance")
    if tolerance is not None:
        return tolerance
    given = echo_setting(config, "moe_received_token_capacity")
    is_within = echo_setting(config, "moe_echo_clones_within_node")
    most = AUTO_CAPACITY - 1 if given is None or is_within else MAX_TOLERANCE
    return most if given is None else min(max(given - 1, 0.0), most)


def token_capacity(config: Any, num_slots: int) -> float | None:
    """``--moe-received-token-capacity`` of a layer in training; None where nothing can overflow.

    Without clones ``auto`` is the most that routing can bring, and with E / R slots the planner's
    bound. With fewer slots the planner comes close to its bound for most routings, and promises
    nothing for the worst. Where clones stay in their node, the bound is that of the fullest node:
    of two nodes one has at most twice the mean; of more, :data:`NODE_CAPACITY` is assumed.
    """
    given = echo_setting(config, "moe_received_token_capacity")
    if given is not None or num_slots == 0:
        return given
    ranks = config.expert_model_parallel_size
    nodes = ranks // domain_ranks(config, ranks)
    above = 1 + plan_tolerance(config)
    if num_slots < config.num_moe_experts // ranks:
        above = max(above, AUTO_CAPACITY)
    elif nodes == 1:
        return None
    return above if nodes == 1 else above * min(nodes, NODE_CAPACITY)
