"""What keeps memory, when it may go, and which layers fit where.

Nothing here knows what a mixture of experts is.
"""

from megatron_echo.free_ticket import FreeQueue, FreeTicket
from megatron_echo.memory.pipeline_layout import LayerCost, PipelineLayout, plan_layout
from megatron_echo.record.ledger import SavedTensorLedger

__all__ = [
    "FreeQueue", "FreeTicket", "LayerCost", "PipelineLayout", "SavedTensorLedger", "plan_layout"
]  # fmt: skip
