import dataclasses

import pytest
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megatron_echo.config import (
    EchoMLATransformerConfig,
    EchoTransformerConfig,
    echo_fields,
)
from megatron_echo.flags import flag_name
from megatron_echo.plan_settings import plan_tolerance, token_capacity

BASE = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
MOE = {**BASE, "num_moe_experts": 8, "expert_model_parallel_size": 4, "add_bias_linear": False}


@pytest.mark.parametrize("config_class", [EchoTransformerConfig, EchoMLATransformerConfig])
def test_fields_on_both_bases(config_class: type) -> None:
    config = config_class(**MOE, moe_enable_echo=True, moe_num_echo_experts=4)
    assert config.moe_enable_echo
    assert config.num_echo_slots_per_rank == 1
    base = MLATransformerConfig if config_class is EchoMLATransformerConfig else TransformerConfig
    assert isinstance(config, base)


def test_slots_default_to_the_experts_of_a_rank_where_those_are_few() -> None:
    assert EchoTransformerConfig(**MOE, moe_enable_echo=True).num_echo_slots_per_rank == 2
    assert EchoTransformerConfig(**MOE).num_echo_slots_per_rank == 0
    zero = EchoTransformerConfig(**MOE, moe_enable_echo=True, moe_num_echo_experts=0)
    assert zero.num_echo_slots_per_rank == 0
    alone = {**MOE, "expert_model_parallel_size": 1}
    assert EchoTransformerConfig(**alone, moe_enable_echo=True).num_echo_slots_per_rank == 0


def test_many_ranks_get_few_slots_each_and_a_buffer_for_them() -> None:
    """Of DeepSeek-V3's 256 experts at EP=64, 2 slots a rank; of all of them, the plan's bound."""
    large = {**MOE, "num_moe_experts": 256, "expert_model_parallel_size": 64}
    config = EchoTransformerConfig(**large, moe_enable_echo=True)
    assert config.num_echo_slots_per_rank == 2
    assert token_capacity(config, 2) == 1.25
    full = EchoTransformerConfig(**large, moe_enable_echo=True, moe_num_echo_experts=256)
    assert full.num_echo_slots_per_rank == 4
    assert token_capacity(full, 4) is None


@pytest.mark.parametrize(
    ("slots", "given", "tolerance", "capacity"),
    [
        (0, None, 0.02, None),
        (1, None, 0.02, 1.25),
        (1, None, 0.5, 1.5),
        (2, None, 0.02, None),
        (3, None, 0.02, None),
        (1, 3.0, 0.02, 3.0),
        (0, 0.9, 0.02, 0.9),
    ],
)
def test_auto_has_a_bound_where_nothing_is_promised(
    slots: int, given: float | None, tolerance: float, capacity: float | None
) -> None:
    """Two experts on a rank: one slot is too few to promise anything."""
    fields = {"moe_received_token_capacity": given, "moe_echo_tolerance": tolerance}
    config = EchoTransformerConfig(**MOE, moe_enable_echo=True, **fields)
    assert token_capacity(config, slots) == capacity


@pytest.mark.parametrize(
    ("slots", "fields", "tolerance", "capacity"),
    [
        (1, {}, 0.25, 1.25),
        (2, {}, 0.25, None),
        (0, {}, 0.25, None),
        (2, {"moe_received_token_capacity": 3.0}, 2.0, 3.0),
        (2, {"moe_received_token_capacity": 0.9}, 0.0, 0.9),
        (2, {"moe_echo_tolerance": 0.02, "moe_echo_ranks_per_node": 2}, 0.02, 2.04),
        (2, {"moe_echo_tolerance": 0.02, "moe_echo_ranks_per_node": 1}, 0.02, 2.04),
        (1, {"moe_echo_tolerance": 0.02, "moe_echo_ranks_per_node": 2}, 0.02, 2.5),
        (1, {"moe_echo_tolerance": 0.02, "moe_echo_ranks_per_node": 4}, 0.02, 1.25),
        (2, {"moe_echo_tolerance": 0.02, "moe_echo_ranks_per_node": 4}, 0.02, None),
        (2, {"moe_received_token_capacity": 3.0, "moe_echo_ranks_per_node": 2}, 0.25, 3.0),
    ],
)
def test_what_auto_tolerance_and_nodes_may_use(
    slots: int, fields: dict, tolerance: float, capacity: float | None
) -> None:
    """Tolerance ``auto`` where none is given; clones within nodes where their size is."""
    fields = {"moe_echo_tolerance": None, **fields}
    fields["moe_echo_clones_within_node"] = "moe_echo_ranks_per_node" in fields
    config = EchoTransformerConfig(**MOE, moe_enable_echo=True, **fields)
    assert plan_tolerance(config) == tolerance
    assert token_capacity(config, slots) == capacity


