"""The experts' computation on grouped rows."""

from megatron_echo.experts.adapter import adapted
from megatron_echo.experts.grouped_mlp import EchoGroupedMLP
from megatron_echo.experts.projection import GroupedLinear

__all__ = ["EchoGroupedMLP", "GroupedLinear", "adapted"]
