"""How tokens travel between the ranks of an expert-parallel group."""

from megatron_echo.dispatch.transports.all_gather import AllGatherTransport
from megatron_echo.dispatch.transports.all_to_all import AllToAllTransport
from megatron_echo.dispatch.transports.base import Delivery, TokenTransport

__all__ = ["AllGatherTransport", "AllToAllTransport", "Delivery", "TokenTransport"]
