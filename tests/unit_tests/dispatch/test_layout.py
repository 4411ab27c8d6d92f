"""The layout of a dispatch against a recomputation in plain Python (property tests)."""

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from megatron_echo.dispatch.layout import (
    DispatchLayout,
    PairCounts,
    build_layout,
    place_pairs,
    round_rows,
)

many = settings(deadline=None, max_examples=200, print_blob=True)


@dataclass(frozen=True)
class Case:
    """Arguments of ``build_layout``, with the groups as nested lists."""

    groups: list[list[int]]
    num_groups: int
    num_rows: int
    alignment: int
    dtype: torch.dtype = torch.int32

    def layout(self, num_rows: int | None = None) -> DispatchLayout:
        return build_layout(
            torch.tensor(self.groups, dtype=self.dtype),
            self.num_groups,
            self.num_rows if num_rows is None else num_rows,
            self.alignment,
        )


@dataclass(frozen=True)
class Expected:
    """The same layout, as lists."""

    group_rows: list[int]
    padded_rows: list[int]
    ends: list[int]
    need: int
    dropped: int
    row_src: list[int]
    row_of: list[list[int]]


def plain(case: Case) -> Expected:
    """Walk over the groups and put one pair after the other."""
    tokens, topk = len(case.groups), len(case.groups[0])
    row_src = [tokens * topk] * case.num_rows
    row_of = [[case.num_rows] * topk for _ in range(tokens)]
    group_rows, padded_rows, ends = [], [], []
    start = dropped = 0
    for group in range(case.num_groups):
        row = start
        for token in range(tokens):
            for k in range(topk):
                if case.groups[token][k] != group:
                    continue
                if row < case.num_rows:
                    row_src[row], row_of[token][k] = token * topk + k, row
                else:
                    dropped += 1
                row += 1
        group_rows.append(row - start)
        padded_rows.append(-(-(row - start) // case.alignment) * case.alignment)
        start += padded_rows[-1]
        ends.append(min(start, case.num_rows))
    return Expected(group_rows, padded_rows, ends, start, dropped, row_src, row_of)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Few tokens and groups of many shapes; buffers too small, just right, and too large."""
    tokens = draw(st.integers(1, 24))
    topk, num_groups = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    alignment = draw(st.sampled_from([1, 4, 16]))
    # A small choice of groups leaves others empty; num_groups is a pair that is not here.
    choice = draw(st.sets(st.integers(0, num_groups), min_size=1))
    pair = st.sampled_from(sorted(choice))
    groups = draw(
        st.lists(st.lists(pair, min_size=topk, max_size=topk), min_size=tokens, max_size=tokens)
    )
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    case = Case(groups, num_groups, 1, alignment, dtype)
    need = plain(case).need
    num_rows = draw(st.one_of(st.integers(1, need + 20), st.just(max(need, 1))))
    return Case(groups, num_groups, num_rows, alignment, dtype)


@many
@given(cases())
def test_layout_is_the_plain_one(case: Case) -> None:
    """I1-I6: counts, need, drops, offsets, padding and both maps, for any buffer."""
    layout, expected = case.layout(), plain(case)
    tokens, topk, groups = len(case.groups), len(case.groups[0]), case.num_groups
    assert layout.group_rows.tolist() == expected.group_rows
    assert layout.padded_rows.tolist() == expected.padded_rows
    assert layout.ends.tolist() == expected.ends
    assert layout.need.item() == expected.need
    assert layout.over.item() == (expected.need > case.num_rows)
    assert layout.dropped.item() == expected.dropped
    assert layout.rows.row_src.tolist() == expected.row_src
    assert layout.rows.row_of.tolist() == expected.row_of
    assert layout.rows.pairs_per_token == topk
    assert layout.rows.token_of_row.tolist() == [pair // topk for pair in expected.row_src]

    shapes = {
        "group_rows": (torch.int64, (groups,)),
        "padded_rows": (torch.int64, (groups,)),
        "ends": (torch.int32, (groups,)),
        "need": (torch.int64, ()),
        "over": (torch.bool, ()),
        "dropped": (torch.int64, ()),
    }
    for name, (dtype, shape) in shapes.items():
        assert (getattr(layout, name).dtype, getattr(layout, name).shape) == (dtype, shape), name
    rows = layout.rows
    assert (rows.row_src.dtype, rows.row_src.shape) == (torch.int32, (case.num_rows,))
    assert (rows.row_of.dtype, rows.row_of.shape) == (torch.int32, (tokens, topk))
    assert rows.token_of_row.dtype == torch.int32


@many
@given(cases())
def test_properties_of_the_maps(case: Case) -> None:
    """I2-I5, stated without the recomputation."""
    layout = case.layout()
    tokens, topk = len(case.groups), len(case.groups[0])
    row_src, row_of = layout.rows.row_src.tolist(), layout.rows.row_of.flatten().tolist()
    placed = [(row, pair) for row, pair in enumerate(row_src) if pair < tokens * topk]
    assert len({pair for _, pair in placed}) == len(placed)
    assert all(row_of[pair] == row for row, pair in placed)
    assert sum(row < case.num_rows for row in row_of) == len(placed)
    assert len(placed) + layout.dropped.item() == layout.group_rows.sum().item()

    ends = layout.ends.tolist()
    assert ends == sorted(ends)
    assert ends[-1] == min(case.num_rows, layout.need.item())
    assert layout.rows.used is not None
    assert layout.rows.used.tolist() == ends[-1:]
    assert layout.need.item() == layout.padded_rows.sum().item()
    assert layout.over.item() or layout.dropped.item() == 0
    flat = [group for token in case.groups for group in token]
    for group, end in enumerate(ends):
        start = ends[group - 1] if group else 0
        assert start == case.num_rows or start % case.alignment == 0
        inside = [pair for row, pair in placed if start <= row < end]
        assert all(flat[pair] == group for pair in inside)
        assert inside == sorted(inside)  # a pair's number is (source, token, k) in one
        rows = [row for row, _ in placed if start <= row < end]
        assert rows == list(range(start, start + len(rows)))  # padding is behind, not between


@many
@given(cases(), st.integers(0, 30))
def test_a_larger_buffer_keeps_what_was_placed(case: Case, more: int) -> None:
    """I7: the same rows hold the same pairs; only what had no room is added."""
    small, large = case.layout(), case.layout(case.num_rows + more)
    assert torch.equal(large.rows.row_src[: case.num_rows], small.rows.row_src)
    had_a_row = small.rows.row_of < case.num_rows
    assert torch.equal(large.rows.row_of[had_a_row], small.rows.row_of[had_a_row])
    assert (large.rows.row_of[~had_a_row] >= case.num_rows).all()
    for name in ("group_rows", "padded_rows", "need"):
        assert torch.equal(getattr(large, name), getattr(small, name)), name
    assert large.dropped <= small.dropped


@many
@given(cases())
def test_a_buffer_of_exactly_what_is_needed(case: Case) -> None:
    """I7: nothing is dropped with need rows; with one less and no padding, one pair is."""
    need = int(case.layout().need)
    if need == 0:
        return
    exact = case.layout(need)
    assert not exact.over
    assert exact.dropped == 0
    assert exact.ends[-1] == need
    short = case.layout(need - 1)
    assert short.over
    if case.alignment == 1:
        assert short.dropped == 1
        lost = (short.rows.row_of == need - 1) & (exact.rows.row_of < need)
        last = max(group for token in case.groups for group in token if group < case.num_groups)
        assert [case.groups[n][k] for n, k in lost.nonzero().tolist()] == [last]


@many
@given(cases())
def test_padding_alone_never_overflows_an_aligned_buffer(case: Case) -> None:
    """With a multiple of the alignment as its size, it is over-full only if a pair is lost."""
    num_rows = round_rows(case.num_rows, case.alignment)
    layout = case.layout(num_rows)
    assert layout.over == (layout.dropped > 0)
    assert (layout.ends % case.alignment == 0).all()


@many
@given(cases(), st.integers(1, 4))
def test_all_ranks_together_compute_every_pair(case: Case, ranks: int) -> None:
    """I1: over the ranks, the groups hold all pairs, and the buffers all but the dropped ones."""
    per_rank = -(-(case.num_groups + 1) // ranks)
    experts = torch.tensor(case.groups)
    held, placed, dropped = 0, 0, 0
    for rank in range(ranks):
        local = experts - rank * per_rank
        groups = torch.where((local >= 0) & (local < per_rank), local, per_rank)
        layout = build_layout(groups, per_rank, case.num_rows, case.alignment)
        held += int(layout.group_rows.sum())
        placed += int((layout.rows.row_of < case.num_rows).sum())
        dropped += int(layout.dropped)
    assert held == experts.numel()
    assert placed == experts.numel() - dropped


@pytest.mark.parametrize("alignment", [1, 4, 16])
@pytest.mark.parametrize("num_rows", [1, 8])
def test_nothing_is_here(num_rows: int, alignment: int) -> None:
    """All pairs are computed elsewhere: empty groups, empty rows."""
    layout = build_layout(torch.full((6, 2), 3), 3, num_rows, alignment)
    assert layout.ends.tolist() == layout.padded_rows.tolist() == [0, 0, 0]
    assert layout.rows.row_src.tolist() == [12] * num_rows
    assert layout.rows.row_of.tolist() == [[num_rows] * 2] * 6
    assert (layout.need.item(), layout.over.item(), layout.dropped.item()) == (0, False, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_token(dtype: torch.dtype) -> None:
    """One token, one group, one row; and the next row is the first that is not used."""
    layout = build_layout(torch.zeros(1, 1, dtype=dtype), 1, 2)
    assert layout.rows.row_src.tolist() == [0, 1]
    assert layout.rows.row_of.tolist() == [[0]]
    assert layout.ends.tolist() == [1]


def test_an_example_by_hand() -> None:
    """Two sources of two tokens, three groups (the second empty), aligned to 4."""
    groups = torch.tensor([[0, 2], [3, 2], [2, 0], [0, 3]])
    layout = build_layout(groups, 3, 8, 4)
    assert layout.group_rows.tolist() == [3, 0, 3]
    assert layout.group_rows.tolist() == [3, 0, 3]
    assert layout.ends.tolist() == [4, 4, 8]
    assert layout.rows.row_src.tolist() == [0, 5, 6, 8, 1, 3, 4, 8]
    assert layout.rows.row_of.tolist() == [[0, 4], [8, 5], [6, 1], [2, 8]]
    # Two rows less: the last group loses its last pair, and padding counts as rows.
    short = build_layout(groups, 3, 6, 4)
    assert short.rows.row_of.tolist() == [[0, 4], [6, 5], [6, 1], [2, 6]]
    assert (short.need.item(), short.over.item(), short.dropped.item()) == (8, True, 1)


def test_many_pairs_are_the_same_on_every_run() -> None:
    """I8, at a size where a sort could choose another algorithm, with an overflow."""
    groups = torch.randint(0, 65, (4096, 8), generator=torch.Generator().manual_seed(0))
    first, second = (build_layout(groups, 64, 30000, 16) for _ in range(2))
    assert first.over
    assert torch.equal(first.rows.row_src, second.rows.row_src)
    assert torch.equal(first.rows.row_of, second.rows.row_of)
    pairs = first.rows.row_src[first.rows.row_src < groups.numel()]
    order = groups.flatten()[pairs] * groups.numel() + pairs
    assert (order.diff() > 0).all()


def test_round_rows() -> None:
    """Never less, at most 1/32 more, and 32 sizes between two powers of two."""
    rounded = [round_rows(rows) for rows in range(5000)]
    assert all(rows <= size <= rows * 33 // 32 for rows, size in enumerate(rounded))
    assert rounded == sorted(rounded)
    assert all(round_rows(size) == size for size in rounded)
    assert rounded[:65] == list(range(65))
    for power in range(5, 12):
        sizes = {size for size in rounded if 2**power < size <= 2 ** (power + 1)}
        assert len(sizes) == 32, power


@pytest.mark.parametrize("alignment", [1, 4, 16, 48, 256])
def test_round_rows_to_the_alignment(alignment: int) -> None:
    """The next multiple of the alignment, of what it is without."""
    for rows in range(3000):
        size = round_rows(rows, alignment)
        assert size % alignment == 0
        assert round_rows(rows) <= size < round_rows(rows) + alignment


def test_few_sizes_for_many_routings() -> None:
    """Loads of 28k to 39k rows: few buffer sizes, little waste; unrounded nearly all differ."""
    generator = torch.Generator().manual_seed(0)
    loads = torch.randint(28_000, 39_000, (3000,), generator=generator).tolist()
    sizes = [round_rows(load) for load in loads]
    assert len(set(loads)) > 2500
    assert len(set(sizes)) <= 17
    assert sum(sizes) / sum(loads) - 1 <= 0.016


@many
@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 4, 16]))
def test_sources_find_the_rows_that_receivers_would(
    data: st.DataObject, ranks: int, num_groups: int, alignment: int
) -> None:
    """``place_pairs`` at every source against ``build_layout`` at every rank."""
    tokens, topk = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3))
    pairs, none = ranks * tokens * topk, ranks * num_groups
    choice = data.draw(st.sets(st.integers(0, none), min_size=1))
    drawn = st.lists(st.sampled_from(sorted(choice)), min_size=pairs, max_size=pairs)
    experts = torch.tensor(data.draw(drawn), dtype=torch.int32).view(ranks, tokens, topk)
    num_rows = data.draw(st.integers(1, pairs + num_groups * (alignment - 1) + 1))
    counts = torch.stack([torch.bincount(e.flatten(), minlength=none + 1) for e in experts])
    places = [
        place_pairs(experts[rank], PairCounts.of(counts[:, :none], rank), rank, num_rows, alignment)
        for rank in range(ranks)
    ]
    stride = num_rows + 1
    found = torch.stack([part.place for part in places]).long()
    nowhere = torch.arange(ranks)[:, None, None] * stride + num_rows
    expected = nowhere.expand(found.shape)
    for rank in range(ranks):
        local = experts - rank * num_groups
        groups = torch.where((local >= 0) & (local < num_groups), local, num_groups)
        layout = build_layout(groups.view(-1, topk), num_groups, num_rows, alignment)
        row_of = layout.rows.row_of.view(found.shape).long()
        expected = torch.where(row_of < num_rows, rank * stride + row_of, expected)
        filled = layout.rows.row_src < pairs
        part = places[rank]
        own = torch.where(filled, torch.arange(num_rows), num_rows)
        assert torch.equal(part.received.long(), own)
        assert torch.equal(part.ends, layout.ends)
        assert (part.need, part.dropped) == (layout.need, layout.dropped)
        assert {part.place.dtype, part.received.dtype, part.ends.dtype} == {torch.int32}
    assert torch.equal(found, expected)
