"""What gradients of clones that travel beside the attention's backward pass add to a layer's peak.

    python benchmarks/homecoming_bytes.py [--quick]

One layer of each model, with attention as a flash kernel keeps it, is built and trained on tensors
without values by :mod:`megatron_echo.memory.estimate`: one of 8 ranks, 4,096 tokens, bf16, the
default slots. By ``p2p`` gradients of clones come home before the backward pass goes on; by what
``auto`` chooses, symmetric memory, weight gradients live until the attention's is over. *Peak* is
the most bytes beside weights, gradient buffers and optimizer, with hardly a vocabulary.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_echo.memory.estimate import estimate  # noqa: E402

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


def peak(flags: str, weights: str) -> int:
    """Bytes beside the states of one rank, with weights of clones by this transport."""
    words = [*COMMON.split(), *flags.split(), "--moe-echo-expert-dispatcher-type", weights]
    (found,) = estimate(words, 8, flash_attention=True)
    return found.activations


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Qwen3-235B-A22B only")
    chosen = list(MODELS)[1:] if parser.parse_args().quick else list(MODELS)
    print("| model | peak, GB | hidden, GB | more |\n|---|---|---|---|")
    for model in chosen:
        plain, hidden = (peak(MODELS[model], way) for way in ("p2p", "auto"))
        print(f"| {model} | {plain / 1e9:.2f} | {hidden / 1e9:.2f} | {hidden / plain - 1:.1%} |")


if __name__ == "__main__":
    main()
