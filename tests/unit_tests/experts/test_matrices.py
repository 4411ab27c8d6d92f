"""Stacks of experts as matrices, for Muon."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from torch.nn import functional as F

from megatron_echo.experts.grouped_mlp import EchoGroupedMLP, experts_as_matrices

pytestmark = pytest.mark.usefixtures("single_rank")
EXPERTS, HIDDEN, FFN = 3, 4, 5


def test_they_compute_and_save_the_same() -> None:
    """Same results, gradients and checkpoint; each expert is a part that is taken by itself."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=FFN, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False,
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    rows, probs = torch.randn(6, HIDDEN), torch.rand(6)
    ends = torch.tensor([1, 4, 6], dtype=torch.int32)
    found = []
    for is_matrix in (False, True):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        mlp = EchoGroupedMLP(EXPERTS, config, pg_collection=groups)
        if is_matrix:
            experts_as_matrices([mlp])
        output, _ = mlp(rows, ends, probs)
        output.sum().backward()
        state = mlp.sharded_state_dict(metadata={})
        saved = {}
        for key in ("linear_fc1.weight", "linear_fc2.weight"):
            entry = state[key]
            built = entry.build() if hasattr(entry, "build") else [entry]
            if hasattr(entry, "build"):
                loaded = entry.merge_fn([part.data for part in built])
                assert loaded.shape == dict(mlp.named_parameters())[key].shape
            saved |= {(p.key, p.global_offset): p.data for p in built}
        grads = [p.grad.flatten() for p in mlp.parameters()]
        found.append((output.detach(), grads, saved))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    weights = mlp.linear_fc1.weight, mlp.linear_fc2.weight
    shapes = [(EXPERTS * 2 * FFN, HIDDEN), (EXPERTS * HIDDEN, FFN)]
    assert [tuple(weight.shape) for weight in weights] == shapes
    assert [weight.qkv_split_shapes for weight in weights] == [[2 * FFN] * 3, [HIDDEN] * 3]
    assert all(weight.is_qkv for weight in weights)
    assert [weight.partition_dim for weight in weights] == [0, 1]
