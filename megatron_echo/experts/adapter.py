"""LoRA in experts: a low-rank projection beside a frozen one, for each expert, cloned with it.

Its two matrices are grouped linears like the one that they adapt. So a clone brings those of its
expert, in exchanges of their own, and their gradients come home, whatever the transport. Names are
Megatron-Bridge's: ``linear_fc1.adapter.linear_in.weight`` beside ``linear_fc1.weight``.
"""

import torch
from torch import Tensor

from megatron_echo.dispatch.clones_of_call import Clones
from megatron_echo.experts.projection import GroupedLinear, draw


class ExpertAdapter(torch.nn.Module):
    """``alpha / rank * B A`` of each expert.

    Attributes:
        linear_in: A, ``[m, rank, in]``.
        linear_out: B, ``[m, out, rank]``.
    """

    def __init__(self, linear: GroupedLinear, rank: int, alpha: float) -> None:
        """Draw A by Xavier and begin with B = 0; see :func:`adapted`."""
        super().__init__()
        (experts, out, width), config = linear.stack.shape, linear.config
        self.linear_in = GroupedLinear(experts, width, rank, config, is_adapter=True)
        self.linear_out = GroupedLinear(experts, rank, out, config, is_adapter=True)
        self._scale = alpha / rank
        with torch.no_grad():
            self.linear_out.weight.zero_()
            for matrix in self.linear_in.weight:
                draw(matrix, torch.nn.init.xavier_uniform_, config)

    def forward(self, rows: Tensor, ends: Tensor, clones: Clones | None = None) -> Tensor:
        """``[B, in]`` to ``[B, out]``; see :class:`GroupedLinear`."""
        inner, _ = self.linear_in(rows, ends, clones)
        return self.linear_out(inner * self._scale, ends, clones)[0]


def adapted(linear: GroupedLinear, rank: int, alpha: float) -> GroupedLinear:
    """Freeze a projection of the experts and put an adapter beside it; all ranks do so.

    It goes before the model is wrapped for data parallelism and before the optimizer is made.

    Args:
        linear: ``linear_fc1`` or ``linear_fc2`` of the experts of a layer.
        rank: of the adapter.
        alpha: its output is multiplied by ``alpha / rank``.

    Returns:
        The same module.

    Raises:
        ValueError: experts are cut by ``--expert-tensor-parallel-size``.
    """
    if linear.config.expert_tensor_parallel_size > 1:
        raise ValueError(
            "An adapter in experts needs them whole, but --expert-tensor-parallel-size is "
            f"{linear.config.expert_tensor_parallel_size}. Use 1, or adapt other layers only."
        )
    linear.requires_grad_(False)
    linear.adapter = ExpertAdapter(linear, rank, alpha)
    return linear
