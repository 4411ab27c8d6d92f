"""Which experts to clone where, and whose tokens go to which copy.

The planner is pure: integer tensors in, integer tensors out, no process group, no host read. Every
rank that runs it on the same counts gets the same bits.
"""

from megatron_echo.planner.balance import plan_clones, planner_backend
from megatron_echo.planner.bound import balance_bound
from megatron_echo.planner.plan import ClonePlan
from megatron_echo.planner.price import ClonePrice
from megatron_echo.planner.slots import auto_slots

__all__ = [
    "ClonePlan",
    "ClonePrice",
    "auto_slots",
    "balance_bound",
    "plan_clones",
    "planner_backend",
]
