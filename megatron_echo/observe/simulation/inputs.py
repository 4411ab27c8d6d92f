"""The two descriptions a prediction starts from, by name or from JSON files: cluster and model."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from megatron_echo.environment import Speeds


def _check_numbers(given: "Cluster | Model") -> None:
    """Positive numbers everywhere, whole ones where they count; 0 where that is the default."""
    for field in dataclasses.fields(given):
        if field.type is str:
            continue
        value, whole = getattr(given, field.name), field.type is int
        good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not good or not (0 < value < math.inf or value == field.default == 0):
            raise ValueError(
                f"The {type(given).__name__.lower()}'s {field.name} is {value!r}. Give a positive "
                f"{'whole ' * whole}number."
            )


@dataclass(frozen=True)
class Cluster:
    """Equal nodes and what is assumed of them; rates are of one GPU and one direction."""

    name: str  # for people
    gpus: int  # of the whole cluster
    gpus_per_node: int  # GPUs that NVLink (or its like) joins
    nvlink_gb_s: float  # 10^9 bytes a second between GPUs of a node
    network_gb_s: float  # 10^9 bytes a second to other nodes, this GPU's part of the network
    hbm_gib: float  # memory of a GPU that programs can use, GiB
    tflops: float  # peak of dense bf16 products, 10^12 a second
    host_gb_s: float  # 10^9 bytes a second between a GPU and the memory of its host
    efficiency: float = 0.5  # assumed, as all that follows: products' rate over the peak
    link_efficiency: float = 0.8  # bandwidth reached over that of the data sheet
    exchange_us: float = 20.0  # latency of one collective, microseconds
    plan_us: float = 100.0  # planning of a layer call, microseconds
    reserve_gib: float = 4.0  # context, NCCL and fragmentation
    peer_margin: float = 1.25  # room in an all-to-all's parts, over the fullest that was seen
    capacity_margin: float = 1.05  # room in the receive buffer, over the fullest rank that was seen

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"{self.gpus} GPUs do not fill nodes of {self.gpus_per_node}. Use a multiple."
            )

    def ranks_per_node(self, ranks: int) -> int:
        """Of an expert-parallel group of consecutive ranks, how many share a node."""
        return math.gcd(ranks, self.gpus_per_node)

    @property
    def speeds(self) -> Speeds:
        """What a GPU is assumed to reach."""
        reached = 1e9 * self.link_efficiency
        flops = self.tflops * 1e12 * self.efficiency
        return Speeds(flops, self.nvlink_gb_s * reached, self.network_gb_s * reached)

    @property
    def assumed(self) -> dict[str, float]:
        """The figures that nobody measured; they are printed with the results."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if f.default != dataclasses.MISSING}


