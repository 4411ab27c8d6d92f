"""``pretrain_gpt_moe.py`` with Megatron's Muon, without the package emerging-optimizers.

Megatron's own optimizer runs: it chooses parameters, takes fused projections apart, shards and
saves. The package gives it a step with momentum and Newton-Schulz's iteration, which stand here.
"""

import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any, Literal

import torch
from megatron.core import optimizer
from megatron.core.optimizer import emerging_optimizers
from torch import Tensor

import pretrain_gpt_moe


def newton_schulz_tp(
    x: Tensor, *, steps: int, tp_group: Any, partition_dim: int | None, **_: Any
) -> Tensor:
    """The matrix nearest to orthogonal ones, roughly; of the whole of it, if it is shared out."""
    assert x.dim() == 2  # the package multiplies by addmm
    if partition_dim is not None and tp_group.size() > 1:
        shards = [torch.empty_like(x) for _ in range(tp_group.size())]
        torch.distributed.all_gather(shards, x.contiguous(), tp_group)
        whole = newton_schulz_tp(
            torch.cat(shards, partition_dim), steps=steps, tp_group=None, partition_dim=None
        )
        return whole.chunk(tp_group.size(), partition_dim)[tp_group.rank()]
    is_tall = x.size(0) > x.size(1)
    x = x.T if is_tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _step in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x.T if is_tall else x


def get_muon_scale_factor(rows: int, columns: int, mode: str) -> float:
    """Of ``--muon-scale-mode spectral``."""
    assert mode == "spectral"
    return max(rows, columns) ** 0.5


class OrthogonalizedOptimizer(torch.optim.Optimizer):
    """Momentum, an update that the subclass makes orthogonal, and decay of weights."""

    def __init__(
        self, params: Any, lr: float, momentum: float, *, nesterov: bool, weight_decay: float,
        scaled_orthogonalize_fn: Callable, **_: Any,
    ) -> None:  # fmt: skip
        super().__init__(
            params,
            {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay},
        )
        self.scaled_orthogonalize_fn = scaled_orthogonalize_fn

    def _init_group(self, group: dict, skip_non_grad_params: bool = True) -> None:
        for p in group["params"]:
            if p not in self.state and not (skip_non_grad_params and p.grad is None):
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            self._init_group(group)
            for p in group["params"]:
                if p.grad is not None:
                    kept = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(kept, group["momentum"]) if group["nesterov"] else kept
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(self.orthogonalize(p, update), alpha=group["lr"])


_all_gather = torch.distributed.all_gather


def all_gather(parts: list[Tensor], own: Tensor, group: Any = None, **_: Any) -> None:
    """Also of uneven parts, which NCCL takes and gloo does not."""
    if len({part.numel() for part in parts}) == 1:
        _all_gather(parts, own, group)
        return
    for rank, part in enumerate(parts):
        if rank == torch.distributed.get_rank(group):
            part.copy_(own)
        torch.distributed.broadcast(part, group=group, group_src=rank)


def install() -> None:
    """Put the package's names where Megatron looks for them, and read its part again."""
    package = "emerging_optimizers"
    contents = {
        package: {"registry": types.SimpleNamespace(get_optimizer_name_list=lambda: [])},
        f"{package}.orthogonalized_optimizers": {
            "AdaptiveMuon": type("AdaptiveMuon", (), {}),
            "OrthogonalizedOptimizer": OrthogonalizedOptimizer,
            "get_muon_scale_factor": get_muon_scale_factor,
        },
        f"{package}.orthogonalized_optimizers.muon_utils": {
            "NSCoeffT": Literal["quintic"],
            "newton_schulz_tp": newton_schulz_tp,
        },
        f"{package}.scalar_optimizers": {"Lion": None},
        f"{package}.soap": {"SOAP": None},
    }
    for name, names in contents.items():
        module = sys.modules[name] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(names)
    torch.distributed.all_gather = all_gather
    importlib.reload(emerging_optimizers)
    optimizer.HAVE_EMERGING_OPTIMIZERS = True
    optimizer._EMERGING_OPTIMIZERS = emerging_optimizers._EMERGING_OPTIMIZERS
    optimizer._create_emerging_optimizer = emerging_optimizers._create_emerging_optimizer


if __name__ == "__main__":
    install()
    pretrain_gpt_moe.main()
