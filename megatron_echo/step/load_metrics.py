"""How evenly a step used the experts, from the counts of its routers."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.step.counts import CountExchange


def load_fractions(counts: Tensor) -> Tensor:
    """Each expert's part of a group's pairs, fp64 ``[..., E]``; zeros for a group without any."""
    wide = counts.double()
    total = wide.sum(-1, keepdim=True)
    return wide / torch.where(total > 0, total, 1)


def load_metrics(counts: Tensor) -> dict[str, Tensor]:
    """How evenly experts are used, from their tokens ``[layers, E]`` over all ranks of a step.

    Returns:
        ``expert_overload``: the fullest expert's load over the mean, 1.0 in balance;
        ``expert_entropy``: of the load fractions, as a part of ``log(E)``, 1.0 in balance;
        ``dead_experts``: experts without a token. Each fp64 ``[layers]``.
    """
    fractions = load_fractions(counts)
    experts = counts.shape[-1]
    return {
        "expert_overload": fractions.amax(-1) * experts,
        "expert_entropy": torch.special.entr(fractions).sum(-1) / math.log(experts),
        "dead_experts": (counts == 0).sum(-1).double(),
    }


def read_load_metrics(exchange: CountExchange | None) -> dict[str, float]:
    """:func:`load_metrics` of the last step as means over the layers of all pipeline stages.

    With ``expert_overload_max`` over layers; empty if no router counted. All ranks of the job call
    it together, at the end of a step: it reads values on the host. ``exchange`` is that of this
    rank's routers, None on a rank without any.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums, highest = torch.zeros(2, 4, dtype=torch.float64, device=device)
    if exchange is not None and exchange.last_step is not None:
        counts = exchange.last_step.clone()
        dist.all_reduce(counts, group=exchange.batch_group)
        ones = torch.ones_like(counts[:, 0], dtype=torch.float64)
        layers = torch.stack([*load_metrics(counts).values(), ones])
        sums += layers.sum(1) / exchange.batch_group.size()  # each of its ranks adds the same
        highest += layers.amax(1)
    dist.all_reduce(sums)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    overload, entropy, dead, layer_count = sums.tolist()
    if layer_count == 0:
        return {}
    return {
        "expert_overload": overload / layer_count,
        "expert_overload_max": highest.tolist()[0],
        "expert_entropy": entropy / layer_count,
        "dead_experts": dead / layer_count,
    }
