"""The MoE layer against Megatron's own: time and bytes kept for backward, layer and training run.

    python benchmarks/moe_layer.py [--output benchmarks/results/moe_layer] [--quick] [--no-training]
    python benchmarks/moe_layer.py --routings packed --no-training --output OUTPUT

Two gloo ranks on a CPU (widths divided by eight), one rank on a GPU. Both layers of a pair run in
the same process and take turns; the training runs (the shape of the main job, a real
``pretrain()``) take turns as whole processes. ``balanced`` forces each expert to get the same
number of tokens, with a receive capacity of 1.0; ``natural`` is the router's own choice with the
default capacity. In ``packed`` each rank brings another number of tokens to each pass, up to all of
the shape's, made of sequences of very different lengths: ours with
``--moe-echo-max-tokens-per-rank`` and a capacity of 1.25, against Megatron's all-to-all dispatcher,
as the all-gather one refuses such batches. Times are medians; only the ratios of one run compare.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from megatron_echo import cpu_backend, environment  # noqa: E402

cpu_backend.enable(verbose=False)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from processes import as_table, results_parser, torchrun  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_echo.record.metrics import read_metrics  # noqa: E402
from megatron_echo.record.saved_tensors import storage_key  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A layer's sizes: hidden, expert ffn, experts, top-k, tokens of a rank."""

    hidden: int
    ffn: int
    experts: int
    topk: int
    tokens: int


def shapes(on_gpu: bool) -> dict[str, Shape]:
    """The models' layers; on one GPU DeepSeek-V3 has the experts of one rank of EP=8."""
    if on_gpu:
        return {
            "Mixtral-8x7B": Shape(4096, 14336, 8, 2, 4096),
            "Qwen3-30B-A3B": Shape(2048, 768, 128, 8, 4096),
            "DeepSeek-V3": Shape(7168, 2048, 32, 8, 4096),
        }
    return {
        "Mixtral-8x7B / 8": Shape(512, 1792, 8, 2, 512),
        "Qwen3-30B-A3B / 8": Shape(256, 96, 128, 8, 512),
        "DeepSeek-V3 / 8": Shape(896, 256, 32, 8, 256),
    }


