"""What the router's losses cost, and how close a batch-wise loss comes to its batch.

Three tables, on one CPU rank, written as JSON and a picture beside the other results::

    python benchmarks/aux_loss.py [--output FILE]

* **memory**: peak of forward and backward through 16 routers, in units of one fp32 tensor of all
  tokens, experts and layers. The routing is compacted after each router, as in the MoE layer.
* **time**: forward and backward of one router.
* **error**: relative error of a batch-wise loss's gradient under 1F1B, by count source and
  pipeline stage, on microbatches whose topics differ and drift from step to step.
"""

import argparse
import gc
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megatron_echo import cpu_backend  # noqa: E402

cpu_backend.enable(verbose=False)

import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_echo.config import EchoTransformerConfig  # noqa: E402
from megatron_echo.dispatch.reroute import compact_probs, compact_routing  # noqa: E402
from megatron_echo.routing.router import EchoRouter  # noqa: E402
from megatron_echo.step.step_end import StepEnd  # noqa: E402

LAYERS, TOKENS, EXPERTS, TOPK, HIDDEN = 16, 2048, 128, 8, 64
UNIT = LAYERS * TOKENS * EXPERTS * 4
SCORES: dict[str, dict[str, Any]] = {
    "softmax, then top-k": {"moe_router_pre_softmax": True},
    "top-k, then softmax": {},
    "sigmoid": {"moe_router_score_function": "sigmoid"},
}
LOSSES: dict[str, dict[str, Any]] = {
    "none": {"moe_router_load_balancing_type": "none"},
    "aux": {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2},
    "seq + global + z": {
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [1e-3, 1e-2],
        "moe_z_loss_coeff": 1e-3,
    },
}
ROUTERS: dict[str, type[TopKRouter]] = {"Megatron": TopKRouter, "ours": EchoRouter}


def build(
    kind: type[TopKRouter],
    layers: int,
    fields: dict[str, Any],
    experts: int = EXPERTS,
    topk: int = TOPK,
    source: str = "late",
    spread: float = 0.3,
) -> list[TopKRouter]:
    """Routers of one model, with the same weights for every kind."""
    config = EchoTransformerConfig(
        num_layers=layers,
        hidden_size=HIDDEN,
        num_attention_heads=1,
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_router_dtype="fp32",
        add_bias_linear=False,
        **fields,
    )
    config.moe_echo_aux_count_source = source
    routers = [kind(config, get_default_pg_collection()) for _ in range(layers)]
    for number, router in enumerate(routers):
        router.set_layer_number(number + 1)
        generator = torch.Generator().manual_seed(number)
        router.weight.data.copy_(torch.randn(router.weight.shape, generator=generator) * spread)
    return routers


def forward(routers: list[TopKRouter], hidden: Tensor) -> Tensor:
    """Through all routers, keeping of each what the MoE layer keeps."""
    kept = []
    for router in routers:
        probs, routing_map = router(hidden)
        kept.append(compact_probs(probs, compact_routing(routing_map, router.topk)))
        del probs, routing_map
    return torch.stack([part.square().sum() for part in kept]).sum()


def end_step(router: TopKRouter) -> None:
    """Begin the next step."""
    exchange = StepEnd.of(router.config).exchange
    if exchange is not None:
        exchange.end_step()


def peak_bytes(step: Callable[[], None]) -> int:
    """Peak of what the allocator hands out during a step, above what is there before."""
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = highest = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        highest = max(highest, now)
    return highest


def memory() -> list[dict[str, Any]]:
    """Rows of the first table."""
    rows = []
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    for (scores, mode), (losses, fields) in (
        (a, b) for a in SCORES.items() for b in LOSSES.items()
    ):
        row: dict[str, Any] = {"scores": scores, "losses": losses}
        for name, kind in ROUTERS.items():
            routers = build(kind, LAYERS, {**mode, **fields})

            def step(routers: list[TopKRouter] = routers) -> None:
                forward(routers, hidden.requires_grad_()).backward()
                end_step(routers[0])

            step()
            row[name] = round(peak_bytes(step) / UNIT, 3)
        rows.append(row)
    return rows


def seconds() -> list[dict[str, Any]]:
    """Rows of the second table: medians in milliseconds."""
    rows = []
    hidden = torch.randn(TOKENS, 1, HIDDEN, generator=torch.Generator().manual_seed(0))
    for (scores, mode), (losses, fields) in (
        (a, b) for a in SCORES.items() for b in LOSSES.items()
    ):
        row: dict[str, Any] = {"scores": scores, "losses": losses}
        pairs = {name: build(kind, 1, {**mode, **fields}) for name, kind in ROUTERS.items()}
        times: dict[str, list[float]] = {name: [] for name in pairs}
        for _ in range(12):
            for name, routers in pairs.items():
                begin = time.perf_counter()
                forward(routers, hidden.requires_grad_()).backward()
                times[name].append(1e3 * (time.perf_counter() - begin))
                end_step(routers[0])
        rows.append(row | {name: round(statistics.median(ms[2:]), 2) for name, ms in times.items()})
    return rows


