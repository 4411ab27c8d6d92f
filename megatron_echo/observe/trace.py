"""The reader of routing traces under the name that it had: see ``record/trace.py``."""

from megatron_echo.record.trace import StepTrace, TraceError, read_trace, read_traces

__all__ = ["StepTrace", "TraceError", "read_trace", "read_traces"]
