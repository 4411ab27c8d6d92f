"""Megatron's transformer layer around ours: where clones' gradients are awaited, and its graphs."""

import functools
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.transformer_layer import MoETransformerLayer
from torch import Tensor

from megatron_echo.moe_layer import EchoMoELayer


def keep_padding(plan: Any) -> None:
    """Let the MoE layer see the padding mask in Megatron's overlapping schedule.

    Args:
        plan: Megatron's ``TransformerLayerSchedulePlan`` of one layer and microbatch, before it
            runs.
    """
    layers = [module for module in plan.layer.modules() if isinstance(module, EchoMoELayer)]
    stage = plan.pre_dispatch_computation
    stage.submodule = functools.partial(_with_padding, stage.submodule, layers)


def _with_padding(run: Any, layers: list[EchoMoELayer], node: Any, *inputs: Tensor) -> Any:
    for layer in layers:
        layer.schedule_state = node.chunk_state
    try:
        return run(node, *inputs)
    finally:
        for layer in layers:
            layer.schedule_state = None


class EchoTransformerLayer(MoETransformerLayer):
    """Megatron's layer: gradients of clones travel while its attention's backward pass runs.

    In graphs of single layers it is one graph, and in training only. Megatron's ``local`` graphs
    serve evaluation too. There our buffers are larger than in training, so that nothing is
    dropped, and nothing is counted.
    """

    def create_mcore_cudagraph_manager(self, config: TransformerConfig) -> None:
        """One graph for all of a layer, whichever part of it is named."""
        mlp = self.submodules_config.mlp
        is_moe = getattr(mlp, "func", getattr(mlp, "module", mlp)) is EchoMoELayer
        parts = {CudaGraphModule.attn, CudaGraphModule.moe if is_moe else CudaGraphModule.mlp}
        if not config.cuda_graph_modules or not parts.isdisjoint(config.cuda_graph_modules):
            self.cudagraph_manager = CudaGraphManager(config)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple:
        """Of Megatron's layer, with what its ``local`` graphs want under pipeline parallelism.

        They mark their inputs: the rotary embedding, one tensor for all microbatches, would keep
        the marks of those in flight. And Megatron frees what a stage has sent on, which would be
        the memory of a graph.
        """
        if self.config.cuda_graph_impl != "local" or self.config.pipeline_model_parallel_size == 1:
            return super().__call__(*args, **kwargs)
        for name, value in kwargs.items():
            if name.startswith("rotary") and isinstance(value, Tensor):
                kwargs[name] = value.detach()
        hidden, *rest = super().__call__(*args, **kwargs)
        is_last = getattr(self, "is_last_layer", False)  # not of a prediction layer's
        return (hidden.clone() if is_last else hidden, *rest)

    def _forward_attention(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of Megatron's layer, behind whose backward pass the experts' parameters get gradients.

        Not where the MoE layer alone is in a graph, or computed again.
        """
        mlp = self.mlp
        is_alone = self.config.cuda_graph_impl == "transformer_engine"
        if isinstance(mlp, EchoMoELayer) and not (is_alone or mlp.moe_layer_recompute):
            hidden_states = mlp.await_gradients(hidden_states)
        return super()._forward_attention(hidden_states, *args, **kwargs)

    def _should_call_local_cudagraph(self, *args: Any, **kwargs: Any) -> bool:
        is_training = self.training and torch.is_grad_enabled()
        return is_training and super()._should_call_local_cudagraph(*args, **kwargs)

    def _should_call_te_cudagraph(self, *args: Any, **kwargs: Any) -> bool:
        return torch.is_grad_enabled() and super()._should_call_te_cudagraph(*args, **kwargs)

    def _get_te_cuda_graph_replay_args(self, *args: Any, **kwargs: Any) -> tuple:
        """Where there is no mask, as in the middle of a pipeline, a causal one and not zeros.

        Transformer Engine's attention asks for neither, the local one takes what it gets.
        """
        has_none = kwargs.get("attention_mask") is None
        args, kwargs = super()._get_te_cuda_graph_replay_args(*args, **kwargs)
        if has_none and "attention_mask" in kwargs and self.config.transformer_impl == "local":
            kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"]).triu(1)
        return args, kwargs
