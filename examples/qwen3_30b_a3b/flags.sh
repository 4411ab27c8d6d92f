# shellcheck shell=bash disable=SC2034  # ../launch.sh and ../smoke.sh use the arrays
# Qwen3-30B-A3B: 30.5 billion parameters, 3.3 active (arXiv 2505.09388 and its config.json).
#
# figures: begin
# 32 GPUs of 80 GB; flags ad240b6f4067. Again: python tools/recipes.py --write qwen3_30b_a3b
# Memory: python -m megatron_echo.memory.estimate --ranks 32 --flash-attention --stages 0 1 -- all
#   arrays but OFFLOAD, --moe-echo-expert-dispatcher-type p2p
#   59.2 GiB on pipeline rank 0 (weights 4.8, gradients 9.6, optimizer 10.7, activations 34.1)
# Gain: python -m megatron_echo.observe.simulate --model qwen3-30b-a3b --cluster h100-nvl8 --gpus
#   32 --ep 8 --pp 2 --vpp 1 --offload-fraction 0 --token-transports symmetric_memory --slots 4
#   --seq-length 4096 --micro-batch-size 1 --global-batch-size 2048 --loads ...
#   ultraep-low: fullest rank 1.35 x the mean, with clones 1.02; +10 % tokens a second
#   ultraep-high: fullest rank 3.26 x the mean, with clones 1.02; +109 % tokens a second
# figures: end

MODEL=(
    --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144
    --num-attention-heads 32 --group-query-attention --num-query-groups 4
    --kv-channels 128 --qk-layernorm    # heads are wider than hidden / heads
    --position-embedding-type rope --rotary-base 1000000
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --padded-vocab-size 151936
    --seq-length 4096 --max-position-embeddings 40960
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
MOE=(
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
    # Balance over the global batch, as published; right over data-parallel ranks too.
    --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3
    --moe-router-dtype fp32             # the softmax over experts in full precision
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm  # ours replace both
)
ECHO=(
    # Slots for clones come from a table, transports from the topology: inside a node each token and
    # each clone in use travels once over NVLink, and the host reads nothing.
    --moe-enable-echo
)
# EP fills a node, so tokens and clones travel over NVLink only. Two pipeline ranks halve weights,
# gradients and optimizer, so that nothing has to be computed again.
PARALLEL=(--expert-model-parallel-size 8 --pipeline-model-parallel-size 2)
MEMORY=()
OFFLOAD=()
TRAINING=(
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size 2048 --train-iters 1000000
    # Not published; a start.
    --lr 3e-4 --min-lr 3e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
    --no-create-attention-mask-in-dataloader  # causal attention needs none
    --manual-gc --manual-gc-interval 100      # all ranks collect garbage in the same steps
)
TWIN=()  # what the small twin needs besides the sizes in ../smoke.sh
