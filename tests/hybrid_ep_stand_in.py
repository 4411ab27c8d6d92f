"""A module with the signature of DeepEP's ``HybridEPBuffer``, over collectives of torch.

It has what the adapter uses of the branch hybrid-ep: the rows, the padding, the limit and what is
dropped beyond it are as documented there; what nobody may read is NaN. It takes any dtype.
"""

import sys
import types

import torch
import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """From now on ``import deep_ep`` finds the stand-in."""
    module = types.ModuleType("deep_ep")
    module.HybridEPBuffer = HybridEPBuffer  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module


class HybridEPBuffer:
    """Over a group of R ranks with G experts each."""

    made = 0

    def __init__(
        self,
        group: dist.ProcessGroup,
        hidden_dim: int,
        max_num_of_tokens_per_rank: int,
        num_local_experts: int,
        use_fp8: bool = False,
        num_sms_dispatch_api: int | None = None,
        num_sms_combine_api: int | None = None,
    ) -> None:
        assert not use_fp8
        self.group, self.hidden_dim = group, hidden_dim
        self.experts = num_local_experts
        HybridEPBuffer.made += 1

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_of_experts_per_rank: int | None = None,
        num_of_experts: int | None = None,
        use_fp8: bool | None = None,
        routing_map: Tensor | None = None,
        probs: Tensor | None = None,
        scaling_factor: Tensor | None = None,
        num_permuted_tokens: int | None = None,
        pad_multiple: int | None = None,
        handle: tuple | None = None,
        non_blocking: bool = False,
        fuse_permute_dispatch: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, tuple]:
        """Rows, their probabilities, no scales, padded rows of each expert, the handle."""
        assert hidden.is_contiguous()
        assert hidden.shape[1] == self.hidden_dim
        assert non_blocking, "would wait for the device"
        assert num_permuted_tokens is not None
        assert num_permuted_tokens % (pad_multiple or 1) == 0
        if handle is None:
            assert routing_map is not None
            assert routing_map.dtype == torch.bool
            assert routing_map.is_contiguous()
            assert routing_map.shape == (len(hidden), self.group.size() * self.experts)
            assert num_of_experts_per_rank == self.experts
            handle = self._plan(routing_map, num_permuted_tokens, pad_multiple or 1)
        source, expert, counts, tokens, _ = handle
        assert tokens == len(hidden)
        rows = self._fill(self._gather(hidden), source)
        row_probs = None
        if probs is not None:
            assert probs.dtype == torch.float32
            assert probs.is_contiguous()
            row_probs = self._fill(self._gather(probs).flatten()[:, None], expert)[:, 0]
        return rows, row_probs, None, counts, handle

    def combine_with_unpermute(
        self,
        *,
        hidden: Tensor,
        probs: Tensor | None = None,
        handle: tuple | None = None,
        pad_multiple: int | None = None,
        fuse_unpermute_combine: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The sums of the rows of each token, and the probabilities back in ``[T, R * G]``."""
        assert hidden.is_contiguous()
        assert handle is not None
        source, expert, _, tokens, _ = handle
        everyone = tokens * self.group.size()
        width = self.group.size() * self.experts
        combined = self._scatter(self._sums(hidden, source, everyone))
        if probs is None:
            return combined, None
        assert probs.dtype == torch.float32
        assert probs.is_contiguous()
        dense = self._sums(probs[:, None], expert, everyone * width)
        return combined, self._scatter(dense.view(everyone, width))

    def _plan(self, routing_map: Tensor, limit: int, multiple: int) -> tuple:
        """Token of each row and its place in the map: -1 in padding, -2 behind the last expert."""
        chosen = self._gather(routing_map.int())
        first, width = self.group.rank() * self.experts, chosen.shape[1]
        source, expert = torch.full((2, limit), -2)
        counts = torch.zeros(self.experts, dtype=torch.int64)
        row, overflow = 0, torch.zeros(1, dtype=torch.int32)
        for local in range(self.experts):
            tokens = chosen[:, first + local].nonzero().flatten()
            placed = tokens[: max(limit - row, 0)]
            overflow |= int(len(placed) < len(tokens))
            padded = min(-(-len(tokens) // multiple) * multiple, limit - row)
            source[row : row + padded] = expert[row : row + padded] = -1
            source[row : row + len(placed)] = placed
            expert[row : row + len(placed)] = placed * width + first + local
            counts[local] = padded
            row += padded
        return source, expert, counts, len(routing_map), overflow

    def _fill(self, values: Tensor, index: Tensor) -> Tensor:
        rows = values[index.clamp(min=0)]
        rows[index == -1] = 0
        rows[index == -2] = float("nan")
        return rows

    def _sums(self, rows: Tensor, index: Tensor, size: int) -> Tensor:
        used = index >= 0
        return rows.new_zeros(size, rows.shape[1]).index_add_(0, index[used], rows[used])

    def _gather(self, tensor: Tensor) -> Tensor:
        whole = tensor.new_empty(self.group.size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(whole, tensor, group=self.group)
        return whole

    def _scatter(self, tensor: Tensor) -> Tensor:
        part = tensor.new_empty(len(tensor) // self.group.size(), *tensor.shape[1:])
        dist.reduce_scatter_tensor(part, tensor, group=self.group)
        return part
