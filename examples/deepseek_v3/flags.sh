# shellcheck shell=bash disable=SC2034  # ../launch.sh and ../smoke.sh use the arrays
# DeepSeek-V3: 671 billion parameters, 37 active, and an MTP layer (arXiv 2412.19437 and its
# config.json).
#
# figures: begin
# 2048 GPUs of 80 GB; flags e2fb91bbb26b. Again: python tools/recipes.py --write deepseek_v3
# Memory: python -m megatron_echo.memory.estimate --ranks 2048 --flash-attention --stages 0 1 15 --
#   all arrays but OFFLOAD, --moe-echo-expert-dispatcher-type p2p
#   54.3 GiB on pipeline rank 15 (weights 12.8, gradients 25.6, optimizer 3.2, activations 12.7)
# Gain: python -m megatron_echo.observe.simulate --model deepseek-v3 --cluster h100-nvl8 --gpus
#   2048 --ep 8 --pp 16 --vpp 2 --offload-fraction 0 --token-transports symmetric_memory --slots 6
#   --seq-length 4096 --micro-batch-size 1 --global-batch-size 16384 --loads ...
#   ultraep-low: fullest rank 1.36 x the mean, with clones 1.02; +13 % tokens a second
#   ultraep-high: fullest rank 3.98 x the mean, with clones 1.02; +143 % tokens a second
# figures: end

MODEL=(
    --num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
    # Multi-head latent attention: low ranks of queries and of keys with values, each normed.
    --multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-layernorm
    --qk-head-dim 128 --qk-pos-emb-head-dim 64 --v-head-dim 128
    # Plain RoPE: YaRN came with the longer context, after pretraining. The fused one is YaRN's.
    --position-embedding-type rope --rope-type rope --rotary-base 10000 --no-rope-fusion
    --normalization RMSNorm --norm-epsilon 1e-6 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --padded-vocab-size 129280
    --seq-length 4096 --max-position-embeddings 4096
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.006
    --mtp-num-layers 1 --mtp-loss-scaling-factor 0.3  # 0.1 after 10 of 14.8 T tokens
)
MOE=(
    --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048
    --moe-layer-freq '([0]*3+[1]*58)'   # the first three layers are dense
    --moe-shared-expert-intermediate-size 2048
    # Scores by sigmoid, the chosen ones scaled to a sum of 2.5; a bias that follows the load takes
    # part in the choice only.
    --moe-router-score-function sigmoid --moe-router-topk-scaling-factor 2.5
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
    --moe-router-num-groups 8 --moe-router-group-topk 4  # a token's experts in 4 of 8 groups
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
    --moe-router-dtype fp32             # scores in full precision
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm  # ours replace both
)
ECHO=(
    # Slots for clones come from a table, transports from the topology: inside a node each token and
    # each clone in use travels once over NVLink, and the host reads nothing.
    --moe-enable-echo
)
# EP fills a node, so tokens and clones travel over NVLink only; 16 pipeline ranks make room for 32
# experts a layer on each GPU. The MTP layer, which ends in a loss of its own, and the loss are one
# chunk: apart from the loss, Megatron would exchange shapes before each message.
PARALLEL=(
    --expert-model-parallel-size 8 --pipeline-model-parallel-size 16
    --pipeline-model-parallel-layout 'Ett|(tt|)*29t|mL'
)
# A pipeline this long keeps many microbatches: only the inputs of layers, all else again.
MEMORY=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
OFFLOAD=()  # next to nothing is left to offload
TRAINING=(
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    # Published: the batch grows from 3072 to 15360 sequences over the first 0.47 T tokens; the rate
    # is constant for 10 T tokens and then falls. 16384 is the next multiple of 16 microbatches.
    --micro-batch-size 1 --global-batch-size 16384 --train-iters 220000
    --lr 2.2e-4 --min-lr 2.2e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
    --no-create-attention-mask-in-dataloader  # causal attention needs none
    --manual-gc --manual-gc-interval 100      # all ranks collect garbage in the same steps
)
# What the small twin needs besides the sizes in ../smoke.sh.
TWIN=(
    --moe-layer-freq '[0,1]' --moe-shared-expert-intermediate-size 64
    --q-lora-rank 32 --kv-lora-rank 16 --qk-head-dim 16 --qk-pos-emb-head-dim 8 --v-head-dim 16
)
