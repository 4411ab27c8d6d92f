"""What an offloader did in a step, as scalars and as a table."""

import dataclasses
from collections import Counter
from collections.abc import Mapping

from megatron_echo.offload.recorder import StepRecord
from megatron_echo.offload.schedule import KEPT_REASONS
from megatron_echo.offload.transfers import Transfers

REASONS = (*KEPT_REASONS, "host_full", "small", "view")
"""Why a storage stays on the device. Parameters, buffers and tensor subclasses are left out."""

FATES = ("reloaded", "forwarded", "dropped")
"""What became of bytes on the host; see ``Blob.fate``."""

USES = ("prefetched", "exposed", "hidden_bytes", "exposed_bytes", "planned_bytes")
"""How storages came back, and what a plan sent; see ``ActivationOffloader.statistics``."""


@dataclasses.dataclass(frozen=True)
class StepSummary:
    """Bytes and counts of one step.

    ``by_module`` has bytes by what became of them, ``offloaded`` or one of :data:`REASONS`;
    ``scalars`` the others.
    """

    by_module: Mapping[str, Counter[str]] = dataclasses.field(default_factory=dict)
    scalars: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(
        cls, transfers: Transfers, by_module: Mapping[str, Counter[str]], uses: Counter[str],
        record: StepRecord,
    ) -> "StepSummary":  # fmt: skip
        """The summary of a step that is over; lost bytes are a ``RuntimeError``."""
        live = [entry.nbytes for entry in record.entries if entry.blob() is not None]
        offloaded = sum(kinds["offloaded"] for kinds in by_module.values())
        scalars = {
            "bytes": offloaded,
            **{f"{fate}_bytes": record.fates[fate] for fate in FATES},
            **{name: uses[name] for name in USES},
            "host_bytes": transfers.arena.peak_leased_bytes,
            "host_allocated_bytes": transfers.arena.allocated_bytes,
            "peak_device_bytes": transfers.peak_device_bytes,
            "live_storages": len(live),
        }
        gone = record.fates.total()
        if not gone <= offloaded <= gone + sum(live):
            raise RuntimeError(
                f"{offloaded} bytes were offloaded, {gone} came back or were dropped and "
                f"{sum(live)} are alive. This is a defect of the offloader; please report it."
            )
        return cls({name: Counter(kinds) for name, kinds in by_module.items()}, scalars)

    def as_scalars(self) -> dict[str, float]:
        """For metrics, with the prefix ``offload/``; see ``ActivationOffloader.statistics``."""
        kept = sum(self.by_module.values(), Counter())
        del kept["offloaded"], kept["parameter"]
        return {
            "offload/bytes": 0,
            "offload/candidate_bytes": kept.total() + self.scalars.get("bytes", 0),
            **{f"offload/kept_{reason}_bytes": kept[reason] for reason in REASONS},
            **{f"offload/{name}": value for name, value in self.scalars.items()},
        }


def as_table(summary: StepSummary) -> str:
    """Text with a row for each module, in MiB."""
    used = [r for r in REASONS if any(kinds[r] for kinds in summary.by_module.values())]
    columns = ["offloaded", *used]
    lines = [f"{'module':<16}" + "".join(f"{name:>12}" for name in columns) + "   (MiB)"]
    for name, kinds in summary.by_module.items():
        cells = "".join(f"{kinds[column] / 2**20:>12.2f}" for column in columns)
        lines.append(f"{name:<16}{cells}")
    lines.append(", ".join(f"{name} {value}" for name, value in summary.scalars.items()))
    return "\n".join(lines)
