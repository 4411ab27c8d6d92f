import dataclasses

import pytest
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_echo.config import (
    EchoMLATransformerConfig,
    EchoTransformerConfig,
    echo_fields,
    flag_name,
)

BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
MOE = {**BASE, "num_moe_experts": 8, "expert_model_parallel_size": 4, "add_bias_linear": False}


@pytest.mark.parametrize("config_class", [EchoTransformerConfig, EchoMLATransformerConfig])
def test_fields_on_both_bases(config_class: type) -> None:
    config = config_class(**MOE, moe_enable_echo=True, moe_num_echo_experts=0)
    assert config.moe_enable_echo
    assert config.num_echo_slots_per_rank == 0
    base = MLATransformerConfig if config_class is EchoMLATransformerConfig else TransformerConfig
    assert isinstance(config, base)


@pytest.mark.parametrize(
    ("value", "advice"), [(30, "Use 28 or 32."), (3, "Use 4."), (8, "Use 0."), (-4, "negative")]
)
def test_a_bad_number_of_slots_names_flag_value_and_choice(value: int, advice: str) -> None:
    with pytest.raises(ValueError, match="--moe-num-echo-experts") as error:
        EchoTransformerConfig(**MOE, moe_enable_echo=True, moe_num_echo_experts=value)
    assert f"--moe-num-echo-experts {value} " in str(error.value)
    assert advice in str(error.value)


@pytest.mark.parametrize("value", [2.0, "4", True])
def test_a_value_of_the_wrong_type(value: object) -> None:
    with pytest.raises(ValueError, match=r"--moe-num-echo-experts .* Use a value of type int"):
        EchoTransformerConfig(**MOE, moe_num_echo_experts=value)


def test_echo_without_experts() -> None:
    with pytest.raises(ValueError, match=r"^--moe-enable-echo needs a mixture.*--num-experts"):
        EchoTransformerConfig(**BASE, moe_enable_echo=True)


def test_echo_with_token_dropping() -> None:
    with pytest.raises(ValueError, match=r"--moe-expert-capacity-factor 1\.5 drops tokens"):
        EchoTransformerConfig(
            **MOE,
            moe_enable_echo=True,
            moe_expert_capacity_factor=1.5,
            moe_token_dispatcher_type="alltoall",
        )


def test_validation_works_on_a_finished_config() -> None:
    config = EchoTransformerConfig(**MOE)
    config.moe_num_echo_experts = 5
    with pytest.raises(ValueError, match="Use 4 or 8"):
        config.validate_echo()


def test_every_field_has_help_and_a_default_that_is_valid() -> None:
    config = EchoTransformerConfig(**MOE)
    for field in echo_fields():
        assert field.metadata["help"].endswith("."), field.name
        assert getattr(config, field.name) == field.default
        assert flag_name(field.name).startswith(("--moe-", "--offload-"))
    stock = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert not stock & {field.name for field in echo_fields()}
