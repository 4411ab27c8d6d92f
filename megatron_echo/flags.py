"""Flags made of dataclass fields: default, help, group and check in one place."""

import argparse
import dataclasses
import math
import types
import typing
from argparse import ArgumentParser
from collections.abc import Callable, Iterable
from typing import Any

Check = Callable[[Any, Any], str | None]
"""``check(value, config)`` returns what is wrong and how to mend it, or None if all is well."""

Rows = tuple[tuple[Callable[[Any], Any], str], ...]
"""Whether a setting is refused, and the words behind its flag, which may name ``{config.x}``."""


def first_refusal(rows: Rows, config: Any) -> str | None:
    """The words of the first row that refuses a configuration (or command line), or None."""
    words = (reason for refused, reason in rows if refused(config))
    return next(words, "").format(config=config, args=config) or None


def flag(
    default: Any,
    help: str,
    *,
    group: str,
    check: Check | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    none_word: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag; its annotation is the value's type.

    Args:
        default: the value without the flag. A tuple takes one word or more.
        help: one or two sentences for ``--help``.
        group: the title of the ``--help`` group.
        check: says what is wrong with a value; runs on the finished configuration.
        metavar: what ``--help`` shows for the value; N and X for numbers.
        choices: the values that a string may have.
        none_word: the word that stands for None on the command line.
    """
    about = {"help": help, "group": group, "check": check, "metavar": metavar}
    return dataclasses.field(
        default=default, metadata=about | {"choices": choices, "none_word": none_word}
    )


def flag_name(field_name: str) -> str:
    """The command-line spelling of a field: ``moe_enable_echo`` is ``--moe-enable-echo``."""
    return "--" + field_name.replace("_", "-")


def value_type(field: dataclasses.Field) -> type:
    """The type of a field's value, with ``Optional`` taken off."""
    options = [t for t in typing.get_args(field.type) if t is not types.NoneType]
    if options and typing.get_origin(options[0]) is tuple:
        options = list(typing.get_args(options[0]))
    if options and isinstance(options[0], types.UnionType):  # a tuple of numbers or None
        options = [t for t in typing.get_args(options[0]) if t is not types.NoneType]
    return typing.cast(type, options[0] if options else field.type)


def takes_several(field: dataclasses.Field) -> bool:
    """True for a tuple, or a tuple or None."""
    options = (field.type, *typing.get_args(field.type))
    return any(typing.get_origin(option) is tuple for option in options)


def number_refusal(value: Any) -> str | None:
    """What is wrong with a number of any flag, and what to use; None for anything else."""
    if isinstance(value, float) and not math.isfinite(value):
        return "is not a finite number. Use one."
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "does not fit into 64 bits. Use a smaller number."
    return None


def spelled(name: str, value: Any) -> str:
    """A flag as it stands on the command line, with its value."""
    return flag_name(name) if value is True else f"{flag_name(name)} {value}"


def check_type(field: dataclasses.Field, value: Any) -> None:
    """Raise a ``ValueError`` unless a field may have this value, by its type and choices."""
    if value is None and types.NoneType in typing.get_args(field.type):
        return
    expected = value_type(field)
    is_bool_for_int = isinstance(value, bool) and expected is not bool
    choices = field.metadata["choices"]
    if choices is not None and value not in choices:
        raise ValueError(f"{flag_name(field.name)} {value} is unknown. Use {' or '.join(choices)}.")
    problem = number_refusal(value)
    if problem is not None:
        raise ValueError(f"{flag_name(field.name)} {value} {problem}")
    if expected is float and type(value) is int:
        return
    if is_bool_for_int or not isinstance(value, expected):
        choice = "True or False" if expected is bool else f"a value of type {expected.__name__}"
        raise ValueError(
            f"{flag_name(field.name)} {value!r} is a {type(value).__name__}. Use {choice}."
        )


def within(least: float, most: float, refusal: str) -> Check:
    """A check of a number's range, both ends in it; None passes."""
    return lambda value, _: None if value is None or least <= value <= most else refusal


def nearest_multiples(value: int, divisor: int) -> str:
    """The positive multiples of ``divisor`` around ``value``, as words for an error message."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)


def add_flags(parser: ArgumentParser, fields: Iterable[dataclasses.Field]) -> None:
    """Add fields made with :func:`flag` to a parser, each in its group."""
    groups: dict[str, Any] = {}
    for field in fields:
        title = field.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(f"megatron_echo: {title}")
        groups[title].add_argument(
            flag_name(field.name), dest=field.name, default=field.default, **_options(field)
        )


def _options(field: dataclasses.Field) -> dict[str, Any]:
    """What ``add_argument`` is told besides name and default."""
    about, kind = field.metadata, value_type(field)
    options: dict[str, Any] = {"help": about["help"].replace("%", "%%")}
    if kind is bool:
        action = argparse.BooleanOptionalAction if field.default else "store_true"
        return options | {"action": action}
    if takes_several(field):
        options["nargs"] = "+"
    if field.default is not None:
        shown = field.default if isinstance(field.default, tuple) else (field.default,)
        options["help"] += f" (default: {' '.join(map(str, shown))})"
    of_numbers = {int: "N", float: "X"}.get(kind)
    options["metavar"] = about["metavar"] or of_numbers
    return options | {"type": _parser(field), "choices": about["choices"]}


def _parser(field: dataclasses.Field) -> Callable[[str], Any]:
    """What turns the word on the command line into the field's value."""
    kind, none_word = value_type(field), field.metadata["none_word"]
    if none_word is None:
        return kind

    def parse(word: str) -> Any:
        return None if word == none_word else kind(word)

    parse.__name__ = f"{kind.__name__} or {none_word}"  # argparse shows it
    return parse
