"""Every flag of megatron_echo: its default, its help text and its validation, in one place.

The command line (:mod:`megatron_echo.arguments`) is generated from the fields below, so a flag,
its default and the configuration cannot disagree. The fields live in a mixin with two bases,
because Megatron replaces the configuration class by its own under ``--multi-latent-attention``.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron.core.transformer import MLATransformerConfig, TransformerConfig

Check = Callable[[Any, Any], str | None]
"""``check(value, config)`` returns what is wrong and how to mend it, or None if all is well."""


def flag(
    default: Any,
    help: str,
    *,
    group: str,
    check: Check | None = None,
    metavar: str | None = None,
    choices: tuple[str, ...] | None = None,
    none_word: str | None = None,
) -> Any:
    """A dataclass field that is also a command-line flag.

    Args:
        default: the value without the flag; its type is the field's annotation.
        help: one or two sentences for ``--help``.
        group: the title of the ``--help`` group.
        check: says what is wrong with a value; runs on the finished configuration.
        metavar: what ``--help`` shows for the value.
        choices: the values that a string may have.
        none_word: the word that stands for None on the command line.
    """
    metadata = {
        "help": help,
        "group": group,
        "check": check,
        "metavar": metavar,
        "choices": choices,
        "none_word": none_word,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag_name(field_name: str) -> str:
    """The command-line spelling of a field: ``moe_enable_echo`` is ``--moe-enable-echo``."""
    return "--" + field_name.replace("_", "-")


def value_type(field: dataclasses.Field) -> type:
    """The type of a field's value, with ``Optional`` taken off."""
    options = [t for t in typing.get_args(field.type) if t is not types.NoneType]
    return typing.cast(type, options[0] if options else field.type)


