# shellcheck shell=bash disable=SC2034  # ../launch.sh and ../smoke.sh use the arrays
# Qwen3-235B-A22B: 235 billion parameters, 22 active (arXiv 2505.09388 and its config.json).
#
# figures: begin
# figures: end

MODEL=(
    --num-layers 94 --hidden-size 4096 --ffn-hidden-size 12288
    --num-attention-heads 64 --group-query-attention --num-query-groups 4
    --kv-channels 128 --qk-layernorm    # heads are wider than hidden / heads
    --position-embedding-type rope --rotary-base 1000000
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --padded-vocab-size 151936
    --seq-length 4096 --max-position-embeddings 40960
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
MOE=(
    --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 1536
    # Balance over the global batch, as published; exact with this package's router losses.
    --moe-router-load-balancing-type global_aux_loss --moe-aux-loss-coeff 1e-3
    --moe-router-dtype fp32             # the softmax over experts in full precision
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm  # ours replace both
)
ECHO=(
    --moe-enable-echo
    # As many slots as a rank has experts: balance is always possible, nothing overflows.
    --moe-num-echo-experts 128 --moe-echo-tolerance 0.02
    # Inside a node every rank gets every token. Few slots are in use at a time: p2p moves those
    # only, for which the host reads each plan.
    --moe-echo-token-transport all_gather --moe-echo-expert-dispatcher-type p2p
)
# EP fills a node, so tokens and clones travel over NVLink only. 94 layers are no multiple of the
# stages: the first and the last, which have the embedding and the loss, get one layer less.
PARALLEL=(
    --expert-model-parallel-size 8 --pipeline-model-parallel-size 8
    --pipeline-model-parallel-layout 'Et*5|(t*6|)*14t*5L'
)
# The rows of the experts are most of what a layer keeps: they are computed again.
MEMORY=(--recompute-granularity selective --recompute-modules moe)
# Of the rest, what the link to the host can move without making a step longer.
OFFLOAD=(
    --fine-grained-activation-offloading --offload-modules qkv_linear core_attn attn_proj
    --offload-max-slowdown 0
)
TRAINING=(
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size 2048 --train-iters 1000000
    # Not published; a start.
    --lr 2e-4 --min-lr 2e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
    --no-create-attention-mask-in-dataloader  # causal attention needs none
    --manual-gc --manual-gc-interval 100      # all ranks collect garbage in the same steps
)
TWIN=()  # what the small twin needs besides the sizes in ../smoke.sh
