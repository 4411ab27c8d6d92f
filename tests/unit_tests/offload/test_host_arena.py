import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_echo.offload.host_arena import HostArena, Lease, size_class


def allocate(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


@given(st.integers(1, 1 << 40))
def test_size_classes_waste_at_most_an_eighth(nbytes: int) -> None:
    size = size_class(nbytes)
    assert nbytes <= size
    assert size == 512 or 8 * (size - nbytes) <= nbytes
    assert size_class(size) == size
    assert size_class(nbytes + 1) >= size


def test_random_loans() -> None:
    """Blocks on loan never overlap, the sums are right, and repetition allocates nothing."""
    arena = HostArena(allocate, None, 1 << 16)
    counts = []
    for _ in range(3):
        drawn, loans = random.Random(1), []
        for _ in range(300):
            if loans and drawn.random() < 0.45:
                arena.give_back(loans.pop(drawn.randrange(len(loans))))
            else:
                lease = arena.lease(drawn.randrange(1, 1 << 14))
                assert lease is not None
                loans.append(lease)
            spans = sorted((x.block.data_ptr(), x.block.numel()) for x in loans)
            for (start, size), (following, _) in itertools.pairwise(spans):
                assert start + size <= following
            assert arena.leased_bytes == sum(size for _, size in spans) <= arena.allocated_bytes
        for lease in loans:
            arena.give_back(lease)
        counts.append(arena.allocations)
    assert counts[0] == counts[1] == counts[2]
    assert arena.leased_bytes == 0


@pytest.mark.parametrize("capacity", [0, 511, 512, 5000, 1 << 20])
def test_the_cap_holds(capacity: int) -> None:
    arena = HostArena(allocate, capacity, 4096)
    loans: list[Lease] = []
    while len(loans) < 3000:
        lease = arena.lease(512)
        if lease is None:
            break
        loans.append(lease)
    assert len(loans) == capacity // 512
    assert arena.allocated_bytes <= capacity
    if loans:
        arena.give_back(loans[0])
        assert arena.lease(500) is loans[0]


def test_the_guard_stays_with_the_block() -> None:
    arena = HostArena(allocate, None, 4096)
    lease = arena.lease(100)
    assert lease is not None
    assert lease.guard is None
    lease.guard = "last read"
    arena.give_back(lease)
    again = arena.lease(200)
    assert again is not None
    assert again.guard == "last read"


@pytest.mark.parametrize("capacity", [None, 100 << 20, 600 * 10**6, 3 << 30, 21 << 30])
@pytest.mark.parametrize("nbytes", [537_000_000, 33 << 20, 5000])
def test_what_is_counted_is_what_is_pinned(capacity: int | None, nbytes: int) -> None:
    """PyTorch rounds each allocation of pinned memory up to a power of two."""
    pinned = 0

    def allocate_pinned(size: int) -> torch.Tensor:
        nonlocal pinned
        pinned += 1 << (size - 1).bit_length()
        return torch.empty(size, dtype=torch.uint8, device="meta")

    arena = HostArena(allocate_pinned, capacity, 50_000_000)
    lent = [arena.lease(size) for size in [nbytes, 1000] * 24]
    assert arena.allocated_bytes == pinned
    if capacity is not None:
        assert pinned <= capacity
    if None not in lent:
        assert pinned <= max(1.3 * arena.leased_bytes, 64 << 20)


def test_the_rest_of_a_slab_is_cut_later() -> None:
    """Also when a larger block needed a slab of its own meanwhile."""
    arena = HostArena(allocate, None, 4096)
    for nbytes in (512, 3 << 20, 3584, 1 << 20):
        arena.lease(nbytes)
    assert arena.allocated_bytes == arena.leased_bytes == 4096 + (4 << 20)
