"""What the report says about memory: the ledgers of a run, ``--memory-ledger``, by module."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

MAX_POINTS = 240
"""Events in a chart; the one with the peak is always among them."""

GROUPS = 7

Json = dict[str, Any]


class ReportError(ValueError):
    """A file that a report is made from is missing or damaged."""


def read_ledgers(folder: Path, told: str | None) -> list[Json]:
    """The ledgers of a run, one for each pipeline stage; a ``ReportError`` if a file is none.

    Where what ``--memory-ledger`` told is not there, a file of that name in the run directory
    counts, and without the flag ``ledger.json``.
    """
    first = Path(told) if told else folder / "ledger.json"
    if not first.is_file():
        first = folder / first.name
    if not first.is_file():
        return []
    others = sorted(
        first.parent.glob(f"{first.stem}-stage*{first.suffix}"), key=lambda p: (len(p.name), p)
    )
    return [_read(path) for path in (first, *others)]


def _read(path: Path) -> Json:
    """One stage.

    Returns:
        ``file``; ``peak``, bytes kept for backward; ``modules``, rows of module, bytes at the
        peak, bytes saved over the step and how many storages; ``taken``, bytes that another
        hook kept elsewhere; ``events`` and ``curves``, bytes kept after each of those events.
    """
    from megatron_echo.record.ledger import KEPT, Entry
    from megatron_echo.record.ledger_plot import label, live_curves, total_curve

    try:
        ledger = json.loads(path.read_text())
        events = int(ledger["events"])
        entries = [
            Entry(**{**entry, "shape": tuple(entry["shape"])}) for entry in ledger["entries"]
        ]
        kept = [entry for entry in entries if entry.kind in KEPT and not entry.taken]
        curves = live_curves(kept, events, GROUPS)
        every = live_curves(kept, events, len(kept))
        total = total_curve(kept, events)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise ReportError(
            f"{path} is no memory ledger. Take it away, or run again with --memory-ledger."
        ) from None
    peak = int(total.argmax())
    saved: Counter[str] = Counter()
    storages: Counter[str] = Counter()
    for entry in kept:
        saved[label(entry)] += entry.nbytes
        storages[label(entry)] += 1
    modules = [[name, int(live[peak]), saved[name], storages[name]] for name, live in every.items()]
    modules.sort(key=lambda row: row[1:3], reverse=True)
    at = np.unique(np.append(np.linspace(0, events, min(events + 1, MAX_POINTS), dtype=int), peak))
    return {
        "file": path.name,
        "peak": int(total[peak]),
        "modules": modules,
        "taken": sum(entry.nbytes for entry in entries if entry.taken),
        "events": at.tolist(),
        "curves": {name: curve[at].tolist() for name, curve in curves.items()},
    }
