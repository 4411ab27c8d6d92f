"""How tokens and weights travel between the ranks of an expert-parallel group."""

from megatron_echo.dispatch.transports.all_gather import AllGatherTransport
from megatron_echo.dispatch.transports.all_to_all import AllToAllTransport
from megatron_echo.dispatch.transports.base import (
    Delivery,
    RowDelivery,
    RowTransport,
    TokenTransport,
)
from megatron_echo.dispatch.transports.symmetric_memory import (
    PeerBuffers,
    SymmetricMemoryTransport,
)
from megatron_echo.dispatch.transports.weights import (
    CollectiveWeights,
    PeerToPeerWeights,
    WeightTransport,
)

WEIGHT_TRANSPORTS: dict[str, type[WeightTransport]] = {
    "collective": CollectiveWeights,
    "p2p": PeerToPeerWeights,
}
"""By the word of ``--moe-echo-expert-dispatcher-type``."""

__all__ = [
    "WEIGHT_TRANSPORTS",
    "AllGatherTransport",
    "AllToAllTransport",
    "CollectiveWeights",
    "Delivery",
    "PeerBuffers",
    "PeerToPeerWeights",
    "RowDelivery",
    "RowTransport",
    "SymmetricMemoryTransport",
    "TokenTransport",
    "WeightTransport",
]
