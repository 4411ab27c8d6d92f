#!/usr/bin/env bash
# Starts a recipe on all nodes of a Slurm job; every train.sbatch ends with it.
#   bash examples/launch.sh RECIPE [any flag of pretrain_gpt_moe.py]
# DATA       prefix of a .bin/.idx pair, several as a blend ("0.3 A 0.7 B"), or mock: made-up tokens
# TOKENIZER  folder or name of the Hugging Face tokenizer that made them; not with DATA=mock
# RUN_DIR    checkpoints and logs (runs/RECIPE); the next job with the same one resumes there
# Needs Transformer Engine (pip install ".[te]"): without it Megatron-Core 0.19.2 cannot resume the
# distributed optimizer, and pretrain_gpt_moe.py refuses to.
set -euo pipefail

RECIPE="${1:?No recipe was named. Name a folder of examples/, mixtral_8x7b for example.}"
shift
: "${SLURM_JOB_ID:?There is no Slurm job. Start sbatch examples/${RECIPE}/train.sbatch.}"
: "${DATA:?No data was named. Set DATA to the prefix of a .bin/.idx pair, or to mock.}"
if [[ ! -f examples/${RECIPE}/flags.sh ]]; then
    echo "There is no recipe ${RECIPE}. Name a folder of examples/, mixtral_8x7b for example." >&2
    exit 2
fi
# shellcheck source=/dev/null
source "examples/${RECIPE}/flags.sh"

export CUDA_DEVICE_MAX_CONNECTIONS=1    # Megatron asks for it with tensor or context parallelism
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True  # less fragmentation
export NCCL_NVLS_ENABLE=0               # saves several GB a GPU; try 1 where memory is plentiful
export NCCL_DEBUG=WARN                  # one line where the network misbehaves
export OMP_NUM_THREADS=8                # torchrun would set 1 and say so
export PYTHONFAULTHANDLER=1             # a stack trace where a process crashes
export TRITON_CACHE_DIR="/tmp/triton-${SLURM_JOB_ID}"    # node-local: no races on a shared disk

# The first node of the job is the meeting point; the job's number makes the port its own.
read -r MASTER_ADDR < <(scontrol show hostnames "${SLURM_JOB_NODELIST}")
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"

RUN_DIR="${RUN_DIR:-runs/${RECIPE}}"    # on a shared disk: every node writes its checkpoint there
# Leave a quarter of an hour before the job's end, to save. Old Slurms do not say when that is.
NOW="$(date +%s)"
MINUTES="${MINUTES:-$(((${SLURM_JOB_END_TIME:-$((NOW + 4 * 3600))} - NOW) / 60 - 15))}"

if [[ ${DATA} == mock ]]; then
    DATASET=(--mock-data --tokenizer-type NullTokenizer --vocab-size 31999)
else
    : "${TOKENIZER:?No tokenizer was named. Set TOKENIZER to the one that made the data.}"
    read -ra BLEND <<<"${DATA}"
    DATASET=(
        --data-path "${BLEND[@]}" --split '990,8,2'
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER}"
    )
fi
CHECKPOINT=(
    --save "${RUN_DIR}/checkpoints" --load "${RUN_DIR}/checkpoints" --save-interval 500
    --ckpt-format torch_dist --exit-duration-in-mins "${MINUTES}"
)
LOGGING=(
    --log-interval 10 --eval-iters 10 --eval-interval 1000
    --run-dir "${RUN_DIR}" --tensorboard-dir "${RUN_DIR}/tensorboard"
)

# -W 0: a node that finishes first does not end the others. -K1: one that fails does, at once.
srun -W 0 -K1 torchrun --nnodes "${SLURM_NNODES}" --nproc-per-node 8 --rdzv-id "${SLURM_JOB_ID}" \
    --rdzv-backend c10d --rdzv-endpoint "${MASTER_ADDR}:${MASTER_PORT}" pretrain_gpt_moe.py \
    "${MODEL[@]}" "${MOE[@]}" "${ECHO[@]}" "${PARALLEL[@]}" "${MEMORY[@]}" "${OFFLOAD[@]}" \
    "${TRAINING[@]}" "${DATASET[@]}" "${CHECKPOINT[@]}" "${LOGGING[@]}" "$@"
