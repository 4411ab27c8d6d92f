"""A whole training step of ``pretrain_gpt_moe.py`` on one GPU: Megatron's layers, ours, captured.

1.4 billion parameters: eight layers with 32 experts as small as Qwen3-30B-A3B's, bf16, mock data,
Adam in fp32. Each run is a process of its own. The times are of whole iterations, optimizer and
data loading included. Nobody checks for NaN, which a captured step could not do and which costs a
wait for the device in each microbatch.
"""

import statistics
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ceilings
from processes import ROOT
from ranks import WaitingRanks
from record import Case, Figures, Recorder, SkippedError
from timing import release_memory

from megatron_echo import environment
from megatron_echo.record.metrics import read_metrics

PART = "A training step of 1.4 billion parameters"
SMALL_PART = "A training step of a tiny model"
LOCAL = "--transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm"
STOCK = "--moe-token-dispatcher-type alltoall"
TE = "--transformer-impl transformer_engine"
OURS = "--moe-enable-echo --moe-received-token-capacity 1.0"
CAPTURED = """
    --cuda-graph-impl full_iteration --te-rng-tracker --no-check-for-nan-in-loss-and-grad
"""
LAYERS = "--cuda-graph-impl local --te-rng-tracker"
TE_LAYERS = "--cuda-graph-impl transformer_engine --te-rng-tracker"
PARTS = f"{TE_LAYERS} --cuda-graph-modules attn moe_router moe_preprocess"
OFFLOAD = """
    --fine-grained-activation-offloading --offload-modules core_attn expert_fc1 moe_act
    --min-offloaded-tensor-size 16384
"""
RECOMPUTE = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"

VARIANTS = {
    "stock local": f"{LOCAL} {STOCK}",
    "ours": f"{LOCAL} {OURS}",
    "ours captured": f"{LOCAL} {OURS} {CAPTURED}",
    "stock TE": f"{STOCK} {TE} --moe-grouped-gemm --moe-permute-fusion",
    "ours on TE, captured": f"{TE} {OURS} {CAPTURED}",
    "ours, captured layers": f"{LOCAL} {OURS} {LAYERS}",
    "ours on TE, captured layers": f"{TE} {OURS} {TE_LAYERS}",
    "stock TE, captured parts": f"{STOCK} {TE} --moe-grouped-gemm --moe-permute-fusion {PARTS}",
    "ours, full recomputation": f"{LOCAL} {OURS} {RECOMPUTE}",
    "ours, offloading": f"{LOCAL} {OURS} {OFFLOAD}",
    "ours captured, offloading": f"{LOCAL} {OURS} {CAPTURED} {OFFLOAD}",
}
"""Flags of each run. One rank computes everything, so that a capacity of 1.0 is exact."""

SPEED = (
    "ours", "stock local", "ours captured", "stock TE", "ours on TE, captured",
    "ours, captured layers", "stock TE, captured parts", "ours on TE, captured layers",
)  # fmt: skip
MEMORY = (
    "ours, full recomputation", "ours, offloading", "ours captured", "ours captured, offloading",
)  # fmt: skip
SMALL = ("ours", "ours captured", "ours, captured layers", "ours captured, offloading")
TARGETS = {
    "ours captured": ("over_stock_local >= 1.3",),
    "ours on TE, captured": ("over_stock_te >= 1.15",),
    "ours, captured layers": ("over_eager >= 1",),
    "ours on TE, captured layers": ("over_captured_parts >= 1",),
    "ours, offloading": (
        "over_full_recomputation >= 1", "of_its_memory <= 1", "exposed_share <= 0.05",
    ),
    "ours captured, offloading": ("over_captured >= 0.97", "of_captured_memory <= 0.95"),
}  # fmt: skip
BASES = {
    "over_stock_local": "stock local",
    "over_stock_te": "stock TE",
    "over_captured_parts": "stock TE, captured parts",
    "over_eager": "ours",
    "over_full_recomputation": "ours, full recomputation",
    "over_captured": "ours captured",
}
MEMORY_BASES = {
    "of_its_memory": "ours, full recomputation",
    "of_captured_memory": "ours captured",
}
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4}  # dense bf16, of the SXM modules' data sheets
WARM_UP_ITERATIONS = 5  # Megatron captures in the fourth
RUN_SECONDS = 100  # at most, for one run
LOSS_LIMIT = 2e-2  # between layers, relative: sums in bf16 are in another order


@dataclass(frozen=True)
class Model:
    """Sizes of the trained model and of a step."""

    layers: int = 8
    hidden: int = 2048
    ffn: int = 768
    experts: int = 32
    topk: int = 8
    heads: int = 16
    groups: int = 4
    channels: int = 128
    sequence: int = 1024
    sequences: int = 4
    microbatches: int = 4
    vocabulary: int = 32000
    iterations: int = 10

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequence * self.sequences * self.microbatches

    @property
    def flops_per_token(self) -> float:
        """Of forward and backward: 6 a parameter that a token meets, and causal attention."""
        attention = 2 * self.hidden * self.channels * (self.heads + self.groups)
        experts = self.hidden * (3 * self.topk * self.ffn + self.experts)
        scores = self.heads * self.channels * self.sequence  # half of 2 products of 2 flops
        layers = self.layers * (6 * (attention + experts) + 6 * scores)
        return layers + 6 * self.hidden * self.vocabulary

    def flags(self, folder: Path) -> list[str]:
        """The command line without a variant's flags."""
        batch = self.sequences * self.microbatches
        return f"""
            --num-layers {self.layers} --hidden-size {self.hidden} --ffn-hidden-size {self.ffn}
            --num-attention-heads {self.heads} --kv-channels {self.channels}
            --group-query-attention --num-query-groups {self.groups}
            --num-experts {self.experts} --moe-router-topk {self.topk}
            --moe-ffn-hidden-size {self.ffn} --moe-router-load-balancing-type none
            --moe-router-dtype fp32
            --seq-length {self.sequence} --max-position-embeddings {self.sequence}
            --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
            --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
            --micro-batch-size {self.sequences} --global-batch-size {batch}
            --train-iters {self.iterations} --lr 1e-4 --bf16 --mock-data --num-workers 0
            --tokenizer-type NullTokenizer --vocab-size {self.vocabulary} --log-interval 1
            --eval-iters 0 --run-dir {folder} --tensorboard-dir {folder}
            --log-memory-to-tensorboard --no-check-for-nan-in-loss-and-grad
        """.split()


