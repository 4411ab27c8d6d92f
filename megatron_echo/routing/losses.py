"""All losses of one router: what they are, over whom they count, how much each one weighs.

**Denominators.** Megatron averages the gradients of a step over microbatches and data-parallel
ranks, and sums them over the ranks that share a sequence. With that, the losses of a step are

* microbatch (``aux_loss``): the mean over microbatches and data-parallel ranks of a loss over the
  tokens of one microbatch, on all ranks that share it;
* sequence (``seq_aux_loss``): the mean over all sequences;
* batch (``global_aux_loss``) and z: the mean over microbatches of a mean over all valid tokens of
  all ranks of the stage.

With ``--calculate-per-token-loss`` Megatron divides everything by the tokens of the step, once, at
its end. Each loss then counts by its valid tokens, and padding cannot make its strength depend on
how a batch is cut.

**Scale.** All share ``MoEAuxLossAutoScaler``'s factor: the scale of the main loss's backward pass,
which holds the gradient scaler, microbatches and context parallelism.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_echo.call_roles import Role
from megatron_echo.loss_settings import LOSS_NAMES, RouterLossSettings
from megatron_echo.routing.aux_loss import balance_loss, balance_rows, router_scores
from megatron_echo.routing.injection import measure, register
from megatron_echo.step.counts import CountExchange


def estimate_whole(
    seen: Tensor, calls: Tensor | int, total: Tensor | int, previous: Tensor, variance: Tensor
) -> Tensor:
    """Counts in proportion to those of a step of which some calls are still to come, fp64 ``[E]``.

    A call to come is estimated by the mean of those seen, moved towards the mean of the step
    before. How far is James and Stein's answer (1961): the variance of the one mean over the
    squared distance of the two, which is at least what chance makes of it. So calls that differ
    lean on the step before while the routing stands still, and less the more it moves.

    ``seen``, fp64 ``[E]``, is the sum of as many ``calls`` of the step's ``total``; ``previous``,
    likewise, the mean call of the step before and ``variance`` that of its calls, a scalar summed
    over experts; both 0 if there was none.
    """
    apart = previous - seen / calls
    chance = variance * (1 / calls + 1 / total)
    distance = torch.maximum(apart.square().sum(), chance).clamp(min=1e-20)
    weight = variance / calls / distance
    return seen + weight * (calls * (total - calls) / total) * apart


class LayerLosses:
    """The losses of one router, weighed in backward; see ``injection.Losses``."""

    score_dtype: torch.dtype | None = torch.float32  # as Megatron, whatever the logits are

    def __init__(
        self,
        settings: RouterLossSettings,
        config: Any,
        groups: Any,
        exchange: CountExchange,
        calls_per_microbatch: int = 1,
        previous: Callable[[], Tensor] | None = None,
    ) -> None:
        """Set up for one layer, with at least one loss.

        ``groups`` has ``tp_cp_group`` and ``tp_dp_cp_group``; ``exchange`` is the model's. Each of
        several ``calls_per_microbatch`` (repeated MTP layers) weighs one part. ``previous`` gives
        the buffer ``[2, E]`` for counts of the step before, if kept.
        """
        self.settings = settings
        self.exchange = exchange
        self.layer_number: int | None = None  # from 1, for Megatron's tracker; None records nothing
        self.score_function = config.moe_router_score_function
        self.has_balance_loss = bool(settings.coefficients)
        self.has_z_loss = settings.z_coefficient > 0
        self._topk = config.moe_router_topk
        self._num_layers = config.num_layers + (config.mtp_num_layers or 0)
        self._sequence_group, self._batch_group = groups.tp_cp_group, groups.tp_dp_cp_group
        self._data_parallel = self._batch_group.size() // self._sequence_group.size()
        self._share = 1 / calls_per_microbatch
        self._previous = previous
        self._tokens: dict[int, int | None] = {}  # of a call; None if some may be padding
        self.counts = exchange.register(calls_per_microbatch, previous)
        self.key = register(self)

    def enter(self, role: Role, tokens: int, has_padding: bool) -> tuple[int, bool]:
        """Begin a forward pass: see :meth:`LayerCounts.enter`."""
        call, is_new = self.counts.enter(role)
        self._tokens[call] = None if has_padding else tokens
        return call, is_new

    def write(self, call: int, counts: Tensor) -> None:
        """Hand over the counts of a call, int64 ``[b, E]``, this rank's."""
        is_padded = self._tokens[call] is None
        over_batch = "global_aux_loss" in self.settings.coefficients
        if not self.settings.counts_sequences:
            counts = counts.sum(0, keepdim=True)
        self.counts.write(call, counts, over_batch or (self.has_z_loss and is_padded))

    @torch.no_grad()
    def record_at_end(self, logits: Tensor, valid: Tensor | None, call: int) -> None:
        """Record the losses of a call that no backward pass will reach, when the step ends.

        In graphs of single layers at once, with what is counted by then. The logits need no
        gradient.
        """
        scores = router_scores(logits, self.score_function, self.score_dtype)
        sums, squares = measure(logits, scores, valid, self)
        if self.exchange.has_layer_graphs:
            self.weigh(sums, squares, call)
        else:
            self.counts.at_end(call, partial(self.weigh, sums, squares, call))

    @torch.no_grad()
    def weigh(self, sums: Tensor, squares: Tensor, call: int) -> tuple[Tensor, Tensor]:
        """Record the losses of a call and weigh their gradients; see ``injection.Losses``."""
        rows = torch.zeros_like(sums, dtype=torch.float64)
        for name, strength in self.settings.coefficients.items():
            counts, tokens, sequences = self._level(name, call)
            unit = balance_rows(counts, tokens) / sequences
            self._record(
                LOSS_NAMES[name], balance_loss(sums.double(), unit), name == "global_aux_loss"
            )
            rows += unit * strength * self._weight(name, tokens, sequences)
        coefficient = torch.zeros_like(squares, dtype=torch.float64)
        if self.has_z_loss:
            tokens = self._batch_tokens(call, squares)
            self._record("z_loss", squares.double() / tokens, True)
            weight = self._weight("z_loss", tokens, 1)
            coefficient = coefficient + self.settings.z_coefficient * weight / tokens
        scale = rows.new_full((), self._share)
        if MoEAuxLossAutoScaler.main_loss_backward_scale is not None:
            scale = MoEAuxLossAutoScaler.main_loss_backward_scale.double().reshape(()) * self._share
        return (rows * scale).to(sums.dtype), (coefficient * scale).to(squares.dtype)

    def _level(self, name: str, call: int) -> tuple[Tensor, Tensor, int]:
        """Counts ``[g, E]``, valid tokens ``[g]`` and number of groups of a loss."""
        if name == "global_aux_loss":
            own = self.counts.of_batch(call)[None]
            return self._batch_counts(call)[None], own.sum(-1) // self._topk, 1
        counts = self.counts.of_sequences(call)
        if name == "aux_loss":
            counts = counts.sum(0, keepdim=True)
        return counts, counts.sum(-1) // self._topk, counts.shape[0]

    def _weight(self, name: str, tokens: Tensor, sequences: int) -> Tensor | int:
        """What a loss is multiplied by so that Megatron's averaging makes it right."""
        if self.settings.per_token:
            weight = tokens * sequences
            return weight[:, None] if weight.dim() else weight
        return self._data_parallel if name in ("global_aux_loss", "z_loss") else 1

    def _batch_counts(self, call: int) -> Tensor:
        """The counts that a batch-wise loss uses, fp64 ``[E]``; only their ratios matter."""
        source = self.settings.source
        if source == "microbatch":
            return self.counts.of_batch(call).double()
        up_to = call if source == "cumulative" else None
        seen, calls = self.counts.of_seen(up_to)
        if not self.settings.keeps_previous:
            return seen
        assert self._previous is not None
        previous, variance = self._previous().double()
        if source == "previous_step":
            return torch.where(previous.sum() > 0, previous, seen)
        total = calls.clamp(min=self.counts.calls_in_step())
        return estimate_whole(seen, calls, total, previous, variance.sum())

    def _batch_tokens(self, call: int, like: Tensor) -> Tensor:
        """Valid tokens of a call on all ranks of the stage, at least 1, a scalar."""
        tokens = self._tokens[call]
        if tokens is not None:
            return like.new_full((), tokens * self._batch_group.size(), dtype=torch.float64)
        valid = self.counts.of_batch(call).sum() // self._topk
        return valid.clamp(min=1).double()

    def _record(self, name: str, value: Tensor, over_batch: bool) -> None:
        """Add a loss, without its coefficient, to what Megatron logs."""
        get_moe_metrics_tracker().record(
            name,
            value * self._share,
            self.layer_number,
            self._num_layers,
            reduce_group=self._batch_group if over_batch else self._sequence_group,
            needs_dp_avg=not over_batch,
        )
