"""On Megatron's own layers: the same bits with and without offload, whatever is recomputed."""

import itertools
import random
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from torch import Tensor

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.model_builder import EchoGPTModelBuilder, EchoGPTModelConfig
from megatron_echo.offload import ActivationOffloader, OffloadConfig
from megatron_echo.offload.regions import REGION_NAMES

pytestmark = pytest.mark.usefixtures("single_rank")

SEQUENCE, VOCABULARY = 16, 32
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {
        "recompute_granularity": "selective",
        "recompute_modules": ["core_attn", "layernorm"],
    },
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def build(echo: bool, **fields: Any) -> GPTModel:
    """Two layers, one of them dense, with dropout and a shared expert."""
    model_parallel_cuda_manual_seed(3, force_reset_rng=True)
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_moe_experts": 4,
        "moe_layer_freq": [0, 1, 1],
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": 16,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "allgather",
        "transformer_impl": "local",
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "moe_enable_echo": echo,
        "moe_num_echo_experts": 4 if echo else 0,
        **fields,
    }
    config = EchoGPTModelConfig(
        transformer=EchoTransformerConfig(**settings),
        vocab_size=VOCABULARY, seq_length=SEQUENCE, should_pad_vocab=False,
    )  # fmt: skip
    model = EchoGPTModelBuilder(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    return model.train()


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE), generator=generator)
    positions = torch.arange(SEQUENCE).expand(2, -1)
    mask = torch.ones(SEQUENCE, SEQUENCE).triu(1).bool()[None, None]
    return tokens, positions, mask


def train(model: GPTModel, offloader: ActivationOffloader | None, steps: int = 3) -> list[Tensor]:
    """Losses, gradients, weights and random states of steps with 1F1B-like orders."""
    model_parallel_cuda_manual_seed(5, force_reset_rng=True)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    for step in range(steps):
        optimizer.zero_grad()
        waiting = []
        for microbatch in range(3):
            tokens, positions, mask = batch(10 * step + microbatch)
            losses = model(tokens, positions, mask, labels=tokens)
            waiting.append(losses.mean())
            if len(waiting) == 2:
                waiting.pop(0).backward()
        with torch.no_grad():
            seen.append(model(*batch(99), labels=batch(99)[0]))
        waiting.pop().backward()
        if offloader is not None:
            offloader.step_end()
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        seen.append(torch.get_rng_state())
        seen += [torch.as_tensor(s) for s in get_cuda_rng_tracker().get_states().values()]
    return seen


def assert_nothing_is_left(offloader: ActivationOffloader) -> None:
    assert offloader.transfers.device_bytes == 0
    assert offloader.transfers.arena.leased_bytes == 0
    assert offloader.transfers.pending == {}
    assert offloader.transfers.reloading_bytes == 0
    assert offloader.statistics()["offload/live_storages"] == 0


def subsets() -> list[tuple[str, ...]]:
    drawn = random.Random(0)
    return [REGION_NAMES, *(tuple(drawn.sample(REGION_NAMES, 3)) for _ in range(3))]


@pytest.mark.parametrize(
    ("echo", "recompute"),
    [
        pytest.param(echo, how, marks=[pytest.mark.slow] * (not echo and how != "selective"))
        for echo, how in itertools.product((True, False), RECOMPUTE)
    ],
)
def test_same_bits(echo: bool, recompute: str) -> None:
    fields = dict(RECOMPUTE[recompute])
    if recompute == "selective" and not echo:
        fields["recompute_modules"] = ["core_attn", "layernorm", "shared_experts"]
    expected = train(build(echo, **fields), None)
    for modules in subsets():
        model = build(echo, **fields)
        config = OffloadConfig(modules=modules, min_tensor_bytes=0)
        offloader = ActivationOffloader(config).attach(model)
        got = train(model, offloader)
        assert len(got) == len(expected)
        assert all(map(torch.equal, got, expected))
        assert_nothing_is_left(offloader)
        statistics = offloader.statistics()
        if recompute != "full":
            assert statistics["offload/bytes"] > 0
            assert statistics["offload/exposed"] == 0


@pytest.mark.parametrize("name", REGION_NAMES)
@pytest.mark.parametrize("echo", [False, True])
def test_every_name_finds_its_module(echo: bool, name: str) -> None:
    """Strict mode raises if not.

    Stock experts that run one by one take slices of one storage, none of them half of it.
    """
    model = build(echo)
    config = OffloadConfig(modules=(name,), min_tensor_bytes=0, strict=True)
    offloader = ActivationOffloader(config).attach(model)
    train(model, offloader, steps=1)
    what = "kept_view_bytes" if name == "expert_fc1" and not echo else "bytes"
    assert offloader.statistics()[f"offload/{what}"] > 0
    assert_nothing_is_left(offloader)


def test_recomputed_modules_save_nothing() -> None:
    model = build(True, **RECOMPUTE["moe"])
    config = OffloadConfig(modules=("expert_fc1",), min_tensor_bytes=0, strict=True)
    offloader = ActivationOffloader(config).attach(model)
    with pytest.raises(ValueError, match="expert_fc1, because the module is recomputed"):
        train(model, offloader, steps=1)
