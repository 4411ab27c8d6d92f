"""The reader of captured routing under the name that it had: see ``record/routing_capture.py``."""

from megatron_echo.record.routing_capture import RoutingReplay, StepCapture, read_captures

__all__ = ["RoutingReplay", "StepCapture", "read_captures"]
