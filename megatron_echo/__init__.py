"""Balanced, sync-free, static-shape dropless MoE training on an unmodified Megatron-Core."""

__version__ = "0.1.0"
