"""A run of which one rank fails before training, while the others wait for it.

Arguments: the rank that fails, and how: ``known``, ``unknown``, or ``late`` for not at all.
"""

import os
import sys
import time
from argparse import Namespace

import torch.distributed as dist
from megatron.core.utils import divide

from megatron_echo.preflight.ranks import Ranks

failing, kind = int(sys.argv[1]), sys.argv[2]
rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
ranks = Ranks(
    Namespace(
        rank=rank,
        world_size=world_size,
        inprocess_restart=False,
        fake_process_group=False,
        distributed_timeout_minutes=1,
        load=None,
        save=None,
    )
)
with ranks.end_together():
    dist.init_process_group("gloo")
    if kind == "late":
        ranks.begin_training()
        time.sleep(rank)
    elif rank != failing:
        dist.barrier()
    elif kind == "known":
        divide(3, 2)
    else:
        1 / 0  # noqa: B018
