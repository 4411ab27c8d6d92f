# shellcheck shell=bash disable=SC2034  # ../launch.sh and ../smoke.sh use the arrays
# GPT-OSS-120B: 116.8 billion parameters, 5.1 active (arXiv 2508.10925 and its config.json).
#
# figures: begin
# 128 GPUs of 80 GB; flags f88ae63a3939. Again: python tools/recipes.py --write gpt_oss_120b
# Memory: python -m megatron_echo.memory.estimate --ranks 128 --flash-attention --stages 0 1 3 --
#   all arrays but OFFLOAD, --moe-echo-expert-dispatcher-type p2p
#   68.3 GiB on pipeline rank 0 (weights 8.2, gradients 16.4, optimizer 10.3, activations 33.4)
# Gain: python -m megatron_echo.observe.simulate --model gpt-oss-120b --cluster h100-nvl8 --gpus
#   128 --ep 8 --pp 4 --vpp 3 --offload-fraction 0 --token-transports symmetric_memory --slots 4
#   --seq-length 4096 --micro-batch-size 1 --global-batch-size 1024 --loads ...
#   ultraep-low: fullest rank 1.45 x the mean, with clones 1.02; +6 % tokens a second
#   ultraep-high: fullest rank 4.06 x the mean, with clones 1.02; +103 % tokens a second
# figures: end

MODEL=(
    --num-layers 36 --hidden-size 2880 --ffn-hidden-size 2880
    --num-attention-heads 64 --group-query-attention --num-query-groups 8 --kv-channels 64
    --window-size "128,0" --window-attn-skip-freq 2  # every other layer sees 128 tokens
    --softmax-type learnable            # an attention sink for each head
    --position-embedding-type rope --rotary-base 150000  # YaRN comes with longer contexts
    --normalization RMSNorm --norm-epsilon 1e-5
    --untie-embeddings-and-output-weights --padded-vocab-size 201088
    --seq-length 4096 --max-position-embeddings 4096
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    # All linear layers have biases, experts too, which Megatron's own experts take without this
    # fusion only.
    --no-bias-dropout-fusion
)
MOE=(
    --num-experts 128 --moe-router-topk 4 --moe-ffn-hidden-size 2880
    --quick-geglu --activation-func-clamp-value 7.0 --glu-linear-offset 1.0
    # Not published; a start.
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-3
    --moe-router-dtype fp32             # the softmax over experts in full precision
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm  # ours replace both
)
ECHO=(
    # Slots for clones come from a table, transports from the topology: inside a node each token and
    # each clone in use travels once over NVLink, and the host reads nothing.
    --moe-enable-echo
)
# EP fills a node, so tokens and clones travel over NVLink only. The pipeline, with its small
# messages, goes between nodes; three chunks a rank shorten its bubble.
PARALLEL=(
    --expert-model-parallel-size 8 --pipeline-model-parallel-size 4
    --num-layers-per-virtual-pipeline-stage 3
)
MEMORY=()
OFFLOAD=()
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
