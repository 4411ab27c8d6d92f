# shellcheck shell=bash disable=SC2034  # ../launch.sh and ../smoke.sh use the arrays
# Nemotron-3-Nano: 31.6 billion parameters, 3.2 active (arXiv 2512.20848 and its config.json).
# Its Mamba layers need the packages mamba_ssm, causal_conv1d and einops; the small twin does too.
#
# figures: begin
# 32 GPUs of 80 GB; flags c55f7eefee22. Again: python tools/recipes.py --write nemotron_3_nano
# Memory: of the simulator, with the command below
#   55.1 GiB on the fullest pipeline rank (states 26.6, activations 26.5)
# Gain: python -m megatron_echo.observe.simulate --model nemotron-3-nano --cluster h100-nvl8 --gpus
#   32 --ep 8 --pp 2 --vpp 1 --offload-fraction 0 --token-transports symmetric_memory --slots 4
#   --seq-length 8192 --micro-batch-size 1 --global-batch-size 3072 --loads ...
#   ultraep-low: fullest rank 1.34 x the mean, with clones 1.02; +9 % tokens a second
#   ultraep-high: fullest rank 1.75 x the mean, with clones 1.02; +30 % tokens a second
# figures: end

MODEL=(
    # M is a Mamba-2 layer, E one of experts, * attention; | ends a pipeline rank's part.
    --hybrid-layer-pattern 'MEMEM*EMEMEM*EMEMEM*EMEMEM|*EMEMEM*EMEMEMEM*EMEMEMEME'
    --hidden-size 2688 --ffn-hidden-size 1856
    --mamba-num-heads 64 --mamba-head-dim 64 --mamba-num-groups 8 --mamba-state-dim 128
    --num-attention-heads 32 --group-query-attention --num-query-groups 2 --kv-channels 128
    --position-embedding-type none      # Mamba knows the order
    --normalization RMSNorm --norm-epsilon 1e-5 --squared-relu --disable-bias-linear
    --untie-embeddings-and-output-weights --padded-vocab-size 131072
    --seq-length 8192 --max-position-embeddings 8192
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.0173
)
MOE=(
    --num-experts 128 --moe-router-topk 6 --moe-ffn-hidden-size 1856
    --moe-shared-expert-intermediate-size 3712
    # Scores by sigmoid, the chosen ones scaled to a sum of 2.5; a bias that follows the load takes
    # part in the choice only.
    --moe-router-score-function sigmoid --moe-router-topk-scaling-factor 2.5
    --moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3
    --moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 1e-4
    --moe-router-dtype fp32             # scores in full precision
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
    # Published: a constant rate for four fifths of 25 T tokens, then down to a hundredth of it. How
    # it falls is not; a start.
    --micro-batch-size 1 --global-batch-size 3072 --train-iters 993000
    --lr 1e-3 --min-lr 1e-5 --lr-decay-style WSD --lr-wsd-decay-style minus_sqrt
    --lr-wsd-decay-iters 199000 --lr-warmup-iters 333
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --cross-entropy-loss-fusion --cross-entropy-fusion-impl native
    --no-create-attention-mask-in-dataloader  # causal attention needs none
    --manual-gc --manual-gc-interval 100      # all ranks collect garbage in the same steps
)
# What the small twin needs besides the sizes in ../smoke.sh.
TWIN=(
    --hybrid-layer-pattern 'ME*E' --mamba-num-heads 4 --mamba-head-dim 16 --mamba-num-groups 2
    --mamba-state-dim 16 --moe-shared-expert-intermediate-size 64 --lr-wsd-decay-iters 3
)
