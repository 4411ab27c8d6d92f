"""Activation offloading: saved tensors of chosen modules wait in host memory for backward.

Works on any ``torch.nn.Module`` through hooks. ``manager.py`` holds the hooks and the steps,
``schedule.py`` decides what goes and when, ``transfers.py`` orders the copies, and the backends of
``copy_lanes.py`` run them.
"""

from megatron_echo.offload.config import OffloadConfig
from megatron_echo.offload.manager import ActivationOffloader

__all__ = ["ActivationOffloader", "OffloadConfig"]
