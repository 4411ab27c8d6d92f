"""Tools for tests, of this package and of code that uses it."""

from megatron_echo.testing.capturable import (
    NotCapturableError,
    Operator,
    Violation,
    assert_capturable,
)
from megatron_echo.testing.no_host_sync import Hit, HostSyncError, no_host_sync

__all__ = [
    "Hit", "HostSyncError", "NotCapturableError", "Operator", "Violation", "assert_capturable",
    "no_host_sync",
]  # fmt: skip
