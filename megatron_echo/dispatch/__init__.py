"""Which token-expert pair is computed in which row of which rank, and the way there and back."""

from megatron_echo.dispatch.dispatcher import EchoTokenDispatcher
from megatron_echo.step.overflow import MoEOverflowError

__all__ = ["EchoTokenDispatcher", "MoEOverflowError"]
