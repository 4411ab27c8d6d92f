"""Runs ``pretrain_gpt_moe.py`` and writes the peak of rank r to ``$PEAK.r``.

With one thread, the highest running total of the allocator's events in PyTorch's profiler. With
expert parallelism gloo's threads free what the profiler, which watches one thread, has seen
allocated: there the storages that operators made are counted until they are gone.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3])]

import pretrain_gpt_moe  # noqa: E402

# isort: split
import torch  # noqa: E402

from megatron_echo.memory.live_bytes import LiveBytes  # noqa: E402


def by_profiler() -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        pretrain_gpt_moe.main()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def by_storages() -> int:
    with LiveBytes() as live:
        pretrain_gpt_moe.main()
    return live.peak


if __name__ == "__main__":
    measured = by_storages() if "--expert-model-parallel-size" in sys.argv else by_profiler()
    Path(f"{os.environ['PEAK']}.{os.environ.get('RANK', 0)}").write_text(str(measured))
