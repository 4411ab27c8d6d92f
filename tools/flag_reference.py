"""Make ``docs/flag_reference.md``: every training flag of this package.

    python tools/flag_reference.py --write     # or --check, which only says whether it is current

They come from the parser of ``pretrain_gpt_moe.py``, which is made from the configuration's fields.
"""

import re
import sys
from argparse import Action, ArgumentParser
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "flag_reference.md"
sys.path.insert(0, str(ROOT))

GROUP = "megatron_echo: "
TAKEN_OVER = "echo_"
"""How the destinations of Megatron's offloading flags begin, which our manager takes over."""

INTRODUCTION = """\
# Our flags

Made by `python tools/flag_reference.py --write` from the parser of `pretrain_gpt_moe.py`; a test
keeps it current. Megatron's own flags work as they do in Megatron, see `--help`;
[which of them fit](flags.md) is a page of its own.
"""


def training_parser() -> ArgumentParser:
    """The parser of ``pretrain_gpt_moe.py``: Megatron's flags and ours."""
    import pretrain_gpt_moe  # turns the CPU backend on: before Megatron

    # isort: split
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
    return pretrain_gpt_moe.extra_args_provider(parser)


def render(parser: ArgumentParser) -> str:
    """The page, from :func:`training_parser`'s result."""
    lines = [INTRODUCTION]
    ours = [group for group in parser._action_groups if (group.title or "").startswith(GROUP)]
    ours.sort(key=lambda group: group.title == f"{GROUP}offload")  # beside Megatron's, at the end
    for group in ours:
        lines += _section(str(group.title).removeprefix(GROUP), group._group_actions)
    taken = [action for action in parser._actions if action.dest.startswith(TAKEN_OVER)]
    lines += _section("Megatron's offloading flags, which drive our manager", taken)
    return "\n".join(lines)


def _section(title: str, actions: Iterable[Action]) -> list[str]:
    lines = [f"## {title}", "", "| flag | value | default | |", "|---|---|---|---|"]
    for action in actions:
        name = ", ".join(f"`{option}`" for option in action.option_strings)
        cells = (name, _value(action), _default(action), _help(action))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def _value(action: Action) -> str:
    """The choices, or what kind of value it is."""
    if action.nargs == 0:
        return ""
    if action.choices:
        return ", ".join(f"`{choice}`" for choice in action.choices)
    word = action.metavar or {int: "N", float: "X"}.get(action.type, "WORD")
    return f"{word}" + (" ..." if action.nargs in ("+", "*") else "")


def _default(action: Action) -> str:
    if action.nargs == 0:
        return "on" if action.default else "off"
    return "" if action.default in (None, []) else f"`{action.default}`"


def _help(action: Action) -> str:
    """The help text without its default, which has a column of its own."""
    text = re.sub(r"\s+", " ", action.help or "").strip().replace("%%", "%")
    return re.sub(r" \(default: [^)]*\)$", "", text)


def main(words: list[str] | None = None) -> None:
    """The command line.

    Args:
        words: without the program's name; None for those of this process.
    """
    parser = ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--write", action="store_true", help="write the page")
    way.add_argument("--check", action="store_true", help="end with 1 where it is out of date")
    args = parser.parse_args(words)
    text = render(training_parser())
    if args.write:
        PAGE.write_text(text)
    elif not PAGE.is_file() or PAGE.read_text() != text:
        command = "python tools/flag_reference.py --write"
        raise SystemExit(f"{PAGE.relative_to(ROOT)} is out of date. Run {command}.")


if __name__ == "__main__":
    main()
