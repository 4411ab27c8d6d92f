"""One projection of the experts of a rank: a stack of weights, its products, and its clones."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_expert_parallel_rng_tracker_name,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_echo.call_roles import Role, role_of_call
from megatron_echo.config import echo_setting, fp8_format
from megatron_echo.dispatch.clones_of_call import Clones
from megatron_echo.environment import on_gpu
from megatron_echo.experts.biases import bias_stack
from megatron_echo.experts.clones import WeightPool, bringer, cloned_linear
from megatron_echo.experts.delayed import DelayedGradients
from megatron_echo.experts.fp8_linear import Fp8Weights, fp8_linear, values_of
from megatron_echo.experts.grouped_linear import (
    GroupedGemm,
    TorchGemm,
    grouped_linear,
    has_grouped_mm,
)
from megatron_echo.experts.pointer_gemm import KERNEL_DTYPES, PointerGemm

GROUPED_GEMMS: dict[str, GroupedGemm] = {"torch": TorchGemm(), "triton": PointerGemm()}
"""By the word of ``--moe-echo-grouped-gemm``, but for ``auto``."""

_KERNELS_WIN = False
"""Whether Triton's kernels take 1 / 0.9 of the time of ``grouped_mm`` at most: then the copy of the
home weights that they save makes them the faster ones. Nobody has measured it yet."""

_OLDEST_FOR_TRITON = (8, 0)


def automatic_gemm(
    capability: tuple[int, int] | None, dtype: torch.dtype, widths: Iterable[int], groups: int
) -> str:
    """What ``--moe-echo-grouped-gemm auto`` is: the one place where that is decided.

    torch on a CPU, and where ``grouped_mm`` has a kernel. Elsewhere torch would multiply all rows
    once for each group, and Triton's kernels are taken, where they can run.

    Args:
        capability: of the GPU, None without one.
        dtype: of rows and weights.
        widths: of rows and results.
        groups: m + S.
    """
    if capability is None or dtype not in KERNEL_DTYPES or capability < _OLDEST_FOR_TRITON:
        return "torch"
    has_torch = has_grouped_mm(capability, dtype, widths, groups) and not _KERNELS_WIN
    return "torch" if has_torch else "triton"


class GroupedLinear(torch.nn.Module):
    """The same projection of each expert: ``weight [m, out, in]`` and perhaps ``bias [m, out]``.

    Attributes:
        adapter: see ``adapter.py``; its output is added. While there is one, ranks freeze
            ``weight`` and ``bias`` together or not at all.
    """

    def __init__(
        self, experts: int, in_features: int, out_features: int, config: TransformerConfig,
        *, is_adapter: bool = False,
    ) -> None:  # fmt: skip
        """Make room for the weights.

        Args:
            experts: m.
            in_features: of a row.
            out_features: of a result.
            config: the transformer's configuration.
            is_adapter: part of an adapter: without a bias, never in FP8.
        """
        super().__init__()
        self.config = config
        self.adapter: torch.nn.Module | None = None
        on_cpu = config.use_cpu_initialization
        self.weight = torch.nn.Parameter(
            torch.empty(
                (experts, out_features, in_features),
                device="cpu" if on_cpu else torch.cuda.current_device(),
                dtype=config.params_dtype,
            )
        )
        self._shape = self.weight.shape
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=1, stride=1)
        has_bias = config.add_bias_linear and not is_adapter
        bias = self.weight.new_empty(experts, out_features) if has_bias else None
        self.bias = None if bias is None else torch.nn.Parameter(bias)
        # Megatron's mark of a parameter that is not shared by all data-parallel ranks.
        shares_groups = (
            config.expert_model_parallel_size == 1
            and config.expert_tensor_parallel_size == config.tensor_model_parallel_size
        )
        for parameter in self.parameters():
            setattr(parameter, "allreduce", shares_groups)  # noqa: B010 (mypy knows no such one)

        self._fp8 = Fp8Weights(config) if fp8_format(config) and not is_adapter else None
        self._pool = WeightPool.of(config)
        self._gemm = echo_setting(config, "moe_echo_grouped_gemm")
        is_delayed = config.delay_wgrad_compute and not is_adapter
        self._later = DelayedGradients() if is_delayed else None
        self._keeps_clones = not echo_setting(config, "moe_echo_recompute_expert_dispatch")

    @property
    def stack(self) -> Tensor:
        """``weight``, ``[m, out, in]``."""
        weight: Tensor = self.weight
        return weight if weight.dim() == len(self._shape) else weight.view(self._shape)

    def make_matrix(self, partition_dim: int) -> None:
        """Turn ``weight`` into ``[m * out, in]``, for an optimizer that takes matrices only.

        Megatron's Muon takes the parts of a fused projection one by one; here they are experts.

        Args:
            partition_dim: of an expert's matrix, where tensor ranks share it out.
        """
        experts, out_features, _ = self._shape
        weight: Any = self.weight
        weight.data = weight.data.flatten(0, 1)
        weight.is_qkv, weight.qkv_split_shapes = True, [out_features] * experts
        weight.partition_dim = partition_dim

    def number(self) -> None:
        """Call ``weight`` ``weight0``, for a checkpoint of Megatron-FSDP.

        It adds the number of a rank's first expert to it, so that ranks do not share a name.
        """
        self.register_parameter("weight0", self._parameters.pop("weight"))

    def __getattr__(self, name: str) -> Any:
        is_numbered = name == "weight" and "weight0" in self._parameters
        return super().__getattr__("weight0" if is_numbered else name)

    def forward(
        self, rows: Tensor, ends: Tensor, clones: Clones | None = None,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """``[B, in]`` to ``[B, out]``; see :func:`grouped_linear` and :func:`cloned_linear`.

        ``packed`` are the rows in FP8, where they come so; see :func:`fp8_linear`. The clones are
        brought here, in the forward pass of the module that owns the weights: Megatron's parameter
        all-gather is waited for before it.

        Returns:
            The products, and the biases to add to them, of :func:`bias_stack`, if there are any.
        """
        bias: Tensor | None = self.bias
        own = clones
        if clones is not None and self.adapter is not None and not self.weight.requires_grad:
            own = replace(clones, is_frozen=True)
        if bias is not None:
            has_exchanges = own is not None and not own.is_frozen and rows.requires_grad
            if has_exchanges and not bias.requires_grad:
                bias = bias.detach().requires_grad_()  # in backward too: see EchoGroupedMLP
            bias = bias_stack(bias, own)
        output = self._product(rows, ends, own, packed)
        if self.adapter is not None:
            if packed is not None and self._fp8 is not None:
                rows = values_of(rows, packed, self._fp8.form)
            output = output + self.adapter(rows, ends, clones)
        return output, bias

    def fetch(self, clones: Clones | None, *, in_backward: bool = False) -> None:
        """Begin to bring the clones, where the transport is hidden, before they are needed.

        Args:
            clones: which experts sit in the slots.
            in_backward: for the backward pass of :meth:`forward`.
        """
        if clones is None or not clones.transport.is_hidden:
            return
        if in_backward and self._keeps_clones:
            return
        bring: Callable[[], Any]
        if self._fp8 is None:
            gemm = self._grouped_gemm(len(self.stack) + clones.slots)
            bring = bringer(self.stack, clones, self._pool, gemm)
        else:
            trains = in_backward or self._trains()
            bring = self._fp8.bringer(self.stack, clones, is_transposed=in_backward, trains=trains)
        clones.begin(self.weight, bring)

    def _trains(self) -> bool:
        return self.training and role_of_call() is not Role.UNRECORDED

    def _product(
        self, rows: Tensor, ends: Tensor, clones: Clones | None, packed: Tensor | None
    ) -> Tensor:
        keep, later = self._keeps_clones, None
        weight = self.stack
        if self._later is not None and (clones is not None or weight.requires_grad):
            # Not in the graph: hooks of a parameter run there, with a gradient or without.
            later, weight = self._later, weight.detach()
            if torch.is_grad_enabled() and not rows.requires_grad:
                rows = rows.detach().requires_grad_()
        if self._fp8 is not None:
            return fp8_linear(
                rows, weight, ends, clones, self._fp8, trains=self._trains(), keep=keep,
                packed=packed, later=later,
            )  # fmt: skip
        gemm = self._grouped_gemm(len(ends))
        if clones is None:
            return grouped_linear(rows, weight, ends, gemm, later)
        return cloned_linear(rows, weight, ends, clones, self._pool, gemm, keep, later)

    def backward_dw(self) -> None:
        """Compute the weight gradient that the first call of those in flight left for later.

        Clones' parts come home here: all ranks of the group call it together. Biases' gradients
        are computed with the other gradients.
        """
        if self._later is not None:
            self._later.compute(self.weight)

    def _grouped_gemm(self, groups: int) -> GroupedGemm:
        kind, weight = self._gemm, self.stack
        if kind == "auto":
            has_gpu = on_gpu(weight)
            capability = torch.cuda.get_device_capability(weight.device) if has_gpu else None
            kind = automatic_gemm(capability, weight.dtype, weight.shape[1:], groups)
        return GROUPED_GEMMS[kind]


class CloneFetch(torch.nn.Module):
    """Begins to bring the clones of a projection: a module, so that its pre-hooks run first.

    Those of ``--overlap-param-gather`` and of Megatron-FSDP wait for the parameters of a module;
    during a call this one has that of another module. It owns none, so states, optimizers and
    hooks of gradients do not see it.
    """

    def __init__(self, linear: GroupedLinear) -> None:
        super().__init__()
        self._of = (linear,)  # no child
        self._is_called = False

    def __call__(self, clones: Clones | None) -> None:
        """Run the hooks, then :meth:`forward`."""
        self._is_called = True
        super().__call__(clones)
        self._is_called = False

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        """The weights that are read, during a call."""
        if self._is_called:
            yield self._of[0].weight

    def forward(self, clones: Clones | None) -> None:
        """See :meth:`GroupedLinear.fetch`."""
        self._of[0].fetch(clones)


class FetchInBackward(torch.autograd.Function):
    """The identity; its backward pass begins to bring clones, before what lies before it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, linear: GroupedLinear, clones: Clones) -> Tensor:
        """``rows`` of any shape, and the projection that needs the clones next in backward."""
        ctx.linear, ctx.clones = linear, clones
        ctx.save_for_backward(clones.slot_expert)
        return rows.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """The gradient as it is."""
        ctx.linear.fetch(ctx.clones.given_back(*ctx.saved_tensors), in_backward=True)
        return grad, None, None


def draw(weight: Tensor, method: Callable[[Tensor], Any], config: TransformerConfig) -> None:
    """Initialise one expert's matrix: others on other expert ranks, the same on their replicas.

    Args:
        weight: ``[out, in]``, without gradients; written.
        method: fills a tensor.
        config: the transformer's configuration.
    """
    if config.use_cpu_initialization:
        master = torch.empty(weight.shape, dtype=torch.float32)
        method(master)
        weight.copy_(master)
    else:
        with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
            method(weight)