@pytest.mark.parametrize(
    ("field", "value", "advice"),
    [
        ("moe_received_token_capacity", 0.0, "Use 1.0 for perfect balance"),
        ("moe_echo_peer_capacity", 1.5, "above 0 and up to 1"),
        ("moe_echo_peer_capacity", 0.5, "belongs to --moe-echo-token-transport all_to_all"),
        ("moe_echo_overflow", "ignore", "Use raise or drop."),
        ("moe_echo_max_tokens_per_rank", 0, "is below 1"),
        ("moe_echo_row_alignment", 0, "is below 1"),
        ("moe_echo_row_alignment", 1025, "is above 1024, more than any kernel wants"),
        ("moe_echo_tolerance", -0.1, "between 0 and 100"),
        ("moe_echo_min_tokens_per_clone", -1, "is negative"),
        ("moe_echo_ranks_per_node", 3, "does not divide the expert-parallel size 4"),
        ("moe_echo_force_skew", -1.0, "is negative"),
        ("moe_echo_rows_per_clone", 5, "belongs to --moe-echo-tolerance auto. Leave one of the"),
        ("moe_echo_clones_within_node", True, "knows no nodes. Give --moe-echo-ranks-per-node."),
    ],
)
def test_a_bad_value_names_the_flag_and_a_choice(field: str, value: object, advice: str) -> None:
    with pytest.raises(ValueError, match=flag_name(field)) as error:
        EchoTransformerConfig(**MOE, moe_enable_echo=True, **{field: value})
    assert advice in str(error.value)


@pytest.mark.parametrize("rows", [-1, 2**31])
def test_a_bad_number_of_rows_for_a_clone(rows: int) -> None:
    with pytest.raises(ValueError, match=f"--moe-echo-rows-per-clone {rows} is out of range"):
        EchoTransformerConfig(
            **MOE, moe_enable_echo=True, moe_echo_tolerance=None, moe_echo_rows_per_clone=rows
        )


def test_symmetric_memory_needs_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"moe_enable_echo": True, "moe_echo_token_transport": "symmetric_memory"}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    EchoTransformerConfig(**MOE, **fields)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="its size is 4 and a machine runs 6 processes"):
        EchoTransformerConfig(**MOE, **fields)


def test_symmetric_memory_of_clones_needs_each_node_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"moe_enable_echo": True, "moe_echo_expert_dispatcher_type": "symmetric_memory"}
    nodes = {"moe_echo_ranks_per_node": 2, "moe_echo_clones_within_node": True}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    EchoTransformerConfig(**MOE, **fields, **nodes)
    for wrong in ({}, {"moe_echo_ranks_per_node": 2}):
        with pytest.raises(ValueError, match="its size is 4 and a machine runs 2"):
            EchoTransformerConfig(**MOE, **fields, **wrong)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    message = "needs each node on one machine.* Use auto, or for --moe-echo-ranks-per-node a"
    with pytest.raises(ValueError, match=message):
        EchoTransformerConfig(**MOE, **fields, **nodes)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (30, "Use 28 or 32."),
        (3, "Use 4."),
        (-4, "negative"),
        (36, "is above one slot a rank for each of 8 experts. Use 32 or fewer."),
        (2**31, "Use 32 or fewer."),
    ],
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
