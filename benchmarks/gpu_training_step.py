"""Step time of ``pretrain_gpt_moe.py`` on one GPU in bf16, Megatron's layer and ours.

    python benchmarks/gpu_training_step.py --output results.json [--tiny]

``--tiny`` is a model for trying the script out on a CPU; its times mean nothing.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from processes import torchrun  # noqa: E402

from megatron_echo.observe.metrics import read_metrics  # noqa: E402

WARM_UP_ITERATIONS = 5


VARIANTS = {
    "allgather": "--moe-token-dispatcher-type allgather",
    "alltoall": "--moe-token-dispatcher-type alltoall",
    "sync-free": "--moe-enable-echo --moe-received-token-capacity 1.0",
}
"""One rank computes everything: a capacity of 1.0 is exact."""


def flags(variant: str, tiny: bool, iterations: int, folder: Path) -> list[str]:
    """The command line of one run, mock data."""
    hidden, ffn, layers, sequence, batch = (64, 64, 2, 64, 2) if tiny else (2048, 1408, 4, 4096, 2)
    text = f"""
        --num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn}
        --num-attention-heads {max(4, hidden // 128)} --num-experts 16 --moe-router-topk 4
        {VARIANTS[variant]} --moe-ffn-hidden-size {ffn}
        --seq-length {sequence} --max-position-embeddings {sequence}
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
        --micro-batch-size {batch} --global-batch-size {2 * batch} --train-iters {iterations}
        --lr 1e-4 --mock-data --tokenizer-type NullTokenizer --vocab-size 32000 --bf16
        --log-interval 5 --eval-iters 0 --run-dir {folder} --tensorboard-dir {folder}
        --log-memory-to-tensorboard
    """
    return text.split()


def measure(variant: str, tiny: bool, iterations: int) -> dict[str, float]:
    """Median seconds an iteration, tokens a second, peak bytes on the device."""
    with tempfile.TemporaryDirectory() as folder:
        words = flags(variant, tiny, iterations, Path(folder))
        torchrun(ROOT / "pretrain_gpt_moe.py", 1, words)
        lines = read_metrics(folder)[WARM_UP_ITERATIONS:]
    seconds = statistics.median(line["iteration-time"] for line in lines)
    batch, sequence = (words[words.index(f) + 1] for f in ("--global-batch-size", "--seq-length"))
    return {
        "seconds": seconds,
        "tokens_per_second": int(batch) * int(sequence) / seconds,
        "peak_bytes": max(line["mem-max-allocated-bytes"] for line in lines),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script out")
    parser.add_argument("--iterations", type=int, default=25, help="iterations of a run")
    args = parser.parse_args()
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("there is no CUDA device. --tiny tries the script out on a CPU.")
    results = {
        f"training step, {variant}": measure(variant, args.tiny, args.iterations)
        for variant in VARIANTS
    }
    for name, result in results.items():
        print(
            f"{name}: {result['seconds'] * 1e3:.1f} ms, {result['tokens_per_second']:,.0f} "
            f"tokens/s, {result['peak_bytes'] / 2**30:.2f} GiB at the peak",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
