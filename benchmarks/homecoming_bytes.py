"""What gradients of clones that travel beside the attention's backward pass add to a layer's peak.

    python benchmarks/homecoming_bytes.py

One layer of each model, with attention as a flash kernel keeps it, is built and trained on tensors
without values by :mod:`megatron_echo.memory.estimate`: one of 8 ranks, 4,096 tokens, bf16, clones
in the slots that are the default. Weight gradients either come home before the backward pass goes
on, or live until the attention's is over. *Peak* is the most bytes beside weights, gradient buffers
and optimizer, with one layer and no embedding to speak of.
"""

import multiprocessing
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

MODELS = {
    "DeepSeek-V3": (
        "--hidden-size 7168 --num-attention-heads 128 --multi-latent-attention --q-lora-rank 1536"
        " --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128"
        " --rope-type rope --num-experts 256 --moe-ffn-hidden-size 2048"
        " --moe-shared-expert-intermediate-size 2048"
    ),
    "Qwen3-235B-A22B": (
        "--hidden-size 4096 --num-attention-heads 64 --group-query-attention --num-query-groups 4"
        " --kv-channels 128 --num-experts 128 --moe-ffn-hidden-size 1536"
    ),
}
COMMON = (
    "--num-layers 1 --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1"
    " --global-batch-size 8 --train-iters 1 --lr 1e-4 --bf16 --swiglu --disable-bias-linear"
    " --normalization RMSNorm --position-embedding-type rope --moe-router-topk 8"
    " --moe-router-dtype fp32 --moe-enable-echo --expert-model-parallel-size 8"
    " --use-distributed-optimizer --mock-data --tokenizer-type NullTokenizer --vocab-size 127"
    " --no-create-attention-mask-in-dataloader --untie-embeddings-and-output-weights"
)


def peak(flags: str, is_hidden: bool) -> int:
    """Bytes beside the states of one rank; in a process of its own."""
    from megatron_echo import cpu_backend

    cpu_backend.enable(verbose=False)
    from megatron_echo.dispatch.transports import PeerToPeerWeights
    from megatron_echo.memory.estimate import dry_run

    PeerToPeerWeights.is_hidden = is_hidden  # stands for symmetric memory
    return dry_run([*COMMON.split(), *flags.split()], 8, 0, flash_attention=True).activations


def main() -> None:
    """Print a table."""
    print("| model | peak, GB | hidden, GB | more |\n|---|---|---|---|")
    for model, flags in MODELS.items():
        context: Any = multiprocessing.get_context("spawn")
        with context.Pool(1, maxtasksperchild=1) as pool:
            plain, hidden = (pool.apply(peak, (flags, way)) for way in (False, True))
        print(f"| {model} | {plain / 1e9:.2f} | {hidden / 1e9:.2f} | {hidden / plain - 1:.1%} |")


if __name__ == "__main__":
    main()
