"""What the simulator prints: tables, the winner's flags, and what each figure rests on."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from megatron_echo.observe.simulation.calibration import Calibration
from megatron_echo.observe.simulation.cost_model import CostModel
from megatron_echo.observe.simulation.layout import Layout, stage_layers
from megatron_echo.observe.simulation.placement import place
from megatron_echo.observe.simulation.search import Candidate, Search, best_by_name, fastest
from megatron_echo.record.trace import StepTrace

OFFLOADED = (
    "attn_norm", "qkv_linear", "core_attn", "attn_proj", "mlp_norm", "expert_fc1", "moe_act"
)  # fmt: skip
"""Names for ``--offload-modules``: together nearly all that a layer keeps."""


@dataclasses.dataclass(frozen=True)
class TraceCheck:
    """A trace's own figures, and whether planning its counts again gives them.

    Attributes:
        calls: layer calls of the trace.
        routed: max/mean of each call without clones, ``[calls]``, from its counts.
        placed: the same as the run computed, from ``load_after``.
        same: calls in which planning again gives every rank the load that was recorded.
    """

    calls: int
    routed: np.ndarray
    placed: np.ndarray
    same: int


def check_trace(traces: Sequence[StepTrace], tolerance: float, node: int | None) -> TraceCheck:
    """Compare a trace with the planner.

    Args:
        traces: of one run.
        tolerance: ``--moe-echo-tolerance`` of that run.
        node: its ``--moe-echo-ranks-per-node``.
    """
    routed, placed, same = [], [], 0
    for trace in traces:
        mean = trace.counts.sum((1, 2)) / trace.counts.shape[1]
        routed.append(trace.load_before.max(1) / mean)
        placed.append(trace.load_after.max(1) / mean)
        ranks = trace.counts.shape[1]
        again = place(
            trace.counts, trace.slot_expert.shape[2], tolerance, node or ranks, node is not None
        )
        same += int((again.placed == trace.load_after.max(1)).sum())
    return TraceCheck(sum(map(len, routed)), np.concatenate(routed), np.concatenate(placed), same)


def trace_lines(check: TraceCheck, tolerance: float) -> list[str]:
    """The trace's figures as text."""
    return [
        f"Trace, {check.calls} layer calls, measured: max/mean load of ranks as routed "
        f"{check.routed.mean():.4f} (max {check.routed.max():.4f}), as computed "
        f"{check.placed.mean():.4f} (max {check.placed.max():.4f}).",
        f"Planned again at tolerance {tolerance:g}: the highest load is the recorded one in "
        f"{check.same} of {check.calls} calls."
        + ("" if check.same == check.calls else " Give the run's own --trace-tolerance."),
    ]


def table(model: CostModel, found: Sequence[Candidate]) -> list[str]:
    """The best of each EP size and number of clones."""
    header = (
        f"{'EP':>4} {'clones':<21} {'PPxVPP':>6} {'kept':<9} {'tokens by':<18} {'weights':<10} "
        f"{'routed':>6} {'placed':>6} {'clones':>6} {'step s':>8} {'+-':>6} {'experts':>7} "
        f"{'tokens':>7} {'clones':>7} {'rest':>7} {'TP, CP':>7} {'bubble':>7} {'exposed':>7} "
        f"{'tok/s/GPU':>9} {'GiB':>6} {'host':>6}"
    )
    lines = [header]
    hbm = model.cluster.hbm_gib
    for one in best_by_name(found, hbm):
        time, layout, placed = one.time, one.layout, one.placed
        by = layout.tokens_by + (
            f" {layout.peer_capacity:g}" if layout.tokens_by == "all_to_all" else ""
        )
        speed = model.work.global_batch * model.work.sequence / time.total / layout.gpus
        overload = 1.0 if layout.tokens_by == "balanced" else placed.overload_placed.mean()
        parts = (
            time.compute, time.tokens, time.clones, time.rest, time.shards, time.bubble,
            time.exposed,
        )  # fmt: skip
        kept = "recompute" if layout.recompute else "offload" if layout.offload else "all"
        lines.append(
            f"{layout.expert:>4} {one.name:<21} "
            f"{f'{layout.pipeline}x{layout.virtual}' + '*' * (layout.layers is not None):>6} "
            f"{kept:<9} {by:<18} {layout.weights_by or '-':<10} "
            f"{placed.overload_routed.mean():>6.3f} {overload:>6.3f} "
            f"{placed.clones.mean():>6.1f} {time.total:>8.3f} {time.error:>6.3f} "
            + " ".join(f"{part:>7.3f}" for part in parts)
            + f" {speed:>9,.0f} {one.memory.total:>6.1f} {one.memory.host:>6.1f}"
            + ("" if one.memory.total <= hbm else "  does not fit")
        )
    if any("*" in line for line in lines):
        lines.append("* layers placed with --pipeline-model-parallel-layout")
    return lines


