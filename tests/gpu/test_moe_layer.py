"""The MoE layer on a GPU: no host synchronisation, and the results of a dense loop."""

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.layer_specs import moe_module_spec
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.testing import no_host_sync

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("single_rank")]
TOKENS, HIDDEN = 512, 256


def build(transport: str, gemm: str) -> EchoMoELayer:
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = EchoTransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, ffn_hidden_size=512,
        moe_ffn_hidden_size=512, num_moe_experts=16, moe_router_topk=4, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, transformer_impl="local",
        moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather", bf16=True,
        params_dtype=torch.bfloat16, moe_enable_echo=True, moe_echo_token_transport=transport,
        moe_echo_grouped_gemm=gemm,
    )  # fmt: skip
    layer = moe_module_spec(config)(config=config, pg_collection=None)
    layer.set_layer_number(1)
    return layer.cuda()


gemms = pytest.mark.parametrize("gemm", ["torch", "triton"])


@gemms
@pytest.mark.parametrize("transport", ["all_gather", "all_to_all", "symmetric_memory"])
def test_no_synchronisation(transport: str, gemm: str) -> None:
    """CUDA's own check and our tripwire, forward and backward, after a warm-up."""
    layer = build(transport, gemm)
    hidden = torch.randn(TOKENS, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    hidden.requires_grad_()
    for step in range(2):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            with torch.autograd.set_multithreading_enabled(False), no_host_sync():
                output, _ = layer(hidden)
                output.float().square().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(hidden.grad).all()


@gemms
def test_the_results_of_a_dense_loop(gemm: str) -> None:
    """Output and gradients against a loop over the experts in fp64."""
    layer = build("all_gather", gemm)
    hidden = torch.randn(TOKENS, 1, HIDDEN, device="cuda", dtype=torch.bfloat16)
    hidden.requires_grad_()
    probs, chosen = layer.route(hidden)
    experts = torch.arange(16, device="cuda")

    def dense(x: torch.Tensor, fc1: torch.Tensor, fc2: torch.Tensor) -> torch.Tensor:
        total = torch.zeros_like(x)
        for expert in experts.tolist():
            gate, up = (x @ fc1[expert].t()).chunk(2, -1)
            weight = (probs * chosen)[:, expert, None].double().detach()
            total = total + weight * ((torch.nn.functional.silu(gate) * up) @ fc2[expert].t())
        return total

    weights = (layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight)
    wide = [t.detach().double().requires_grad_() for t in (hidden[:, 0], *weights)]
    expected = dense(*wide)
    output, _ = layer(hidden)
    cotangent = torch.randn_like(output)
    output.backward(cotangent)
    expected.backward(cotangent[:, 0].double())
    pairs = [(output[:, 0], expected)]
    pairs += [(w.grad, reference.grad) for w, reference in zip(weights, wide[1:], strict=True)]
    for actual, reference in pairs:
        error = (actual.double() - reference).norm() / reference.norm()
        assert error < 2e-2, error
