"""``pretrain_gpt_moe.py`` with packages of Mamba, gated delta nets, latent layers and FSDP played.

Megatron's own modules run, on a CPU; in place of the kernels that they call stand functions of
torch with the same arguments. They are for sequences of some dozen tokens: the selective scan
takes memory of the square of the sequence.
"""

import importlib.machinery
import math
import re
import sys
import types
from typing import Any

import torch
import torch.nn.functional as F
from functorch.einops import rearrange
from megatron.core.distributed.fsdp import mcore_fsdp_adapter
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.ssm import mamba_context_parallel, mamba_mixer
from megatron.core.ssm.gated_delta_net import common, gdn
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.moe import moe_layer
from torch import Tensor, nn

import pretrain_gpt_moe


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Each channel by itself, over the last ``w`` tokens; ``[b, s, d]`` and ``[d, w]``."""
    width = weight.size(1)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    mixed = F.conv1d(padded, weight[:, None], bias, groups=len(weight)).transpose(1, 2)
    return F.silu(mixed) if activation in ("silu", "swish") else mixed, None


def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``y_t = c_t . h_t`` with ``h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t``, as one product.

    Args:
        x: ``[batch, s, h, p]``.
        dt: ``[batch, s, h]``.
        a: ``[h]``, negative.
        b: ``[batch, s, h, n]``.
        c: the same.
    """
    dtype, wide = x.dtype, torch.promote_types(x.dtype, a.dtype)
    x, dt, b, c = (each.to(wide) for each in (x, dt, b, c))
    log_decay = (dt * a).cumsum(1).transpose(1, 2)
    between = log_decay[..., :, None] - log_decay[..., None, :]
    later = torch.ones_like(between, dtype=torch.bool).triu(1)
    weight = between.masked_fill(later, -torch.inf).exp() * torch.einsum("bihn,bjhn->bhij", c, b)
    return torch.einsum("bhij,bjh,bjhp->bihp", weight, dt, x).to(dtype)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, *, activation: str, headdim: int, ngroups: int, **_: Any,
) -> Tensor:  # fmt: skip
    """A Mamba-2 layer between its two projections, ``[b, s, d]`` to ``[b, s, h * p]``."""
    heads = len(A)
    inner = heads * headdim
    state = (zxbcdt.size(-1) - 2 * inner - heads) // 2
    z, xbc, dt = zxbcdt.split((inner, inner + 2 * state, heads), -1)
    xbc, _ = causal_conv1d(xbc, conv1d_weight, conv1d_bias, activation)
    x, b, c = xbc.split((inner, state, state), -1)
    x = x.unflatten(-1, (heads, headdim))
    b, c = (
        part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, 2) for part in (b, c)
    )
    y = selective_scan(x, F.softplus(dt + dt_bias), A, b, c) + D[:, None] * x
    return y.flatten(-2) * F.silu(z)


def l2norm(x: Tensor) -> Tensor:
    """Rows of length one."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class GroupedRMSNorm(nn.Module):
    """Of ``group_size`` features each, with one weight for each feature."""

    def __init__(
        self, hidden_size: int, *, eps: float, group_size: int, dtype: torch.dtype, **_: Any
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))
        self.eps, self.group_size = eps, group_size

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group_size))
        return F.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2) * self.weight


class OnePlusNorm(nn.LayerNorm):
    """A layer norm that multiplies by ``1 + weight``: ``--apply-layernorm-1p``."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.data.zero_()
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)


class NormedLinear(ColumnParallelLinear):
    """Transformer Engine's norm and projection in one."""

    def __init__(self, inputs: int, outputs: int, *, config: Any, **options: Any) -> None:
        super().__init__(inputs, outputs, config=config, **options)
        self.norm = OnePlusNorm(config, inputs, config.layernorm_epsilon)

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        return super().forward(self.norm(x), *rest, **options)


class LatentLinear(nn.Linear):
    """Between hidden and latent width, the same on all tensor-parallel ranks."""

    def __init__(
        self, inputs: int, outputs: int, *, config: Any, init_method: Any, bias: bool, **_: Any
    ) -> None:
        super().__init__(inputs, outputs, bias, dtype=config.params_dtype)
        init_method(self.weight)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class Provider(LocalSpecProvider):
    """Of modules beside an attention variant, which Megatron takes from Transformer Engine."""

    def column_parallel_layer_norm_linear(self) -> type:
        return NormedLinear

    def layer_norm(self, **_: Any) -> type:
        return OnePlusNorm


def local_attention(config: Any, backend: Any = None) -> Any:
    """Of the layers between those of the variant."""
    attention = get_gpt_layer_local_submodules(qk_layernorm=config.qk_layernorm).self_attention
    attention.metainfo["fuse_input_layernorm"] = False
    return attention


def rearranged(tensor: Tensor, pattern: str, **sizes: int) -> Tensor:
    """The function of einops; that of functorch does not split one dimension into three."""
    left, right = (
        [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", side)]
        for side in pattern.split("->")
    )
    for names, size in zip(left, tensor.shape, strict=True):
        for name in [name for name in names if name not in sizes]:
            sizes[name] = size // math.prod(sizes.get(other, 1) for other in names)
    order = [name for names in left for name in names]
    parts = tensor.reshape([sizes[name] for name in order])
    parts = parts.permute([order.index(name) for names in right for name in names])
    return parts.reshape([math.prod(sizes[name] for name in names) for names in right])


def install() -> None:
    """Put all of it where Megatron looks."""
    for name in ("mamba_ssm", "einops", "fla"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name] = module
    mcore_fsdp_adapter.HAVE_EINOPS = True
    mcore_fsdp_adapter.einops = types.SimpleNamespace(rearrange=rearranged)
    mamba_mixer.HAVE_MAMBA_SSM = mamba_mixer.HAVE_EINOPS = True
    mamba_context_parallel.HAVE_EINOPS = True
    mamba_mixer.rearrange = rearrange
    mamba_mixer.mamba_split_conv1d_scan_combined = mamba_split_conv1d_scan_combined
    mamba_mixer.ExtendedRMSNorm = GroupedRMSNorm
    common.HAVE_FLA, common.l2norm = True, l2norm
    gdn.causal_conv1d = causal_conv1d
    gdn.chunk_gated_delta_rule = common.torch_chunk_gated_delta_rule  # Megatron's own, in torch
    moe_layer.HAVE_TE, moe_layer.TELinear = True, LatentLinear
    variants._get_backend_spec_provider = lambda config: Provider()
    variants._get_self_attention_module_spec = local_attention


if __name__ == "__main__":
    install()
    pretrain_gpt_moe.main()
