"""The command line of megatron_echo, generated from the configuration's fields."""

import dataclasses
from argparse import ArgumentParser, Namespace

from megatron.core.transformer import MLATransformerConfig

from megatron_echo.config import EchoMLATransformerConfig, EchoTransformerConfig, echo_fields
from megatron_echo.environment import HAVE_TRANSFORMER_ENGINE
from megatron_echo.flags import add_flags, flag, flag_name


@dataclasses.dataclass
class RunArguments:
    """Flags of ``pretrain_gpt_moe.py`` that do not belong to the model's configuration."""

    run_dir: str | None = flag(
        None,
        "Folder for this run's records: run.json (resolved flags, versions, layout) and "
        "metrics.jsonl (one line an iteration, full-precision floats under Megatron's names). "
        "TensorBoard events and checkpoints go below it too where --tensorboard-dir or --save "
        "say so.",
        group="run directory",
        metavar="DIR",
    )
    memory_ledger: str | None = flag(
        None,
        "Write what each module keeps for backward in the first step into this JSON file, and a "
        "picture beside it; one for each pipeline stage.",
        group="run directory",
        metavar="FILE",
    )


def add_echo_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add every flag of this package to Megatron's parser, in groups of its own.

    Use it as ``extra_args_provider`` of ``megatron.training.parse_and_validate_args``.
    """
    add_flags(parser, (*echo_fields(), *dataclasses.fields(RunArguments)))
    if not HAVE_TRANSFORMER_ENGINE:
        # Megatron asks for it, for its own layers. Our experts do without.
        for action in parser._actions:
            if action.dest == "delay_wgrad_compute":
                parser.set_defaults(delay_wgrad_compute=False)
                action.dest = "delay_wgrad_of_experts"
    return parser


def repair_help(parser: ArgumentParser) -> None:
    """Escape a bare ``%`` in help texts: one of Megatron 0.19.2's makes ``--help`` fail."""
    for action in parser._actions:
        if action.help is None:
            continue
        try:
            action.help % {**vars(action), "prog": parser.prog}
        except (ValueError, TypeError, KeyError):
            action.help = action.help.replace("%", "%%")


def refuse_heterogeneous_layers(args: Namespace) -> None:
    """Refuse, by a ``ValueError``, the one configuration class that cannot carry our fields."""
    for name in ("heterogeneous_layers_config_path", "heterogeneous_layers_config_encoded_json"):
        if getattr(args, name, None) is not None:
            raise ValueError(
                f"{flag_name(name)} builds Megatron's own configuration class, which cannot carry "
                "the flags of megatron_echo. Leave it out, or run Megatron's own script."
            )


def echo_config_from_args(args: Namespace) -> EchoTransformerConfig | EchoMLATransformerConfig:
    """The transformer configuration of a parsed command line, with this package's fields.

    Megatron's ``core_transformer_config_from_args(args, config_class)`` ignores
    ``config_class`` under ``--multi-latent-attention``; here the finished object becomes the
    MLA twin. It is not rebuilt from its own fields, because Megatron's ``__post_init__`` is not
    idempotent.

    Raises:
        ValueError: a flag of this package has a bad value, or the heterogeneous configuration,
            which cannot carry the fields, was asked for.
    """
    from megatron.training.argument_utils import core_transformer_config_from_args

    refuse_heterogeneous_layers(args)
    config = core_transformer_config_from_args(args, EchoTransformerConfig)
    is_delayed = getattr(args, "delay_wgrad_of_experts", False)
    if is_delayed and not args.moe_enable_echo:
        raise ValueError(
            "--delay-wgrad-compute needs Transformer Engine, but for the experts of this package. "
            "Install it, or add --moe-enable-echo."
        )
    config.delay_wgrad_compute |= is_delayed
    if isinstance(config, EchoTransformerConfig):
        config.validate_echo()
        return config
    if type(config) is not MLATransformerConfig:
        raise ValueError(
            f"Megatron built a {type(config).__name__} from this command line; the flags of "
            "megatron_echo fit TransformerConfig and MLATransformerConfig only."
        )
    config.__class__ = EchoMLATransformerConfig
    for field in echo_fields():
        setattr(config, field.name, getattr(args, field.name, field.default))
    config.validate_echo()
    return config
