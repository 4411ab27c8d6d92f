"""``pretrain_gpt_moe.py`` with ``--cuda-graph-impl transformer_engine``, without that package.

Megatron hands its layers to Transformer Engine's ``make_graphed_callables``. Here a function of
that name does what it does, in the order that it is given, with graphs that a CPU records.
"""

import itertools
import sys
import types
from typing import Any

import torch
from megatron.core.transformer import cuda_graphs, transformer_layer
from torch import Tensor, nn

import pretrain_gpt_moe
from megatron_echo import compatibility


class Graphed:
    """Forward and backward pass of a layer for one microbatch in flight."""

    def __init__(self, layer: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self.inputs = (*args, *kwargs.values())
        self.parameters = tuple(p for p in layer.parameters() if p.requires_grad)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def warm_up(self) -> None:
        outputs = self.layer(*self.args, **self.kwargs)
        self._gradients(outputs, tuple(map(torch.zeros_like, outputs)))

    def _gradients(self, outputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple:
        """By ``backward``, which recomputation inside a layer takes part in."""
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        leaves = (*self.inputs, *self.parameters)
        kept = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(*zip(*pairs, strict=True))
        found = tuple(leaf.grad for leaf in leaves)
        for leaf, grad in zip(leaves, kept, strict=True):
            leaf.grad = grad
        return found

    def capture_forward(self) -> None:
        with torch.cuda.graph(self.forward):
            self.outputs = self.layer(*self.args, **self.kwargs)

    def capture_backward(self) -> None:
        self.grads = tuple(map(torch.zeros_like, self.outputs))
        with torch.cuda.graph(self.backward):
            self.results = self._gradients(self.outputs, self.grads)

    def reset(self) -> None:
        self.forward.reset()
        self.backward.reset()

    def __call__(self, *args: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        given = (*args, *(kwargs[name] for name in self.kwargs))
        return Replay.apply(self, *given, *self.parameters)


class Replay(torch.autograd.Function):
    """What autograd sees of a replay."""

    @staticmethod
    def forward(ctx: Any, graphed: Graphed, *tensors: Tensor) -> tuple[Tensor, ...]:
        for memory, tensor in zip(graphed.inputs, tensors, strict=False):
            memory.data.copy_(tensor)
        ctx.graphed = graphed
        graphed.forward.replay()
        return tuple(output.detach() for output in graphed.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        for memory, grad in zip(ctx.graphed.grads, grads, strict=True):
            if grad is not None:
                memory.copy_(grad)
        ctx.graphed.backward.replay()
        results = (None if r is None else r.detach() for r in ctx.graphed.results)
        return (None, *results)


def make_graphed_callables(
    layers: tuple[nn.Module, ...], sample_args: list[tuple], *, sample_kwargs: list[dict],
    num_warmup_iters: int, _order: list[int], _num_layers_per_chunk: list[int], **_: Any,
) -> list[Graphed]:  # fmt: skip
    """Capture in the order of the schedule: chunk ``c`` forward, ``-c`` backward."""
    starts = [0, *itertools.accumulate(_num_layers_per_chunk)]
    microbatches = len(_order) // 2 // len(_num_layers_per_chunk)
    graphed: list[Graphed] = []
    for chunk, number in enumerate(_num_layers_per_chunk):
        for _microbatch in range(microbatches):
            for layer in layers[starts[chunk] : starts[chunk] + number]:
                graphed.append(
                    Graphed(layer, sample_args[len(graphed)], sample_kwargs[len(graphed)])
                )
    for each in graphed:
        for _iteration in range(num_warmup_iters):
            each.warm_up()
    done = {(way, c): 0 for way in (1, -1) for c in range(len(_num_layers_per_chunk))}
    for word in _order:
        way, chunk = (1, word - 1) if word > 0 else (-1, -word - 1)
        number = _num_layers_per_chunk[chunk]
        first = starts[chunk] * microbatches + done[way, chunk] * number
        done[way, chunk] += 1
        some = graphed[first : first + number]
        for each in some if way == 1 else reversed(some):
            each.capture_forward() if way == 1 else each.capture_backward()
    return graphed


if __name__ == "__main__":
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules[name] = types.ModuleType(name)
    transformer_layer.is_te_min_version = lambda version, **_: True
    compatibility.HAVE_TRANSFORMER_ENGINE = True
    cuda_graphs.HAVE_TE_GRAPHS = True
    cuda_graphs.is_te_min_version = lambda version, **_: True
    cuda_graphs.make_graphed_callables = make_graphed_callables
    pretrain_gpt_moe.main()
