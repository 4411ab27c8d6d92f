"""A stack of expert weights in a distributed checkpoint, as Megatron's own experts are in it."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensorFactory,
)
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint
from torch import Tensor

Offsets = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ExpertShard:
    """Which of all experts a rank holds, and which part of each.

    Attributes:
        expert_rank: this rank's place in the expert-parallel group.
        expert_ranks: ranks in that group.
        tensor_rank: its place in the expert-tensor-parallel group, whose ranks share out F.
        tensor_ranks: ranks in that group.
    """

    expert_rank: int
    expert_ranks: int
    tensor_rank: int = 0
    tensor_ranks: int = 1


def sharded_stack(
    weight: Tensor, key: str, shard: ExpertShard, replica_id: ReplicaId,
    sharded_offsets: Offsets = (), *, shape: torch.Size, is_fc1: bool, gated: bool = False,
    separate: bool = False,
) -> ShardedTensor | ShardedTensorFactory:  # fmt: skip
    """One object for the whole stack, so that the optimizer finds its moments by the parameter.

    Args:
        weight: the parameter, or one of its moments.
        key: ``...experts.linear_fc1.weight``, or with ``separate`` a name with ``{expert}`` in it.
        shard: what of the experts this rank holds.
        replica_id: which copy this rank holds.
        sharded_offsets: axes in front, those of the layers.
        shape: ``[m, out, in]``, also of a parameter that is ``[m * out, in]``, or that of a bias,
            ``[m, out]``. Megatron has biases only where there is one tensor rank.
        is_fc1: F is ``out``, else ``in``.
        gated: gate and up are two halves of fc1's ``out`` and are stored as two parts.
        separate: a key for each expert (``singleton_local_shards``) in place of one global tensor.
    """
    axes, local = len(sharded_offsets), shape[0]
    rank, ranks = shard.tensor_rank, shard.tensor_ranks
    gated = gated and is_fc1

    def parts(name: str, tensor: Tensor, is_stack: bool) -> list[ShardedTensor]:
        # The stack is one shard of the expert axis; a single expert has no such axis.
        experts = (axes, shard.expert_rank, shard.expert_ranks)
        front = (*sharded_offsets, experts) if is_stack else sharded_offsets
        axis = axes + is_stack + (not is_fc1 and len(shape) == 3)
        if not gated:
            named = [(name, (axis, rank, ranks))]
        elif is_stack:
            named = [(name, (axis, half * ranks + rank, 2 * ranks)) for half in (0, 1)]
        else:
            named = [(f"{name}_{half}", (axis, rank, ranks)) for half in "wv"]
        pieces = tensor.chunk(2, int(is_stack)) if gated else (tensor,)  # itself, not a view
        return [
            ShardedTensor.from_rank_offsets(
                part, piece, *front, offset, replica_id=replica_id, prepend_axis_num=axes
            )
            for (part, offset), piece in zip(named, pieces, strict=True)
        ]

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: ReplicaId, flattened_range: Any) -> list:
        tensor = tensor.view(shape)
        if not separate:
            return parts(key, tensor, True)
        first = shard.expert_rank * local
        return [
            part
            for i in range(local)
            for part in parts(key.format(expert=first + i), tensor[i], False)
        ]

    @torch.no_grad()
    def merge(loaded: list) -> Tensor:
        pieces = [torch.as_tensor(piece) for piece in loaded]
        if not separate:
            return torch.cat(pieces, dim=1).view(weight.shape)
        step = 2 if gated else 1
        experts = [torch.cat(pieces[i : i + step], dim=0) for i in range(0, len(pieces), step)]
        return torch.stack(experts).view(weight.shape)

    if not gated and not separate and weight.shape == shape:
        return parts(key, weight, True)[0]
    return ShardedTensorFactory(key, weight, build, merge, replica_id)


def empty_extra_states(
    key: str, local_key: str, experts: int, shard: ExpertShard, replica_id: ReplicaId,
    sharded_offsets: Offsets = (), *, separate: bool = False,
) -> ShardedStateDict:  # fmt: skip
    """The empty objects that Megatron's linear layers keep in a checkpoint and ask for.

    Args:
        key: ``...experts.linear_fc1._extra_state``, as in :func:`sharded_stack`.
        local_key: prefix of the keys in this rank's dictionary; the expert's number is appended.
        experts: m, experts on a rank.
        shard: what of the experts this rank holds.
        replica_id: which copy this rank holds.
        sharded_offsets: axes in front.
        separate: as in :func:`sharded_stack`.
    """
    states: ShardedStateDict = {}
    for i in range(experts):
        expert = shard.expert_rank * experts + i
        axis = () if separate else ((len(sharded_offsets), expert, shard.expert_ranks * experts),)
        states[f"{local_key}{i}"] = make_sharded_object_for_checkpoint(
            None, key.format(expert=expert), (*sharded_offsets, *axis), replica_id
        )
    return states
