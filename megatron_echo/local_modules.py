"""Modules for ``--transformer-impl local``, where Megatron's own ones refuse.

Without Transformer Engine, Megatron's norm refuses sequence parallelism, its attention refuses
context parallelism, packed sequences and MLA, and its hybrid stack has no final norm. These say yes
and otherwise are the stock modules: the same parameters, names and arithmetic.
"""

import copy
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_norm import LayerNormInterface
from torch import Tensor


class LocalNorm:
    """Builds ``torch.nn.LayerNorm`` or ``RMSNorm``, with sequence parallelism.

    All that this asks of a norm is the mark on its parameters: each tensor-parallel rank sees a
    part of the sequence, and Megatron sums the gradients of marked parameters over the group.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any
    ) -> LayerNormInterface:
        """Build the norm over the last dimension, of ``hidden_size`` features."""
        norms = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(
                f"--normalization {config.normalization} has no local module. "
                f"Use one of {', '.join(norms)}."
            )
        for flag, is_set in (
            ("--apply-layernorm-1p", config.layernorm_zero_centered_gamma),
            ("memory_efficient_layer_norm", config.memory_efficient_layer_norm),
        ):
            if is_set:
                raise ValueError(
                    f"{flag} needs Transformer Engine. Leave it out with --transformer-impl local."
                )
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class LocalHybridStack(HybridStack):
    """Megatron's stack of hybrid layers with a local norm at its end, as given by ``LocalNorm``."""

    def __init__(self, *args: Any, post_layer_norm: bool = True, **rest: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **rest)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            eps = self.config.layernorm_epsilon
            self.final_norm = LocalNorm(self.config, self.config.hidden_size, eps)


class LocalCoreAttention(DotProductAttention):
    """Megatron's ``DotProductAttention`` with context parallelism, packed sequences and MLA.

    Context parallelism: rank ``r`` of ``P`` holds chunks ``r`` and ``2P - 1 - r`` of the ``2P``
    chunks of each sequence (Megatron's balanced order). Keys and values are gathered over the
    group along the sequence, in rank order, and the causal mask compares the positions that the
    rows came from; the backward pass reduce-scatters. That costs ``P`` times the memory of ring
    attention for keys and values and is meant for correctness, not for long sequences.

    MLA: keys and values may have other widths than ``kv_channels``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        **kwargs: Any,
    ) -> None:
        stock_config = copy.copy(config)
        stock_config.context_parallel_size = 1
        super().__init__(stock_config, *args, **kwargs)
        self.config = config
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition
        self.cp_group = None
        if config.context_parallel_size > 1:
            if self.attn_mask_type != AttnMaskType.causal or config.window_size is not None:
                raise ValueError(
                    f"--context-parallel-size {config.context_parallel_size} with "
                    "--transformer-impl local supports causal attention over the whole sequence "
                    "only. Leave --window-size out, or install Transformer Engine."
                )
            given = getattr(self.pg_collection, "cp", None)
            self.cp_group = given or parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attention over the whole sequence for this rank's queries.

        ``query [s, b, n, k]``, ``key [s, b, g, k]`` and ``value [s, b, g, v]``, with ``s`` tokens
        on this context-parallel rank, give ``[s, b, n * v]``. Packed sequences come as ``[t, n,
        k]``, ``[t, g, k]`` and ``[t, g, v]``, one after the other, and each sees itself only.
        ``attention_mask`` is bool, True where a query must not look; under context parallelism the
        causal mask of the true positions takes its place.

        Raises:
            ValueError: packed sequences that are cut over ranks, or seen through a window.
        """
        if packed_seq_params is not None:
            attention_mask = self._packed_mask(len(query), packed_seq_params)
            query, key, value = (tensor[:, None] for tensor in (query, key, value))
        elif self.cp_group is not None:
            attention_mask = self._causal_mask(query.size(0), query.device)
            key = gather_from_sequence_parallel_region(key, group=self.cp_group)
            value = gather_from_sequence_parallel_region(value, group=self.cp_group)
        return super().forward(query, key, value, attention_mask, *args, **kwargs)

    def _packed_mask(self, rows: int, packed: PackedSeqParams) -> Tensor:
        """``[1, 1, t, t]``: True where the key is of another sequence, or after the query."""
        if self.cp_group is not None or self.config.window_size is not None:
            raise ValueError(
                "Packed sequences with --transformer-impl local need whole sequences, but "
                f"--context-parallel-size is {self.config.context_parallel_size} and --window-size "
                f"{self.config.window_size}. Leave both out, or install Transformer Engine."
            )
        ends = packed.cu_seqlens_q_padded
        ends = packed.cu_seqlens_q if ends is None else ends
        position = torch.arange(rows, dtype=ends.dtype, device=ends.device)
        sequence = torch.bucketize(position, ends, right=True)
        is_hidden = (sequence[:, None] != sequence) | (position[:, None] < position)
        return is_hidden[None, None]

    def _causal_mask(self, rows: int, device: torch.device) -> Tensor:
        """``[1, 1, s, s * P]``: True where the key's position is after the query's."""
        assert self.cp_group is not None
        ranks, own = self.cp_group.size(), self.cp_group.rank()
        chunk = torch.arange(rows // 2, device=device)
        positions = [
            torch.cat((chunk + r * (rows // 2), chunk + (2 * ranks - 1 - r) * (rows // 2)))
            for r in range(ranks)
        ]
        return (torch.cat(positions)[None, :] > positions[own][:, None])[None, None]
