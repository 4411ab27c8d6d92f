"""The recipes: published shapes, flags that parse, small twins that train, figures of today."""

import math
from argparse import Namespace
from pathlib import Path

import launch
import pytest
import recipes
from example_scripts import KERNEL_STAND_INS, start, validate, words_of
from megatron.training.arguments import parse_args

from megatron_echo.arguments import add_echo_arguments
from megatron_echo.observe.simulation.inputs import MODELS, Model
from megatron_echo.record.metrics import read_metrics

NAMES = recipes.recipes()
EXAMPLES = launch.ROOT / "examples"
PUBLISHED_PARAMETERS = {
    "mixtral_8x7b": 46.7e9,
    "qwen3_30b_a3b": 30.5e9,
    "qwen3_235b_a22b": 235e9,
    "gpt_oss_120b": 116.8e9,
    "deepseek_v3": 671e9,  # without the MTP layer
    "kimi_k2": 1026e9,  # of the checkpoint
    "nemotron_3_nano": 31.6e9,
}
QWEN3 = {"rotary_base": 1_000_000, "layernorm_epsilon": 1e-6, "qk_layernorm": True}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
PUBLISHED_SETTINGS = {
    "mixtral_8x7b": {"rotary_base": 1_000_000, "layernorm_epsilon": 1e-5, "qk_layernorm": False},
    "qwen3_30b_a3b": QWEN3,
    "qwen3_235b_a22b": QWEN3,
    "gpt_oss_120b": {
        "rotary_base": 150_000,
        "layernorm_epsilon": 1e-5,
        "qk_layernorm": False,
        "add_bias_linear": True,
        "quick_geglu": True,
        "activation_func_clamp_value": 7.0,
        "glu_linear_offset": 1.0,
        "window_size": (128, 0),
        "softmax_type": "learnable",
    },
    "deepseek_v3": {
        "rotary_base": 10_000,
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": True,
        "rope_type": "rope",
        "mtp_num_layers": 1,
        **SIGMOID,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": 8,
        "moe_router_group_topk": 4,
    },
    "kimi_k2": {
        "rotary_base": 50_000,
        "layernorm_epsilon": 1e-6,
        "qk_layernorm": True,
        "mtp_num_layers": None,
        **SIGMOID,
        "moe_router_topk_scaling_factor": 2.827,
        "moe_router_num_groups": None,
    },
    "nemotron_3_nano": {
        "position_embedding_type": "none",
        "layernorm_epsilon": 1e-5,
        "qk_layernorm": False,
        "squared_relu": True,
        **SIGMOID,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": None,
    },
}
QUICK_TWINS = ("deepseek_v3", "gpt_oss_120b", "mixtral_8x7b")
"""Between them every array of flags; the other twins differ from them in sizes."""
FOLLOWS_QUICKLY = ("kimi_k2", "nemotron_3_nano")
TWIN_STEPS = 10


def test_there_is_a_recipe_for_each_model() -> None:
    assert set(NAMES) == PUBLISHED_PARAMETERS.keys()


