"""Where a step's time goes, from the timers in ``metrics.jsonl`` (``--timing-log-level``)."""

import statistics
from typing import Any

from megatron_echo.record.metrics import TIMERS

Json = dict[str, Any]

_SYNC = ("all-grads-sync", "embedding-grads-all-reduce")
_PIPELINE = tuple(name for name in TIMERS[2] if name.endswith(("-send", "-recv")))
_PASSES = ("batch-generator", "forward-compute", "backward-compute")

PARTS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("data", ("batch-generator",), ()),
    ("forward", ("forward-compute",), ("batch-generator",)),
    ("backward", ("backward-compute",), ()),
    ("pipeline, waiting and sending", _PIPELINE, ()),
    ("reduction of gradients", _SYNC, ()),
    ("rest of the passes", ("forward-backward",), (*_PASSES[1:], *_PIPELINE, *_SYNC)),
    ("optimizer", ("optimizer",), ("params-all-gather",)),
    ("gathering of weights", ("params-all-gather",), ()),
    ("rest of the step", ("iteration",), ("forward-backward", "optimizer")),
)
"""Each part: its timers, and those inside them that are parts of their own."""


def step_parts(metrics: Json) -> list[Json]:
    """The parts of each step on the last rank, in seconds; they add up to ``iteration-time``.

    For each part with timers ``label``, ``values`` (None where the line has none), ``median``
    and ``source``. Empty without ``--timing-log-level``.
    """
    columns, rows = metrics["values"], len(metrics["iteration"])

    def seconds(name: str, row: int) -> float:
        value = columns.get(f"{name}-time", [0.0] * rows)[row]
        return value if isinstance(value, (int, float)) else 0.0

    def part(whole: tuple[str, ...], inside: tuple[str, ...], row: int) -> float | None:
        if not seconds("forward-backward", row):
            return None
        total = sum(seconds(name, row) for name in whole)
        return max(0.0, total - sum(seconds(name, row) for name in inside))

    if not any(seconds("forward-backward", row) for row in range(rows)):
        return []
    found = []
    for label, whole, inside in PARTS:
        timed, taken_off = (
            [f"{name}-time" for name in names if f"{name}-time" in columns]
            for names in (whole, inside)
        )
        if not timed:
            continue
        if label == "rest of the passes" and "forward-compute-time" not in columns:
            label = "forward and backward"
        values = [part(whole, inside, row) for row in range(rows)]
        source = " + ".join(timed) + "".join(f" - {name}" for name in taken_off)
        median = statistics.median(value for value in values if value is not None)
        found.append({"label": label, "values": values, "median": median, "source": source})
    return found
