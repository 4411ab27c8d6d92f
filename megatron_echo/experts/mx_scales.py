"""Scales of MXFP8 where torch's grouped products read them: in tiles of 128 lines and 4 blocks.

A tile is 512 bytes: those of a line are together, and those of lines 32 apart beside each other.
Each group has tiles of its own, one row of them after the other, so that its lines are filled up
to 128, and in weight gradients its blocks to 4. How many tiles there are is known without the
groups; what lies between two groups multiplies nothing but zeros and must be no NaN.
"""

import torch
from torch import Tensor

_LINES, _BLOCKS, _APART = 128, 4, 32
_ROWS_OF_BLOCK = 32


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _tiles(scales: Tensor) -> Tensor:
    """``[..., n, k]`` bytes, filled up with zeros, to ``[..., n / 128, k / 4, 512]``."""
    lines, blocks = scales.shape[-2:]
    behind = (0, _up(blocks, _BLOCKS) - blocks, 0, _up(lines, _LINES) - lines)
    filled = torch.nn.functional.pad(scales, behind)
    tiles = filled.unflatten(-1, (-1, _BLOCKS)).unflatten(-3, (-1, _LINES // _APART, _APART))
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-3)


def _filled(ends: Tensor, size: int, multiple: int) -> tuple[Tensor, Tensor]:
    """Where each line of groups filled up to a multiple comes from, -1 for what is filled in.

    Args:
        ends: ``[G]``, end offset of each group.
        size: lines at most.
        multiple: of them.

    Returns:
        ``[N]``, N as many as there may be, and the ends of the filled groups.
    """
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    sizes = ends - starts
    filled_ends = ((sizes + multiple - 1) // multiple * multiple).cumsum(0)
    place = torch.arange(_up(size + len(ends) * (multiple - 1), multiple), device=ends.device)
    group = torch.searchsorted(filled_ends, place, right=True).clamp_(max=len(ends) - 1)
    inside = place - (filled_ends - (sizes + multiple - 1) // multiple * multiple)[group]
    return torch.where(inside < sizes[group], starts[group] + inside, -1), filled_ends


def _taken(scales: Tensor, index: Tensor, dim: int) -> Tensor:
    """Lines or blocks by number, zero for -1."""
    taken = scales.index_select(dim, index.clamp(min=0))
    return taken.masked_fill_((index < 0)[:, None] if dim == 0 else index < 0, 0)


def tiles_of_matrices(scales: Tensor) -> Tensor:
    """E8M0 ``[G, n, k]`` to ``[G, N]``."""
    return _tiles(scales.view(torch.uint8)).flatten(1).view(scales.dtype)


def tiles_of_rows(scales: Tensor, ends: Tensor) -> Tensor:
    """Of rows in groups.

    Args:
        scales: E8M0 ``[B, k]``.
        ends: int32 ``[G]``, end offset of each group.

    Returns:
        ``[N, K]``, k filled up to 4.
    """
    index, _ = _filled(ends, len(scales), _LINES)
    tiles = _tiles(_taken(scales.view(torch.uint8), index, 0))
    return tiles.view(len(index), -1).view(scales.dtype)


def tiles_of_columns(scales: Tensor, ends: Tensor) -> Tensor:
    """Of columns, whose blocks are in groups.

    Args:
        scales: E8M0 ``[n, B / 32]``.
        ends: int32 ``[G]``, end offset of each group of rows, multiples of 32.

    Returns:
        ``[N, K]``, n filled up to 128.
    """
    index, filled_ends = _filled(ends // _ROWS_OF_BLOCK, scales.shape[1], _BLOCKS)
    tiles = _tiles(_taken(scales.view(torch.uint8), index, 1))
    lines, blocks, size = tiles.shape
    # From rows of tiles over all groups to all the tiles of a group, row after row.
    tile_ends = filled_ends // _BLOCKS
    starts = torch.cat((tile_ends.new_zeros(1), tile_ends))
    place = torch.arange(lines * blocks, device=ends.device)
    group = torch.searchsorted(tile_ends * lines, place, right=True)
    width = torch.diff(starts, append=starts.new_full((1,), blocks)).clamp_(min=1)[group]
    inside = place - starts[group] * lines
    at = inside // width * blocks + starts[group] + inside % width
    return tiles.view(-1, size)[at].view(lines * _LINES, -1).view(scales.dtype)