def microbatch(step: int, index: int, tokens: int, shift: float, drifts: float) -> Tensor:
    """Tokens ``[S, 1, H]`` about a topic of their own, on a mean that drifts with the steps."""
    draw = torch.Generator().manual_seed(1000 * step + index)
    mean, drift = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(10**6))
    topic = torch.randn(HIDDEN, generator=draw)
    common = 0.3 * mean + drifts * step * drift + shift * topic
    return (torch.randn(tokens, HIDDEN, generator=draw) + common)[:, None]


def gradient(routers: list[TopKRouter], parts: list[list[Tensor]], in_flight: int) -> Tensor:
    """The last step's gradient with ``in_flight`` forward passes before the first backward."""
    (router,) = routers
    for step in parts:
        router.weight.grad, waiting = None, []
        for hidden in step:
            waiting.append(router(hidden)[0])
            if len(waiting) == in_flight:
                (0 * waiting.pop(0)).sum().backward()
        for probs in waiting:
            (0 * probs).sum().backward()
        end_step(router)
    assert router.weight.grad is not None
    return router.weight.grad


def error(shift: float, drifts: float = 0.05) -> list[dict[str, Any]]:
    """Rows of the third table."""
    fields = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1.0}
    experts, topk, tokens, stages = 64, 6, 512, 4
    rows = []
    for microbatches in (2, 4, 8, 16):
        parts = [
            [microbatch(s, m, tokens, shift, drifts) for m in range(microbatches)] for s in range(3)
        ]
        whole = torch.cat(parts[-1], dim=1)
        exact = (
            gradient(build(EchoRouter, 1, fields, experts, topk, spread=0.125), [[whole]], 1)
            * microbatches
        )
        for source in ("microbatch", "cumulative", "late", "previous_step", "late+previous"):
            row: dict[str, Any] = {"microbatches": microbatches, "source": source}
            for name, in_flight in (("first stage", stages), ("last stage", 1)):
                routers = build(EchoRouter, 1, fields, experts, topk, source, spread=0.125)
                set_microbatches(microbatches)
                found = gradient(routers, parts, in_flight)
                row[name] = round(float((found - exact).norm() / exact.norm()), 4)
            rows.append(row)
    return rows


def set_microbatches(microbatches: int) -> None:
    """Tell Megatron's calculator how many microbatches a step has."""
    from megatron.core import num_microbatches_calculator as calculator

    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, None, microbatches, 1, 1)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print one table."""
    print(f"\n{title}")
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    for row in [dict.fromkeys(rows[0]) | {key: key for key in rows[0]}, *rows]:
        print("  ".join(str(value).ljust(widths[key]) for key, value in row.items()))


def draw(tables: list[list[dict[str, Any]]], path: Path) -> None:
    """Memory with all losses, and the error of each count source, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    places = range(len(SCORES))
    parts = [("no loss", "none", "Megatron"), *((f"all, {r}", [*LOSSES][-1], r) for r in ROUTERS)]
    for shift, (label, losses, router) in enumerate(parts):
        heights = [row[router] for row in tables[0] if row["losses"] == losses]
        left.bar([x + 0.27 * (shift - 1) for x in places], heights, 0.25, label=label)
    left.set_xticks(places, list(SCORES))
    left.set_title("Peak of 16 routers / one fp32 tensor of all scores")
    left.legend()
    for source in dict.fromkeys(row["source"] for row in tables[2]):
        rows = [row for row in tables[2] if row["source"] == source]
        counts = [row["microbatches"] for row in rows]
        right.plot(counts, [row["last stage"] for row in rows], "o-", label=source)
    right.set_xscale("log", base=2)
    right.set_xlabel("microbatches a step")
    right.set_title("Error of the batch-wise gradient, 1F1B, last stage")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/aux_loss.json")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    tables = {
        f"memory (units of {UNIT >> 20} MiB)": memory(),
        "time (ms)": seconds(),
        "error under 1F1B, 4 stages, microbatches that differ": error(0.8),
        "error under 1F1B, 4 stages, microbatches alike": error(0.0),
        "error under 1F1B, 4 stages, microbatches alike, routing that moves": error(0.0, 0.5),
    }
    for title, rows in tables.items():
        show(title, rows)
    arguments.output.write_text(json.dumps(tables, indent=1) + "\n")
    draw(list(tables.values()), arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
