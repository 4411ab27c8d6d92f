"""What keeps memory, and which layers fit where.

Nothing here knows what a mixture of experts is.
"""

from megatron_echo.memory.pipeline_layout import LayerCost, PipelineLayout, plan_layout
from megatron_echo.record.ledger import SavedTensorLedger

__all__ = [
    "LayerCost",
    "PipelineLayout",
    "SavedTensorLedger",
    "plan_layout",
]
