"""How tokens and weights travel between the ranks of an expert-parallel group."""

from megatron_echo.dispatch.transports.all_gather import AllGatherTransport
from megatron_echo.dispatch.transports.all_to_all import AllToAllTransport
from megatron_echo.dispatch.transports.automatic import Transports
from megatron_echo.dispatch.transports.base import Delivery, TokenTransport
from megatron_echo.dispatch.transports.hybrid_ep import HybridEPBuffers, HybridEPTransport
from megatron_echo.dispatch.transports.nccl_ep import NcclEPContext, NcclEPTransport
from megatron_echo.dispatch.transports.peer_buffers import NodeBuffers, PeerBuffers
from megatron_echo.dispatch.transports.symmetric_memory import SymmetricMemoryTransport
from megatron_echo.dispatch.transports.weights import (
    CollectiveWeights,
    PeerToPeerWeights,
    SymmetricMemoryWeights,
    WeightTransport,
)

__all__ = [
    "AllGatherTransport",
    "AllToAllTransport",
    "CollectiveWeights",
    "Delivery",
    "HybridEPBuffers",
    "HybridEPTransport",
    "NcclEPContext",
    "NcclEPTransport",
    "NodeBuffers",
    "PeerBuffers",
    "PeerToPeerWeights",
    "SymmetricMemoryTransport",
    "SymmetricMemoryWeights",
    "TokenTransport",
    "Transports",
    "WeightTransport",
]
