"""Megatron-Core's own functional test configurations with our layer: ``upstream_configs.yaml``.

``test_upstream_matrix.py`` judges all of them and trains them beside Megatron's layer.
"""

import dataclasses
from pathlib import Path

import launch
import yaml

CONFIGS = Path(__file__).resolve().parent / "upstream_configs.yaml"
BASE = {
    "num_layers": None,
    "num_experts": None,
    "moe_router_topk": None,
    "swiglu": None,
    "normalization": None,
    "position_embedding_type": None,
    "seq_length": 32,
    "max_position_embeddings": 32,
    "micro_batch_size": 1,
    "train_iters": 2,
}
"""On top of ``launch.tiny_model``; None is left to the configuration."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Configurations that are the same one when they are as small as here.

    Attributes:
        names: upstream's, folder and case.
        ranks: to start.
        flags: of upstream, scaled.
        left_out: flags that need what is not here.
        refusal: words of a refusal that the flags alone bring.
        build_refusal: of one that comes when the model is built.
        package: that Megatron needs.
        stand_in: the same, in whose place there are functions of torch, for both layers.
        reason: of a refusal, in short.
    """

    names: tuple[str, ...]
    ranks: int
    flags: str
    left_out: str = ""
    refusal: str = ""
    build_refusal: str = ""
    package: str = ""
    stand_in: str = ""
    reason: str = ""
    steps: int = 2

    def argv(self, *, ours: bool, run_dir: object = None) -> list[str]:
        """The command line with our layer, or with Megatron's."""
        base = {**BASE, "train_iters": self.steps}
        words = [*launch.tiny_model(**base, run_dir=run_dir), *self.flags.split()]
        if ours:
            return [*words, "--moe-enable-echo"]
        if "--cuda-graph-impl" in words:  # whose graphs of dropless layers are parts of them
            words[words.index("--cuda-graph-impl") + 1] = "none"
        if "--delay-wgrad-compute" in words:  # which needs Transformer Engine
            words.remove("--delay-wgrad-compute")
        return ["alltoall" if word == "flex" else word for word in words]  # flex needs DeepEP

    @property
    def script(self) -> Path:
        """That starts it."""
        if "--overlap-moe-expert-parallel-comm" in self.flags:
            return CONFIGS.parent / "overlap_in_fp32.py"
        if not self.stand_in:
            return launch.SCRIPT
        is_muon = self.stand_in == "emerging_optimizers"
        return CONFIGS.parent / ("muon_stand_in.py" if is_muon else "kernel_stand_ins.py")

    @property
    def outcome(self) -> str:
        """For people."""
        if self.reason:
            return f"refused: {self.reason}"
        return "follows Megatron's layer"


_LLAMA = "--normalization RMSNorm --position-embedding-type rope --num-layers 2 --num-experts 8 "
_TP2 = (
    _LLAMA
    + "--tensor-model-parallel-size 2 --sequence-parallel --moe-token-dispatcher-type alltoall "
)
_BIASES = (
    "--moe-router-topk 2 --quick-geglu --activation-func-clamp-value 0.2 --glu-linear-offset 1.0 "
    "--no-bias-gelu-fusion --no-bias-dropout-fusion --expert-tensor-parallel-size 1 --lr 1e-2 "
)
OWN = (
    Config(("biases, TP 2, ETP 1",), 2, _TP2 + _BIASES, steps=5),
    Config(
        ("biases, TP 2, EP 2, ETP 1",), 2, _TP2 + _BIASES + "--expert-model-parallel-size 2",
        steps=5,
    ),
    Config(
        ("Muon, ETP 2",), 2,
        _TP2 + "--swiglu --moe-router-topk 2 --optimizer muon --expert-tensor-parallel-size 2",
        stand_in="emerging_optimizers", steps=5,
    ),
    Config(
        ("probabilities on the input",), 2,
        _LLAMA + "--swiglu --moe-router-topk 1 --moe-apply-probs-on-input "
        "--moe-router-pre-softmax --expert-model-parallel-size 2 "
        "--moe-token-dispatcher-type alltoall",
        steps=20,
    ),
)  # fmt: skip
"""Settings that none of Megatron-Core's configurations has."""


def load() -> list[Config]:
    """All of them."""
    return [
        Config(**{**entry, "names": tuple(entry["names"])})
        for entry in yaml.safe_load(CONFIGS.read_text())
    ]


def render() -> str:
    """A section of ``docs/flags.md``."""
    configs = load()
    total = sum(len(config.names) for config in configs)
    followed = sum(len(config.names) for config in configs if not config.reason)
    lines = [
        "## Megatron-Core's own test configurations",
        "",
        f"{total} of its functional tests of mixtures of experts, sizes and ranks scaled down and "
        "in fp32, three with Muon in bf16 (`tests/functional_tests/upstream_configs.yaml`): "
        f"**{followed} follow Megatron's "
        "layer**, loss and gradient norm within 1e-5 over two steps (measured: 2e-7). *Left out* "
        "needs a GPU or another package.",
        "",
        "| configuration | outcome | left out |",
        "|---|---|---|",
    ]
    for config in configs:
        needs = [config.left_out] if config.left_out else []
        needs += [f"(needs {config.package})"] if config.package else []
        needs += [f"(a stand-in of {config.stand_in})"] if config.stand_in else []
        lines += [f"| `{name}` | {config.outcome} | {' '.join(needs)} |" for name in config.names]
    return "\n".join(lines) + "\n"
