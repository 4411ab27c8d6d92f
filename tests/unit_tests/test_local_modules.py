from pathlib import Path

import launch
import pytest
import torch
from megatron.core.transformer import TransformerConfig

from megatron_echo.local_modules import LocalNorm

WORKERS = Path(__file__).resolve().parent / "workers"


def config(**fields: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **fields)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norm_is_torchs_with_the_mark_of_sequence_parallelism(kind, sequence_parallel) -> None:
    settings = config(normalization=kind)
    settings.sequence_parallel = sequence_parallel
    norm = LocalNorm(settings, 8, eps=1e-5)
    assert type(norm) is getattr(torch.nn, kind)
    assert norm.eps == 1e-5
    assert all(p.sequence_parallel is sequence_parallel for p in norm.parameters())
    x = torch.randn(3, 8)
    torch.testing.assert_close(norm(x), getattr(torch.nn, kind)(8, eps=1e-5)(x))


def test_norm_refuses_what_torch_does_not_have() -> None:
    with pytest.raises(ValueError, match=r"--apply-layernorm-1p needs Transformer Engine"):
        LocalNorm(config(layernorm_zero_centered_gamma=True), 8)
    settings = config()
    settings.normalization = "L2Norm"
    with pytest.raises(ValueError, match=r"--normalization L2Norm has no local module"):
        LocalNorm(settings, 8)


@pytest.mark.parametrize("ranks", [2, 3])
def test_context_parallel_attention_is_attention(ranks: int) -> None:
    """Forward and backward over the ranks equal one rank's, grouped queries and wide values too."""
    launch.run([], ranks, script=WORKERS / "context_parallel_attention.py").check()
