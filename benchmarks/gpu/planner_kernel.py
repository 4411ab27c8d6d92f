"""Time of the planner for 64 ranks and 256 experts, and of the torch reference on the device."""

from functools import partial

import torch
from record import Figures, Recorder
from timing import device, device_microseconds, host_milliseconds

from megatron_echo.observe.simulation.workloads import synthetic
from megatron_echo.planner import plan_clones
from megatron_echo.planner.balance import plan_clones_reference

RANKS, EXPERTS, TOPK, TOKENS = 64, 256, 8, 1024
WORKLOADS = ("lognormal 1.0", "one hot expert")
SLOTS = (4, 1, 2, 16)
TARGETS = ("kernel_us <= 60",)


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


def run(recorder: Recorder, dry: bool) -> None:
    """Each workload with each number of slots on a rank."""
    ranks, experts = (8, 32) if dry else (RANKS, EXPERTS)
    for workload in WORKLOADS:
        for slots in SLOTS:
            name = f"{workload}, S={slots}"
            recorder.measure(name, partial(measure, workload, slots, ranks, experts), TARGETS)
