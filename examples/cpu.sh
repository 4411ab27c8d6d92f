#!/usr/bin/env bash
# A tiny mixture of experts on a machine without a GPU: two processes, mock data, a minute.
#   bash examples/cpu.sh [any flag of pretrain_gpt_moe.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread a process: the processes share the cores

MODEL=(
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --seq-length 128 --max-position-embeddings 128 --position-embedding-type rope
    --normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0 --hidden-dropout 0
)
MOE=(
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 64
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --expert-model-parallel-size 2 --moe-enable-echo
)
TRAINING=(
    --micro-batch-size 4 --global-batch-size 16 --train-iters 50 --lr 1e-3 --lr-decay-style cosine
    --mock-data --tokenizer-type NullTokenizer --vocab-size 256 --num-workers 0
)
LOGGING=(--log-interval 10 --eval-iters 0 --run-dir runs/cpu --tensorboard-dir runs/cpu/tensorboard)

exec torchrun --standalone --nproc-per-node 2 pretrain_gpt_moe.py \
    "${MODEL[@]}" "${MOE[@]}" "${TRAINING[@]}" "${LOGGING[@]}" "$@"
