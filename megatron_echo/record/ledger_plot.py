"""The ledger's picture: bytes kept for backward, stacked, over the saves and frees of a step."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def live_curves(
    entries: Sequence[Any], events: int, field: str, groups: int
) -> dict[str, np.ndarray]:
    """Bytes kept after each event, int64 ``[events + 1]``, by a field of the entries.

    Args:
        entries: what to count.
        events: saves and frees in all.
        field: of an entry; ``module`` without the numbers of experts.
        groups: at most so many of them, those with the highest peaks, and one for the rest.
    """
    curves: dict[str, np.ndarray] = {}
    for entry in entries:
        changes = curves.setdefault(label(entry, field), np.zeros(events + 1, np.int64))
        changes[entry.saved_at] += entry.nbytes
        if entry.freed_at is not None:
            changes[entry.freed_at] -= entry.nbytes
    live = {name: changes.cumsum() for name, changes in curves.items()}
    largest = sorted(live, key=lambda name: -live[name].max())
    kept = {name: live[name] for name in largest[:groups]}
    if rest := largest[groups:]:
        kept[f"other ({len(rest)})"] = np.sum([live[name] for name in rest], axis=0)
    return kept


def plot_ledger(
    entries: Sequence[Any], events: int, path: str | Path, field: str, groups: int
) -> None:
    """Draw it; the arguments are those of ``SavedTensorLedger.plot``.

    Args:
        entries: what to count.
        events: saves and frees in all.
        path: where to.
        field: of an entry.
        groups: at most so many of them and one for the rest.
    """
    from matplotlib.figure import Figure

    stacked = {
        name: kept / 2**20 for name, kept in live_curves(entries, events, field, groups).items()
    }
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(np.arange(events + 1), list(stacked.values()), labels=list(stacked), step="post")
    total = np.sum(list(stacked.values()), axis=0) if stacked else np.zeros(1)
    axes.set(
        xlabel="saves and frees of the step, in order",
        ylabel="kept for backward, MiB",
        title=f"Saved tensors by {field}: peak {total.max():.2f} MiB",
        xlim=(0, max(events, 1)),
    )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def label(entry: Any, field: str) -> str:
    """The field's value; experts of one layer have one colour."""
    value = str(getattr(entry, field))
    return (re.sub(r"\.\d+", ".*", value) if field == "module" else value) or "(itself)"
