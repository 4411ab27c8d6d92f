"""The experts' computation on grouped rows."""

from megatron_echo.experts.grouped_mlp import EchoGroupedMLP

__all__ = ["EchoGroupedMLP"]
