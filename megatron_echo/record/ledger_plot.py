"""The ledger's picture: bytes kept for backward, stacked, over the saves and frees of a step."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

GROUPS = 8
"""Colours of the picture; the smaller groups are one."""


def total_curve(entries: Sequence[Any], events: int) -> np.ndarray:
    """Bytes that entries (``ledger.Entry``) keep after each event, int64 ``[events + 1]``."""
    changes = np.zeros(events + 1, np.int64)
    for entry in entries:
        changes[entry.saved_at] += entry.nbytes
        if entry.freed_at is not None:
            changes[entry.freed_at] -= entry.nbytes
    return changes.cumsum()


def live_curves(entries: Sequence[Any], events: int, groups: int) -> dict[str, np.ndarray]:
    """:func:`total_curve` of each module (:func:`label`).

    The modules with the highest peaks, at most ``groups``, and all others as one.
    """
    of_module: dict[str, list[Any]] = {}
    for entry in entries:
        of_module.setdefault(label(entry), []).append(entry)
    live = {name: total_curve(mine, events) for name, mine in of_module.items()}
    largest = sorted(live, key=lambda name: -live[name].max())
    kept = {name: live[name] for name in largest[:groups]}
    if rest := largest[groups:]:
        kept[f"other ({len(rest)})"] = np.sum([live[name] for name in rest], axis=0)
    return kept


def plot_ledger(entries: Sequence[Any], events: int, path: str | Path) -> None:
    """Draw what entries keep over all events, saves and frees, into a file."""
    from matplotlib.figure import Figure

    stacked = {name: kept / 2**20 for name, kept in live_curves(entries, events, GROUPS).items()}
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(np.arange(events + 1), list(stacked.values()), labels=list(stacked), step="post")
    peak = total_curve(entries, events).max() / 2**20
    axes.set(
        xlabel="saves and frees of the step, in order",
        ylabel="kept for backward, MiB",
        title=f"Saved tensors by module: peak {peak:.2f} MiB",
        xlim=(0, max(events, 1)),
    )
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=120)


def label(entry: Any) -> str:
    """The entry's module; experts of one layer have one colour."""
    return re.sub(r"\.\d+", ".*", entry.module) or "(itself)"
