from pathlib import Path

import launch
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_echo.local_modules import LocalCoreAttention, LocalNorm

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


def packed_attention(**fields: object) -> LocalCoreAttention:
    settings = {"attention_dropout": 0.0, "masked_softmax_fusion": False, **fields}
    heads = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=4, num_query_groups=2, **settings
    )  # fmt: skip
    return LocalCoreAttention(heads, 1, AttnMaskType.causal, "self")


@pytest.mark.usefixtures("single_rank")
@pytest.mark.parametrize("is_padded", [False, True])
def test_packed_sequences_see_themselves_only(is_padded: bool) -> None:
    """Output and gradients of each are those of it alone; padding behind it changes nothing."""
    lengths, padding = (1, 5, 3, 1), (1, 0, 2, 0) if is_padded else (0,) * 4
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    steps = [length + more for length, more in zip(lengths, padding, strict=True)]
    places = torch.tensor([0, *steps]).cumsum(0).int()
    packed = PackedSeqParams("thd", ends, ends, places if is_padded else None)
    torch.manual_seed(0)
    whole = [torch.randn(int(places[-1]), n, 4, dtype=torch.float64) for n in (4, 2, 2)]
    leaves = [tensor.clone().requires_grad_() for tensor in whole]
    model_parallel_cuda_manual_seed(1)
    attention = packed_attention()
    output = attention(*leaves, None, AttnMaskType.causal, packed_seq_params=packed)
    output = output.reshape(len(output), -1)
    weight = torch.zeros_like(output)
    for first, length in zip(places.tolist(), lengths, strict=False):
        rows = slice(first, first + length)
        weight[rows] = torch.randn(length, 16, dtype=torch.float64)
    output.backward(weight)
    for first, length in zip(places.tolist(), lengths, strict=False):
        rows = slice(first, first + length)
        alone = [tensor[rows, None].clone().requires_grad_() for tensor in whole]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        expected = attention(*alone, mask)
        expected.backward(weight[rows, None])
        torch.testing.assert_close(output[rows], expected[:, 0], rtol=1e-13, atol=1e-13)
        for leaf, one in zip(leaves, alone, strict=True):
            torch.testing.assert_close(leaf.grad[rows], one.grad[:, 0], rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("single_rank")
def test_packed_sequences_need_all_of_them() -> None:
    rows = torch.zeros(2, 4, 4)
    packed = PackedSeqParams("thd", torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"but --context-parallel-size is 1 and --window-size \(1"):
        packed_attention(window_size=(1, 0))(rows, rows, rows, None, packed_seq_params=packed)