TINY = Model(
    layers=2, hidden=64, ffn=32, experts=8, topk=2, heads=4, groups=2, channels=16, sequence=64,
    sequences=2, microbatches=2, vocabulary=128, iterations=5,
)  # fmt: skip


def start(variant: str, model: Model, folder: Path) -> WaitingRanks:
    """A run whose imports begin now; its metrics will be in ``folder``."""
    argv = [*model.flags(folder), *VARIANTS[variant].split()]
    return WaitingRanks(
        ROOT / "pretrain_gpt_moe.py", argv, env={"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    )


def figures_of(lines: list[dict], model: Model) -> Figures:
    """Time, rate and memory of a step, from the metrics of each iteration."""
    counted = lines[min(WARM_UP_ITERATIONS, len(lines) - 1) :]
    per_step = statistics.median(line["iteration-time"] for line in counted)
    tflops = model.flops_per_token * model.tokens / per_step / 1e12
    figures = {"ms": per_step * 1e3, "tokens_per_s": model.tokens / per_step, "tflops": tflops}
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if name in environment.device_name()]
    if peaks:
        figures["mfu"] = tflops / peaks[0]
    for figure, key in (
        ("peak_gib", "mem-max-allocated-bytes"),
        ("held_gib", "mem-reserved-bytes"),
    ):
        if key in lines[-1]:
            figures[figure] = lines[-1][key] / 2**30
    if lines[-1].get("offload/bytes"):
        back = lines[-1]["offload/hidden_bytes"] + lines[-1]["offload/exposed_bytes"]
        figures["offloaded_gib"] = lines[-1]["offload/bytes"] / 2**30
        figures["exposed_share"] = lines[-1]["offload/exposed_bytes"] / max(back, 1)
    return {**figures, "first_loss": lines[0]["lm loss"], "last_loss": lines[-1]["lm loss"]}


class Runs:
    """The runs of a stage: all import side by side, and train one after the other.

    Args:
        recorder: knows the rows so far.
        part: the table that they belong to.
        model: what to train.
        variants: of :data:`VARIANTS`, in the order in which they train.
    """

    def __init__(
        self, recorder: Recorder, part: str, model: Model, variants: tuple[str, ...]
    ) -> None:
        self._recorder, self._part, self._model = recorder, part, model
        self._folder = tempfile.TemporaryDirectory()
        self._waiting = {
            variant: start(variant, model, Path(self._folder.name) / variant.replace(" ", "-"))
            for variant in variants
            if environment.HAVE_TRANSFORMER_ENGINE or TE not in VARIANTS[variant]
        }
        longest = RUN_SECONDS + 10.0
        self.cases = [
            Case(part, variant, partial(self._measure, variant), TARGETS.get(variant, ()), longest)
            for variant in variants
        ]

    def _measure(self, variant: str) -> Figures:
        if variant not in self._waiting:
            raise SkippedError("Transformer Engine does not import")
        release_memory()
        self._waiting[variant].run(self._recorder.at_most(RUN_SECONDS))
        folder = Path(self._folder.name) / variant.replace(" ", "-")
        figures = figures_of(read_metrics(folder), self._model)
        product = self._recorder.figures(ceilings.PART, ceilings.PRODUCT)
        if product:
            figures["of_product"] = figures["tflops"] / product["tflops"]
        for name, base in BASES.items():
            other = self._recorder.figures(self._part, base)
            if other:
                figures[name] = other["ms"] / figures["ms"]
        for name, base in MEMORY_BASES.items():
            other = self._recorder.figures(self._part, base)
            if other and "peak_gib" in other:
                figures[name] = figures["peak_gib"] / other["peak_gib"]
        self._compare_losses(figures)
        return figures

    def _compare_losses(self, figures: Figures) -> None:
        """Add how far the losses are from those of our eager layer, in this model.

        Raises:
            AssertionError: further than sums in another order explain.
        """
        eager = self._recorder.figures(self._part, "ours")
        if not eager:
            return
        names = ("first_loss", "last_loss")
        figures["loss_from_ours"] = max(abs(figures[n] - eager[n]) / eager[n] for n in names)
        if not figures["loss_from_ours"] <= LOSS_LIMIT:
            raise AssertionError(f"losses {[(n, figures[n], eager[n]) for n in names]}")


def small_runs(recorder: Recorder) -> Runs:
    """A tiny model, eager, as one graph, and as graphs of its layers."""
    return Runs(recorder, SMALL_PART, TINY, SMALL)


def runs(recorder: Recorder, variants: tuple[str, ...]) -> Runs:
    """The model of this benchmark, a tiny one in a dry run."""
    return Runs(recorder, PART, TINY if recorder.dry else Model(), variants)
