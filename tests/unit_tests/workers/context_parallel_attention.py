"""Attention over two context-parallel ranks against the same attention on one, in fp64."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from megatron_echo import cpu_backend
from megatron_echo.local_modules import LocalCoreAttention

SEQUENCE, BATCH, HEADS, GROUPS, WIDTH, VALUE_WIDTH = 24, 2, 4, 2, 8, 6


def attention(ranks: int) -> LocalCoreAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        context_parallel_size=ranks,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
    )
    return LocalCoreAttention(config, 1, AttnMaskType.causal, "self", v_channels=VALUE_WIDTH)


def main() -> None:
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(context_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    shapes = [(HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, VALUE_WIDTH)]
    whole = [torch.randn(SEQUENCE, BATCH, *s, dtype=torch.float64) for s in shapes]
    weight = torch.randn(SEQUENCE, BATCH, HEADS * VALUE_WIDTH, dtype=torch.float64)
    chunk = SEQUENCE // (2 * ranks)
    first, last = rank * chunk, (2 * ranks - 1 - rank) * chunk
    rows = torch.cat([torch.arange(first, first + chunk), torch.arange(last, last + chunk)])

    reference = [tensor.clone().requires_grad_() for tensor in whole]
    expected = attention(1)(*reference, None)
    (expected * weight).sum().backward()
    local = [tensor[rows].clone().requires_grad_() for tensor in whole]
    actual = attention(ranks)(*local, None)
    (actual * weight[rows]).sum().backward()
    torch.testing.assert_close(actual, expected[rows], rtol=1e-13, atol=1e-13)
    for mine, all_rows in zip(local, reference, strict=True):
        torch.testing.assert_close(mine.grad, all_rows.grad[rows], rtol=1e-12, atol=1e-13)
    dist.barrier()


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main()
