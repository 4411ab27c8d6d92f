"""What the losses of a model's routers are: Megatron's flags and this package's, checked."""

from dataclasses import dataclass, replace
from typing import Any

COUNT_SOURCES = ("microbatch", "cumulative", "late", "previous_step", "late+previous")
DEFAULT_SOURCE = "late+previous"
COUNTED_CHOICES = ("unbiased", "assigned")
LOSS_NAMES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Megatron's load-balancing types, and what its tracker calls their losses."""


_STRONGEST = 1e6
"""Far beyond any use, and far within fp32 with every factor that a loss is weighed with."""


@dataclass(frozen=True)
class RouterLossSettings:
    """The losses of a model's routers, as Megatron's flags and this package's say.

    Attributes:
        counted: ``--moe-echo-aux-counts``. unbiased: the top-k of the scores, as DeepSeek-V3's
            eq. 18 and Megatron; assigned: what the router chose with bias, groups and replay.
        source: ``--moe-echo-aux-count-source``, whose counts a batch-wise loss uses. microbatch:
            its own. cumulative: and those before it. late: all whose forward pass came before
            this backward pass. previous_step: those of the step before. late+previous: late, and
            the rest estimated from these and from the step before.
    """

    coefficients: dict[str, float]  # by load-balancing type, those above 0
    z_coefficient: float = 0.0  # 0 without z loss
    counted: str = "unbiased"
    source: str = DEFAULT_SOURCE
    per_token: bool = False  # ``--calculate-per-token-loss``
    mcore_compat: bool = False  # leave everything to Megatron's router

    @classmethod
    def from_config(cls, config: Any) -> "RouterLossSettings":
        """The settings in a ``TransformerConfig``; a ``ValueError`` where they contradict."""
        types, values = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
        if isinstance(types, str):
            types, values = [types], [values]
        settings = cls(
            {name: value for name, value in zip(types, values, strict=True) if name in LOSS_NAMES},
            config.moe_z_loss_coeff or 0.0,
            getattr(config, "moe_echo_aux_counts", cls.counted),
            getattr(config, "moe_echo_aux_count_source", cls.source),
            config.calculate_per_token_loss,
            getattr(config, "moe_echo_aux_mcore_compat", cls.mcore_compat),
        )
        problem = settings.refusal()
        if problem is not None:
            raise ValueError(problem)
        above = {name: value for name, value in settings.coefficients.items() if value > 0}
        return replace(settings, coefficients=above)

    def refusal(self) -> str | None:
        """What in the settings has no meaning, and what to do; None if all is well."""
        for flag, strength in (
            *(("--moe-aux-loss-coeff", value) for value in self.coefficients.values()),
            ("--moe-z-loss-coeff", self.z_coefficient),
        ):
            if not 0 <= strength <= _STRONGEST:
                return f"{flag} {strength} is no strength. Use 0 to {_STRONGEST:g}."
        for flag, value, choices in (
            ("--moe-echo-aux-count-source", self.source, COUNT_SOURCES),
            ("--moe-echo-aux-counts", self.counted, COUNTED_CHOICES),
        ):
            if value not in choices:
                return f"{flag} {value} is unknown. Use {' or '.join(choices)}."
        if self.source != DEFAULT_SOURCE and not self.coefficients.get("global_aux_loss"):
            return (
                f"--moe-echo-aux-count-source {self.source} is for a batch-wise loss. Use "
                "--moe-router-load-balancing-type global_aux_loss with a coefficient above 0, or "
                "leave it out."
            )
        if self.mcore_compat and (self.source, self.counted) != (DEFAULT_SOURCE, "unbiased"):
            return (
                "--moe-echo-aux-mcore-compat gives the losses to Megatron's router, which has "
                "neither --moe-echo-aux-count-source nor --moe-echo-aux-counts. Leave one out."
            )
        return None

    @property
    def any(self) -> bool:
        """Whether there is a loss that this package computes."""
        return bool(self.coefficients or self.z_coefficient) and not self.mcore_compat

    @property
    def counts_sequences(self) -> bool:
        """Whether the counts of the ranks that share sequences are needed."""
        return "aux_loss" in self.coefficients or "seq_aux_loss" in self.coefficients

    @property
    def keeps_previous(self) -> bool:
        """Whether counts are kept from one step to the next."""
        sources = ("previous_step", "late+previous")
        return "global_aux_loss" in self.coefficients and self.source in sources
