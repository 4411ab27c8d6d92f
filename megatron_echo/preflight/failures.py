"""The one place that turns an exception of a run into a sentence for its user.

An exception is *known* if it has a sentence here, or if a ``raise`` or ``assert`` statement of
Megatron or of this package made it on purpose before the first step. Anything else is a defect: it
keeps its traceback.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megatron.core

from megatron_echo.preflight.checkpoint import latest_checkpoint

_FULL_DISK_BYTES = 1 << 20
_MEGATRON = Path(megatron.core.__file__).parents[1]
_OURS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Explanation:
    """What a user is told in place of a traceback."""

    text: str  # the fault, then the fix
    code: int = 2  # of the process; 2 where the command line is at fault


_OTHER_SCHEDULE = (
    r"OptimizerParamScheduler: class input value (\S+) and checkpoint ?value (\S+) for (.*) do not "
    "match"
)


def explain(error: BaseException, args: Namespace, is_training: bool) -> Explanation | None:
    """What to say about an exception of Megatron or of this package, None to leave its traceback.

    What is refused once the first step has begun is no refusal of the command line.
    """
    schedule = re.search(_OTHER_SCHEDULE, str(error), re.DOTALL)
    if schedule is not None and isinstance(error, AssertionError):
        here, there, what = schedule.groups()
        return Explanation(
            f"--load {args.load}: the {what} is {there} there and {here} here. Add "
            "--override-opt-param-scheduler to go on with the schedule of this command line, or "
            "--use-checkpoint-opt-param-scheduler to keep the checkpoint's."
        )
    if not is_training:
        refusal = explain_refusal(error)
        return Explanation(refusal) if refusal is not None else None
    return _explain_bad_loss(error, args)


def explain_refusal(error: BaseException) -> str | None:
    """The text of an exception that Megatron or this package raised on purpose; else None."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return None
    path, line = Path(frames[-1].filename), frames[-1].line or ""
    text = " ".join(str(error).split())
    if path.is_relative_to(_OURS):
        return text if isinstance(error, ValueError) and line.startswith("raise ") else None
    statement = "assert " if isinstance(error, AssertionError) else f"raise {type(error).__name__}"
    if not path.is_relative_to(_MEGATRON) or not line.startswith(statement):
        return None  # the second: a message that could not be put together, say
    place = f"{path.relative_to(_MEGATRON.parent)}:{frames[-1].lineno}"
    return f"Megatron-Core refuses this command line ({place}): {text or line}"


def report(problem: object) -> None:
    """Print an error in one line."""
    print(f"pretrain_gpt_moe.py: error: {problem}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """Around what every rank finds alike: each node's first rank says it, all exit with code 2."""
    try:
        yield
    except Exception as error:
        refusal = explain_refusal(error)
        if refusal is None and not isinstance(error, ValueError):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":
            report(refusal or error)
        raise SystemExit(2) from error


def _explain_bad_loss(error: BaseException, args: Namespace) -> Explanation | None:
    """Megatron saves a checkpoint of a loss that is NaN, and trips over an absent ``--save``."""
    names = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    if args.save or not isinstance(error, TypeError) or "save_checkpoint" not in names:
        return None
    return Explanation(
        "The loss is NaN or infinite, in the iteration that the log names above. Lower --lr or "
        "look at its data; with --save, a checkpoint of the step before is kept.",
        code=1,
    )


def explain_full_disk(error: BaseException, args: Namespace) -> str | None:
    """What to say of a full disk and what is still there; None for any other failure.

    Megatron writes checkpoints in worker processes and reports only that one of them failed.
    """
    if not args.save or not os.path.isdir(args.save):
        return None
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return _describe_full_disk(chain.filename or args.save, args.save)
        if "Worker failure" in str(chain) and _has_no_room(args.save):
            return _describe_full_disk(args.save, args.save)
        chain = chain.__cause__ or chain.__context__
    return None


def _has_no_room(save: str) -> bool:
    """True if another checkpoint like the last one does not fit."""
    kept = latest_checkpoint(save)
    needed = sum(file.stat().st_size for file in kept.iterdir()) if kept else _FULL_DISK_BYTES
    return shutil.disk_usage(save).free < needed


def _describe_full_disk(path: str, save: str) -> str:
    kept = latest_checkpoint(save)
    state = f"{kept.name} is complete and untouched" if kept else "No checkpoint is there yet"
    free = shutil.disk_usage(save).free / 1e6
    return (
        f"The disk of {path} is full ({free:.1f} MB free on that of --save). {state}; free some "
        "space, then start again with --load."
    )
