"""The models: sizes, parameters, products and what a layer keeps for backward."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """A decoder whose first layers are dense and whose others are mixtures of experts.

    Attributes:
        name: for people.
        layers: all of them.
        hidden: H.
        heads: query heads.
        groups: key-value heads; with MLA, ignored.
        head_dim: width of a query and key head; with MLA, without the rotated part.
        vocab: tokens of the vocabulary; input and output embeddings are not tied.
        ffn: width of a dense layer.
        moe_ffn: F, width of an expert.
        experts: E.
        topk: K.
        dense_layers: how many come first.
        shared_ffn: width of the shared experts together.
        q_lora: MLA's query rank, 0 without MLA.
        kv_lora: MLA's key-value rank.
        rope_dim: MLA's rotated part of a head.
        value_dim: width of a value head; 0: as ``head_dim``.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    vocab: int
    ffn: int
    moe_ffn: int
    experts: int
    topk: int
    dense_layers: int = 0
    shared_ffn: int = 0
    q_lora: int = 0
    kv_lora: int = 0
    rope_dim: int = 0
    value_dim: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value, least = getattr(self, field.name), int(field.default is dataclasses.MISSING)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"The model's {field.name} is {value!r}. Give a whole number.")
        if self.topk > self.experts or self.dense_layers >= self.layers:
            raise ValueError(
                f"Model {self.name} has top-{self.topk} of {self.experts} experts and "
                f"{self.dense_layers} dense of {self.layers} layers. Make both parts smaller."
            )

    @property
    def moe_layers(self) -> int:
        """Layers with experts."""
        return self.layers - self.dense_layers

    @property
    def expert_parameters(self) -> int:
        """Of one expert: gate, up and down."""
        return 3 * self.hidden * self.moe_ffn

    @property
    def _value_dim(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def attention_parameters(self) -> int:
        """Of one layer."""
        out = self.heads * self._value_dim * self.hidden
        if self.q_lora:
            query = self.q_lora * (self.hidden + self.heads * (self.head_dim + self.rope_dim))
            down = self.hidden * (self.kv_lora + self.rope_dim)
            return (
                query + down + self.kv_lora * self.heads * (self.head_dim + self._value_dim) + out
            )
        return self.hidden * (self.heads + 2 * self.groups) * self.head_dim + out

    @property
    def key_value_width(self) -> int:
        """Elements of a token's keys and values as attention reads them."""
        if self.q_lora:
            return self.heads * (self.head_dim + self.rope_dim + self._value_dim)
        return 2 * self.groups * self.head_dim

    def has_dense_mlp(self, layer: str) -> bool:
        """Whether a layer has an MLP besides routed experts."""
        return layer == "dense" or self.shared_ffn > 0

    def dense_parameters(self, layer: str) -> int:
        """What a layer has besides routed experts; ``layer`` is ``dense`` or ``moe``."""
        if layer == "dense":
            return self.attention_parameters + 3 * self.hidden * self.ffn
        return self.attention_parameters + self.hidden * (3 * self.shared_ffn + self.experts)

    @property
    def parameters(self) -> int:
        """All of them, without norms and biases."""
        moe = self.dense_parameters("moe") + self.experts * self.expert_parameters
        dense = self.dense_layers * self.dense_parameters("dense")
        return self.moe_layers * moe + dense + 2 * self.vocab * self.hidden

    def layer_flops(self, layer: str, tokens: int, sequence: int) -> float:
        """Floating-point operations of a layer besides routed experts, forward and backward.

        Args:
            layer: ``dense`` or ``moe``.
            tokens: of a microbatch on this rank.
            sequence: length of a sequence; attention is causal.
        """
        width = self.head_dim + self.rope_dim + self._value_dim
        scores = 3 * sequence * self.heads * width
        return tokens * (6 * self.dense_parameters(layer) + scores)

    def kept_bytes(self, layer: str, tokens: int) -> int:
        """bf16 bytes that a layer besides routed experts keeps for backward.

        Two norms' inputs and outputs, queries, keys, values, attention's output (scores are not
        kept: flash attention), a dense or shared MLP's two products and their activation.
        """
        if self.q_lora:
            heads = self.heads * (2 * (self.head_dim + self.rope_dim) + 2 * self._value_dim)
            heads += self.q_lora + self.kv_lora
        else:
            heads = 2 * (self.heads + self.groups) * self.head_dim
        width = self.ffn if layer == "dense" else self.shared_ffn
        return 2 * tokens * (4 * self.hidden + heads + 3 * width)

    def flags(self) -> list[str]:
        """The model's flags for Megatron, without the vocabulary's tokenizer."""
        words = [
            f"--num-layers {self.layers} --hidden-size {self.hidden}",
            f"--ffn-hidden-size {self.ffn} --num-attention-heads {self.heads}",
            f"--num-experts {self.experts} --moe-router-topk {self.topk}",
            f"--moe-ffn-hidden-size {self.moe_ffn}",
            "--swiglu --disable-bias-linear --normalization RMSNorm",
            "--position-embedding-type rope --untie-embeddings-and-output-weights",
        ]
        if self.dense_layers:
            words.append(f"--moe-layer-freq '[0]*{self.dense_layers}+[1]*{self.moe_layers}'")
        if self.shared_ffn:
            words.append(f"--moe-shared-expert-intermediate-size {self.shared_ffn}")
        if self.q_lora:
            words.append(
                f"--multi-latent-attention --q-lora-rank {self.q_lora} --kv-lora-rank "
                f"{self.kv_lora} --qk-head-dim {self.head_dim} --qk-pos-emb-head-dim "
                f"{self.rope_dim} --v-head-dim {self._value_dim}"
            )
        else:
            words.append(
                f"--group-query-attention --num-query-groups {self.groups} "
                f"--kv-channels {self.head_dim}"
            )
        return words


MODELS = {
    model.name: model
    for model in (
        Model("mixtral-8x7b", 32, 4096, 32, 8, 128, 32000, 14336, 14336, 8, 2),
        Model("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 151936, 6144, 768, 128, 8),
        Model("qwen3-235b-a22b", 94, 4096, 64, 4, 128, 151936, 12288, 1536, 128, 8),
        Model(
            "deepseek-v3", 61, 7168, 128, 128, 128, 129280, 18432, 2048, 256, 8,
            dense_layers=3, shared_ffn=2048, q_lora=1536, kv_lora=512, rope_dim=64, value_dim=128,
        ),
    )
}  # fmt: skip
"""From the models' published configurations; DeepSeek-V3 without its MTP layer."""


def load_model(name: str) -> Model:
    """A model by name, or from a ``.json`` file with the fields of :class:`Model`.

    Raises:
        ValueError: an unknown name, or fields that do not fit.
        FileNotFoundError: there is no such file.
    """
    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    if path.suffix != ".json":
        raise ValueError(f"Model {name} is unknown. Use {', '.join(MODELS)}, or a .json file.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no model file {name}. Give its path.")
    try:
        return Model(**{"name": path.stem, **json.loads(path.read_text())})
    except (TypeError, json.JSONDecodeError) as error:
        names = ", ".join(field.name for field in dataclasses.fields(Model))
        raise ValueError(f"{name} does not describe a model ({error}). Give {names}.") from error
