"""The device-side shape metadata of one dispatch: which token-expert pair sits in which row.

Every shape is decided from the configuration; everything that depends on the routing stays in
device tensors. Rows are grouped by expert, each group padded to the row alignment, and inside a
group ordered by (source rank, token, k), which is the order of Megatron's own permutation.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_STEPS = 32


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: fp32, or ``dtype`` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def share_of(share: float, whole: int) -> int:
    """``ceil(share * whole)`` in integers, the share rounded to millionths once."""
    return -(-round(share * 10**6) * whole // 10**6)


def round_rows(rows: int, alignment: int = 1) -> int:
    """A row count rounded up to one of 32 sizes between two powers of two.

    Buffers then come in few sizes, so that freed ones fit later requests; at most 1/32 more rows,
    and up to a multiple of the alignment.
    """
    step = max(1, (1 << max(rows - 1, 0).bit_length()) // (2 * _STEPS))
    return -(-(-(-rows // step) * step) // alignment) * alignment


@dataclass(frozen=True)
class RowMap:
    """Rows of a buffer and the tokens that they are copies of, both ways."""

    row_src: Tensor
    """int32 ``[B]``, the pair ``n * K + k`` that sits in a row, ``N * K`` in an empty one."""
    row_of: Tensor
    """int32 ``[N, copies]``, the rows with copies of a token, ``B`` for none: K of them, or one for
    each rank that it is sent to."""
    pairs_per_token: int
    """K; ``row_src // K`` is the token."""
    used: Tensor | None = None
    """int32 ``[1]``, rows in use; nothing reads those behind. None if all are."""

    @property
    def token_of_row(self) -> Tensor:
        """int32 ``[B]``: the token that sits in a row, N in an empty row."""
        return self.row_src // self.pairs_per_token


@dataclass(frozen=True)
class DispatchLayout:
    """Where the pairs of one dispatch are computed on this rank. B rows, G groups."""

    rows: RowMap
    """The map between rows and pairs; its ``row_of`` is ``[N, K]``."""
    group_rows: Tensor
    """int64 ``[G]``, pairs of each group, before the buffer's limit."""
    padded_rows: Tensor
    """int64 ``[G]``, the same rounded up to the row alignment; 0 stays 0."""
    ends: Tensor
    """int32 ``[G]``, end of each padded group, not above B: what ``grouped_mm`` takes."""
    need: Tensor
    """int64 scalar, rows that would hold everything."""
    dropped: Tensor
    """int64 scalar, pairs without a row; above 0 only if ``over``."""

    @property
    def over(self) -> Tensor:
        """Bool scalar, ``need > B``."""
        return self.need > self.rows.row_src.shape[0]


def histogram(index: Tensor, size: int) -> Tensor:
    """int64 ``[size]``, how often each number below ``size`` is in a vector of int64."""
    return index.new_zeros(size).scatter_add_(0, index, torch.ones_like(index))


def place_groups(size: Tensor, num_rows: int, alignment: int) -> tuple[Tensor, Tensor, Tensor]:
    """Put groups of these sizes one after the other, each padded to a multiple of ``alignment``.

    Gives first row and end of each group as if there were room for all, and how many rows of each
    are behind row B; all int64 ``[..., G]``, as ``size``.
    """
    padded = size if alignment == 1 else (size + (alignment - 1)) // alignment * alignment
    ends = padded.cumsum(-1)
    starts = ends - padded
    placed = (starts + size).clamp(max=num_rows) - starts.clamp(max=num_rows)
    return starts, ends, size - placed


