"""Regions of a model, found by module name: where they open and where they close.

A region is a piece of the forward pass whose saved tensors are handled together. Most are one
module's forward. Norms begin before and end behind their module, so that the input that a
recomputed norm saves outside its own forward is in the region too; ``moe_act`` is all that lies
between the two projections of an expert, where stock layers have no module.
"""

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle


class Edge(NamedTuple):
    """The moment before or after the forward pass of a module."""

    module: nn.Module
    after: bool

    def hook(self, call: Callable[[bool], None]) -> RemovableHandle:
        """Call ``call(failed)`` at this moment, after the forward even if that raises."""
        if self.after:
            return self.module.register_forward_hook(
                lambda _module, _inputs, output: call(output is None), always_call=True
            )
        return self.module.register_forward_pre_hook(lambda _module, _inputs: call(False))


class Span(NamedTuple):
    """A region of the model: its name, where it opens and where it closes."""

    name: str
    opens: Edge
    closes: Edge


class _Rule(NamedTuple):
    """A span relative to a transformer layer; paths are globs, and one ``*`` matches in both.

    It opens before or ``after`` a module, and closes behind it or before the module ``until``.
    """

    opens: str
    until: str | None = None
    after: bool = False


_RULES: dict[str, tuple[_Rule, ...]] = {
    "attn_norm": (_Rule("", until="self_attention"),),
    "qkv_linear": (
        _Rule("self_attention.linear_qkv"),
        _Rule("self_attention.linear_q_proj"),
        _Rule("self_attention.linear_*_down_proj"),
    ),
    "core_attn": (_Rule("self_attention.core_attention"),),
    "attn_proj": (_Rule("self_attention.linear_proj"),),
    "mlp_norm": (_Rule("cross_attention", until="mlp", after=True),),
    "expert_fc1": (
        _Rule("mlp.experts.linear_fc1"),
        _Rule("mlp.experts.local_experts.*.linear_fc1"),
    ),
    "moe_act": tuple(
        _Rule(f"{experts}.linear_fc1", until=f"{experts}.linear_fc2", after=True)
        for experts in ("mlp.experts", "mlp.experts.local_experts.*")
    ),
    "router": (_Rule("mlp.router"),),
    "shared_experts": (_Rule("mlp.shared_experts"),),
}

REGION_NAMES = tuple(_RULES)
"""Names that ``OffloadConfig.modules`` knows: Megatron's, ``router`` and ``shared_experts``."""


def find_spans(
    model: nn.Module, names: Sequence[str], extra_regions: Mapping[str, str]
) -> list[Span]:
    """All spans of a model.

    A transformer layer is any module with ``self_attention``, ``mlp`` and ``input_layernorm``.
    ``names`` are some of :data:`REGION_NAMES`; ``extra_regions`` maps names to globs over dotted
    module paths.
    """
    spans = []
    for module in model.modules():
        if all(hasattr(module, name) for name in ("self_attention", "mlp", "input_layernorm")):
            for name in names:
                spans += [span for rule in _RULES[name] for span in _matches(module, name, rule)]
    for name, pattern in extra_regions.items():
        spans += [
            Span(name, Edge(module, after=False), Edge(module, after=True))
            for path, module in model.named_modules()
            if fnmatch.fnmatchcase(path, pattern)
        ]
    return spans


def _matches(layer: nn.Module, name: str, rule: _Rule) -> Iterator[Span]:
    modules = dict(layer.named_modules())
    for path, module in modules.items():
        if fnmatch.fnmatchcase(path, rule.opens) and path.count(".") == rule.opens.count("."):
            closing = path if rule.until is None else rule.until
            if "*" in closing:
                start = path.removesuffix(rule.opens.rpartition("*")[2])
                closing = start + closing.rpartition("*")[2]
            if closing in modules:
                closes = Edge(modules[closing], rule.until is None)
                yield Span(name, Edge(module, rule.after), closes)
