"""--moe-echo-token-transport hybrid_ep, over a stand-in for DeepEP; its worker's checks."""

import sys
import types
from pathlib import Path

import hybrid_ep_stand_in
import launch
import pytest
import torch

from megatron_echo.config import EchoTransformerConfig
from megatron_echo.environment import find_hybrid_ep

WORKER = Path(__file__).resolve().parents[1] / "workers" / "hybrid_ep.py"
FIELDS = {
    "num_layers": 1,
    "hidden_size": 8,
    "num_attention_heads": 1,
    "num_moe_experts": 8,
    "expert_model_parallel_size": 2,
    "params_dtype": torch.bfloat16,
    "moe_echo_token_transport": "hybrid_ep",
}


@launch.on_ranks(2, slow=(3,))
def test_the_results_of_all_gather(ranks: int) -> None:
    print(launch.run(["the_results_of_all_gather"], ranks, script=WORKER).check().output)


@pytest.mark.parametrize(
    ("check", "ranks"), [("the_results_of_all_gather", 2), ("overflow", 2), ("no_host_sync", 2)]
)
def test_nccl_ep(check: str, ranks: int) -> None:
    """The same over Megatron's wrappers of NCCL EP."""
    launch.run([check], ranks, script=WORKER, env={"NCCL_EP": "1"}).check()


def test_without_nccl_ep() -> None:
    with pytest.raises(ValueError, match=r"nccl_ep needs Transformer Engine .* Install .* 2\.20"):
        EchoTransformerConfig(**{**FIELDS, "moe_echo_token_transport": "nccl_ep"})


@pytest.mark.parametrize("check", ["overflow", "no_host_sync", "evaluation"])
def test_two_ranks(check: str) -> None:
    launch.run([check], 2, script=WORKER).check()


@pytest.fixture
def deep_ep(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An empty module of that name."""
    module = types.ModuleType("deep_ep")
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    return module


def test_where_it_is_installed(deep_ep: types.ModuleType) -> None:
    deep_ep.HybridEPBuffer = hybrid_ep_stand_in.HybridEPBuffer
    assert find_hybrid_ep() is hybrid_ep_stand_in.HybridEPBuffer
    assert EchoTransformerConfig(**FIELDS)


class OldBuffer:
    """Of a version that waits for the device."""

    def dispatch_with_permute(self, *, hidden: object, use_host_meta: bool = True) -> None: ...


@pytest.mark.parametrize("buffer", [None, OldBuffer], ids=["without HybridEP", "too old"])
def test_a_deep_ep_that_does_not_do(deep_ep: types.ModuleType, buffer: type | None) -> None:
    if buffer is not None:
        deep_ep.HybridEPBuffer = buffer
    with pytest.raises(ValueError, match=r"hybrid_ep needs DeepEP .* Install the branch"):
        EchoTransformerConfig(**FIELDS)


def test_without_deep_ep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deep_ep", None)
    with pytest.raises(ValueError, match=r"hybrid_ep needs DeepEP .* or use all_to_all"):
        EchoTransformerConfig(**FIELDS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_model_parallel_size": 1}, "has no other rank to send to. Use all_gather"),
        ({"params_dtype": torch.float32}, "adds in bf16, not torch.float32. Use --bf16"),
    ],
)
def test_what_it_cannot_do(
    fields: dict[str, object], message: str, deep_ep: types.ModuleType
) -> None:
    deep_ep.HybridEPBuffer = hybrid_ep_stand_in.HybridEPBuffer
    with pytest.raises(ValueError, match=message):
        EchoTransformerConfig(**{**FIELDS, **fields})