def parsed(name: str, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    words = recipes.flags_of(name, ("MODEL", "MOE"))
    monkeypatch.setattr("sys.argv", ["pretrain_gpt_moe.py", *words])
    return parse_args(add_echo_arguments)


def model_of(args: Namespace, name: str) -> Model:
    """What the flags build, as the simulator describes models."""
    frequency = args.moe_layer_freq
    dense = frequency.index(1) if isinstance(frequency, list) else 0
    assert not dense or frequency == [0] * dense + [1] * (args.num_layers - dense)
    pattern = (args.hybrid_layer_pattern or "").replace("|", "")
    shape = {
        "groups": args.num_query_groups,
        "head_dim": args.kv_channels,
    }
    if args.multi_latent_attention:
        shape = {
            "groups": args.num_attention_heads,
            "head_dim": args.qk_head_dim,
            "q_lora": args.q_lora_rank,
            "kv_lora": args.kv_lora_rank,
            "rope_dim": args.qk_pos_emb_head_dim,
            "value_dim": args.v_head_dim,
        }
    return Model(
        name=name,
        layers=len(pattern) or args.num_layers,
        pattern=pattern,
        matrices=2 if args.squared_relu else 3,
        mamba_heads=args.mamba_num_heads or 0,
        mamba_head_dim=args.mamba_head_dim if pattern else 0,
        mamba_groups=args.mamba_num_groups if pattern else 0,
        mamba_state=args.mamba_state_dim if pattern else 0,
        hidden=args.hidden_size,
        heads=args.num_attention_heads,
        vocab=args.padded_vocab_size,
        ffn=args.ffn_hidden_size,
        moe_ffn=args.moe_ffn_hidden_size,
        experts=args.num_experts,
        topk=args.moe_router_topk,
        dense_layers=dense,
        shared_ffn=args.moe_shared_expert_intermediate_size or 0,
        **shape,
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_is_the_published_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flags, the simulator's model and the published number of parameters say the same."""
    args = parsed(name, monkeypatch)
    assert args.swiglu + args.quick_geglu + args.squared_relu == 1
    assert args.normalization == "RMSNorm"
    assert args.untie_embeddings_and_output_weights
    assert args.group_query_attention != args.multi_latent_attention
    for setting, value in PUBLISHED_SETTINGS[name].items():
        assert getattr(args, setting) == value, setting
    model = model_of(args, name.replace("_", "-"))
    assert model == MODELS[model.name]
    assert model.parameters == pytest.approx(PUBLISHED_PARAMETERS[name], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_the_job_parses_and_resumes(name: str, tmp_path: Path) -> None:
    job = EXAMPLES / name / "train.sbatch"
    words = ["--train-iters", "7"]
    processes, flags = words_of(job, tmp_path, words, DATA="mock")
    assert processes == recipes.gpus_of(name)
    assert flags[-2:] == words
    assert flags[flags.index("--save") + 1] == flags[flags.index("--load") + 1]
    for flag in ("--moe-enable-echo", "--bf16", "--use-distributed-optimizer", "--save-interval"):
        assert flag in flags
    validate(flags, processes, tmp_path, script_of(name))


def script_of(name: str) -> Path:
    """What starts a recipe here: with functions of torch in place of Mamba's kernels."""
    is_hybrid = recipes.settings_of(name).hybrid_layer_pattern is not None
    return KERNEL_STAND_INS if is_hybrid else launch.SCRIPT


def test_the_job_ends_before_its_limit(tmp_path: Path) -> None:
    job = EXAMPLES / "mixtral_8x7b" / "train.sbatch"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "date").write_text("#!/bin/sh\necho 1000000\n")
    (tmp_path / "bin" / "date").chmod(0o755)
    for variables, minutes in (
        ({"SLURM_JOB_END_TIME": str(1_000_000 + 7200)}, "105"),
        ({}, "225"),
        ({"MINUTES": "30"}, "30"),
    ):
        _, flags = words_of(job, tmp_path, DATA="mock", **variables)
        assert flags[flags.index("--exit-duration-in-mins") + 1] == minutes


def test_data_and_tokenizer_come_from_the_environment(tmp_path: Path) -> None:
    job = EXAMPLES / "deepseek_v3" / "train.sbatch"
    _, flags = words_of(job, tmp_path, DATA="0.3 /a 0.7 /b", TOKENIZER="/my tokenizer")
    at = flags.index("--data-path")
    assert flags[at + 1 : at + 5] == ["0.3", "/a", "0.7", "/b"]
    assert flags[flags.index("--tokenizer-model") + 1] == "/my tokenizer"
    assert "--mock-data" not in flags


@pytest.mark.parametrize(
    ("script", "words", "variables", "message"),
    [
        ("deepseek_v3/train.sbatch", [], {}, "No data was named. Set DATA to"),
        ("deepseek_v3/train.sbatch", [], {"DATA": "/a"}, "No tokenizer was named. Set TOKENIZER"),
        ("launch.sh", [], {}, "No recipe was named. Name a folder"),
        (
            "launch.sh",
            ["mixtral_8x7b"],
            {"SLURM_JOB_ID": ""},
            "no Slurm job. Start sbatch examples",
        ),
        ("launch.sh", ["gpt"], {"DATA": "mock"}, "There is no recipe gpt. Name a folder"),
        ("smoke.sh", [], {}, "No recipe was named. Name a folder"),
        ("smoke.sh", ["gpt"], {}, "There is no recipe gpt. Name a folder"),
    ],
)
def test_what_is_missing_is_named(
    script: str, words: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    finished = start(EXAMPLES / script, tmp_path, words, **variables)
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "WORDS" not in finished.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_small_twin_trains(name: str, tmp_path: Path) -> None:
    """All flags but sizes and layout, on two ranks of a CPU: the loss falls."""
    losses = losses_of_the_twin(name, tmp_path)
    assert len(losses) == TWIN_STEPS
    assert losses[-1] < losses[0] - 0.1


def losses_of_the_twin(name: str, folder: Path, *more: str) -> list[float]:
    words = [name, "--run-dir", str(folder / "run"), *more]
    processes, flags = words_of(EXAMPLES / "smoke.sh", folder, words)
    return losses_of(flags, processes, script_of(name))


def losses_of(flags: list[str], processes: int, script: Path) -> list[float]:
    launch.run(flags, processes, script).check()
    folder = flags[len(flags) - flags[::-1].index("--run-dir")]
    losses = [line["lm loss"] for line in read_metrics(folder) if "lm loss" in line]
    assert all(map(math.isfinite, losses))
    return losses


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FOLLOWS_QUICKLY)) for n in NAMES]
)
def test_a_small_twin_follows_megatrons_layer(name: str, tmp_path: Path) -> None:
    """Five steps in fp32, from the same parameters; what else the recipe sets is as it is."""
    words = [name, "--exit-interval", "5", "--run-dir", str(tmp_path / "ours")]
    processes, flags = words_of(EXAMPLES / "smoke.sh", tmp_path, words)
    flags.remove("--bf16")
    ours = losses_of(flags, processes, script_of(name))
    flags.remove("--moe-enable-echo")
    flags[-1] = str(tmp_path / "theirs")
    assert ours == pytest.approx(losses_of(flags, processes, script_of(name)), rel=1e-5)
    assert len(set(ours)) == 5


@pytest.mark.parametrize("name", QUICK_TWINS)
def test_the_first_steps_of_a_small_twin(name: str, tmp_path: Path) -> None:
    assert len(losses_of_the_twin(name, tmp_path, "--exit-interval", "2")) == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_of_these_flags(name: str) -> None:
    """What the comment was made from has not changed since."""
    block = recipes.read_block(recipes.flags_file(name))
    assert f"{recipes.gpus_of(name)} GPUs" in block
    assert recipes.digest_of(name) in block
    assert max(map(len, block.splitlines())) <= recipes.WIDTH


def test_the_table_says_what_the_comments_say() -> None:
    assert recipes.read_block(recipes.README) == recipes.table()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "mixtral_8x7b")) for n in NAMES]
)
def test_the_simulated_gain_is_todays(name: str) -> None:
    block = recipes.read_block(recipes.flags_file(name))
    assert recipes.as_comment(recipes.gain_lines(name)) in block


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_figures_are_made_again(name: str) -> None:
    assert recipes.read_block(recipes.flags_file(name)) == recipes.block_of(name)
