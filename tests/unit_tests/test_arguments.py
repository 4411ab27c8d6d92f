import argparse
from types import SimpleNamespace

import pytest

from megatron_echo.arguments import RunArguments, add_echo_arguments, echo_config_from_args
from megatron_echo.config import EchoTransformerConfig, echo_fields
from megatron_echo.flags import flag_name


def parse(*argv: str) -> argparse.Namespace:
    return add_echo_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(argv)


def test_every_field_is_a_flag_with_the_same_default() -> None:
    args = parse()
    for field in echo_fields():
        assert getattr(args, field.name) == field.default
    config = EchoTransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    assert all(getattr(config, f.name) == getattr(args, f.name) for f in echo_fields())


def test_flags_are_in_groups_of_their_own() -> None:
    parser = add_echo_arguments(argparse.ArgumentParser())
    text = parser.format_help()
    for title in ("megatron_echo: echo", "megatron_echo: run directory"):
        assert title in text
    for name in (*(f.name for f in echo_fields()), *RunArguments.__dataclass_fields__):
        assert flag_name(name) in text


def test_values_reach_the_namespace() -> None:
    args = parse("--moe-enable-echo", "--moe-num-echo-experts", "16", "--run-dir", "runs/x")
    assert (args.moe_enable_echo, args.moe_num_echo_experts, args.run_dir) == (True, 16, "runs/x")


def test_a_word_for_a_number_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--moe-num-echo-experts", "many")
    assert "--moe-num-echo-experts: invalid int or auto value: 'many'" in capsys.readouterr().err


def test_heterogeneous_configuration_is_refused_by_name() -> None:
    args = SimpleNamespace(heterogeneous_layers_config_path="layers.json")
    with pytest.raises(ValueError, match="--heterogeneous-layers-config-path"):
        echo_config_from_args(args)
