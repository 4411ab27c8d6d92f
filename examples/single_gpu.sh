#!/usr/bin/env bash
# A mixture of experts of 0.9 billion parameters on one GPU with 80 GB, bf16, mock data.
#   bash examples/single_gpu.sh [any flag of pretrain_gpt_moe.py]
# For real data: replace --mock-data and the tokenizer flags below (--data-path, --tokenizer-type).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Fewer out-of-memory errors from fragmentation.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"  # torchrun would set 1 and say so

MODEL=(
    --num-layers 12 --hidden-size 1024 --ffn-hidden-size 2816 --num-attention-heads 16
    --group-query-attention --num-query-groups 4
    --seq-length 4096 --max-position-embeddings 4096 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
)
MOE=(
    --num-experts 32 --moe-router-topk 4 --moe-ffn-hidden-size 704
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --moe-enable-echo  # one rank has nobody to clone for: no host reads, static shapes
)
TRAINING=(
    --bf16 --micro-batch-size 1 --global-batch-size 32 --train-iters 1000
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 100
    --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --mock-data --tokenizer-type NullTokenizer --vocab-size 32000
)
LOGGING=(
    --log-interval 10 --eval-iters 0 --run-dir runs/single_gpu
    --tensorboard-dir runs/single_gpu/tensorboard
)

exec torchrun --standalone --nproc-per-node 1 pretrain_gpt_moe.py \
    "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${LOGGING[@]}" "$@"
