"""A whole training step of ``pretrain_gpt_moe.py`` on one GPU: Megatron's layers, ours, captured.

1.4 billion parameters: eight layers with 32 experts as small as Qwen3-30B-A3B's, bf16, mock data,
Adam in fp32. Each run is a process of its own. The times are of whole iterations, optimizer and
data loading included. Nobody checks for NaN, which a captured step could not do and which costs a
wait for the device in each microbatch.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ceilings import PRODUCT
from processes import ROOT
from record import Figures, Recorder, Row, SkippedError

from megatron_echo import environment
from megatron_echo.observe.metrics import read_metrics

LOCAL = "--transformer-impl local --no-masked-softmax-fusion --no-persist-layer-norm"
STOCK = "--moe-token-dispatcher-type alltoall"
TE = "--transformer-impl transformer_engine"
STOCK_TE = f"{STOCK} {TE} --moe-grouped-gemm --moe-permute-fusion"
OURS = "--moe-enable-echo --moe-received-token-capacity 1.0"
CAPTURED = """
    --cuda-graph-impl full_iteration --te-rng-tracker --no-check-for-nan-in-loss-and-grad
"""
OFFLOAD = "--fine-grained-activation-offloading --offload-modules expert_fc1 moe_act"

VARIANTS = {
    "stock local": f"{LOCAL} {STOCK}",
    "ours": f"{LOCAL} {OURS}",
    "ours captured": f"{LOCAL} {OURS} {CAPTURED}",
    "stock TE": STOCK_TE,
    "ours on TE, captured": f"{TE} {OURS} {CAPTURED}",
    "ours on TE": f"{TE} {OURS}",
    "ours, offloading": f"{LOCAL} {OURS} {OFFLOAD}",
    "stock TE, offloading": f"{STOCK_TE} {OFFLOAD} --offload-implementation megatron",
    "ours on TE, offloading": f"{TE} {OURS} {OFFLOAD}",
}
"""Flags of each run, the most important ones first. One rank computes everything, so that a
capacity of 1.0 is exact."""

DRY_VARIANTS = ("stock local", "ours", "ours captured")
TARGETS = {
    "ours captured": "over_stock_local >= 1.3",
    "ours on TE, captured": "over_stock_te >= 1.15",
}
BASES = {"over_stock_local": "stock local", "over_stock_te": "stock TE", "over_ours": "ours"}
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4}  # dense bf16, of the SXM modules' data sheets
WARM_UP_ITERATIONS = 6  # Megatron captures in the fourth
RUN_SECONDS = 110  # at most, for one run


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
    iterations: int = 16

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


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def train(flags: list[str], seconds: float) -> None:
    """One run as a single rank, without torchrun, which takes seconds to start."""
    single = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    settings = {"CUDA_DEVICE_MAX_CONNECTIONS": 1, "PYTHONWARNINGS": "ignore"}
    names = {**single, **meeting, **settings}
    variables = {name: str(value) for name, value in names.items()}
    try:
        result = subprocess.run(
            [sys.executable, str(ROOT / "pretrain_gpt_moe.py"), *flags],
            env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""
        output = output.decode(errors="replace") if isinstance(output, bytes) else output
        print(output[-8000:], flush=True)
        raise RuntimeError(f"took over {seconds:.0f} s; last: {last_line(output)}") from None
    if result.returncode:
        print(result.stdout[-8000:], flush=True)
        raise RuntimeError(f"exit code {result.returncode}: {last_line(result.stdout)}")


def last_line(output: str) -> str:
    """The last line that speaks of an error, or the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [""]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])


def measure(
    variant: str, model: Model, seconds: float, rows: dict[str, Row], losses: dict[str, list[float]]
) -> Figures:
    """Train and read the metrics.

    Args:
        variant: one of :data:`VARIANTS`.
        model: what to train.
        seconds: the run may take.
        rows: those of other variants, and the ceilings.
        losses: of each iteration of each variant so far; this one's are added.
    """
    if TE in VARIANTS[variant] and not environment.HAVE_TRANSFORMER_ENGINE:
        raise SkippedError("Transformer Engine does not import")
    if model is TINY and variant not in DRY_VARIANTS:
        raise SkippedError("needs a GPU")
    with tempfile.TemporaryDirectory() as folder:
        train([*model.flags(Path(folder)), *VARIANTS[variant].split()], seconds)
        lines = read_metrics(folder)
    losses[variant] = [line["lm loss"] for line in lines]
    counted = lines[min(WARM_UP_ITERATIONS, model.iterations - 1) :]
    per_step = statistics.median(line["iteration-time"] for line in counted)
    tflops = model.flops_per_token * model.tokens / per_step / 1e12
    figures = {"ms": per_step * 1e3, "tokens_per_s": model.tokens / per_step, "tflops": tflops}
    peaks = [peak for name, peak in PEAK_TFLOPS.items() if name in environment.device_name()]
    if peaks:
        figures["mfu"] = tflops / peaks[0]
    if PRODUCT in rows:
        figures["of_product"] = tflops / rows[PRODUCT].figures["tflops"]
    for figure, key in (
        ("peak_gib", "mem-max-allocated-bytes"),
        ("held_gib", "mem-reserved-bytes"),
    ):
        if key in lines[-1]:
            figures[figure] = lines[-1][key] / 2**30
    for name, base in BASES.items():
        if base in rows and base != variant:
            figures[name] = rows[base].figures["ms"] / figures["ms"]
    if "ours" in losses and variant != "ours":
        pairs = zip(losses[variant], losses["ours"], strict=False)
        figures["loss_from_ours"] = max(abs(a - b) for a, b in pairs)
    return {**figures, "last_loss": losses[variant][-1]}


def run(recorder: Recorder, dry: bool) -> None:
    """The variants one after the other, while there is time."""
    model = TINY if dry else Model()
    rows = {row.name: row for row in recorder.measured("ceilings")}
    losses: dict[str, list[float]] = {}
    for variant in VARIANTS:
        seconds = min(RUN_SECONDS, recorder.seconds_left)
        function = partial(measure, variant, model, seconds, rows, losses)
        targets = [TARGETS[variant]] if variant in TARGETS else []
        recorder.measure(variant, function, targets)
        rows |= {row.name: row for row in recorder.measured("training")}
