"""Planned pipeline layouts of a DeepSeek-V3-like model against the even split.

    python benchmarks/pipeline_layout.py [--output benchmarks/results/pipeline_layout]

What a layer keeps for backward comes from a ledger: one forward pass of each kind of layer at full
size, on fake tensors, in bf16 with this package's MoE layer (one rank with the experts of 1/64 of
the model, balanced routing, 4,096 tokens). Attention keeps what flash attention keeps: its inputs,
its output and the log-sum-exp. Times are floating-point operations, backward twice the forward; a
bf16 weight costs 2 bytes, its gradient 4, its optimizer state 12 over the data-parallel ranks.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from megatron_echo import cpu_backend, environment  # noqa: E402

cpu_backend.enable(verbose=False)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from processes import results_parser  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from megatron_echo.memory import LayerCost, SavedTensorLedger, plan_layout  # noqa: E402
from megatron_echo.memory.pipeline_layout import PipelineLayout  # noqa: E402


@dataclass(frozen=True)
class Sizes:
    """DeepSeek-V3: 61 layers, the first 3 dense, MLA, 256 experts of which a token takes 8."""

    hidden: int = 7168
    heads: int = 128
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    dense_ffn: int = 18432
    expert_ffn: int = 2048
    experts: int = 256
    topk: int = 8
    vocabulary: int = 129280
    tokens: int = 4096
    layers: int = 61
    dense_layers: int = 3
    expert_ranks: int = 64
    data_ranks: int = 128


class Attention(nn.Module):
    """MLA in plain linears; the core is PyTorch's flash attention."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.s, width = s, s.nope + s.rope
        self.q_down, self.q_up = linear(s.hidden, s.q_rank), linear(s.q_rank, s.heads * width)
        self.kv_down = linear(s.hidden, s.kv_rank + s.rope)
        self.kv_up = linear(s.kv_rank, s.heads * (s.nope + width))
        self.q_norm, self.kv_norm = norm(s.q_rank), norm(s.kv_rank)
        self.out = linear(s.heads * width, s.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, H]``."""
        s, width = self.s, self.s.nope + self.s.rope
        q = self.q_up(self.q_norm(self.q_down(x)))
        kv = self.kv_up(self.kv_norm(self.kv_down(x)[:, : s.kv_rank]))
        k, v = kv.view(-1, s.heads, s.nope + width).split((s.nope, width), dim=2)
        k = torch.cat((k, k[..., : s.rope]), dim=2)  # rotary part, broadcast over heads
        heads = [t.reshape(1, -1, s.heads, width).transpose(1, 2) for t in (q, k, v)]
        core = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(core.transpose(1, 2).reshape(len(x), -1))


class SwiGLU(nn.Module):
    """A dense feed-forward layer."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up, self.down = linear(hidden, 2 * ffn), linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, H]``."""
        gate, value = self.up(x).chunk(2, dim=1)
        return self.down(F.silu(gate) * value)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward; with ``moe``, this package's layer beside a shared one.

    One rank with E / R experts and all its tokens going to them: balanced expert parallelism brings
    a rank as many rows as its own tokens have choices.
    """

    def __init__(self, s: Sizes, moe: Any = None) -> None:
        super().__init__()
        self.attention, self.moe = Attention(s), moe
        self.norm1, self.norm2 = norm(s.hidden), norm(s.hidden)
        self.mlp = SwiGLU(s.hidden, s.dense_ffn if moe is None else s.expert_ffn)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to ``[T, H]``."""
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        if self.moe is None:
            return x + self.mlp(y)
        return x + self.mlp(y) + self.moe(y[:, None])[0].squeeze(1)


class Head(nn.Module):
    """Final norm, output projection, and cross entropy in fp32."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.norm, self.out = norm(s.hidden), linear(s.hidden, s.vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        """``[T, H]`` to the mean loss."""
        return F.cross_entropy(self.out(self.norm(x)).float(), torch.zeros(len(x)).long())


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Without a bias, in bf16."""
    return nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


def norm(width: int) -> nn.Module:
    """RMS norm in bf16."""
    return nn.RMSNorm(width, dtype=torch.bfloat16)


def moe_layer(s: Sizes) -> Any:
    """The layer of this package on one rank.

    It has as many experts as a token takes: fewer cannot be routed to, and what is kept for
    backward depends on the rows only. The cost counts those that a rank of the model has.
    """
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_echo.config import EchoTransformerConfig
    from megatron_echo.layer_specs import moe_module_spec

    config = EchoTransformerConfig(
        num_layers=1, hidden_size=s.hidden, num_attention_heads=s.heads,
        num_moe_experts=s.topk, moe_router_topk=s.topk,
        moe_ffn_hidden_size=s.expert_ffn, gated_linear_unit=True, activation_func=F.silu,
        add_bias_linear=False, bf16=True, params_dtype=torch.bfloat16, transformer_impl="local",
        moe_token_dispatcher_type="allgather", moe_router_load_balancing_type="none",
        perform_initialization=False, moe_enable_echo=True, moe_received_token_capacity=1.0,
    )  # fmt: skip
    return moe_module_spec(config)(config=config, pg_collection=get_default_pg_collection())


