"""The Triton planner on a GPU against the torch reference, bit for bit."""

import pytest
import torch

from megatron_echo.planner import plan_clones
from megatron_echo.planner.balance import plan_clones_reference

pytestmark = pytest.mark.gpu
FIELDS = ("slot_expert", "allocation", "load_before", "load_after", "num_clones")


@pytest.mark.parametrize("shape", [(2, 4), (8, 64), (64, 256), (48, 240), (64, 128), (256, 512)])
@pytest.mark.parametrize("slots", [1, 2, 4, 16])
def test_the_kernel_equals_the_reference(shape: tuple[int, int], slots: int) -> None:
    for seed, settings in enumerate([(0.0, 0, None), (0.02, 100, None), (0.02, 0, shape[0] // 2)]):
        generator = torch.Generator().manual_seed(seed)
        popularity = torch.rand(shape[1], generator=generator) ** 6
        counts = (torch.rand(shape, generator=generator) * popularity * 4096).long()
        expected = plan_clones_reference(counts, slots, *settings)
        plan = plan_clones(counts.cuda(), slots, *settings)
        for name in FIELDS:
            assert torch.equal(getattr(plan, name).cpu(), getattr(expected, name)), name
        assert torch.equal(plan.split_for(1).cpu(), expected.split_for(1))


@pytest.mark.parametrize(("shape", "slots"), [((64, 128), 1), ((64, 256), 2), ((256, 512), 1)])
def test_the_same_bits_every_time(shape: tuple[int, int], slots: int) -> None:
    """Fifty launches on one input, counts past 2^31: a race between warps would show."""
    generator = torch.Generator().manual_seed(1)
    popularity = torch.rand(shape[1], generator=generator, dtype=torch.float64) ** 6
    counts = torch.rand(shape, generator=generator, dtype=torch.float64) * popularity * 2**40
    expected = plan_clones_reference(counts.long(), slots)
    for _ in range(50):
        plan = plan_clones(counts.long().cuda(), slots)
        assert torch.equal(plan.allocation.cpu(), expected.allocation)


def test_planning_reads_nothing_on_the_host() -> None:
    counts = torch.randint(0, 99, (8, 32), device="cuda")
    plan_clones(counts, 4)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        plan_clones(counts, 4).split_for(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