def _parallel_flags(model: CostModel, layout: Layout) -> str:
    """Sizes of the groups, and which layers are where."""
    words = [f"--expert-model-parallel-size {layout.expert}"]
    words.append(f"--pipeline-model-parallel-size {layout.pipeline}")
    if layout.tensor > 1:
        words.append(f"--tensor-model-parallel-size {layout.tensor} --sequence-parallel")
        words.append("--expert-tensor-parallel-size 1")
    if layout.context > 1:
        words.append(f"--context-parallel-size {layout.context}")
    counts = stage_layers(model.model, layout)
    if layout.layers is not None:
        middle = "|".join("t" * count for count in counts)
        words.append(f"--pipeline-model-parallel-layout 'E{middle}L'")
    elif layout.virtual > 1:
        words.append(f"--num-virtual-stages-per-pipeline-rank {layout.virtual}")
    elif counts[-1] != counts[0]:
        words.append(f"--decoder-last-pipeline-num-layers {counts[-1]}")
    return " ".join(words)


def megatron_flags(model: CostModel, one: Candidate, by_node: bool = False) -> list[str]:
    """A candidate as flags of ``pretrain_gpt_moe.py``, some to a line."""
    layout, work = one.layout, model.work
    lines = model.model.flags()
    lines.append(
        f"--seq-length {work.sequence} --max-position-embeddings {work.sequence} "
        f"--micro-batch-size {work.micro_batch} --global-batch-size {work.global_batch}"
    )
    lines.append("--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather")
    lines.append(_parallel_flags(model, layout))
    if layout.recompute:
        lines.append(
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
        )
    if layout.offload:
        lines.append(
            "--fine-grained-activation-offloading --activation-offload-fraction "
            f"{layout.offload:g} --offload-modules {' '.join(_offloaded(model))}"
        )
    lines.append("--moe-token-dispatcher-type alltoall --moe-grouped-gemm")
    if one.kind != "echo":
        return lines
    placed = one.placed
    capacity = "auto" if one.capacity is None else f"{one.capacity:g}"
    lines.append(
        f"--moe-enable-echo --moe-num-echo-experts {placed.slots * placed.ranks} "
        f"--moe-echo-tolerance {placed.tolerance:g} --moe-received-token-capacity {capacity}"
    )
    peer = f" --moe-echo-peer-capacity {layout.peer_capacity:g}" if layout.peer_capacity < 1 else ""
    lines.append(
        f"--moe-echo-token-transport {layout.tokens_by}{peer} "
        f"--moe-echo-expert-dispatcher-type {layout.weights_by}"
    )
    node = model.cluster.ranks_per_node(layout.expert)
    if by_node and node < layout.expert:
        lines.append(f"--moe-echo-ranks-per-node {node}")
    return lines


def _offloaded(model: CostModel) -> list[str]:
    shared = ["shared_experts"] if model.model.shared_ffn else []
    return [*OFFLOADED, *shared]