def build_layout(
    groups: Tensor, num_groups: int, num_rows: int, alignment: int = 1
) -> DispatchLayout:
    """Lay out the pairs that this rank computes.

    What does not fit ``num_rows`` is dropped from the last groups first, the same on every run.

    Args:
        groups: integer ``[N, K]``, the local group of each pair; G for pairs that are computed
            elsewhere or do not exist. Tokens are in the order of their source ranks.
        num_groups: G, experts and clone slots on this rank.
        num_rows: B, rows of the buffer.
        alignment: rows of each group are padded to a multiple of this.
    """
    tokens, topk = groups.shape
    pairs = tokens * topk
    key = groups.reshape(pairs)
    # The pairs that are not here form a last group, from row B on.
    size = histogram(key.to(torch.int64), num_groups + 1)
    group_rows = size[:num_groups]
    starts, ends, behind = place_groups(group_rows, num_rows, alignment)
    padded_rows = ends - starts
    starts = torch.cat((starts, starts.new_full((1,), num_rows)))
    order = key.argsort(stable=True)
    # The n-th pair in this order is n rows behind row 0, but for what the groups before it take.
    shift = (starts - (size.cumsum(0) - size)).index_select(0, key.index_select(0, order))
    row = shift.add_(torch.arange(pairs, device=key.device)).clamp_(max=num_rows)
    row_src = order.new_full((num_rows + 1,), pairs).scatter_(0, row, order)[:num_rows]
    row_of = torch.empty_like(row).scatter_(0, order, row)
    need = ends[-1]
    ends = ends.clamp(max=num_rows).int()
    return DispatchLayout(
        rows=RowMap(row_src.int(), row_of.view(tokens, topk).int(), topk, used=ends[-1:]),
        group_rows=group_rows,
        padded_rows=padded_rows,
        ends=ends,
        need=need,
        dropped=behind.sum(),
    )


@dataclass(frozen=True)
class PairCounts:
    """Pairs of one call for each physical expert, int64 ``[R, G]``; known before tokens travel."""

    total: Tensor  # from all source ranks
    below: Tensor  # from the ranks below this one
    own: Tensor  # from this rank

    @classmethod
    def of(cls, counts: Tensor, rank: int) -> Self:
        """From what each source rank sends, int64 ``[R, R * G]``."""
        below = (counts.cumsum(0) - counts)[rank]  # of one shape on all ranks
        shape = len(counts), -1
        return cls(counts.sum(0).view(shape), below.view(shape), counts[rank].view(shape))


@dataclass(frozen=True)
class PairPlaces:
    """Where the pairs of one source rank go, and what comes to it. B rows on each of R ranks."""

    place: Tensor
    """int32 ``[T, K]``, ``r * (B + 1) + row`` for a row of rank ``r``; row B of this rank where a
    pair has none."""
    received: Tensor
    """int32 ``[B]``, of each row of this rank its own number, B if it is empty."""
    ends: Tensor
    """int32 ``[G]``, end of each padded group of this rank, not above B."""
    need: Tensor
    """int64 scalar, rows that would hold everything that this rank computes."""
    dropped: Tensor
    """int64 scalar, pairs without a row on this rank."""


def place_pairs(
    experts: Tensor, counts: PairCounts, rank: int, num_rows: int, alignment: int = 1
) -> PairPlaces:
    """Find, at its source, the row of each pair that :func:`build_layout` finds where it arrives.

    ``experts`` are integer ``[T, K]``, physical ones ``r * G + g``, ``R * G`` for none;
    ``counts.own`` is their histogram. ``rank`` is this source rank, ``num_rows`` B.
    """
    num_groups = counts.total.shape[1]
    starts, ends, behind = place_groups(counts.total, num_rows, alignment)
    # Of each expert the first row of this source; the pairs without one begin at row B.
    first = (starts + counts.below).reshape(-1)
    first = torch.cat((first, first.new_full((1,), num_rows)))
    sent = counts.own.reshape(-1).cumsum(0)
    sent = torch.cat((sent.new_zeros(1), sent))
    key = experts.reshape(-1)
    order = key.argsort(stable=True)
    expert = key.index_select(0, order).to(torch.int64)
    row = (first - sent).index_select(0, expert).add_(torch.arange(key.numel(), device=key.device))
    stride = num_rows + 1
    place = expert // num_groups * stride + row
    place.masked_fill_(row >= num_rows, rank * stride + num_rows)
    place = torch.empty_like(place).scatter_(0, order, place)

    row = torch.arange(num_rows, device=key.device)
    filled = (starts + counts.total)[rank]
    filled = torch.cat((filled, filled.new_zeros(1)))
    filled = filled.index_select(0, torch.searchsorted(ends[rank], row, right=True))
    return PairPlaces(
        place=place.view(experts.shape).int(),
        received=row.masked_fill_(row >= filled, num_rows).int(),
        ends=ends[rank].clamp(max=num_rows).int(),
        need=ends[rank, -1],
        dropped=behind[rank].sum(),
    )
