#!/usr/bin/env bash
# A recipe's small twin: its flags with small sizes, on two GPUs or, without any, two processes.
#   bash examples/smoke.sh RECIPE [any flag of pretrain_gpt_moe.py]
# Ten steps on made-up tokens, in a minute: does this installation run the recipe at all?
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RECIPE="${1:?No recipe was named. Name a folder of examples/, mixtral_8x7b for example.}"
shift
if [[ ! -f examples/${RECIPE}/flags.sh ]]; then
    echo "There is no recipe ${RECIPE}. Name a folder of examples/, mixtral_8x7b for example." >&2
    exit 2
fi
# shellcheck source=/dev/null
source "examples/${RECIPE}/flags.sh"

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # one thread a process: they share the cores
export CUDA_DEVICE_MAX_CONNECTIONS=1    # Megatron asks for it with tensor or context parallelism

SIZES=(
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --moe-ffn-hidden-size 64
    --num-attention-heads 4 --num-query-groups 2 --kv-channels 16
    --num-experts 16 --moe-num-echo-experts 16 --seq-length 64 --max-position-embeddings 64
    --padded-vocab-size 256 --vocab-size 255
)
# In place of PARALLEL: two ranks, experts over both.
LAYOUT=(--expert-model-parallel-size 2)
STEPS=(
    --global-batch-size 8 --train-iters 10 --lr 2e-3 --min-lr 2e-4 --lr-warmup-iters 0
    --mock-data --tokenizer-type NullTokenizer --num-workers 0
    --log-interval 1 --eval-iters 0 --run-dir "runs/smoke_${RECIPE}"
)

exec torchrun --standalone --nproc-per-node 2 pretrain_gpt_moe.py \
    "${MODEL[@]}" "${MOE[@]}" "${ECHO[@]}" "${LAYOUT[@]}" "${MEMORY[@]}" "${OFFLOAD[@]}" \
    "${TRAINING[@]}" "${SIZES[@]}" "${TWIN[@]}" "${STEPS[@]}" "$@"
