"""``pretrain_gpt_moe.py`` whose saves end badly.

Rank 1 kills itself in the middle of writing the checkpoint named in ``KILL_AT``. The disk is full
when the one in ``FULL_AT`` is written. After the save of iteration ``KILL_AFTER`` each
rank kills itself.
"""

import errno
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron.training import training

import pretrain_gpt_moe

real_fsync = os.fsync
real_save = training.save_checkpoint


def failing_fsync(descriptor: int) -> None:
    folder = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent
    if folder.name == os.environ.get("KILL_AT") and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name == os.environ.get("FULL_AT"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real_fsync(descriptor)


def last_save(iteration: int, *args: Any, **kwargs: Any) -> None:
    real_save(iteration, *args, **kwargs)
    if str(iteration) == os.environ.get("KILL_AFTER"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.fsync = failing_fsync
    training.save_checkpoint = last_save
    if "FULL_AT" in os.environ:
        shutil.disk_usage = lambda path: SimpleNamespace(free=0)
    pretrain_gpt_moe.main()
