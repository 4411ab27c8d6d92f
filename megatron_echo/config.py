"""Every flag of the MoE layer: its default, its help text and its validation, in one place.

The command line (:mod:`megatron_echo.arguments`) is generated from the fields below, so a flag,
its default and the configuration cannot disagree. The fields live in a mixin with two bases,
because Megatron replaces the configuration class by its own under ``--multi-latent-attention``.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_echo import flag_checks as checks
from megatron_echo import flags
from megatron_echo.compatibility import whole_layer_in_graph
from megatron_echo.flags import check_type, spelled
from megatron_echo.loss_settings import RouterLossSettings
from megatron_echo.planner.slots import auto_slots
from megatron_echo.precision import FORMATS, Fp8Format, expert_precision

flag = functools.partial(flags.flag, group="echo")


@dataclass
class EchoConfigMixin:
    """The fields that megatron_echo adds to a Megatron transformer configuration."""

    moe_enable_echo: bool = flag(
        False,
        "The MoE layer of this package: no host synchronisation, static shapes, and the hottest "
        "experts of each layer and microbatch cloned onto ranks that have room (ECHO), so that "
        "every expert-parallel rank computes the same number of tokens.",
        check=checks.enable_echo,
    )
    moe_num_echo_experts: int | None = flag(
        None,
        "Slots for cloned experts, in total over the expert-parallel group. The default, auto, is "
        "a table: 6 a rank for 256 experts on 8 ranks, 2 on 64. As many as a rank has experts, "
        "--num-experts in total, balance any routing and cannot overflow. 0: no clones.",
        check=checks.num_echo_experts,
        none_word="auto",
    )
    moe_received_token_capacity: float | None = flag(
        None,
        "Rows of each rank's receive buffer, in units of perfect balance: 1.0 holds the tokens of "
        "one rank times the top-k. The default, auto, never overflows without clones or with as "
        "many slots as experts. With fewer it is 1.25, and a step that needs more overflows.",
        check=checks.capacity,
        none_word="auto",
    )
    moe_echo_max_tokens_per_rank: int | None = flag(
        None,
        "The most tokens that a rank brings to a layer, where their number differs between "
        "microbatches or ranks (packed or variable-length sequences): the buffers are made for "
        "it. What a rank brings less costs no product and counts nowhere. Without it all ranks "
        "bring the same number.",
        check=checks.positive,
    )
    moe_echo_overflow: str = flag(
        "raise",
        "What to do when a receive buffer was too small. raise: stop on all ranks before the "
        "optimizer step, with the capacity that would have sufficed. drop: train on without the "
        "token-expert pairs that had no row, counted and logged.",
        choices=("raise", "drop"),
    )
    moe_echo_token_transport: str = flag(
        "auto",
        "How tokens reach the ranks that compute them. auto: by the topology, and says what. "
        "all_gather: every rank gets every token. all_to_all: each token is sent once to each rank "
        "that computes one of its experts, in equal parts. hybrid_ep: by DeepEP's HybridEP "
        "kernels. nccl_ep, experimental: by those of NCCL EP. symmetric_memory: each token is "
        "written straight into the rows where its experts compute it; for ranks of one machine.",
        check=checks.token_transport,
        choices=("auto", "all_gather", "all_to_all", "hybrid_ep", "nccl_ep", "symmetric_memory"),
    )
    moe_echo_peer_capacity: float = flag(
        1.0,
        "Places for each peer in the all-to-all, as a part of a rank's tokens. 1.0 is never "
        "over-full; less saves traffic, and what does not fit is an overflow.",
        check=checks.peer_capacity,
    )
    moe_echo_fp32_sums_on_the_wire: bool = flag(
        False,
        "With all_gather: partial sums of a token's experts travel in fp32, which is twice the "
        "bytes. Without it each is rounded once to the tokens' dtype, as with the other "
        "transports, and they are added in fp32.",
    )
    moe_echo_row_alignment: int = flag(
        1,
        "Each expert's rows are padded to a multiple of this, for kernels that want it.",
        check=checks.row_alignment,
    )

    moe_echo_tolerance: float | None = flag(
        0.02,
        "How far above the mean a rank's load may be, 0.02 for 2 %. Saves clones. auto: as far as "
        "the receive buffer holds, where that is faster by prediction: rows are weighed against "
        "clones in each layer and microbatch, and none is made that does not pay.",
        check=checks.tolerance,
        none_word="auto",
    )
    moe_echo_rows_per_clone: int | None = flag(
        None,
        "With --moe-echo-tolerance auto: how many rows a rank computes while one clone travels "
        "inside its node. auto: by the layer's sizes and stated speeds of the device.",
        check=checks.rows_per_clone,
        none_word="auto",
    )
    moe_echo_min_tokens_per_clone: int = flag(
        0,
        "Clones with fewer tokens are given up where their home can compute them within the bound.",
        check=checks.not_negative,
    )
    moe_echo_ranks_per_node: int | None = flag(
        None,
        "Expert-parallel ranks that share a node: clones then stay inside it where balance allows "
        "that, and tokens stay in their node where they can.",
        check=checks.ranks_per_node,
    )
    moe_echo_clones_within_node: bool = flag(
        False,
        "No clone leaves its home's node, and no weights of clones cross nodes. Each node is "
        "balanced by itself; the receive buffer is by default twice that of perfect balance.",
        check=checks.within_node,
    )
    moe_echo_planner_backend: str = flag(
        "auto",
        "What plans: torch operations, Triton kernels, or by device.",
        check=checks.kernels,
        choices=("auto", "torch", "triton"),
    )
    moe_echo_grouped_gemm: str = flag(
        "auto",
        "What multiplies the experts' rows. torch: grouped_mm, with a kernel of this package for "
        "rows of clones on a GPU, elsewhere with a copy of the home weights beside the clones. "
        "triton: kernels of this package alone. "
        "auto: torch on a CPU, and on a GPU where grouped_mm has a kernel that does not wait for "
        "the host: bf16, compute capability 9 or 10, widths of a multiple of 8, fewer than 1,024 "
        "experts and slots on a rank. Elsewhere, from compute capability 8.0 on, triton.",
        check=checks.kernels,
        choices=("auto", "torch", "triton"),
    )
    moe_echo_expert_precision: str = flag(
        "auto",
        "What experts compute in. params-dtype: as their parameters, bf16 as a rule. The others: "
        "operands in e4m3, in which tokens and clones travel too; parameters and gradients stay as "
        "they are. fp8-rowwise: a scale for each row, for compute capability 9.0. mxfp8: a scale "
        "for 32 elements, for 10.0. fp8-blockwise: for 128, of weights for 128 x 128, by kernels "
        "of this package, which have all three from 8.9 on with --moe-echo-grouped-gemm triton. A "
        "CPU has a reference of each. auto: the format of --fp8-recipe mxfp8 or blockwise where "
        "it can be had, else params-dtype, and says so. nvfp4 is not built.",
        check=checks.expert_precision,
        choices=("auto", "params-dtype", *FORMATS, "nvfp4"),
    )
    moe_echo_recompute_expert_dispatch: bool = flag(
        True,
        "Bring clones again in backward. Without it each layer call keeps a copy of its clones "
        "until its backward pass: more memory, one exchange less.",
    )
    moe_echo_expert_dispatcher_type: str = flag(
        "auto",
        "How weights of clones travel. auto: by the topology, and says what. collective: for each "
        "slot an expert between each two ranks, in use or not. p2p: only the slots in use, for "
        "which the host reads each plan; not within CUDA graphs. symmetric_memory: only the slots "
        "in use, read by the ranks that want them; for ranks of one machine, or of each node.",
        check=checks.expert_dispatcher,
        choices=("auto", "collective", "p2p", "symmetric_memory"),
    )
    moe_echo_check_every: int = flag(
        0,
        "Every so many steps compute one MoE layer again without clones and compare, and compare "
        "the plan over the ranks; stop on a difference. 0 never does.",
        check=checks.every,
    )
    moe_echo_trace_dir: str | None = flag(
        None,
        "Write the routing counts of each layer and microbatch, and the plans, into this folder, "
        "one .npz file for each traced step and pipeline stage.",
        metavar="DIR",
    )
    moe_echo_trace_every: int = flag(
        1,
        "Trace every so many steps.",
        check=checks.positive,
    )
    moe_echo_capture_routing: str | None = flag(
        None,
        "Write the chosen experts of every token and their probabilities into this folder, one "
        ".npz file for each step and rank, copied behind the computation.",
        check=checks.capture,
        metavar="DIR",
    )
    moe_echo_capture_slots: int = flag(
        64,
        "Layer calls whose routing may be on its way to the host; with as many as a step has, "
        "nothing waits before its end.",
        check=checks.positive,
    )
    moe_echo_replay_routing: str | None = flag(
        None,
        "Send every token to the experts that it went to in another run: a folder of "
        "--moe-echo-capture-routing, or step-00000001.npz and so on with ids [tokens, MoE layers, "
        "K]. The parallel layout may differ.",
        check=checks.replay,
        metavar="DIR",
    )
    moe_echo_aux_counts: str = flag(
        "unbiased",
        "Which choices the load-balancing losses count. unbiased: the top-k of the scores, as "
        "DeepSeek-V3 and Megatron. assigned: what the router chose with bias, groups and replay.",
        group="router losses",
        choices=("unbiased", "assigned"),
    )
    moe_echo_aux_count_source: str = flag(
        "late+previous",
        "Whose counts global_aux_loss uses. microbatch: its own. cumulative: and those before it. "
        "late: of all whose forward pass came before the backward pass. previous_step: of the "
        "step before. late+previous: late, the rest estimated from these and the step before.",
        group="router losses",
        choices=("microbatch", "cumulative", "late", "previous_step", "late+previous"),
    )
    moe_echo_aux_mcore_compat: bool = flag(
        False,
        "Leave the losses to Megatron's own router, bit for bit, with what is wrong in them.",
        group="router losses",
    )
    moe_echo_force_skew: float = flag(
        0.0,
        "For tests and benchmarks: adds a fixed Zipf bias with this exponent to the router's "
        "logits, in another order in each layer, so that the routing is skewed and still learns.",
        check=checks.skew,
        metavar="ALPHA",
    )

    @property
    def num_echo_slots_per_rank(self) -> int:
        """Clone slots S on each expert-parallel rank; 0 with echo off or a single rank."""
        return num_clone_slots(self) if self.moe_enable_echo else 0

    def __post_init__(self) -> None:
        with whole_layer_in_graph(self):
            super().__post_init__()  # type: ignore[misc]
        self.validate_echo()

    def validate_echo(self) -> None:
        """Check every field of this package on a finished configuration.

        Raises:
            ValueError: names the flag, its value, and what is allowed.
        """
        for field in echo_fields():
            value = getattr(self, field.name)
            check_type(field, value)
            check = field.metadata["check"]
            problem = check(value, self) if check is not None else None
            if problem is not None:
                raise ValueError(f"{spelled(field.name, value)} {problem}")
        if self.moe_enable_echo:
            RouterLossSettings.from_config(self)


def echo_fields() -> Iterator[dataclasses.Field]:
    """The fields that are flags of this package, in the order of their declaration."""
    return (field for field in dataclasses.fields(EchoConfigMixin) if "group" in field.metadata)


def echo_setting(config: Any, name: str) -> Any:
    """A setting of this package, its default where the configuration is Megatron's plain one."""
    if isinstance(config, EchoConfigMixin):
        return getattr(config, name)
    return getattr(EchoConfigMixin, name)


