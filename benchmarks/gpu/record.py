"""Rows of results: each is measured, caught and written on its own, and has a deadline."""

import json
import operator
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from processes import as_table

Figures = dict[str, float]

_COMPARISONS = {">=": operator.ge, "<=": operator.le}
_NOTE_CHARACTERS = 300


class SkippedError(Exception):
    """Why something cannot be measured here; that is no failure."""


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        part: of ``run.py``.
        name: what was measured; part and name together are unique.
        status: ``measured``, ``failed`` or ``skipped``.
        figures: the unit is at the end of each name.
        targets: such as ``"of_copy >= 0.8"``.
        reached: whether all targets are; None without targets or figures, and in a dry run.
        note: the error, or the reason for skipping.
    """

    part: str
    name: str
    status: str
    figures: Figures = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    reached: bool | None = None
    note: str = ""


def is_reached(target: str, figures: Figures) -> bool:
    """Whether the figure that a target names is there and on the right side."""
    name, comparison, value = target.split()
    return name in figures and _COMPARISONS[comparison](figures[name], float(value))


class Recorder:
    """Appends the rows of one part to a file, a line of JSON each, as soon as they are there.

    Args:
        part: its name.
        file: the rows of all parts so far.
        deadline: by ``time.monotonic()``, which all processes share; what would begin later is
            skipped.
        dry: the figures mean nothing, and are not compared with targets.
    """

    def __init__(self, part: str, file: Path, deadline: float, dry: bool = False) -> None:
        self._part, self._file, self._dry = part, file, dry
        self._deadline = deadline

    @property
    def seconds_left(self) -> float:
        """Until the deadline, at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    def measured(self, part: str) -> list[Row]:
        """The rows of a part that have been measured so far, in this process or before."""
        rows = read_rows(self._file)
        return [row for row in rows if row.part == part and row.status == "measured"]

    def measure(
        self, name: str, function: Callable[[], Figures], targets: Sequence[str] = ()
    ) -> Figures | None:
        """Call ``function`` and write the row.

        Returns:
            Its figures, None if it failed or could not be called.
        """
        try:
            if not self.seconds_left:
                raise SkippedError("no time was left")
            figures = function()
        except SkippedError as reason:
            self.skip(name, str(reason), targets)
            return None
        except Exception as error:
            self.fail(name, error, targets)
            return None
        is_judged = bool(targets) and not self._dry
        reached = all(is_reached(t, figures) for t in targets) if is_judged else None
        self._write(Row(self._part, name, "measured", figures, tuple(targets), reached))
        return figures

    def skip(self, name: str, reason: str, targets: Sequence[str] = ()) -> None:
        """Write the row of something that cannot be measured here."""
        self._write(Row(self._part, name, "skipped", targets=tuple(targets), note=reason))

    def fail(self, name: str, error: Exception, targets: Sequence[str] = ()) -> None:
        """Write the row of something that did not work."""
        traceback.print_exception(error)
        note = f"{type(error).__name__}: {error}"
        note = note if len(note) <= _NOTE_CHARACTERS else note[:_NOTE_CHARACTERS] + " ..."
        self._write(Row(self._part, name, "failed", targets=tuple(targets), note=note))

    def _write(self, row: Row) -> None:
        with self._file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"  {row.name}: {_summary(row)}", flush=True)


def read_rows(file: Path) -> list[Row]:
    """The rows that the parts have written so far."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [
        Row(**{**(row := json.loads(line)), "targets": tuple(row["targets"])}) for line in lines
    ]


def _summary(row: Row) -> str:
    if row.status != "measured":
        return f"{row.status} ({row.note})"
    return ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())


def _cells(row: Row) -> dict[str, float | str]:
    cells: dict[str, float | str] = {"": row.name, **row.figures}
    if row.targets:
        outcome = {True: ": reached", False: ": missed", None: ""}[row.reached]
        cells["target"] = ", ".join(row.targets) + outcome
    if row.status != "measured":
        cells["note"] = f"{row.status}: {' '.join(row.note.replace('|', '/').split())}"
    return cells


def as_markdown(rows: Sequence[Row], titles: dict[str, str]) -> str:
    """A section with a table for each part that has rows.

    Args:
        rows: of all parts.
        titles: of the parts, in their order.
    """
    sections = []
    for part, title in titles.items():
        cells = [_cells(row) for row in rows if row.part == part]
        if cells:
            last = [name for name in ("target", "note") if any(name in row for row in cells)]
            columns = [c for c in dict.fromkeys(k for row in cells for k in row) if c not in last]
            sections.append(f"## {title}\n\n{as_table(cells, [*columns, *last])}")
    return "\n\n".join(sections)
