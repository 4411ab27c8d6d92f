"""What the simulator prints: tables, the winner's flags, and what each figure rests on."""

import math
from collections.abc import Sequence
from itertools import islice

import numpy as np

from megatron_echo.observe.simulation.inputs import Model
from megatron_echo.observe.simulation.layout import Layout, Run
from megatron_echo.observe.simulation.placement import place
from megatron_echo.observe.simulation.search import (
    Candidate,
    Search,
    best_by_name,
    fastest,
    smallest,
)
from megatron_echo.record.trace import StepTrace

OFFLOADED = (
    "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"
)  # fmt: skip
"""Names for ``--offload-modules``: together nearly all that a layer keeps."""


def report_lines(search: Search, found: Sequence[Candidate], left_out: Sequence[str]) -> list[str]:
    """The whole report: the trace's own figures, the best of each kind, the winner, the basis."""
    (cluster, model, work), loads = search.run, search.workload
    traced = []
    if loads.traces:
        node = cluster.gpus_per_node if search.by_node else None
        tolerance = next((t for t in search.tolerance if t is not None), 0.0)
        traced = [*trace_lines(loads.traces, tolerance, node), ""]
    return [
        f"{model.name} ({model.parameters / 1e9:.1f} G parameters) on {cluster.gpus:,} GPUs of "
        f"{cluster.name}, TP={search.tp}, CP={search.cp}, {work.global_batch:,} "
        f"sequences of {work.sequence} tokens a step; loads: {loads.name} ({loads.basis})",
        "",
        *traced,
        *(f"Left out: {reason}" for reason in left_out),
        *_table(search.run, found),
        "",
        *_best_lines(search, found),
        "",
        *_basis_lines(search),
    ]


def trace_lines(
    traces: Sequence[StepTrace], tolerance: float, gpus_per_node: int | None
) -> list[str]:
    """A trace's own figures, and whether planning its counts again gives them.

    ``tolerance`` is that of the traced run, ``gpus_per_node`` None if its planner knew no nodes.
    """
    routed, placed, same = [], [], 0
    for trace in traces:
        ranks, after = trace.counts.shape[1], trace.load_after.max(1)
        mean = trace.counts.sum((1, 2)) / ranks
        routed += list(trace.load_before.max(1) / mean)
        placed += list(after / mean)
        node = math.gcd(ranks, gpus_per_node or ranks)
        slots, by_node = trace.slot_expert.shape[2], gpus_per_node is not None
        same += int((place(trace.counts, slots, tolerance, node, by_node).placed == after).sum())
    hint = "" if same == len(routed) else " Give the run's own --tolerance and --by-node."
    return [
        f"Trace, {len(routed)} layer calls, measured: max/mean load of ranks as routed "
        f"{np.mean(routed):.4f} (max {max(routed):.4f}), as computed {np.mean(placed):.4f} (max "
        f"{max(placed):.4f}).",
        f"Planned again at tolerance {tolerance:g}: the highest load is the recorded one in {same} "
        f"of {len(routed)} calls.{hint}",
    ]


def _table(run: Run, found: Sequence[Candidate]) -> list[str]:
    """The best of each EP size and number of clones."""
    hbm = run.cluster.hbm_gib
    lines = [
        f"{'EP':>4} {'clones':<21} {'PPxVPP':>6} {'kept':<9} {'tokens by':<18} {'weights':<10} "
        f"{'routed':>6} {'placed':>6} {'clones':>6} {'step s':>8} {'+-':>6} {'experts':>7} "
        f"{'tokens':>7} {'clones':>7} {'rest':>7} {'TP, CP':>7} {'bubble':>7} {'exposed':>7} "
        f"{'tok/s/GPU':>9} {'GiB':>6} {'host':>6}"
    ]
    for one in best_by_name(found, hbm):
        time, layout, placed = one.time, one.layout, one.placed
        stages = f"{layout.pipeline}x{layout.virtual}" + "*" * (layout.layers is not None)
        kept = "recompute" if layout.recompute else "offload" if layout.offload else "all"
        peer = f" {layout.peer_capacity:g}" if layout.tokens_by == "all_to_all" else ""
        speed = run.work.global_batch * run.work.sequence / time.total / layout.gpus
        lines.append(
            f"{layout.expert:>4} {one.name:<21} {stages:>6} {kept:<9} "
            f"{layout.tokens_by + peer:<18} {layout.weights_by or '-':<10} "
            f"{placed.overload_routed.mean():>6.3f} {placed.overload_placed.mean():>6.3f} "
            f"{placed.clones.mean():>6.1f} "
            f"{time.total:>8.3f} {time.error:>6.3f} "
            + " ".join(f"{part:>7.3f}" for part in time[:7])
            + f" {speed:>9,.0f} {one.memory.total:>6.1f} {one.memory.host:>6.1f}"
            + ("" if one.memory.total <= hbm else "  does not fit")
        )
    if any("*" in line for line in lines):
        lines.append("* layers placed with --pipeline-model-parallel-layout")
    return lines


