"""One forward and backward pass of a MoE layer, eager or in a CUDA graph, with static tensors."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import moe_layer
import torch
import torch.distributed as dist
from moe_layer import Shape
from record import SkippedError
from timing import device, on_gpu
from torch import Tensor

from megatron_echo import environment

_WARM_UP = 3
HOT_BIAS = 50.0
DRY_SHAPE = Shape(hidden=32, ffn=16, experts=8, topk=2, tokens=32)

_COMMON = {"moe_router_dtype": "fp32"}  # as recipes set it; our activation's kernels need it
VARIANTS: dict[str, dict[str, Any]] = {
    "stock local": {"moe_token_dispatcher_type": "alltoall"},
    "stock TE": {
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "transformer_impl": "transformer_engine",
    },
    "ours": {},
    "ours captured": {},
}
"""Layers that are compared, and fields of their configurations."""


@contextmanager
def single_rank() -> Iterator[None]:
    """Megatron's parallel state of one process. Without NCCL, whose threads disturb a capture."""
    from megatron.core import parallel_state

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class Pass:
    """Forward and backward of one layer; calling it replaces the results.

    Attributes:
        layer: the MoE layer.
        hidden: ``[T, 1, H]``, its static input; the mean of each token is 1 (see :meth:`route`).
        cotangent: ``[T, 1, H]``, the gradient of its output.
    """

    def __init__(self, shape: Shape, variant: str, **fields: Any) -> None:
        """Build the layer in bf16 (fp32 without a GPU).

        Args:
            shape: its sizes.
            variant: one of :data:`VARIANTS`.
            fields: more of its configuration.
        """
        if "TE" in variant and not environment.HAVE_TRANSFORMER_ENGINE:
            raise SkippedError("Transformer Engine does not import")
        dtype = torch.bfloat16 if on_gpu() else torch.float32
        settings = {"bias_activation_fusion": on_gpu(), **_COMMON, **VARIANTS[variant], **fields}
        # One rank computes everything: a capacity of 1.0 is exact.
        capacity = 1.0 if (ours := variant.startswith("ours")) else None
        self.layer = moe_layer.build(shape, dtype, ours, capacity, **settings)
        torch.manual_seed(0)
        size = (shape.tokens, 1, shape.hidden)
        self._noise = torch.randn(size, device=device())
        self.hidden = torch.empty(size, dtype=dtype, device=device()).requires_grad_()
        self.cotangent = torch.randn(size, device=device()).to(dtype)
        self._output: Tensor | None = None
        self._router = self.layer.router.weight.detach().clone()
        self.route("even")

    @property
    def leaves(self) -> list[Tensor]:
        """What has gradients."""
        return [self.hidden, *self.layer.parameters()]

    @torch.no_grad()
    def route(self, routing: str, seed: int = 0) -> None:
        """Bring about a routing, through the router's weight and the input, both in place.

        With a mean of 1 in each token, ``bias / H`` in a row of the weight adds ``bias`` to that
        expert's logit.

        Args:
            routing: ``even``; ``zipf``, popularity ``1 / place``; ``hot``, all tokens to the same
                experts; ``holes``, no token to every other expert.
            seed: turns the tokens around; another routing of the same kind.
        """
        experts, width = self._router.shape
        bias = torch.zeros(experts)
        if routing == "zipf":
            bias = -torch.arange(1.0, experts + 1).log()
        elif routing == "hot":
            bias[: self.layer.config.moe_router_topk] = HOT_BIAS
        elif routing == "holes":
            bias[1::2] = -HOT_BIAS
        noise = self._noise - self._noise.mean(-1, keepdim=True)
        self.hidden.copy_(noise.roll(seed, -1) + 1)
        centred = self._router.float() - self._router.float().mean(1, keepdim=True)
        self.layer.router.weight.copy_(centred + bias[:, None].to(centred) / width)

    def clear(self) -> None:
        """Drop all gradients, so that the next pass makes new ones."""
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> None:
        """Forward and backward; results are in :meth:`results`."""
        self.clear()
        output, _ = self.layer(self.hidden)
        output.backward(self.cotangent)
        self._output = output.detach()

    def results(self) -> dict[str, Tensor]:
        """The output and all gradients of the last call."""
        assert self._output is not None
        names = ["hidden", *(name for name, _ in self.layer.named_parameters())]
        gradients = {name: leaf.grad for name, leaf in zip(names, self.leaves, strict=True)}
        return {"output": self._output, **{n: g for n, g in gradients.items() if g is not None}}


class CapturedPass:
    """A :class:`Pass` in a CUDA graph; calling it replays. Without a GPU it runs the pass.

    Attributes:
        results: static output and gradients, overwritten by each replay.
        pool_bytes: device memory that the graph holds.
    """

    def __init__(self, eager: Pass) -> None:
        """Warm up and capture."""
        self._eager = eager
        self.pool_bytes = 0
        if not on_gpu():
            eager()
            self.results = eager.results()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                eager()
            eager.clear()
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            eager()
        self.results = eager.results()
        self.pool_bytes = torch.cuda.memory_reserved() - before
        torch.cuda.synchronize()

    def __call__(self) -> None:
        """Replay."""
        if on_gpu():
            self._graph.replay()
            return
        self._eager()
        for name, tensor in self._eager.results().items():
            self.results[name].copy_(tensor)