def nearest_multiples(value: int, divisor: int) -> str:
    """The positive multiples of ``divisor`` around ``value``, as words for an error message."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else str(above)


def _check_enable_echo(value: bool, config: Any) -> str | None:
    return echo_refusal(config) if value else None


def echo_refusal(config: Any) -> str | None:
    """What in a transformer configuration the layer of this package cannot work with, or None.

    The words follow the flag that turns the layer on: what is wrong, then what to do.
    """
    for refused, reason in _REFUSALS:
        if refused(config):
            return reason.format(config=config)
    return None


_REFUSALS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (
        lambda c: c.num_moe_experts is None,
        "needs a mixture of experts. Give --num-experts, or leave the flag out.",
    ),
    (
        lambda c: c.moe_expert_capacity_factor is not None,
        "is dropless, but --moe-expert-capacity-factor {config.moe_expert_capacity_factor} drops "
        "tokens. Leave one of the two out.",
    ),
    (
        lambda c: c.expert_tensor_parallel_size > 1,
        "keeps whole experts on a rank, but --expert-tensor-parallel-size is "
        "{config.expert_tensor_parallel_size}. Use --expert-tensor-parallel-size 1.",
    ),
    (
        lambda c: c.fp8 or c.fp4,
        "computes experts in bf16, fp16 or fp32. Leave --fp8-format and --fp4-format out.",
    ),
    (
        lambda c: c.add_bias_linear,
        "has experts without biases. Use --disable-bias-linear.",
    ),
    (
        lambda c: c.moe_latent_size is not None,
        "has no latent projections. Leave --moe-latent-size out.",
    ),
    (
        lambda c: c.moe_apply_probs_on_input,
        "applies probabilities inside the activation. Leave --moe-apply-probs-on-input out.",
    ),
    (
        lambda c: c.moe_router_padding_for_quantization,
        "pads rows by itself. Leave --moe-router-padding-for-quantization out and use "
        "--moe-echo-row-alignment.",
    ),
    (
        lambda c: c.moe_shared_expert_overlap,
        "does not overlap the shared expert with communication. Leave "
        "--moe-shared-expert-overlap out.",
    ),
    (
        lambda c: c.overlap_moe_expert_parallel_comm,
        "keeps one dispatch in flight. Leave --overlap-moe-expert-parallel-comm out.",
    ),
    (
        lambda c: c.delay_wgrad_compute or c.overlap_dispatch_backward_with_experts_wgrad,
        "computes weight gradients with the other gradients. Leave --delay-wgrad-compute and "
        "--overlap-dispatch-backward-with-experts-wgrad out.",
    ),
    (
        lambda c: c.use_transformer_engine_op_fuser,
        "has its own experts. Leave --use-transformer-engine-op-fuser out.",
    ),
    (
        lambda c: c.moe_mlp_glu_interleave_size is not None,
        "keeps gate and up projections apart. Leave --moe-mlp-glu-interleave-size out.",
    ),
    (
        lambda c: c.variable_seq_lengths,
        "has static shapes, but the sequence length varies between microbatches. Leave "
        "--variable-seq-lengths out.",
    ),
    (
        lambda c: c.recompute_granularity == "selective" and "moe_act" in c.recompute_modules,
        "recomputes the activation in backward anyway. Take moe_act out of --recompute-modules.",
    ),
    (
        lambda c: c.cuda_graph_impl in ("local", "transformer_engine"),
        "is not captured layer by layer. Leave --cuda-graph-impl {config.cuda_graph_impl} out.",
    ),
    (
        lambda c: c.transformer_impl == "inference_optimized",
        "is a training layer. Use --transformer-impl transformer_engine or local.",
    ),
    (
        lambda c: c.use_cpu_initialization and c.expert_model_parallel_size > 1,
        "needs different experts on each rank, but --use-cpu-initialization makes them the same. "
        "Leave it out.",
    ),
    (
        lambda c: c.fine_grained_activation_offloading,
        "does not offload its activations. Leave --fine-grained-activation-offloading out.",
    ),
)


def _check_num_echo_experts(value: int | None, config: Any) -> str | None:
    ranks = config.expert_model_parallel_size
    if value is None:
        return None
    if value < 0:
        return f"is negative. Use a multiple of the expert-parallel size {ranks}, or 0."
    if value % ranks:
        choice = nearest_multiples(value, ranks)
        return f"is not divisible by the expert-parallel size {ranks}. Use {choice}."
    if value > 0:
        return "asks for clones, which this version does not make yet. Use 0."
    return None


def _check_capacity(value: float | None, config: Any) -> str | None:
    if value is not None and not 0 < value < float("inf"):
        return "is not a positive number. Use 1.0 for perfect balance, more for skew, or auto."
    return None


def _check_peer_capacity(value: float, config: Any) -> str | None:
    if not 0 < value <= 1:
        return "is not above 0 and up to 1. Use 1.0 for a part that is never over-full."
    if value < 1 and config.moe_echo_token_transport != "all_to_all":
        return "belongs to --moe-echo-token-transport all_to_all. Leave one of the two out."
    return None


def _check_row_alignment(value: int, config: Any) -> str | None:
    return None if value >= 1 else "is below 1. Use 1, or the multiple that a kernel wants."


@dataclass
class EchoConfigMixin:
    """The fields that megatron_echo adds to a Megatron transformer configuration."""

    moe_enable_echo: bool = flag(
        False,
        "Clone the hottest experts of each layer and microbatch onto ranks that have room (ECHO), "
        "so that every expert-parallel rank computes the same number of tokens.",
        group="echo",
        check=_check_enable_echo,
    )
    moe_num_echo_experts: int | None = flag(
        None,
        "Slots for cloned experts, in total over the expert-parallel group. 0, and until clones "
        "are made the default too, is the layer without clones: free of host synchronisation, "
        "static in shape.",
        group="echo",
        check=_check_num_echo_experts,
        metavar="N",
    )
    moe_received_token_capacity: float | None = flag(
        None,
        "Rows of each rank's receive buffer, in units of perfect balance: 1.0 holds the tokens of "
        "one rank times the top-k. The default, auto, never overflows.",
        group="echo",
        check=_check_capacity,
        metavar="X",
        none_word="auto",
    )
    moe_echo_overflow: str = flag(
        "raise",
        "What to do when a receive buffer was too small. raise: stop on all ranks before the "
        "optimizer step, with the capacity that would have sufficed. drop: train on without the "
        "token-expert pairs that had no row, counted and logged.",
        group="echo",
        choices=("raise", "drop"),
    )
    moe_echo_token_transport: str = flag(
        "all_gather",
        "How tokens reach the ranks that compute them. all_gather: every rank gets every token. "
        "all_to_all: each token is sent once to each rank that computes one of its experts, in "
        "equal parts.",
        group="echo",
        choices=("all_gather", "all_to_all"),
    )
    moe_echo_peer_capacity: float = flag(
        1.0,
        "Places for each peer in the all-to-all, as a part of a rank's tokens. 1.0 is never "
        "over-full; less saves traffic, and what does not fit is an overflow.",
        group="echo",
        check=_check_peer_capacity,
        metavar="X",
    )
    moe_echo_row_alignment: int = flag(
        1,
        "Each expert's rows are padded to a multiple of this, for kernels that want it.",
        group="echo",
        check=_check_row_alignment,
        metavar="N",
    )

    @property
    def num_echo_slots_per_rank(self) -> int:
        """Clone slots S on each expert-parallel rank."""
        config = typing.cast(Any, self)
        return (self.moe_num_echo_experts or 0) // config.expert_model_parallel_size

    def validate_echo(self) -> None:
        """Check every field of this package on a finished configuration.

        Raises:
            ValueError: names the flag, its value, and what is allowed.
        """
        for field in echo_fields():
            value = getattr(self, field.name)
            _check_type(field, value)
            check = field.metadata["check"]
            problem = check(value, self) if check is not None else None
            if problem is not None:
                raise ValueError(f"{_spelled(field.name, value)} {problem}")


def echo_fields() -> Iterator[dataclasses.Field]:
    """The fields that are flags of this package, in the order of their declaration."""
    return (field for field in dataclasses.fields(EchoConfigMixin) if "group" in field.metadata)


def echo_setting(config: Any, name: str) -> Any:
    """A setting of this package, its default where the configuration is Megatron's plain one."""
    if isinstance(config, EchoConfigMixin):
        return getattr(config, name)
    return 0 if name == "num_echo_slots_per_rank" else getattr(EchoConfigMixin, name)


def _spelled(name: str, value: Any) -> str:
    return flag_name(name) if value is True else f"{flag_name(name)} {value}"


def _check_type(field: dataclasses.Field, value: Any) -> None:
    if value is None and types.NoneType in typing.get_args(field.type):
        return
    expected = value_type(field)
    is_bool_for_int = isinstance(value, bool) and expected is not bool
    choices = field.metadata["choices"]
    if choices is not None and value not in choices:
        raise ValueError(f"{flag_name(field.name)} {value} is unknown. Use {' or '.join(choices)}.")
    if expected is float and type(value) is int:
        return
    if is_bool_for_int or not isinstance(value, expected):
        choice = "True or False" if expected is bool else f"a value of type {expected.__name__}"
        raise ValueError(
            f"{flag_name(field.name)} {value!r} is a {type(value).__name__}. Use {choice}."
        )


@dataclass
class EchoTransformerConfig(EchoConfigMixin, TransformerConfig):
    """Megatron's ``TransformerConfig`` with the fields of this package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_echo()


@dataclass
class EchoMLATransformerConfig(EchoConfigMixin, MLATransformerConfig):
    """Megatron's ``MLATransformerConfig`` with the fields of this package."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_echo()