def num_clone_slots(config: Any) -> int:
    """Clone slots S on each expert-parallel rank with our layer; none on a single rank."""
    ranks = config.expert_model_parallel_size
    if ranks == 1 or config.num_moe_experts is None:
        return 0
    total = echo_setting(config, "moe_num_echo_experts")
    return auto_slots(ranks, config.num_moe_experts) if total is None else total // ranks


def expert_width(config: Any) -> int:
    """Width of the rows that experts take and give: H, or the latent width."""
    return config.moe_latent_size or config.hidden_size


def expert_elements(config: Any) -> int:
    """Elements of an expert's weights on a rank, or of its slice there; biases included."""
    matrices, width = 3 if config.gated_linear_unit else 2, expert_width(config)
    ffn = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
    biases = (matrices - 1) * ffn + width if config.add_bias_linear else 0
    return matrices * width * ffn + biases


def fp8_format(config: Any) -> Fp8Format | None:
    """Of what the experts' products take; None where they compute in the parameters' dtype."""
    return FORMATS.get(expert_precision(config)[0])


def row_alignment(config: Any) -> int:
    """To what each expert's rows are padded: ``--moe-echo-row-alignment``, in FP8 a format's."""
    given, form = echo_setting(config, "moe_echo_row_alignment"), fp8_format(config)
    return math.lcm(given, form.alignment) if form else given


def dispatched_row_bytes(config: Any, is_packed: bool) -> int:
    """Bytes of a token on its way to an expert; packed it is in FP8, with its scales."""
    width, form = expert_width(config), fp8_format(config) if is_packed else None
    return width + form.scale_bytes(width) if form else width * config.params_dtype.itemsize


def clone_itemsize(config: Any) -> int:
    """Bytes of an element of a clone's weights; scales are left out."""
    return 1 if fp8_format(config) else config.params_dtype.itemsize


@dataclass
class EchoTransformerConfig(EchoConfigMixin, TransformerConfig):
    """Megatron's ``TransformerConfig`` with the fields of this package."""


@dataclass
class EchoMLATransformerConfig(EchoConfigMixin, MLATransformerConfig):
    """Megatron's ``MLATransformerConfig`` with the fields of this package."""
