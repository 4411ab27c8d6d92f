"""The stand-ins of CUDA kernels compute what a loop over tokens does."""

import kernel_stand_ins as stand_ins
import pytest
import torch
import torch.nn.functional as F
from megatron.core.ssm.gated_delta_net.common import torch_chunk_gated_delta_rule
from torch import Tensor

TOKENS, HEADS, WIDTH, GROUPS, STATE = 7, 4, 3, 2, 5


def convolved(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Of one sequence ``[s, d]``."""
    rows = []
    for t in range(len(x)):
        row = bias.clone()
        for back in range(min(t + 1, weight.size(1))):
            row += weight[:, -1 - back] * x[t - back]
        rows.append(F.silu(row))
    return torch.stack(rows)


def test_a_mamba_layer() -> None:
    """The state of each head, token by token."""
    inner, state = HEADS * WIDTH, GROUPS * STATE
    kwargs = {"generator": torch.Generator().manual_seed(1), "dtype": torch.float64}
    zxbcdt = torch.randn(2, TOKENS, 2 * inner + 2 * state + HEADS, **kwargs)
    weight, bias = torch.randn(inner + 2 * state, 3, **kwargs), torch.randn(1, **kwargs)
    bias = bias.expand(inner + 2 * state)
    dt_bias, d, a = torch.randn(HEADS, **kwargs), torch.randn(HEADS, **kwargs), -torch.ones(HEADS)
    a = a * torch.rand(HEADS, **kwargs)
    found = stand_ins.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, a, d, activation="silu", headdim=WIDTH, ngroups=GROUPS
    )
    for sequence, rows in zip(zxbcdt, found, strict=True):
        mixed = convolved(sequence[:, inner : 2 * inner + 2 * state], weight, bias)
        for head in range(HEADS):
            kept = torch.zeros(WIDTH, STATE, dtype=torch.float64)
            own = slice(head * WIDTH, (head + 1) * WIDTH)
            first = inner + head // (HEADS // GROUPS) * STATE
            for t in range(TOKENS):
                dt = F.softplus(sequence[t, -HEADS + head] + dt_bias[head])
                x, b = mixed[t, own], mixed[t, first : first + STATE]
                c = mixed[t, first + state : first + state + STATE]
                kept = (dt * a[head]).exp() * kept + dt * x[:, None] * b
                wanted = (kept @ c + d[head] * x) * F.silu(sequence[t, own])
                torch.testing.assert_close(rows[t, own], wanted, rtol=1e-12, atol=1e-12)


def test_a_gated_delta_net() -> None:
    """Megatron's reference, which takes the kernel's place, and the norm of its keys."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, TOKENS, HEADS, WIDTH, generator=generator) for _ in range(3))
    k = stand_ins.l2norm(k)
    assert k.norm(dim=-1).sub(1).abs().max() < 1e-5
    decay, beta = (torch.rand(1, TOKENS, HEADS, generator=generator) for _ in range(2))
    found, _ = torch_chunk_gated_delta_rule(q, k, v, g=-decay, beta=beta, chunk_size=4)
    for head in range(HEADS):
        kept = torch.zeros(WIDTH, WIDTH)
        for t in range(TOKENS):
            kept = kept * (-decay[0, t, head]).exp()
            error = v[0, t, head] - k[0, t, head] @ kept
            kept = kept + beta[0, t, head] * torch.outer(k[0, t, head], error)
            wanted = q[0, t, head] @ kept / WIDTH**0.5
            assert found[0, t, head].tolist() == pytest.approx(wanted.tolist(), rel=1e-4, abs=1e-6)


def test_norms() -> None:
    """Over groups of features, and with a weight that is added to one."""
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    norm = stand_ins.GroupedRMSNorm(6, eps=0.0, group_size=3, dtype=torch.float32)
    halves = [half / half.square().mean(-1, keepdim=True).sqrt() for half in x.split(3, -1)]
    torch.testing.assert_close(norm(x), torch.cat(halves, -1))
