"""The layer's forward and backward, for every combination of its settings, as a graph holds it.

Each rank proves two things over the five routings of ``moe_cases``: a capture is safe
(``assert_capturable``), and replays of one capture have the bits of eager passes. The argument N
takes each N-th combination only.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from moe_cases import HIDDEN, ROUTINGS, ForcedRouter
from torch import Tensor
from unit_tests.workers.moe_layer import BATCH, SEQUENCE, build, problem

from megatron_echo import cpu_backend
from megatron_echo.cpu_backend.recorded_graph import RecordedGraph, capture
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.record.ledger import KEPT, SavedTensorLedger
from megatron_echo.testing import assert_capturable

TOPK = 2
SETTINGS: dict[str, tuple] = {
    "moe_echo_token_transport": ("all_gather", "all_to_all"),
    "moe_num_echo_experts": (0, "one a rank", None),
    "moe_echo_recompute_expert_dispatch": (True, False),
    "moe_received_token_capacity": (None, 1.0),
}
ALONE: tuple[dict[str, Any], ...] = (
    {"moe_echo_tolerance": 0.5, "moe_echo_min_tokens_per_clone": 3},
    {"moe_echo_ranks_per_node": 1},
    {"moe_echo_row_alignment": 16},
    {"moe_echo_token_transport": "all_to_all", "moe_echo_peer_capacity": 0.5},
    {"gated_linear_unit": False, "activation_func": F.gelu},
    {"params_dtype": torch.bfloat16},
    {"params_dtype": torch.bfloat16, "moe_echo_token_transport": "all_to_all"},
    {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    {"add_bias_linear": True, "activation_func_clamp_value": 1.0},
)


def combinations() -> Iterator[dict[str, Any]]:
    """All of ``SETTINGS``, then each of ``ALONE``."""
    for values in itertools.product(*SETTINGS.values()):
        chosen = dict(zip(SETTINGS, values, strict=True))
        if chosen["moe_num_echo_experts"] == 0 and not chosen["moe_echo_recompute_expert_dispatch"]:
            continue  # without clones there is nothing to keep
        yield {"params_dtype": torch.float32, **chosen}
    for fields in ALONE:
        yield {"params_dtype": torch.float32, "moe_num_echo_experts": None, **fields}


class Pass:
    """Forward and backward of one layer in static memory.

    Attributes:
        results: output, and gradients of tokens, probabilities and weights, of the last call.
        kept: shapes and dtypes of what it kept from forward to backward.
    """

    def __init__(self, layer: EchoMoELayer) -> None:
        self._layer = layer
        self.results: list[Tensor] = []
        self.kept: list[tuple] = []

    def __call__(self, hidden: Tensor, probs: Tensor, chosen: Tensor, weight: Tensor) -> None:
        """Megatron frees gradients after each use, so they are made anew."""
        leaves = hidden.detach().requires_grad_(), probs.detach().requires_grad_()
        self._layer.router = ForcedRouter(leaves[1], chosen)
        with SavedTensorLedger(self._layer) as ledger:
            output, _ = self._layer(leaves[0])
        self.kept = [(e.shape, e.dtype) for e in ledger.entries if e.kind in KEPT]
        parameters = [p for p in self._layer.experts.parameters() if p.requires_grad]
        output.backward(weight)
        wanted = (*leaves, *parameters)
        self.results = [output.detach(), *(each.grad for each in wanted if each.grad is not None)]
        assert len(self.results) == 1 + len(wanted)
        for each in wanted:
            each.grad = None


def check(fields: dict[str, Any]) -> None:
    """Both proofs for one combination."""
    dtype = fields.pop("params_dtype")
    if fields["moe_num_echo_experts"] == "one a rank":
        fields["moe_num_echo_experts"] = dist.get_world_size()
    layer = build(TOPK, dtype, moe_echo_overflow="drop", **fields)
    inputs = []
    for kind in ROUTINGS:
        mine = problem(kind, TOPK, dtype).mine()
        shape = (SEQUENCE, BATCH, HIDDEN)
        inputs.append((mine.hidden.view(shape), mine.probs, mine.chosen, mine.weight.view(shape)))
    run = Pass(layer)
    assert_capturable(run, *inputs)
    eager = []
    for given in inputs:
        run(*given)
        eager.append([tensor.clone() for tensor in run.results])
    kept = run.kept
    static = [tensor.clone() for tensor in inputs[0]]
    graph = RecordedGraph()
    with capture(graph):
        run(*static)
    assert run.kept == kept
    for given, expected in zip(inputs, eager, strict=True):
        for memory, tensor in zip(static, given, strict=True):
            memory.copy_(tensor)
        graph.replay()
        for actual, wanted in zip(run.results, expected, strict=True):
            assert torch.equal(actual, wanted), fields
    graph.reset()


def main() -> None:
    """The combinations, on all ranks together."""
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    count = 0
    for fields in itertools.islice(combinations(), 0, None, int(sys.argv[1])):
        check(dict(fields))
        count += 1
    dist.barrier()
    if dist.get_rank() == 0:
        print(f"COMBINATIONS={count}", flush=True)


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    main()
