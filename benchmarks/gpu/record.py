"""Rows of results: each is measured, caught and written on its own, and has a deadline."""

import faulthandler
import json
import operator
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

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
        stage: of the check.
        part: the table that it belongs to.
        name: what was measured; part and name together are unique within a run.
        status: ``measured``, ``failed`` or ``skipped``.
        figures: the unit is at the end of each name.
        targets: such as ``"of_copy >= 0.8"``.
        reached: whether all targets are; None without targets or figures, and in a dry run.
        note: the error, or the reason for skipping.
        machine: device, driver, versions and date.
    """

    stage: int
    part: str
    name: str
    status: str
    figures: Figures = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    reached: bool | None = None
    note: str = ""
    machine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What makes one row.

    Attributes:
        part: the table that the row belongs to.
        name: of the row.
        run: measures or checks; whatever it raises makes the row a failed one.
        targets: as in :class:`Row`.
        seconds: after so many it hangs, and its process ends; in a dry run after ten times as many.
    """

    part: str
    name: str
    run: Callable[[], Figures]
    targets: tuple[str, ...] = ()
    seconds: float = 80.0


def is_reached(target: str, figures: Figures) -> bool:
    """Whether the figure that a target names is there and on the right side."""
    name, comparison, value = target.split()
    return name in figures and _COMPARISONS[comparison](figures[name], float(value))


class Recorder:
    """Appends rows to a file, a line of JSON each, as soon as they are there.

    Args:
        stage: of the check.
        file: the rows so far, of other stages and days too; other files go beside it.
        deadline: by ``time.monotonic()``, which all processes share; what would begin later is
            skipped.
        machine: written into each row.
        dry: the figures mean nothing, and are not compared with targets.
    """

    def __init__(
        self, stage: int, file: Path, deadline: float, machine: dict[str, Any], dry: bool = False
    ) -> None:
        self.file, self.dry = file, dry
        self._stage, self._deadline, self._machine = stage, deadline, machine

    @property
    def seconds_left(self) -> float:
        """Until the deadline, at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    def at_most(self, seconds: float) -> float:
        """Of so many seconds those that are left; in a dry run all that are left."""
        return self.seconds_left if self.dry else min(seconds, self.seconds_left)

    def figures(self, part: str, name: str) -> Figures:
        """What was measured last under this name, on this day and device; empty if nothing was."""
        found = [
            row.figures
            for row in read_rows(self.file)
            if (row.part, row.name, row.machine) == (part, name, self._machine)
        ]
        return found[-1] if found else {}

    def measure(self, case: Case) -> bool:
        """Run a case and write its row; False if it failed.

        Where it hangs, in a kernel perhaps, the process says so and ends.
        """
        limit = case.seconds * (10 if self.dry else 1)
        faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
        try:
            if not self.seconds_left:
                raise SkippedError("no time was left")
            figures = case.run()
            _wait_for_device()
        except SkippedError as reason:
            self._write(case, "skipped", note=str(reason))
            return True
        except Exception as error:
            traceback.print_exception(error)
            self.fail(case, f"{type(error).__name__}: {error}")
            return False
        finally:
            faulthandler.cancel_dump_traceback_later()
        is_judged = bool(case.targets) and not self.dry
        reached = all(is_reached(t, figures) for t in case.targets) if is_judged else None
        self._write(case, "measured", figures=figures, reached=reached)
        return True

    def fail(self, case: Case, note: str) -> None:
        """Write the row of a case that did not work."""
        note = note if len(note) <= _NOTE_CHARACTERS else note[:_NOTE_CHARACTERS] + " ..."
        self._write(case, "failed", note=note)

    def _write(self, case: Case, status: str, **fields: Any) -> None:
        row = Row(
            self._stage, case.part, case.name, status, targets=case.targets, machine=self._machine,
            **fields,
        )  # fmt: skip
        with self.file.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        print(f"  {row.part}, {row.name}: {_summary(row)}", flush=True)


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, in order."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [
        Row(**{**(row := json.loads(line)), "targets": tuple(row["targets"])}) for line in lines
    ]


def driver_version() -> str | None:
    """The NVIDIA driver's version, None where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.split("\n")[0].strip() or None


def machine(dry: bool) -> dict[str, Any]:
    """Device, driver, versions and day, for each row."""
    import torch

    from megatron_echo import environment

    return {
        "device": environment.device_name(),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "versions": {k: v for k, v in environment.versions().items() if v is not None},
        "date": date.today().isoformat(),
        "dry_run": dry,
    }


def _wait_for_device() -> None:
    """So that an error of the device is that of the case which made it."""
    from timing import synchronize  # imports torch, which who only reads rows does not need

    synchronize()


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


def _table(rows: Sequence[Row]) -> str:
    cells = [_cells(row) for row in rows]
    last = [name for name in ("target", "note") if any(name in row for row in cells)]
    columns = [c for c in dict.fromkeys(k for row in cells for k in row) if c not in last]
    return as_table(cells, [*columns, *last])


def as_markdown(rows: Sequence[Row]) -> str:
    """What each device measured each day, a table for each part; the last row of a name counts."""
    runs: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        from_ = row.machine
        versions = ", ".join(f"{name} {value}" for name, value in from_["versions"].items())
        dry = " **A dry run: the times mean nothing.**" if from_["dry_run"] else ""
        head = f"{from_['device']}, driver {from_['driver']}, {versions}, {from_['date']}.{dry}"
        runs.setdefault(head, {})[row.part, row.name] = row
    sections = []
    for head, last in runs.items():
        sections.append(head)
        for part in dict.fromkeys(part for part, _ in last):
            table = _table([row for row in last.values() if row.part == part])
            sections.append(f"## {part}\n\n{table}")
    return "\n\n".join(sections)
