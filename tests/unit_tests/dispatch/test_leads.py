"""Which pairs of a token travel for the others of the same rank, in symmetric memory."""

import torch

from megatron_echo.dispatch.transports.symmetric_memory import _leads

B = 5
STRIDE = B + 1
NONE = STRIDE + B  # this is rank 1


def test_the_first_pair_on_each_rank_leads() -> None:
    """By a loop, over places drawn at random, some without a row."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        place = torch.randperm(3 * B, generator=generator)[:12]
        place = (place // B * STRIDE + place % B).view(4, 3)
        place[torch.rand(4, 3, generator=generator) < 0.3] = NONE
        is_lead, told = _leads(place.int(), B)
        for token, places in enumerate(place.tolist()):
            for k, own in enumerate(places):
                lead, *rows = told.view(4, 3, -1)[token, k].tolist()
                if own == NONE:
                    assert not is_lead[token, k]
                    assert rows == [B] * 3
                    continue
                there = [p % STRIDE if p != NONE and p // STRIDE == own // STRIDE else B
                         for p in places]  # fmt: skip
                first = next(row for row in there if row != B)
                assert lead == first
                assert is_lead[token, k] == (own % STRIDE == first)
                assert rows == (there if is_lead[token, k] else [B] * 3)
