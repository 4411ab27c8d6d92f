"""How partial sums travel back over the all-gather, on pretended ranks."""

import pytest
import torch
from torch import Tensor

from megatron_echo.dispatch.transports import AllGatherTransport, all_gather


class Group:
    """Nine ranks, this is the first."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_sums_are_added_wide(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would be left of the ones if each addition were rounded."""
    first = 256 if dtype == torch.bfloat16 else 2048
    parts = torch.ones(9, 1, 4, dtype=dtype)
    parts[0] = first
    travelled: list[torch.dtype] = []

    def travels(tensor: Tensor, _: Group) -> Tensor:
        travelled.append(tensor.dtype)
        return tensor if len(tensor) == 9 else tensor.expand(9, -1)

    for name in ("exchange", "gather"):
        monkeypatch.setattr(all_gather, name, travels)
    partial = parts.flatten(0, 1).requires_grad_()
    total = AllGatherTransport(Group(), 1).send_back(partial, None)  # type: ignore[arg-type]
    assert total.dtype == torch.float32
    assert (total == first + 8).all()
    total.sum().backward()
    assert travelled == [dtype, dtype]
    assert partial.grad is not None
    assert (partial.grad == 1).all()


def test_wide_sums_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before, with the same bits: fp32 and wider, and with the flag."""
    seen: list[torch.dtype] = []

    def reduce_scatter(tensor: Tensor, _: Group) -> Tensor:
        seen.append(tensor.dtype)
        return tensor[:1]

    monkeypatch.setattr(all_gather, "reduce_scatter", reduce_scatter)
    for dtype in (torch.float32, torch.float64):
        AllGatherTransport(Group(), 1).send_back(torch.ones(9, 4, dtype=dtype), None)  # type: ignore[arg-type]
    assert seen == [torch.float32, torch.float64]
