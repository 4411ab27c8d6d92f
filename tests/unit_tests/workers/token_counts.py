"""EchoMoELayer where ranks bring different numbers of tokens; the argument names a check.

The reference is the dense loop of ``moe_layer.py`` over 64 tokens a rank, of which those that a
rank does not bring choose no expert.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_cases import HIDDEN, forced
from torch import Tensor
from unit_tests.workers import moe_layer
from unit_tests.workers.moe_layer import (
    RESULTS,
    Problem,
    build,
    dense,
    errors,
    main,
    problem,
    report,
)

from megatron_echo import cpu_backend
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.step.overflow import UnevenTokensError
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

MOST = 64
LENGTHS = (0, 1, 7, MOST)
LOSSES: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.2, 0.3],
    "moe_z_loss_coeff": 0.1,
}


def shortened(case: Problem, lengths: list[int]) -> Problem:
    """Only the first tokens of each rank have experts."""
    exists = torch.cat([torch.arange(MOST) < length for length in lengths])[:, None]
    chosen = case.chosen & exists
    return replace(case, chosen=chosen, probs=torch.where(chosen, case.probs, 0))


def run_first(layer: EchoMoELayer, case: Problem, tokens: int) -> dict[str, Tensor]:
    """The results of this rank's first tokens; zeros for the others."""
    mine = case.mine()
    hidden = mine.hidden[:tokens, None].clone().requires_grad_()
    probs = mine.probs[:tokens].clone().requires_grad_()
    fc1, fc2 = layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight
    fc1.grad = fc2.grad = None
    with no_host_sync("raise"):
        output, _ = forced(layer, probs, mine.chosen[:tokens])(hidden)
        output.backward(mine.weight[:tokens, None])
    assert output.shape == hidden.shape
    found = [output.detach(), *(t.grad for t in (hidden, probs, fc1, fc2) if t.grad is not None)]
    for place, tensor in enumerate(found[:3]):
        found[place] = tensor.new_zeros(MOST, tensor.shape[-1])
        found[place][:tokens] = tensor.view(tokens, tensor.shape[-1])
    return dict(zip(RESULTS, found, strict=True))


def check_dense() -> None:
    """Every call of a layer has other numbers; with clones and without, on every transport."""
    ranks, worst = dist.get_world_size(), 0.0
    for wire, slots in itertools.product(moe_layer.TRANSPORTS, (0, 2)):
        layer = build(
            2, torch.float64, moe_echo_token_transport=wire, moe_num_echo_experts=slots * ranks,
            moe_echo_max_tokens_per_rank=MOST, moe_received_token_capacity=float(ranks),
        )  # fmt: skip
        shifts = range(len(LENGTHS))
        for shift, kind in moe_layer.thinned(itertools.product(shifts, ("hot", "random"))):
            lengths = [LENGTHS[(rank + shift) % len(LENGTHS)] for rank in range(ranks)]
            case = shortened(problem(kind, 2, torch.float64, tokens=MOST), lengths)
            found = run_first(layer, case, lengths[dist.get_rank()])
            worst = max(worst, *errors(found, dense(layer, case)).values())
        StepEnd.of(layer.config).overflow.check()
    assert worst <= 1e-12, worst
    report("worst error", {"fp64": f"{worst:.1e}"})


def check_padding() -> None:
    """Tokens between which padding stands have the output, losses and gradients of those alone."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    tokens = (3, 11, 5, 0)[dist.get_rank()]
    places = torch.randperm(MOST, generator=generator)[:tokens].sort().values
    hidden = torch.randn(tokens, 1, HIDDEN, dtype=torch.float64, generator=generator)
    padded = torch.randn(MOST, 1, HIDDEN, dtype=torch.float64, generator=generator)
    padded[places] = hidden
    mask = torch.ones(1, MOST, dtype=torch.bool)
    mask[0, places] = False
    results = []
    for padding_mask in (None, mask):
        layer = build(
            2, torch.float64, moe_router_dtype="fp64", calculate_per_token_loss=True, **LOSSES,
            moe_echo_max_tokens_per_rank=MOST, moe_num_echo_experts=2 * dist.get_world_size(),
        )  # fmt: skip
        leaf = (hidden if padding_mask is None else padded).clone().requires_grad_()
        output, _ = layer(leaf, padding_mask=padding_mask)
        assert leaf.shape == output.shape
        rows = slice(None) if padding_mask is None else places
        output[rows].square().sum().backward()
        parameters = list(layer.parameters())
        for parameter in parameters:
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
        StepEnd.of(layer.config).overflow.check()
        assert leaf.grad is not None
        results.append([output[rows], leaf.grad[rows], *(p.grad for p in parameters)])
        if padding_mask is not None:
            assert not output[mask[0]].any()
            assert not leaf.grad[mask[0]].any()
    for alone, between in zip(*results, strict=True):
        torch.testing.assert_close(between, alone, rtol=1e-12, atol=1e-12)


def check_bounds() -> None:
    """More tokens than the bound stop all ranks; without it ranks must bring as many."""
    for wire, too_many in itertools.product(moe_layer.TRANSPORTS, ((1, 0), (2, 2))):
        layer = build(
            2, torch.float64, moe_echo_max_tokens_per_rank=MOST, moe_echo_token_transport=wire,
            moe_num_echo_experts=2 * dist.get_world_size(),
        )  # fmt: skip
        check, rank = StepEnd.of(layer.config).overflow, dist.get_rank()
        words = f"A rank brings {MOST + too_many[0]} tokens .*per-rank is {MOST}. Make it"
        tokens = MOST + too_many[min(rank, 1)]
        hidden = torch.ones(tokens, 1, HIDDEN, dtype=torch.float64, requires_grad=True)
        output, _ = layer(hidden)
        output.sum().backward()
        assert output.shape == hidden.shape
        assert not output[MOST:].any()
        with pytest.raises(UnevenTokensError, match=words):
            check.check()
        layer(hidden[:MOST])
        check.check()
        layer.eval()
        with pytest.raises(ValueError, match=rf"brings {MOST + 1} tokens .* is {MOST}\. Make it"):
            layer(hidden.new_zeros(MOST + 1, 1, HIDDEN))  # no step ends an evaluation
    layer = build(2, torch.float64)
    check = StepEnd.of(layer.config).overflow
    check.record_tokens(dist.get_rank(), layer.ep_group)
    with pytest.raises(UnevenTokensError, match="or give --moe-echo-max-tokens-per-rank"):
        check.check()


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main(globals())
