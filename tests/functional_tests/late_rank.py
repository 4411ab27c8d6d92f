"""``pretrain_gpt_moe.py`` with a rank 1 that meets the others three seconds late."""

import os
import time

import pretrain_gpt_moe
from megatron_echo.preflight import ranks

if os.environ["RANK"] == "1":
    meet = ranks._store
    ranks._store = lambda args: time.sleep(3) or meet(args)
pretrain_gpt_moe.main()