def _model_flags(model: Model) -> list[str]:
    """Without the vocabulary's tokenizer."""
    lines = [
        f"{'' if model.pattern else f'--num-layers {model.layers} '}--hidden-size {model.hidden}",
        f"--ffn-hidden-size {model.ffn} --num-attention-heads {model.heads}",
        f"--num-experts {model.experts} --moe-router-topk {model.topk}",
        f"--moe-ffn-hidden-size {model.moe_ffn}",
        f"{'--swiglu' if model.matrices == 3 else '--squared-relu'} --disable-bias-linear",
        "--normalization RMSNorm --untie-embeddings-and-output-weights",
        f"--position-embedding-type {'none' if model.pattern else 'rope'}",
    ]
    if model.dense_layers:
        lines.append(f"--moe-layer-freq '[0]*{model.dense_layers}+[1]*{model.moe_layers}'")
    if model.pattern:
        lines.append(
            f"--mamba-num-heads {model.mamba_heads} --mamba-head-dim {model.mamba_head_dim} "
            f"--mamba-num-groups {model.mamba_groups} --mamba-state-dim {model.mamba_state}"
        )
    if model.shared_ffn:
        lines.append(f"--moe-shared-expert-intermediate-size {model.shared_ffn}")
    mla = (
        f"--multi-latent-attention --q-lora-rank {model.q_lora} --kv-lora-rank {model.kv_lora} "
        f"--qk-head-dim {model.head_dim} --qk-pos-emb-head-dim {model.rope_dim} "
        f"--v-head-dim {model.value_width}"
    )
    gqa = f"--group-query-attention --num-query-groups {model.groups} "
    return [*lines, mla if model.q_lora else gqa + f"--kv-channels {model.head_dim}"]


def _parallel_flags(run: Run, layout: Layout) -> str:
    """Sizes of the groups, and which layers are where."""
    words = [
        f"--expert-model-parallel-size {layout.expert}",
        f"--pipeline-model-parallel-size {layout.pipeline}",
    ]
    if layout.tensor > 1:
        words.append(
            f"--tensor-model-parallel-size {layout.tensor} --sequence-parallel "
            "--expert-tensor-parallel-size 1"
        )
    if layout.context > 1:
        words.append(f"--context-parallel-size {layout.context}")
    counts = layout.counts(run.model)
    if run.model.pattern:
        letters = iter(run.model.pattern)
        stages = ["".join(islice(letters, count)) for count in counts]
        words.append(f"--hybrid-layer-pattern '{'|'.join(stages)}'")
    elif layout.layers is not None:
        middle = "|".join("t" * count for count in counts)
        words.append(f"--pipeline-model-parallel-layout 'E{middle}L'")
    elif layout.virtual > 1:
        words.append(f"--num-virtual-stages-per-pipeline-rank {layout.virtual}")
    elif counts[-1] != counts[0]:
        words.append(f"--decoder-last-pipeline-num-layers {counts[-1]}")
    return " ".join(words)


