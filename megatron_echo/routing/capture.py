"""The reader of captured routing under the name that it had: see ``record/routing_capture.py``."""

from megatron_echo.record.routing_capture import StepCapture, read_captures

__all__ = ["StepCapture", "read_captures"]
