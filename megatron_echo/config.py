"""Every flag of megatron_echo: its default, its help text and its validation, in one place.

The command line (:mod:`megatron_echo.arguments`) is generated from the fields below, so a flag,
its default and the configuration cannot disagree. The fields live in a mixin with two bases,
because Megatron replaces the configuration class by its own under ``--multi-latent-attention``.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer import MLATransformerConfig, TransformerConfig

Check = Callable[[Any, Any], str | None]
"""``check(value, config)`` returns what is wrong and how to mend it, or None if all is well."""


def flag(
    default: Any, help: str, *, group: str, check: Check | None = None, metavar: str | None = None
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: the value without the flag; its type is the field's annotation.
        help: one or two sentences for ``--help``.
        group: the title of the ``--help`` group.
        check: says what is wrong with a value; runs on the finished configuration.
        metavar: what ``--help`` shows for the value.
    """
    metadata = {"help": help, "group": group, "check": check, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """The command-line spelling of a field: ``moe_enable_echo`` is ``--moe-enable-echo``."""
    return "--" + field_name.replace("_", "-")


def value_type(field: dataclasses.Field) -> type:
    """The type of a field's value, with ``Optional`` taken off."""
    options = [t for t in typing.get_args(field.type) if t is not types.NoneType]
    return typing.cast(type, options[0] if options else field.type)


def nearest_multiples(value: int, divisor: int) -> str:
    """The positive multiples of ``divisor`` around ``value``, as words for an error message."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)


def _check_enable_echo(value: bool, config: Any) -> str | None:
    if not value:
        return None
    if config.num_moe_experts is None:
        return "needs a mixture of experts. Give --num-experts, or leave the flag out."
    if config.moe_expert_capacity_factor is not None:
        return (
            f"is dropless, but --moe-expert-capacity-factor {config.moe_expert_capacity_factor} "
            "drops tokens. Leave one of the two out."
        )
    return None


def _check_num_echo_experts(value: int | None, config: Any) -> str | None:
    ranks = config.expert_model_parallel_size
    if value is None:
        return None
    if value < 1:
        return f"is below 1. Use a positive multiple of the expert-parallel size {ranks}."
    if value % ranks:
        choice = nearest_multiples(value, ranks)
        return f"is not divisible by the expert-parallel size {ranks}. Use {choice}."
    return None


@dataclass
class EchoConfigMixin:
    """The fields that megatron_echo adds to a Megatron transformer configuration."""

    moe_enable_echo: bool = flag(
        False,
        "Clone the hottest experts of each layer and microbatch onto ranks that have room (ECHO), "
        "so that every expert-parallel rank computes the same number of tokens.",
        group="echo",
        check=_check_enable_echo,
    )
    moe_num_echo_experts: int | None = flag(
        None,
        "Slots for cloned experts, in total over the expert-parallel group. The default, "
        "--num-experts, gives each rank as many slots as it has experts of its own, with which "
        "exact balance is always possible.",
        group="echo",
        check=_check_num_echo_experts,
        metavar="N",
    )

    @property
    def num_echo_slots_per_rank(self) -> int:
        """Clone slots S on each expert-parallel rank; 0 with echo off."""
        config = typing.cast(Any, self)
        if not self.moe_enable_echo:
            return 0
        total = self.moe_num_echo_experts or config.num_moe_experts
        return total // config.expert_model_parallel_size

    def validate_echo(self) -> None:
        """Check every field of this package on a finished configuration.

        Raises:
            ValueError: names the flag, its value, and what is allowed.
        """
        for field in echo_fields():
            value = getattr(self, field.name)
            _check_type(field, value)
            check = field.metadata["check"]
            problem = check(value, self) if check is not None else None
            if problem is not None:
                raise ValueError(f"{_spelled(field.name, value)} {problem}")


def echo_fields() -> Iterator[dataclasses.Field]:
    """The fields that are flags of this package, in the order of their declaration."""
    return (field for field in dataclasses.fields(EchoConfigMixin) if "group" in field.metadata)


def _spelled(name: str, value: Any) -> str:
    return flag_name(name) if value is True else f"{flag_name(name)} {value}"


def _check_type(field: dataclasses.Field, value: Any) -> None:
    if value is None and types.NoneType in typing.get_args(field.type):
        return
    expected = value_type(field)
    is_bool_for_int = isinstance(value, bool) and expected is not bool
    if is_bool_for_int or not isinstance(value, expected):
        choice = "True or False" if expected is bool else f"a value of type {expected.__name__}"
        raise ValueError(
            f"{flag_name(field.name)} {value!r} is a {type(value).__name__}. Use {choice}."
        )


@dataclass
class EchoTransformerConfig(EchoConfigMixin, TransformerConfig):
    """Megatron's ``TransformerConfig`` with the fields of this package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_echo()


@dataclass
class EchoMLATransformerConfig(EchoConfigMixin, MLATransformerConfig):
    """Megatron's ``MLATransformerConfig`` with the fields of this package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_echo()