def megatron_flags(run: Run, one: Candidate, by_node: bool = False) -> list[str]:
    """A candidate as flags of ``pretrain_gpt_moe.py``, some to a line."""
    layout, work, placed = one.layout, run.work, one.placed
    lines = [
        *_model_flags(run.model),
        f"--seq-length {work.sequence} --max-position-embeddings {work.sequence} "
        f"--micro-batch-size {work.micro_batch} --global-batch-size {work.global_batch}",
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
        _parallel_flags(run, layout),
    ]
    if layout.recompute:
        lines.append(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        )
    if layout.offload:
        modules = [*OFFLOADED, "shared_experts"] if run.model.shared_ffn else OFFLOADED
        lines.append(
            "--fine-grained-activation-offloading --activation-offload-fraction "
            f"{layout.offload:g} --offload-modules {' '.join(modules)}"
        )
    lines.append("--moe-token-dispatcher-type alltoall --moe-grouped-gemm")
    if one.kind != "echo":
        return lines
    capacity = "auto" if one.capacity is None else f"{one.capacity:g}"
    tolerance = "auto" if placed.tolerance is None else f"{placed.tolerance:g}"
    peer = f" --moe-echo-peer-capacity {layout.peer_capacity:g}" if layout.peer_capacity < 1 else ""
    lines += [
        f"--moe-enable-echo --moe-num-echo-experts {placed.slots * placed.ranks} "
        f"--moe-echo-tolerance {tolerance} --moe-received-token-capacity {capacity}",
        f"--moe-echo-token-transport {layout.tokens_by}{peer} "
        f"--moe-echo-expert-dispatcher-type {layout.weights_by}",
    ]
    node = run.cluster.ranks_per_node(layout.expert)
    if by_node and node < layout.expert:
        lines.append(f"--moe-echo-ranks-per-node {node}")
    return lines


def _best_lines(search: Search, found: Sequence[Candidate]) -> list[str]:
    """The winner, its margin, its memory and its flags."""
    hbm = search.run.cluster.hbm_gib
    best = fastest(found, hbm)
    if best is None:
        least = smallest(found)
        return [
            f"Nothing fits {hbm:g} GiB: the smallest, EP={least.layout.expert} "
            f"PP={least.layout.pipeline} {least.name}, needs {least.memory.total:.1f} GiB. Use "
            "more GPUs, more pipeline stages or a shorter sequence."
        ]
    what = "plain EP" if best.kind == "echo" else "with clones"
    other = fastest((one for one in found if one.kind != best.kind), hbm)
    margin = "none fits."
    if other is not None:
        noise = 2 * (other.time.error + best.time.error) / best.time.total
        margin = (
            f"EP={other.layout.expert}, PP={other.layout.pipeline}, {other.name}, takes "
            f"{other.time.total / best.time.total - 1:.1%} longer; the draw of layer calls is good "
            f"for +-{noise:.1%}."
        )
    memory = best.memory
    return [
        f"Best: {best.name}, EP={best.layout.expert}, PP={best.layout.pipeline}: "
        f"{best.time.total:.3f} s a step.",
        f"  The best {what}: {margin}",
        f"  Memory of the fullest rank: {memory.total:.1f} of {hbm:g} GiB (states "
        f"{memory.states:.1f}, activations {memory.activations:.1f}, clones {memory.clones:.1f}, "
        f"working {memory.working:.1f}, reserve {memory.reserve:.1f}); on the host "
        f"{memory.host:.1f} GiB.",
        "  Flags:",
        " \\\n".join(f"    {line}" for line in megatron_flags(search.run, best, search.by_node)),
    ]


def _basis_lines(search: Search) -> list[str]:
    """What is measured, what is arithmetic, what is assumed."""
    cluster = search.run.cluster
    assumed = ", ".join(f"{name} {value:g}" for name, value in cluster.assumed.items())
    return [
        "What this rests on",
        f"  Loads: {search.workload.basis}. Balance and clones are the real planner's, exactly.",
        "  Arithmetic: operations, bytes over links, parameters, bytes kept for backward "
        "(bf16, fp32 gradients, Adam in fp32 spread by the distributed optimizer).",
        f"  Data sheets: {cluster.name} {cluster.nvlink_gb_s:g} GB/s in a node, "
        f"{cluster.network_gb_s:g} GB/s a GPU to others, {cluster.host_gb_s:g} GB/s to its host, "
        f"{cluster.tflops:g} TFLOP/s.",
        f"  Assumed, not measured, to be set in a cluster's file: {assumed}.",
        "  Assumed: no transfer within a layer hides behind products; replicas of an expert-"
        "parallel group see equal loads; no contention between groups; what the host's link moves "
        "in a forward pass is offloaded, and hidden.",
        "  symmetric_memory and hybrid_ep send just the rows that leave; hybrid_ep needs DeepEP.",
        "  No step on a GPU has been compared with this. Ratios are worth more than seconds.",
    ]