def best_lines(model: CostModel, search: Search, found: Sequence[Candidate]) -> list[str]:
    """The winner, its margins, its memory and its flags."""
    hbm = model.cluster.hbm_gib
    real = [one for one in found if one.kind != "what if"]
    best = fastest(real, hbm)
    if best is None:
        least = min(real, key=lambda one: one.memory.total)
        return [
            f"Nothing fits {hbm:g} GiB: the smallest, EP={least.layout.expert} "
            f"PP={least.layout.pipeline} {least.name}, needs {least.memory.total:.1f} GiB. Use "
            "more GPUs, more pipeline stages or a shorter sequence."
        ]
    lines = [
        f"Best: {best.name}, EP={best.layout.expert}, PP={best.layout.pipeline}: "
        f"{best.time.total:.3f} s a step."
    ]
    for kind, what in (("plain", "the best plain EP"), ("echo", "the best with clones")):
        other = fastest((one for one in real if one.kind == kind), hbm)
        if kind == best.kind:
            continue
        if other is None:
            lines.append(f"  {what}: none fits.")
            continue
        margin = other.time.total / best.time.total - 1
        noise = (other.time.error + best.time.error) / best.time.total
        lines.append(
            f"  {what} (EP={other.layout.expert}, PP={other.layout.pipeline}, {other.name}) takes "
            f"{margin:.1%} longer; the draw of layer calls is good for +-{2 * noise:.1%}."
        )
    for one in best_by_name((c for c in found if c.kind == "what if"), hbm):
        if one.layout.expert == best.layout.expert:
            lines.append(
                f"  What if, at EP={one.layout.expert}: {one.name} would take "
                f"{one.time.total:.3f} s (PP={one.layout.pipeline})."
            )
    memory = best.memory
    lines.append(
        f"  Memory of the fullest rank: {memory.total:.1f} of {hbm:g} GiB (states "
        f"{memory.states:.1f}, activations {memory.activations:.1f}, clones {memory.clones:.1f}, "
        f"working {memory.working:.1f}, reserve {memory.reserve:.1f}); on the host "
        f"{memory.host:.1f} GiB."
    )
    lines.append("  Flags:")
    lines += [f"    {line} \\" for line in megatron_flags(model, best, search.by_node)]
    lines[-1] = lines[-1].removesuffix(" \\")
    return lines


def calibration_lines(calibration: Calibration) -> list[str]:
    """The model against measured runs."""
    lines = [
        "The form of the model against measured CPU runs at EP=2 (constants from other runs than "
        "the one predicted):"
    ]
    lines += [
        f"  {check.name:<45} measured {check.measured:8.3f}   predicted {check.predicted:8.3f}   "
        f"error {check.error:+.0%}"
        for check in calibration.checks
    ]
    clones = "" if calibration.clone_ms is None else f", {calibration.clone_ms:.1f} ms for clones"
    lines.append(
        f"  Fitted: {calibration.gflops:.0f} GFLOP/s, {calibration.row_ns:.0f} ns an element of a "
        f"row{clones} a layer call, on that machine."
    )
    return lines + [f"  {note}" for note in calibration.notes]


def basis_lines(model: CostModel, search: Search) -> list[str]:
    """What is measured, what is arithmetic, what is assumed."""
    assumed = ", ".join(
        f"{field.name} {getattr(model.assumed, field.name):g}"
        for field in dataclasses.fields(model.assumed)
    )
    return [
        "What this rests on",
        f"  Loads: {search.loads.basis}. Balance and clones are the real planner's, exactly.",
        "  Arithmetic: operations, bytes over links, parameters, bytes kept for backward "
        "(bf16, fp32 gradients, Adam in fp32 spread by the distributed optimizer).",
        f"  Data sheets: {model.cluster.name} {model.cluster.nvlink_gb_s:g} GB/s in a node, "
        f"{model.cluster.network_gb_s:g} GB/s a GPU to others, {model.cluster.host_gb_s:g} GB/s to "
        f"its host, {model.cluster.tflops:g} TFLOP/s.",
        f"  Assumed, not measured: {assumed}.",
        "  Assumed: no transfer within a layer hides behind products; replicas of an expert-"
        "parallel group see equal loads; no contention between groups; what the host's link moves "
        "in a forward pass is offloaded, and hidden.",
        "  What if, in no program: balanced, Megatron's all-to-all with equal loads.",
        "  symmetric_memory and hybrid_ep send just the rows that leave; hybrid_ep needs DeepEP.",
        "  No step on a GPU has been compared with this. Ratios are worth more than seconds.",
    ]
