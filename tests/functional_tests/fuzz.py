"""Random command lines of our flags with Megatron's layouts, for ``test_fuzz.py``.

    python tests/functional_tests/fuzz.py SEED...      # prints them

A line is made of one seed. Most are close to valid, so that faults which need a built model show
as well: a layout that fits the ranks, settings that go with it, some of our flags with values of
theirs. In half of them one of our flags then gets a value that no flag should have.
"""

import dataclasses
import random
import shlex
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import launch  # noqa: E402

from megatron_echo import cpu_backend  # noqa: E402

cpu_backend.enable(verbose=False)

from megatron_echo.arguments import RunArguments  # noqa: E402
from megatron_echo.config import echo_fields  # noqa: E402
from megatron_echo.flags import flag_name, value_type  # noqa: E402
from megatron_echo.offload.config import REGION_NAMES  # noqa: E402
from megatron_echo.offload.training import OffloadArguments  # noqa: E402

OUR_FIELDS = {
    field.name: field
    for owner in (echo_fields(), *map(dataclasses.fields, (RunArguments, OffloadArguments)))
    for field in owner
    if field.name not in ("moe_enable_echo", "run_dir")  # in every line
}
LARGE = (2**31, 2**63 - 1, 2**64, 10**30)
HOSTILE = {
    int: (-1, 0, 1, 3, *LARGE, -(2**63) - 1, 1.5, "many"),
    float: (-1, 0, 1e-300, 1.0, 1e300, *LARGE, "nan", "inf", "-inf", "much"),
    bool: ("yes",),
    str: ("/proc/nope", "/dev/null/below", "", "x" * 300, "{folder}/a/b", "{folder}/wrong"),
}
"""By type: values at and beyond the borders, words of another type, paths nobody can write."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line: flags for ``launch.tiny_model``, more words, and on how many ranks."""

    flags: dict[str, object]
    words: list[str]
    ranks: int

    def argv(self, folder: Path) -> list[str]:
        """The words, with files in ``folder``."""
        words = launch.tiny_model(**self.flags, train_iters=2, run_dir="{folder}/run") + self.words
        return [word.replace("{folder}", str(folder)) for word in words]


def draw(seed: int) -> Case:
    """The case of a seed."""
    dice = random.Random(seed)
    ranks = dice.choice((1, 2, 2, 4))
    flags = layout(dice, ranks)
    for group in SETTINGS:
        if dice.random() < 0.25:
            flags |= dice.choice(group)
    ours = dice.sample(sorted(OUR_FIELDS), dice.randrange(5))
    if dice.random() < 0.9:
        flags["moe_enable_echo"] = True
    for name in ours:
        flags |= sensible(name, dice, flags)
    words = []
    if dice.random() < 0.5:
        name = dice.choice(sorted(OUR_FIELDS))
        flags.pop(name, None)
        words = [f"{flag_name(name)}={hostile(OUR_FIELDS[name], dice)}"]
    return Case(flags, words, ranks)


def split(dice: random.Random, ranks: int) -> int:
    """A divisor of ``ranks``."""
    return dice.choice([size for size in (1, 2, 4) if ranks % size == 0])


