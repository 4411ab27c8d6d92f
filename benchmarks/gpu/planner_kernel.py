"""Time of the planner for 64 ranks and 256 experts, and of the torch reference on the device."""

from functools import partial

import torch
from record import Case, Figures
from timing import device, device_microseconds, host_milliseconds

from megatron_echo.observe.simulation.workloads import synthetic
from megatron_echo.planner import plan_clones
from megatron_echo.planner.balance import plan_clones_reference

PART = "Planner, 64 ranks and 256 experts"
RANKS, EXPERTS, TOPK, TOKENS = 64, 256, 8, 1024
WORKLOADS = ("lognormal 1.0", "one hot expert")
TARGETS = {4: ("kernel_us <= 60",), 1: ("kernel_us <= 120",), 2: ()}
"""By slots on a rank."""


def measure(workload: str, slots: int, ranks: int, experts: int) -> Figures:
    """Microseconds on the device, what is allocated and cleared included."""
    counts = torch.from_numpy(synthetic(workload).counts(ranks, experts, TOPK, TOKENS, 0, 0))
    counts = counts.to(device(), torch.int64)
    plan = partial(plan_clones, counts, slots)
    reference = {"reference": partial(plan_clones_reference, counts, slots)}
    return {
        "kernel_us": device_microseconds({"kernel": plan})["kernel"],
        "host_us": host_milliseconds(plan) * 1e3,
        "reference_us": device_microseconds(reference, rounds=3)["reference"],
    }


def cases(dry: bool) -> list[Case]:
    """Each workload with each number of slots on a rank."""
    ranks, experts = (8, 32) if dry else (RANKS, EXPERTS)
    return [
        Case(PART, f"{workload}, S={slots}", partial(measure, workload, slots, ranks, experts),
             targets)
        for workload in WORKLOADS
        for slots, targets in TARGETS.items()
    ]  # fmt: skip
