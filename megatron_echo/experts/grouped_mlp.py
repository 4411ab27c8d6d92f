"""The experts of one rank as one stack of weights for each projection."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from megatron_echo.config import expert_width, fp8_format
from megatron_echo.dispatch.clones_of_call import Clones
from megatron_echo.experts.activation import (
    expert_activation,
    packed_activation,
    weighted_activation,
)
from megatron_echo.experts.biases import with_weighted_bias
from megatron_echo.experts.checkpoint import ExpertShard, empty_extra_states, sharded_stack
from megatron_echo.experts.projection import CloneFetch, FetchInBackward, GroupedLinear, draw


class WeightedActivation(torch.nn.Module):
    """The activation times the router's probability, a module so that hooks find it by name."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._activation = expert_activation(config)
        self._format = fp8_format(config)

    def forward(
        self, hidden: Tensor, probs: Tensor, ends: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """``[B, 2F]`` or ``[B, F]`` and ``[B]`` to ``[B, F]``, and in FP8 that packed.

        See :func:`weighted_activation` and :func:`packed_activation`.
        """
        if self._format is not None:
            return packed_activation(hidden, probs, ends, self._activation, self._format, bias)
        return weighted_activation(hidden, probs, ends, self._activation, bias), None


class EchoGroupedMLP(MegatronModule):
    """The experts of this rank; takes the place of Megatron's SequentialMLP and TEGroupedMLP.

    Initial weights, checkpoint keys and shapes are SequentialMLP's, so a checkpoint saved with one
    loads with the other.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: Any = None,
        pg_collection: ProcessGroupCollection | None = None,
        name: str | None = None,
    ) -> None:
        """Build and initialise.

        Args:
            num_local_experts: m.
            config: the transformer's configuration.
            submodules: accepted for the sake of specs written for Megatron's experts; not used.
            pg_collection: ``ep``, ``expt_tp`` and ``expt_dp`` are used. The ranks of ``expt_tp``
                share out F, of the gate and of the up projection alike.
            name: not used.
        """
        super().__init__(config=config)
        assert pg_collection is not None
        self.num_local_experts = num_local_experts
        self._shard = ExpertShard(
            get_pg_rank(pg_collection.ep),
            get_pg_size(pg_collection.ep),
            get_pg_rank(pg_collection.expt_tp),
            get_pg_size(pg_collection.expt_tp),
        )
        self._data_parallel_rank = get_pg_rank(pg_collection.expt_dp)
        hidden = expert_width(config)
        ffn = config.moe_ffn_hidden_size // self._shard.tensor_ranks
        widths = ffn * 2 if config.gated_linear_unit else ffn
        self.linear_fc1 = GroupedLinear(num_local_experts, hidden, widths, config)
        self.activation = WeightedActivation(config)
        self.linear_fc2 = GroupedLinear(num_local_experts, ffn, hidden, config)
        self.fetch_fc1 = CloneFetch(self.linear_fc1)
        self.fetch_fc2 = CloneFetch(self.linear_fc2)
        # Projections of one shape share a buffer: the second is brought once the first is used.
        self._fetches_ahead = self.linear_fc1.weight.shape != self.linear_fc2.weight.shape
        if config.perform_initialization:
            self._initialise()
        self._register_load_state_dict_pre_hook(_forget_extra_states)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw the weights expert by expert, fc1 before fc2, as SequentialMLP does; no bias."""
        for fc1, fc2 in zip(self.linear_fc1.stack, self.linear_fc2.stack, strict=True):
            draw(fc1, self.config.init_method, self.config)
            draw(fc2, self.config.output_layer_init_method, self.config)
        for bias in (self.linear_fc1.bias, self.linear_fc2.bias):
            if bias is not None:
                bias.zero_()

    def forward(
        self,
        hidden_states: Tensor,
        ends: Tensor,
        probs: Tensor,
        clones: Clones | None = None,
        packed: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """Compute all experts, and the clones of other ranks' experts.

        Args:
            hidden_states: ``[B, H]``, rows grouped by expert; rows beyond the last end are not
                read.
            ends: int32 ``[m]``, with clones ``[m + S]``, end offset of each expert's and slot's
                rows.
            probs: ``[B]``, the router's probability of each row: a factor of the activation, or
                of the row itself with ``--moe-apply-probs-on-input``.
            clones: which experts sit in the slots.
            packed: the rows in FP8, where they come so; ``hidden_states`` is a stand-in then.

        Returns:
            ``[B, H]``, anything in the rows beyond the last expert's; and no bias: that of the
            second projection is added here, times the row's probability, as Megatron does.
        """
        if self.config.moe_apply_probs_on_input:
            hidden_states = (hidden_states * probs[:, None]).to(hidden_states.dtype)
            probs = torch.ones_like(probs)
        if clones is not None and probs.requires_grad and not hidden_states.requires_grad:
            # fc1's backward pass has exchanges: it must not depend on whether its weight is frozen.
            hidden_states = hidden_states.detach().requires_grad_()
        is_hidden = clones is not None and clones.transport.is_hidden
        is_ahead = is_hidden and self._fetches_ahead
        if is_ahead:
            self.fetch_fc2(clones)
        hidden, bias = self.linear_fc1(hidden_states, ends, clones, packed)
        hidden, packed = self.activation(hidden, probs, ends, bias)
        output, bias = self.linear_fc2(hidden, ends, clones, packed)
        if is_ahead:
            output = FetchInBackward.apply(output, self.linear_fc1, clones)
        return output if bias is None else with_weighted_bias(output, bias, probs, ends), None

    def backward_dw(self) -> None:
        """The weight gradients of a call, with ``--delay-wgrad-compute``; else nothing."""
        self.linear_fc2.backward_dw()
        self.linear_fc1.backward_dw()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """The state as Megatron's SequentialMLP describes it to a distributed checkpoint."""
        separate = (metadata or {}).get("singleton_local_shards", False)
        state: dict[str, Any] = {}
        for name in ("linear_fc1", "linear_fc2"):
            shapes = {"weight": getattr(self, name).stack.shape}
            key = f"{prefix}experts.{'{expert}.' if separate else ''}{name}."
            for kind, parameter in getattr(self, name).named_parameters():
                state[f"{prefix}{name}.{kind}"] = sharded_stack(
                    parameter, f"{key}{kind}", self._shard, (0, 0, self._data_parallel_rank),
                    sharded_offsets, shape=shapes.get(kind, parameter.shape), separate=separate,
                    is_fc1=name == "linear_fc1",
                    gated=self.config.gated_linear_unit and "linear_in" not in kind,
                )  # fmt: skip
            state |= empty_extra_states(
                f"{key}_extra_state", f"{prefix}{name}._extra_state", self.num_local_experts,
                self._shard, (0, self._shard.tensor_rank, self._data_parallel_rank),
                sharded_offsets, separate=separate,
            )  # fmt: skip
        return state


def experts_as_matrices(models: list[MegatronModule]) -> list[MegatronModule]:
    """``--optimizer muon``, as a pre-wrap hook: see :meth:`GroupedLinear.make_matrix`."""
    for model in models:
        for module in model.modules():
            if isinstance(module, EchoGroupedMLP):
                module.linear_fc1.make_matrix(partition_dim=0)
                module.linear_fc2.make_matrix(partition_dim=1)
    return models


def experts_for_fsdp(models: list[MegatronModule]) -> list[MegatronModule]:
    """``--use-megatron-fsdp``, as a pre-wrap hook: it shards rows, and saves by name."""
    for model in experts_as_matrices(models):
        for module in model.modules():
            if isinstance(module, EchoGroupedMLP):
                module.linear_fc1.number()
                module.linear_fc2.number()
    return models


def _forget_extra_states(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the empty objects of a loaded checkpoint out: nothing here has such a state."""
    for key in [key for key in state_dict if key.startswith(prefix) and "._extra_state" in key]:
        del state_dict[key]
