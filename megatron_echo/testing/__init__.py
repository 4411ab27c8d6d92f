"""Tools for tests, of this package and of code that uses it."""

from megatron_echo.testing.no_host_sync import Hit, HostSyncError, no_host_sync

__all__ = ["Hit", "HostSyncError", "no_host_sync"]
