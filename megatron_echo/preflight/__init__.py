"""Checks on a command line before Megatron starts: a bad run ends in one sentence, at once.

Megatron finds most of these too, but later, on every rank, as an assertion deep in a traceback.
Each check takes what ``megatron.training.arguments.parse_args`` gives, not yet validated, and
raises a ``ValueError``: the fault, then what to do about it. What only shows while Megatron sets up
is turned into a sentence in :mod:`.failures`.
"""

import os
from argparse import Namespace

from megatron_echo.preflight.checkpoint import check_checkpoint, latest_checkpoint
from megatron_echo.preflight.data import check_data, check_indexed_dataset
from megatron_echo.preflight.layout import check_flags, check_schedule
from megatron_echo.preflight.places import check_places

__all__ = [
    "check_command_line", "check_files", "check_flags", "check_indexed_dataset", "check_schedule",
    "latest_checkpoint",
]  # fmt: skip


def check_command_line(args: Namespace) -> None:
    """All checks of a command line."""
    check_flags(args)
    check_files(args)


def check_files(args: Namespace) -> None:
    """The part of :func:`check_command_line` that reads and makes files.

    Each node's first rank looks at the data, and rank 0 at what the run writes and loads. So a
    fault may show on one rank only; :mod:`.failures` ends the others.
    """
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        check_data(args)
    if args.rank == 0:
        check_places(args)
        check_checkpoint(args)
