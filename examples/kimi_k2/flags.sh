# shellcheck shell=bash disable=SC2034  # ../launch.sh and ../smoke.sh use the arrays
# Kimi-K2: a trillion parameters, 32 billion active (arXiv 2507.20534 and its config.json).
#
# figures: begin
# 2048 GPUs of 80 GB; flags 0cd5b5ffb2b1. Again: python tools/recipes.py --write kimi_k2
# Memory: python -m megatron_echo.memory.estimate --ranks 2048 --flash-attention --stages 0 1 15 --
#   all arrays but OFFLOAD, --moe-echo-expert-dispatcher-type p2p
#   73.9 GiB on pipeline rank 1 (weights 16.9, gradients 33.7, optimizer 6.0, activations 17.4)
# Gain: python -m megatron_echo.observe.simulate --model kimi-k2 --cluster h100-nvl8 --gpus 2048
#   --ep 8 --pp 16 --vpp 2 --offload-fraction 0 --token-transports symmetric_memory --slots 12
#   --seq-length 4096 --micro-batch-size 1 --global-batch-size 16384 --loads ...
#   ultraep-low: fullest rank 1.27 x the mean, with clones 1.02; +7 % tokens a second
#   ultraep-high: fullest rank 2.70 x the mean, with clones 1.02; +88 % tokens a second
# figures: end

MODEL=(
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 64
    # Multi-head latent attention: low ranks of queries and of keys with values, each normed.
    --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-layernorm
    --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
    # Plain RoPE: YaRN came with the longer context, after pretraining. The fused one is YaRN's.
    --position-embedding-type rope --rope-type rope --rotary-base 50000 --no-rope-fusion
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --padded-vocab-size 163840
    --seq-length 4096 --max-position-embeddings 4096
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
MOE=(
    --num-experts 384 --moe-router-topk 8 --moe-ffn-hidden-size 2048
    --moe-layer-freq '([0]*1+[1]*60)'   # the first layer is dense
    --moe-shared-expert-intermediate-size 2048
    # Scores by sigmoid, the chosen ones scaled to a sum of 2.827; a bias that follows the load takes
    # part in the choice only. A token's experts are anywhere: no limit of groups.
    --moe-router-score-function sigmoid --moe-router-topk-scaling-factor 2.827
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-3
    --moe-router-dtype fp32             # scores in full precision
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm  # ours replace both
)
ECHO=(
    # Slots for clones come from a table, transports from the topology: inside a node each token and
    # each clone in use travels once over NVLink, and the host reads nothing.
    --moe-enable-echo
)
# EP fills a node, so tokens and clones travel over NVLink only; 16 pipeline ranks make room for 48
# experts a layer on each GPU. The first and the last two chunks have a layer less.
PARALLEL=(
    --expert-model-parallel-size 8 --pipeline-model-parallel-size 16
    --pipeline-model-parallel-layout 'Et|(tt|)*29t|tL'
)
# A pipeline this long keeps many microbatches: only the inputs of layers, all else again.
MEMORY=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
OFFLOAD=()  # next to nothing is left to offload
TRAINING=(
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    # Published: a constant rate for 10 T tokens, then 5.5 T down to a tenth of it, and MuonClip. For
    # that add --optimizer muon --qk-clip, with the package emerging_optimizers and Transformer
    # Engine 2.9; without them this is Adam.
    --micro-batch-size 1 --global-batch-size 16384 --train-iters 231000
    --lr 2e-4 --min-lr 2e-5 --lr-decay-style WSD --lr-wsd-decay-style cosine
    --lr-wsd-decay-iters 82000 --lr-warmup-iters 500
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
    --no-create-attention-mask-in-dataloader  # causal attention needs none
    --manual-gc --manual-gc-interval 100      # all ranks collect garbage in the same steps
)
# What the small twin needs besides the sizes in ../smoke.sh.
TWIN=(
    --moe-layer-freq '[0,1]' --moe-shared-expert-intermediate-size 64 --lr-wsd-decay-iters 3
    --q-lora-rank 32 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
)
