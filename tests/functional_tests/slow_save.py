"""``pretrain_gpt_moe.py`` with a save that lasts: a test kills a rank in the middle of it.

The writer of the checkpoint named in ``SLOW_SAVE_AT`` leaves a file ``slow`` beside its
half-written data and then waits a minute.
"""

import os
import time
from pathlib import Path

import pretrain_gpt_moe

real_fsync = os.fsync


def slow_fsync(descriptor: int) -> None:
    path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if path.parent.name == os.environ["SLOW_SAVE_AT"]:
        (path.parent / "slow").touch()
        time.sleep(60)
    real_fsync(descriptor)


if __name__ == "__main__":
    os.fsync = slow_fsync
    pretrain_gpt_moe.main()