def build(
    shape: Shape, dtype: torch.dtype, ours: bool, capacity: float | None, **settings: Any
) -> torch.nn.Module:
    """One MoE layer, Megatron's all-gather one or ours, with the same weights.

    Args:
        shape: its sizes.
        dtype: of the weights.
        ours: this package's layer.
        capacity: ``--moe-received-token-capacity``.
        settings: other fields of the configuration.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_echo.config import EchoTransformerConfig
    from megatron_echo.layer_specs import moe_module_spec

    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    defaults = {"moe_token_dispatcher_type": "allgather", "transformer_impl": "local"}
    config = EchoTransformerConfig(
        num_layers=1, hidden_size=shape.hidden, num_attention_heads=4, ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.ffn, num_moe_experts=shape.experts, moe_router_topk=shape.topk,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        moe_router_load_balancing_type="none", bf16=dtype == torch.bfloat16, params_dtype=dtype,
        moe_enable_echo=ours, moe_num_echo_experts=0, moe_received_token_capacity=capacity,
        **{**defaults, **settings},
    )  # fmt: skip
    spec = moe_module_spec if ours else _stock_spec(get_moe_module_spec)
    layer = spec(config)(config=config, pg_collection=None)
    layer.set_layer_number(1)
    return layer.to(torch.cuda.current_device()) if torch.cuda.is_available() else layer


def _stock_spec(get_spec: Any) -> Any:
    return lambda config: get_spec(
        use_te=config.transformer_impl == "transformer_engine",
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
    )


def forced_routing(stock: Any) -> Any:
    """``TopKRouter.routing`` with the tokens going round the experts, its own work still done."""

    def routing(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _, chosen = stock(self, logits, *args, **kwargs)
        tokens, experts = chosen.shape
        pair = torch.arange(tokens * self.topk, device=chosen.device).view(tokens, self.topk)
        forced = torch.zeros_like(chosen).scatter_(1, pair % experts, True)
        probs = torch.softmax(logits.view(tokens, experts), dim=1, dtype=torch.float32)
        return torch.where(forced, probs, 0), forced

    return routing


def saved_bytes(layer: torch.nn.Module, hidden: Tensor) -> int:
    """Bytes that one forward pass keeps for backward, each storage once; weights left out."""
    known = {storage_key(tensor) for tensor in (*layer.parameters(), hidden)}
    kept: dict[int, int] = {}
    held = []  # storages stay alive, so that a key is not used twice

    def pack(tensor: Tensor) -> Tensor:
        if storage_key(tensor) not in known:
            kept[storage_key(tensor)] = tensor.untyped_storage().nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden)
    return sum(kept.values())


def step(layer: torch.nn.Module, hidden: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    for parameter in layer.parameters():
        parameter.grad = None
    torch.cuda.synchronize()
    dist.barrier()
    begin = time.perf_counter()
    output, _ = layer(hidden)
    output.sum().backward()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


CAPACITIES = {"balanced": 1.0, "packed": 1.25}
PACKED: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "stock": lambda shape: {"moe_token_dispatcher_type": "alltoall"},
    "ours": lambda shape: {"moe_echo_max_tokens_per_rank": shape.tokens},
}


def packed_tokens(bound: int, random: torch.Generator) -> int:
    """Tokens of one batch: sequences of very different lengths, as many as fit into the bound.

    Args:
        bound: of the batch; a sequence has a 32nd of it to all of it, log-uniformly.
        random: where they come from.
    """
    tokens, length = 0, 0
    while tokens + length <= bound:
        tokens += length
        length = int(bound * 32 ** -torch.rand((), generator=random))
    return tokens


def compare_layers(shape: Shape, dtype: torch.dtype, routing: str, rounds: int) -> dict[str, Any]:
    """Medians over alternating passes, and the kept bytes."""
    balanced, packed = routing == "balanced", routing == "packed"
    layers = {
        name: build(
            shape, dtype, name == "ours", CAPACITIES.get(routing) if name == "ours" else None,
            **(PACKED[name](shape) if packed else {}),
        )
        for name in ("stock", "ours")
    }  # fmt: skip
    device = next(layers["ours"].parameters()).device
    whole = torch.randn(shape.tokens, 1, shape.hidden, dtype=dtype, device=device)
    hidden, random = whole.requires_grad_(), torch.Generator().manual_seed(dist.get_rank())
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for layer in layers.values():
        if balanced:
            forced = forced_routing(type(layer.router).routing)
            layer.router.routing = functools.partial(forced, layer.router)
        step(layer, hidden)
    for _ in range(rounds):
        if packed:
            hidden = whole[: packed_tokens(shape.tokens, random)].detach().requires_grad_()
        for name, layer in layers.items():
            seconds[name].append(step(layer, hidden))
    kept = {name: saved_bytes(layer, hidden) for name, layer in layers.items()}
    ratio = statistics.median(o / s for o, s in zip(seconds["ours"], seconds["stock"], strict=True))
    return {
        **{f"{name} ms": statistics.median(seconds[name]) * 1e3 for name in layers},
        "time ratio": ratio,
        **{f"{name} kept MiB": kept[name] / 2**20 for name in layers},
        "kept ratio": kept["ours"] / kept["stock"],
    }


def worker(args: argparse.Namespace) -> None:
    """One rank of the layer benchmark; rank 0 writes the rows."""
    from megatron.core import parallel_state

    on_gpu = not cpu_backend.is_enabled()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    torch.set_num_threads(1)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = []
    for name, shape in shapes(on_gpu).items():
        for routing in args.routings:
            result = compare_layers(shape, dtype, routing, args.rounds)
            rows.append({"layer": name, "routing": routing, **result})
    if dist.get_rank() == 0:
        args.worker.write_text(json.dumps(rows))
    dist.destroy_process_group()


LAYER = "--moe-enable-echo --moe-num-echo-experts 0"
NO_LOSS = "--moe-router-load-balancing-type none"
TRAININGS = {
    "balanced": (NO_LOSS, f"{NO_LOSS} {LAYER} --moe-received-token-capacity 1.0"),
    "natural": ("", LAYER),
    "natural, ours with clones": ("", "--moe-enable-echo"),
    "skew 1.0, clones (ours) against none (stock)": (
        f"{LAYER} --moe-echo-force-skew 1.0",
        "--moe-enable-echo --moe-echo-force-skew 1.0",
    ),
}
"""Pairs of training runs: flags of the one in the columns of stock, and of ours."""


def training_iterations(flags: str, balanced: bool, iterations: int) -> list[float]:
    """Seconds of each iteration of one training run in the shape of the main job."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"""
            --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256
            --seq-length 256 --max-position-embeddings 256 --position-embedding-type rope
            --normalization RMSNorm --swiglu --disable-bias-linear --attention-dropout 0
            --hidden-dropout 0 --untie-embeddings-and-output-weights --num-experts 8
            --moe-router-topk 2 --moe-ffn-hidden-size 128 --micro-batch-size 8
            --moe-token-dispatcher-type allgather
            --global-batch-size 16 --train-iters {iterations} --lr 4e-3 --mock-data
            --tokenizer-type NullTokenizer --vocab-size 256 --num-workers 0 --log-interval 1
            --eval-iters 0 --expert-model-parallel-size 2 --run-dir {folder} {flags}
        """.split()
        script = ROOT / ("benchmarks/balanced_pretrain.py" if balanced else "pretrain_gpt_moe.py")
        torchrun(script, 2, words)
        return [line["iteration-time"] for line in read_metrics(folder)][4:]


def compare_training(routing: str, runs: int, iterations: int) -> dict[str, Any]:
    """Medians of whole training runs that take turns."""
    sides = dict(zip(("stock", "ours"), TRAININGS[routing], strict=True))
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(runs):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            seconds = training_iterations(sides[name], routing == "balanced", iterations)
            medians[name].append(statistics.median(seconds))
    ratios = [o / s for o, s in zip(medians["ours"], medians["stock"], strict=True)]
    return {
        **{f"{name} ms": statistics.median(medians[name]) * 1e3 for name in sides},
        "time ratio": statistics.median(ratios),
    }


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "moe_layer")
    parser.add_argument("--quick", action="store_true", help="few rounds, to try the script out")
    parser.add_argument("--no-training", action="store_true", help="the layers only")
    kinds = ("balanced", "natural", "packed")
    parser.add_argument("--routings", nargs="+", choices=kinds, default=kinds[:2])
    parser.add_argument("--rounds", type=int, default=31, help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    on_gpu = not cpu_backend.is_enabled()
    rounds = 3 if args.quick else args.rounds
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        words = ["--worker", str(result), "--rounds", str(rounds), "--routings", *args.routings]
        torchrun(Path(__file__), 1 if on_gpu else 2, words)
        rows = json.loads(result.read_text())
    if not args.no_training and not on_gpu:
        for routing in TRAININGS:
            runs, iterations = (1, 8) if args.quick else (3, 24)
            measured = compare_training(routing, runs, iterations)
            rows.append({"layer": "training run, main job", "routing": routing, **measured})
    where = f"{environment.device_name()}, {'1 rank' if on_gpu else '2 ranks, one thread each'}"
    dispatcher = "all-to-all" if args.routings == ["packed"] else "all-gather"
    text = f"{where}; stock: {dispatcher} dispatcher, SequentialMLP\n\n{as_table(rows)}\n"
    print(text)
    args.output.with_suffix(".md").write_text(text)
    figures = {f"{row.pop('layer')}, {row.pop('routing')}": row for row in rows}
    record = {"machine": where, "versions": environment.versions(), **figures}
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
