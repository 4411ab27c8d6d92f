"""What to offload, how much of it, and at what cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_echo.offload.regions import REGION_NAMES

POLICIES = ("earliest", "largest", "longest-lifetime")


@dataclasses.dataclass(frozen=True)
class OffloadConfig:
    """Settings of an :class:`~megatron_echo.offload.ActivationOffloader`.

    Attributes:
        modules: names of regions whose saved tensors may be offloaded, Megatron's
            ``--offload-modules`` plus ``router`` and ``shared_experts``.
        extra_regions: further regions, name to a glob over dotted module paths; each module that
            matches is a region.
        fraction: of the eligible bytes of each microbatch, in the policy's order, 0 to 1. The
            first steps offload everything unless it is 0, which switches it all off.
        min_tensor_bytes: smaller storages stay on the device.
        policy: which storages come first. ``earliest``: in forward order; ``largest``;
            ``longest-lifetime``: longest between saving and use.
        target_bytes: offload no more than brings the forecast peak of the regions' saved bytes
            on the device down to this. None: as much as ``fraction`` allows.
        max_slowdown: how much longer a planned step may take, as a share of its time. What the
            link cannot move within that stays on the device.
        max_host_bytes: most bytes of host memory, as they are pinned: in powers of two. When it is
            full, tensors stay on the device.
        slab_bytes: host memory is pinned in pieces of this size at least.
        learning_steps: steps with the same schedule that are timed before they are planned; the
            shortest times count.
        strict: a configured name that matches no module or saves nothing in the first step is an
            error in place of a warning.
    """

    modules: tuple[str, ...] = ()
    extra_regions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fraction: float = 1.0
    min_tensor_bytes: int = 2 << 20
    policy: str = "earliest"
    target_bytes: int | None = None
    max_slowdown: float = 0.0
    max_host_bytes: int | None = None
    slab_bytes: int = 64 << 20
    learning_steps: int = 2
    strict: bool = False

    def __post_init__(self) -> None:
        """Raise a ``ValueError`` for a setting outside its range, with what to use."""
        unknown = [name for name in self.modules if name not in REGION_NAMES]
        if unknown:
            raise ValueError(
                f"The offload module {unknown[0]!r} is not known. "
                f"Use some of {', '.join(REGION_NAMES)}."
            )
        names = [*self.modules, *self.extra_regions]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"The offload module {twice[0]!r} is named twice. Name it once.")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"The offload fraction {self.fraction} is no share. Use 0 to 1.")
        for name in _RANGES:
            problem = setting_refusal(name, getattr(self, name))
            if problem is not None:
                raise ValueError(f"{name} is {getattr(self, name)}, which {problem}")
        if self.policy not in POLICIES:
            raise ValueError(
                f"The offload policy {self.policy!r} is not known. "
                f"Use one of {', '.join(POLICIES)}."
            )


_RANGES: Mapping[str, tuple[float, float]] = {
    "min_tensor_bytes": (0, 2**63 - 1),
    "target_bytes": (1, 2**63 - 1),
    "max_slowdown": (0, 1e6),
    "max_host_bytes": (0, 2**63 - 1),
    "slab_bytes": (512, 2**63 - 1),
    "learning_steps": (1, 2**63 - 1),
}
"""The least and the greatest value of each number."""


def setting_refusal(name: str, value: Any) -> str | None:
    """What is wrong with a setting that has a range, and what to use; None if all is well."""
    least, most = _RANGES.get(name, (0, 0))
    if name not in _RANGES or value is None or least <= value <= most:
        return None
    if not value <= most:
        return f"is too large. Use {most:g} or less."
    return f"is too small. Use {least:g} or more."
