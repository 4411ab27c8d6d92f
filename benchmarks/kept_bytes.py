"""What one MoE layer keeps from forward to backward at its default capacity, counted.

    python benchmarks/kept_bytes.py [--output benchmarks/results/kept_bytes] [--quick]

The real layers run on fake tensors at the models' own widths, one rank of a pretended group, 4,096
tokens, bf16; each storage once, weights and the layer's input left out. Ours has its default
buffer, so that it keeps the same whatever the routing, eager or captured: 1.25 times perfect
balance, with as many slots (S) as experts of a rank 1.02 times, and without slots room for the
worst routing. Megatron's, with the lesser of its two dropless dispatchers, SequentialMLP and fused
SwiGLU, keeps what came: *mean* is the average over ranks, *fullest* the rank that most tokens want
(experts wanted by a lognormal of spread 1.0). *moe_act*: the mean less what ``--recompute-modules
moe_act`` saves it, which our experts do in any case.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import traffic  # noqa: E402
from moe_layer import saved_bytes  # noqa: E402
from processes import as_table  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_echo.observe.simulation.inputs import MODELS as PUBLISHED  # noqa: E402

_GPT_OSS = PUBLISHED["gpt-oss-120b"]
MODELS = {
    **traffic.MODELS,
    "GPT-OSS-120B": traffic.Shape(
        _GPT_OSS.hidden, _GPT_OSS.moe_ffn, _GPT_OSS.experts, _GPT_OSS.topk
    ),
}
DISPATCHERS = ("Megatron alltoall", "Megatron allgather")


@functools.cache
def stock_experts() -> Any:
    """Megatron's SequentialMLP with its own products, for even numbers of rows."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP

    class Even(SequentialMLP):
        """Takes no counts: fake tensors have none."""

        def forward(self, rows: Tensor, _: Tensor, probs: Tensor) -> Any:
            share, rest = divmod(len(rows), self.num_local_experts)
            sizes = [share + (number < rest) for number in range(self.num_local_experts)]
            return super().forward(rows, SimpleNamespace(tolist=lambda: sizes), probs)

    linears = (
        LocalSpecProvider().column_parallel_linear(),
        LocalSpecProvider().row_parallel_linear(),
    )
    return functools.partial(Even, submodules=MLPSubmodules(*linears))


def kept(shape: traffic.Shape, ranks: int, slots: int, wire: str) -> int:
    """Bytes of one layer; of Megatron's with its own experts, on a mean rank."""
    with traffic.fake_tensors(shape, ranks, slots) as counter:
        layer = traffic.build(shape, ranks, slots, wire, "collective", stock_experts())
        size = (traffic.TOKENS, 1, shape.hidden)
        hidden = torch.empty(size, dtype=torch.bfloat16, requires_grad=True)
        with counter, torch.compiler.set_stance("force_eager"):
            return saved_bytes(layer, hidden)


def fullest(shape: traffic.Shape, ranks: int) -> float:
    """Pairs that the most wanted rank computes without clones, over the mean."""
    chosen = traffic.choices(shape, ranks)
    load = (chosen // (shape.experts // ranks)).reshape(-1).bincount(minlength=ranks)
    return float(load.max() / load.double().mean())


def rows_of(model: str, ranks: int) -> Iterator[dict[str, Any]]:
    """Each token transport with the default slots, against Megatron."""
    from megatron_echo.planner import auto_slots

    shape, mebi = MODELS[model], 2**20
    stock = min(kept(shape, ranks, 0, wire) for wire in DISPATCHERS)
    # Rows of the experts' three tensors; the rest is the router's and the dispatcher's maps.
    pairs, overload = traffic.TOKENS * shape.topk, fullest(shape, ranks)
    activation = pairs * shape.ffn * 2
    of_rows = pairs * (shape.hidden + 2 * shape.ffn) * 2 + activation
    default = auto_slots(ranks, shape.experts)
    for wire, slots in (*((wire, default) for wire in traffic.WIRES), ("all_gather", 0)):
        ours = kept(shape, ranks, slots, wire)
        yield {
            "model": model,
            "EP": ranks,
            "tokens": wire,
            "S": slots,
            "ours MiB": ours / mebi,
            "Megatron MiB, mean": stock / mebi,
            "ours / mean": ours / stock,
            "ours / fullest": ours / (stock + (overload - 1) * of_rows),
            "ours / moe_act": ours / (stock - activation),
        }


if __name__ == "__main__":
    traffic.main(__doc__, MODELS, rows_of, as_table)