def cost(kind: str, module: nn.Module, x: Tensor, s: Sizes, expert: int = 0) -> LayerCost:
    """Kept bytes from the ledger, static bytes from the parameters, time from the products.

    Args:
        kind: see ``LayerCost``.
        module: the layer.
        x: its input.
        s: sizes.
        expert: parameters of a rank's experts, whose optimizer state has fewer ranks to be on.
    """
    with SavedTensorLedger(module) as ledger:
        output = module(x)
        kept = ledger.live_bytes()
    del output
    dense = sum(p.numel() for n, p in module.named_parameters() if not n.startswith("moe.experts."))
    over_experts = s.data_ranks // s.expert_ranks
    static = dense * (6 + 12 / s.data_ranks) + expert * (6 + 12 / over_experts)
    active = dense + 3 * s.hidden * s.expert_ffn * s.topk * (expert > 0)
    products = 0 if kind == "E" else 2 * active * s.tokens
    if kind in "tm":
        products += 2 * s.tokens**2 * s.heads * (s.nope + s.rope)
    return LayerCost(kind, 3 * products / 4e14, kept, round(static))


def layer_costs(s: Sizes) -> dict[str, LayerCost]:
    """Each kind of layer, measured once, in the order of the model."""
    experts = 3 * s.hidden * s.expert_ffn * (s.experts // s.expert_ranks)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.zeros(s.tokens, s.hidden, dtype=torch.bfloat16, requires_grad=True)
        tokens = torch.zeros(s.tokens, dtype=torch.int64)
        table = nn.Embedding(s.vocabulary, s.hidden, dtype=torch.bfloat16)
        moe = moe_layer(s)
        first = cost("E", table, tokens, s)
        dense = cost("t", Layer(s), x, s)
        sparse = cost("t", Layer(s, moe), x, s, experts)
        head = cost("L", Head(s), x, s)
    mtp = LayerCost(
        "m", sparse.seconds + head.seconds, sparse.activation_bytes + head.activation_bytes,
        sparse.static_bytes,
    )  # fmt: skip
    return {
        "embedding": first, "dense layer": dense, "MoE layer": sparse, "MTP layer": mtp,
        "head and loss": head,
    }  # fmt: skip


CASES = [
    (ranks, chunks, schedule)
    for ranks in (8, 16)
    for chunks, schedule in ((1, "1f1b"), (2, "interleaved"), (2, "interleaved-ep-overlap"))
]


def compare(
    layers: list[LayerCost], ranks: int, chunks: int, schedule: str
) -> list[dict[str, Any]]:
    """Both preferences against the even split."""
    rows = []
    for prefer in ("time", "memory"):
        begin = time.perf_counter()
        plan = plan_layout(layers, ranks, chunks, schedule, prefer=prefer)
        seconds = time.perf_counter() - begin
        even = plan.even
        assert plan.measures.keeps(even.measures), "worse than the even split"
        assert plan.slowdown < 1e-9, "slower than the even split"
        plan.check_with_megatron()
        rows.append(
            {
                "P": ranks, "V": chunks, "schedule": schedule, "prefer": prefer,
                **_row(plan, even), "plan s": round(seconds, 2), "layout": plan.string,
            }
        )  # fmt: skip
    return rows


def _row(plan: PipelineLayout, even: PipelineLayout) -> dict[str, Any]:
    return {
        "even GiB": round(even.peak_bytes / 2**30, 2),
        "planned GiB": round(plan.peak_bytes / 2**30, 2),
        "peak %": round(100 * (plan.peak_bytes / even.peak_bytes - 1), 1),
        "longest stage %": round(
            100 * (plan.measures.stage_time / even.measures.stage_time - 1), 1
        ),
        "step %": round(100 * plan.slowdown, 1),
    }


def as_table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, without the layouts."""
    columns = [name for name in rows[0] if name != "layout"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "pipeline_layout")
    args = parser.parse_args()
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    sizes = Sizes()
    kinds = layer_costs(sizes)
    repeated = {"dense layer": sizes.dense_layers, "MoE layer": sizes.layers - sizes.dense_layers}
    layers = [layer for name, layer in kinds.items() for _ in range(repeated.get(name, 1))]
    costs = [
        {
            "layer": name, "kept MiB": round(layer.activation_bytes / 2**20, 1),
            "static MiB": round(layer.static_bytes / 2**20, 1),
            "ms": round(layer.seconds * 1e3, 2),
        }
        for name, layer in kinds.items()
    ]  # fmt: skip
    rows = [row for case in CASES for row in compare(layers, *case)]
    text = f"{as_table(costs)}\n\n{as_table(rows)}\n"
    print(text)
    args.output.with_suffix(".md").write_text(text)
    record = {"versions": environment.versions(), "costs": costs, "cases": rows}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
