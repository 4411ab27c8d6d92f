# shellcheck shell=bash disable=SC2034  # ../launch.sh and ../smoke.sh use the arrays
# Mixtral 8x7B: 46.7 billion parameters, 12.9 active (arXiv 2401.04088 and its config.json).
#
# figures: begin
# 64 GPUs of 80 GB; flags 514b1fb08857. Again: python tools/recipes.py --write mixtral_8x7b
# Memory: python -m megatron_echo.memory.estimate --ranks 64 --flash-attention --stages 0 1 3 --
#   all arrays but OFFLOAD, --moe-echo-expert-dispatcher-type p2p
#   60.7 GiB on pipeline rank 0 (weights 3.5, gradients 7.0, optimizer 8.2, activations 42.0)
# Gain: python -m megatron_echo.observe.simulate --model mixtral-8x7b --cluster h100-nvl8 --gpus 64
#   --ep 8 --pp 4 --vpp 4 --offload-fraction 0 --token-transports symmetric_memory --slots 1
#   --seq-length 4096 --micro-batch-size 1 --global-batch-size 1024 --loads ...
#   ultraep-low: fullest rank 1.21 x the mean, with clones 1.02; -11 % tokens a second
#   ultraep-high: fullest rank 3.06 x the mean, with clones 1.02; +67 % tokens a second
# figures: end

MODEL=(
    --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
    --num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
    --position-embedding-type rope --rotary-base 1000000
    --normalization RMSNorm --norm-epsilon 1e-5 --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --padded-vocab-size 32000
    --seq-length 4096 --max-position-embeddings 32768
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
)
MOE=(
    --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 14336
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 2e-2
    --moe-router-dtype fp32             # the softmax over experts in full precision
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm  # ours replace both
)
ECHO=(
    # Slots for clones come from a table, transports from the topology: inside a node each token and
    # each clone in use travels once over NVLink, and the host reads nothing.
    --moe-enable-echo
)
# EP fills a node, so tokens and clones travel over NVLink only. The pipeline, with its small
# messages, goes between nodes; four chunks a rank shorten its bubble.
PARALLEL=(
    --expert-model-parallel-size 8 --pipeline-model-parallel-size 4
    --num-layers-per-virtual-pipeline-stage 2
)
MEMORY=()
# Most of what a layer keeps is rows of the experts: as much of them goes to the host as its link
# can move without making a step longer.
OFFLOAD=(
    --fine-grained-activation-offloading --offload-modules expert_fc1 moe_act
    --offload-max-slowdown 0
)
TRAINING=(
    --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --micro-batch-size 1 --global-batch-size 1024 --train-iters 250000
    # Not published; a start.
    --lr 1e-4 --min-lr 1e-5 --lr-decay-style cosine --lr-warmup-iters 2000
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
    --no-create-attention-mask-in-dataloader  # causal attention needs none
    --manual-gc --manual-gc-interval 100      # all ranks collect garbage in the same steps
)
TWIN=()  # what the small twin needs besides the sizes in ../smoke.sh
