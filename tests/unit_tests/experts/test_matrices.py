"""Stacks of experts as matrices, for Muon and for Megatron-FSDP."""

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig, fsdp_dtensor_checkpoint
from torch.nn import functional as F

from megatron_echo.experts.grouped_linear import grouped_linear
from megatron_echo.experts.grouped_mlp import (
    EchoGroupedMLP,
    experts_as_matrices,
    experts_for_fsdp,
)
from megatron_echo.experts.projection import CloneFetch

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


def test_backward_reads_a_parameter_where_it_is_by_then() -> None:
    """Megatron-FSDP frees a gathered parameter, and gathers it into other memory."""
    weight = torch.nn.Parameter(torch.randn(EXPERTS * FFN, HIDDEN))
    ends = torch.tensor([1, 4, 6], dtype=torch.int32)
    rows = torch.randn(6, HIDDEN, requires_grad=True)
    found = []
    for is_moved in (False, True):
        rows.grad = None
        output = grouped_linear(rows, weight.view(EXPERTS, FFN, HIDDEN), ends)
        if is_moved:
            freed = weight.data
            weight.data = freed.clone()
            freed.fill_(torch.nan)
        output.square().sum().backward()
        found.append(rows.grad)
    assert torch.equal(*found)


def test_names_of_experts_differ_between_ranks_of_megatron_fsdp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a matrix with a number, which Megatron raises by that of a rank's first expert."""
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=1, num_moe_experts=2 * EXPERTS,
        moe_ffn_hidden_size=FFN, add_bias_linear=False,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    mlp = EchoGroupedMLP(EXPERTS, config, pg_collection=groups)
    experts_for_fsdp([mlp])
    assert mlp.linear_fc1.weight is mlp.linear_fc1.weight0
    assert mlp.linear_fc1.stack.shape == (EXPERTS, FFN, HIDDEN)
    state = {f"layers.0.mlp.experts.{name}": p for name, p in mlp.named_parameters()}
    found = set()
    for first in (0, EXPERTS):
        monkeypatch.setattr(fsdp_dtensor_checkpoint, "get_ep_layer_offset", lambda _, at=first: at)
        found |= fsdp_dtensor_checkpoint.handle_experts_in_state_dict(state, 2 * EXPERTS).keys()
    assert {name.rpartition(".")[2] for name in found} == {"weight0", f"weight{EXPERTS}"}
    assert len(found) == 4


def test_only_a_call_shows_the_weight_that_a_fetch_reads() -> None:
    """Hooks before it gather that; hooks of gradients would count it twice."""
    seen = []
    fetch = CloneFetch(torch.nn.Linear(2, 2))
    fetch.register_forward_pre_hook(lambda module, _: seen.extend(module.parameters()))
    fetch._of[0].fetch = lambda clones: None
    fetch(None)
    assert seen == [fetch._of[0].weight]
    assert not list(fetch.parameters(recurse=False))