@dataclass(frozen=True)
class Model:
    """A decoder whose first layers are dense and whose others are mixtures of experts; or a hybrid.

    A kind of layer is what it has, in Megatron's letters: ``*`` attention, ``-`` a dense MLP, ``E``
    experts, ``M`` Mamba.
    """

    name: str  # for people
    layers: int  # all of them
    hidden: int  # H
    heads: int  # query heads
    groups: int  # key-value heads; with MLA, ignored
    head_dim: int  # width of a query and key head; with MLA, without the rotated part
    vocab: int  # tokens of the vocabulary; input and output embeddings are not tied
    ffn: int  # width of a dense layer
    moe_ffn: int  # F, width of an expert
    experts: int  # E
    topk: int  # K
    dense_layers: int = 0  # how many come first
    shared_ffn: int = 0  # width of the shared experts together
    q_lora: int = 0  # MLA's query rank, 0 without MLA
    kv_lora: int = 0  # MLA's key-value rank
    rope_dim: int = 0  # MLA's rotated part of a head
    value_dim: int = 0  # width of a value head; 0: as ``head_dim``
    pattern: str = ""  # of a hybrid model: one letter for each layer
    matrices: int = 3  # of an expert or MLP: gate, up and down; 2 without a gate
    mamba_heads: int = 0  # of a Mamba-2 layer, and so on
    mamba_head_dim: int = 0
    mamba_groups: int = 0  # that share B and C
    mamba_state: int = 0  # width of the state

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.pattern and len(self.pattern) != self.layers:
            raise ValueError(
                f"Model {self.name} has {self.layers} layers, but pattern {self.pattern} has "
                f"{len(self.pattern)}. Give a letter for each layer."
            )
        if self.topk > self.experts or self.dense_layers >= self.layers:
            raise ValueError(
                f"Model {self.name} has top-{self.topk} of {self.experts} experts and "
                f"{self.dense_layers} dense of {self.layers} layers. Make both parts smaller."
            )

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return sum("E" in kind for kind in self.kinds)

    @property
    def kinds(self) -> list[str]:
        """Of all layers, in order."""
        first = self.dense_layers
        return list(self.pattern) or ["*-"] * first + ["*E"] * (self.layers - first)

    @property
    def mamba_widths(self) -> tuple[int, int]:
        """Of all heads; and of B, C and the step sizes together."""
        others = 2 * self.mamba_groups * self.mamba_state + self.mamba_heads
        return self.mamba_heads * self.mamba_head_dim, others

    @property
    def value_width(self) -> int:
        """Of a value head."""
        return self.value_dim or self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Of one expert."""
        return self.matrices * self.hidden * self.moe_ffn

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        out = self.heads * self.value_width * self.hidden
        if not self.q_lora:
            return self.hidden * (self.heads + 2 * self.groups) * self.head_dim + out
        query = self.q_lora * (self.hidden + self.heads * (self.head_dim + self.rope_dim))
        down = self.hidden * (self.kv_lora + self.rope_dim)
        return query + down + self.kv_lora * self.heads * (self.head_dim + self.value_width) + out

    def dense_parameters(self, kind: str) -> int:
        """What a layer of this kind has besides routed experts."""
        inner, others = self.mamba_widths
        parts = {
            "*": self.attention_parameters,
            "-": self.hidden * self.matrices * self.ffn,
            "E": self.hidden * (self.matrices * self.shared_ffn + self.experts),
            "M": self.hidden * (3 * inner + others),
        }
        return sum(parts[letter] for letter in kind)

    @property
    def parameters(self) -> int:
        """All of them, without norms, biases and convolutions."""
        experts = self.moe_layers * self.experts * self.expert_parameters
        dense = sum(map(self.dense_parameters, self.kinds))
        return experts + dense + 2 * self.vocab * self.hidden


CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        Cluster("h100-nvl8", 64, 8, 450, 50, 79, 989, 64),
        Cluster("h200-nvl8", 64, 8, 450, 50, 140, 989, 64),
        Cluster("h800-nvl8", 64, 8, 200, 50, 79, 989, 64),
        Cluster("b200-nvl8", 64, 8, 900, 50, 178, 2250, 64),
        Cluster("gb200-nvl72", 72, 72, 900, 50, 184, 2500, 225),
    )
}
"""From the vendors' data sheets: peak rates; one 400 Gbit/s network port for each GPU; PCIe 5.0 x16
to the host, or half of a Grace CPU's NVLink-C2C."""

MODELS = {
    model.name: model
    for model in (
        Model("mixtral-8x7b", 32, 4096, 32, 8, 128, 32000, 14336, 14336, 8, 2),
        Model("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 151936, 6144, 768, 128, 8),
        Model("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 151936, 12288, 1536, 128, 8),
        Model("gpt-oss-120b", 36, 2880, 64, 8, 64, 201088, 2880, 2880, 128, 4),
        Model(
            "deepseek-v3", 61, 7168, 128, 128, 128, 129280, 18432, 2048, 256, 8,
            dense_layers=3, shared_ffn=2048, q_lora=1536, kv_lora=512, rope_dim=64, value_dim=128,
        ),
        Model(
            "kimi-k2", 61, 7168, 64, 64, 128, 163840, 18432, 2048, 384, 8,
            dense_layers=1, shared_ffn=2048, q_lora=1536, kv_lora=512, rope_dim=64, value_dim=128,
        ),
        Model(
            "nemotron-3-nano", 52, 2688, 32, 2, 128, 131072, 1856, 1856, 128, 6, shared_ffn=3712,
            pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", matrices=2,
            mamba_heads=64, mamba_head_dim=64, mamba_groups=8, mamba_state=128,
        ),
    )
}  # fmt: skip
"""From the models' published configurations; DeepSeek-V3 without its MTP layer."""


def load[T: (Cluster, Model)](known: dict[str, T], name: str) -> T:
    """A known cluster or model by name, or one from a ``.json`` file with its fields.

    A file may leave ``name`` out, and with ``"like": KEY`` all fields that are as there.

    Raises:
        ValueError: an unknown name, fields missing or too many, a value out of range.
        FileNotFoundError: there is no such file.
    """
    if name in known:
        return known[name]
    kind, path = type(next(iter(known.values()))), Path(name)
    what, names = kind.__name__.lower(), ", ".join(known)
    if path.suffix != ".json":
        raise ValueError(f"There is no {what} {name}. Use {names}, or a .json file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no {what} file {name}. Give its path.")
    try:
        fields = {"name": path.stem, **json.loads(path.read_text())}
        like = str(fields.pop("like", ""))
        if like and like not in known:
            raise ValueError(f"{name} is like {like}, which is no {what}. Use {names}.")
        return dataclasses.replace(known[like], **fields) if like else kind(**fields)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} is not valid JSON ({error}). Mend it.") from error
    except TypeError as error:
        wanted = ", ".join(field.name for field in dataclasses.fields(kind))
        raise ValueError(f"{name} does not describe a {what} ({error}). Give {wanted}.") from error
