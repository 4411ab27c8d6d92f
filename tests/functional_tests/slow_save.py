"""``pretrain_gpt_moe.py`` whose ranks are killed in the middle of a save or right after one.

The writer of the checkpoint named in ``SLOW_SAVE_AT`` leaves a file ``slow`` beside its
half-written data and then waits a minute for the test. After the save of iteration ``KILL_AFTER``
each rank kills itself.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from megatron.training import training

import pretrain_gpt_moe

real_fsync = os.fsync
real_save = training.save_checkpoint


def slow_fsync(descriptor: int) -> None:
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if path.parent.name == os.environ.get("SLOW_SAVE_AT"):
        (path.parent / "slow").touch()
        time.sleep(60)
    real_fsync(descriptor)


def last_save(iteration: int, *args: Any, **kwargs: Any) -> None:
    real_save(iteration, *args, **kwargs)
    if str(iteration) == os.environ.get("KILL_AFTER"):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    os.fsync = slow_fsync
    training.save_checkpoint = last_save
    pretrain_gpt_moe.main()