def layout(dice: random.Random, ranks: int) -> dict[str, object]:
    """Parallel sizes that mostly fit each other, and the batch and the layers that they want."""
    pipeline = dice.choice((1, split(dice, ranks)))
    tensor = split(dice, ranks // pipeline)
    context = split(dice, ranks // pipeline // tensor)
    expert = dice.choice((split(dice, ranks // pipeline), ranks // pipeline))
    data = ranks // pipeline // tensor // context
    virtual = dice.choice((1, 1, 2)) if pipeline > 1 else 1
    micro, microbatches = dice.choice((1, 2)), pipeline * dice.choice((1, 2))
    flags: dict[str, object] = {
        "seq_length": 32,
        "hidden_size": 32,
        "num_layers": pipeline * virtual * dice.choice((1, 2)),
        "pipeline_model_parallel_size": pipeline,
        "tensor_model_parallel_size": tensor,
        "context_parallel_size": context,
        "expert_model_parallel_size": expert,
        "expert_tensor_parallel_size": dice.choice((1,) * 9 + (tensor,)),
        "sequence_parallel": tensor > 1 and dice.random() < 0.9,
        "micro_batch_size": micro,
        "global_batch_size": micro * data * microbatches + (dice.random() < 0.03),
        "num_experts": dice.choice((8, 8, 8, 4, 6)),
        "moe_router_topk": dice.choice((1, 2, 2, 3)),
        "moe_router_pre_softmax": True,  # a must for a top-k of 1
    }
    if virtual > 1:
        flags["num_virtual_stages_per_pipeline_rank"] = virtual
    if dice.random() < 0.05:
        sizes = [name for name, size in flags.items() if type(size) is int]
        flags[dice.choice(sizes)] = dice.choice((-1, 0, 3, 5))
    return flags


FULL_RECOMPUTATION = {
    "recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1,
}  # fmt: skip
MLA = {
    "multi_latent_attention": True, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
OFFLOADING = {"fine_grained_activation_offloading": True, "min_offloaded_tensor_size": 16}
GRAPH = {"cuda_graph_impl": "full_iteration", "no_check_for_nan_in_loss_and_grad": True}
SETTINGS: tuple[tuple[dict[str, object], ...], ...] = (
    ({"use_distributed_optimizer": True},
     {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
      "overlap_param_gather": True}),
    ({"bf16": True}, {"bf16": True}, {"fp16": True}),
    (FULL_RECOMPUTATION, {"recompute_granularity": "selective", "recompute_modules": "moe"},
     {"recompute_granularity": "selective", "recompute_modules": "layernorm"}),
    ({"mtp_num_layers": 1}, {"mtp_num_layers": 2}),
    (MLA,),
    ({"moe_layer_freq": 2}, {"moe_layer_freq": 2}, {"moe_layer_freq": "[1,0,1]"},
     {"num_experts": None}),
    ({"untie_embeddings_and_output_weights": True},),
    *(({"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": 0.01},)
      for kind in ("aux_loss", "seq_aux_loss", "global_aux_loss")),
    ({"moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
      "moe_aux_loss_coeff": [0.01, 0.001]},
     {"moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
      "moe_aux_loss_coeff": 0.01}),
    ({"moe_z_loss_coeff": 0.001}, {"moe_z_loss_coeff": 0.001}, {"moe_z_loss_coeff": 0},
     {"moe_z_loss_coeff": "inf"}, {"moe_aux_loss_coeff": "nan"}),
    ({"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True,
      "moe_router_dtype": "fp32"}, {"moe_router_num_groups": 2, "moe_router_group_topk": 1}),
    ({"moe_shared_expert_intermediate_size": 32},),
    ({"calculate_per_token_loss": True},),
    ({"moe_token_dispatcher_type": "alltoall"}, {"moe_token_dispatcher_type": "allgather"},
     {"moe_token_dispatcher_type": "flex"}),
    (GRAPH,),
    tuple({**OFFLOADING, "offload_modules": name} for name in REGION_NAMES),
    ({"moe_received_token_capacity": 1.2, "moe_echo_overflow": "drop"},
     {"moe_received_token_capacity": 0.5, "moe_echo_overflow": "drop"}),
)  # fmt: skip
"""Of each group one entry may join a line."""


def hostile(field: dataclasses.Field, dice: random.Random) -> object:
    """A value that the flag of a field should not have; of few words the parser takes care."""
    if field.metadata["choices"] is not None and dice.random() < 0.8:
        return dice.choice(field.metadata["choices"])
    return dice.choice(HOSTILE[value_type(field)])


def sensible(name: str, dice: random.Random, flags: dict[str, object]) -> dict[str, object]:
    """A value of one of our flags that can be right."""
    field = OUR_FIELDS[name]
    kind = value_type(field)
    experts = flags["expert_model_parallel_size"]
    assert isinstance(experts, int)
    if field.metadata["choices"] is not None:
        value: object = dice.choice(field.metadata["choices"])
    elif name == "moe_num_echo_experts":
        value = experts * dice.choice((0, 1, 2, 4))
    elif name == "moe_received_token_capacity":
        return {name: dice.choice((1.0, 1.5, "auto")), "moe_echo_overflow": "drop"}
    elif kind is bool:
        if field.default:
            return {f"no_{name}": True}
        value = True
    elif kind is str:
        value = f"{{folder}}/{name}"
    elif kind is float:
        value = dice.choice((0, 0.1, 0.5, 1.0))
    else:
        value = dice.choice((1, 2, 16))
    return {name: value}


if __name__ == "__main__":
    folder = Path(tempfile.gettempdir(), "fuzz")
    for word in sys.argv[1:]:
        case = draw(int(word))
        print(f"# seed {word}, {case.ranks} ranks\n{shlex.join(case.argv(folder))}")
