"""What the layers of a model do once a step: checks, metrics and traces.

The layers of a model read values from the device at the end of a step; only weights by ``p2p``
need each plan before (``host_copy.py``). One object of the model ends a step, once, after the last
backward pass and before the optimizer's first change:

* when ``config.finalize_model_grads_func`` is called, on every rank, while ours stands there;
* at the latest when PyTorch calls its hook before an optimizer's step: a script may put another
  function there, whenever it likes, and have a training loop of its own.

A step is *open* once the model is called to train, on ranks without MoE layers too. So all ranks
end as often, several optimizers in Megatron's chained one end it once, and that of another model
does not. With ``--cuda-graph-impl full_iteration`` that function is called inside the graph, where
nothing may be read, and a replay calls no layer. There the hook alone ends the step: it is over
when an optimizer steps that has stepped since the last end.

What layers count, they count on the device, in tensors that the first call of a step clears: a
replay counts as Python would, and what a graph is warmed up with counts for nothing.
"""

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.cuda_graphs import is_graph_capturing, is_graph_warmup
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer

from megatron_echo.call_roles import Role, role_of_call
from megatron_echo.config import echo_setting, num_clone_slots
from megatron_echo.environment import is_capturing, training_args
from megatron_echo.per_model import PerModel
from megatron_echo.plan_settings import token_capacity
from megatron_echo.record.metrics import publish
from megatron_echo.record.routing_capture import RoutingCapture
from megatron_echo.record.statistics import StepStatistics, console_line
from megatron_echo.record.token_layout import TokenLayout
from megatron_echo.record.trace import RoutingTrace
from megatron_echo.step.counts import CountExchange
from megatron_echo.step.load_metrics import read_load_metrics
from megatron_echo.step.overflow import OverflowCheck
from megatron_echo.step.self_check import SelfCheck
from megatron_echo.step_hooks import EndOfStep, watch_optimizers


class StepEnd(PerModel, EndOfStep):
    """The end of a step for the MoE layers of a model. One object for each model: :meth:`of`."""

    def __init__(self, config: Any) -> None:
        """Use :meth:`of`, with the model's ``TransformerConfig``."""
        super().__init__(config.finalize_model_grads_func)
        config.finalize_model_grads_func = self
        self.exchange: CountExchange | None = None  # of the routers, once the first one is built
        setting, num_slots = functools.partial(echo_setting, config), num_clone_slots(config)
        self._has_clones = num_slots > 0
        self.steps = 0  # that have ended
        self._is_open = False
        self._sees_calls = False
        self._is_in_graph = config.cuda_graph_impl == "full_iteration"
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._chunks: Sequence[nn.Module] = ()
        _watch_calls(self)
        watch_optimizers(self)
        is_auto = token_capacity(config, num_slots) is None
        most = setting("moe_echo_max_tokens_per_rank")
        self.overflow = OverflowCheck(setting("moe_echo_overflow"), is_auto, most)
        self.statistics = StepStatistics(self._has_clones and setting("moe_echo_tolerance") is None)
        self.self_check = SelfCheck(setting("moe_echo_check_every") if self._has_clones else 0)
        self.trace = RoutingTrace(
            setting("moe_echo_trace_dir") if self._has_clones else None,
            setting("moe_echo_trace_every"),
            config.cuda_graph_impl != "none",
        )
        folder = setting("moe_echo_capture_routing")
        self.capture: RoutingCapture | None = None
        if folder is not None:
            slots = setting("moe_echo_capture_slots")
            rank = dist.get_rank() if dist.is_initialized() else 0
            self.capture = RoutingCapture(folder, slots, config.num_moe_experts, rank)
        self._is_sequence_parallel = config.sequence_parallel
        self.replay: Any = None

    @classmethod
    def of(cls, config: Any, *_: Any) -> "StepEnd":
        """The object of a model, from its ``TransformerConfig``; installed on first use."""
        return super().of(config, config)

    def note(self, role: Role) -> None:
        """The model, or a layer of it, is called in training.

        With the first call of a step: what layers left on the device before belongs to none. In
        the capture of a whole step this becomes part of the graph.
        """
        if is_graph_capturing() or is_graph_warmup():
            return  # Megatron makes graphs of single layers, between two steps
        self._sees_calls = True
        if not role.counts or self._is_open:
            return
        self._is_open = True
        if is_capturing():
            _gather_again(self._chunks)
        if self.exchange is not None:
            self.exchange.begin_step()
        self.overflow.begin_step()
        self.statistics.begin_step()
        self.trace.begin_step()

    def __call__(self, chunks: Sequence[nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Finish the gradients, then :meth:`end_step` if that may read here."""
        self._chunks = chunks
        result = self._finalize(chunks, *args, **kwargs)
        if not self._is_in_graph:
            if self._is_open or not self._sees_calls:
                self.end_step()
        elif self.exchange is not None:
            self.exchange.join()
        return result

    def before_optimizer(self, optimizer: Optimizer) -> None:
        """:meth:`end_step`, if this begins the update of a step that has not ended."""
        is_replayed = self._is_in_graph and optimizer in self._stepped
        if self._is_open or is_replayed:
            self._stepped.clear()
            self.end_step()
        if self.steps:  # an optimizer that loads its state may step before there is any
            self._stepped.add(optimizer)

    def record_routing(self, layer: int, experts: Tensor, weights: Tensor) -> None:
        """Capture one forward pass of a layer, the one that counts, if asked for.

        ``experts`` are int32 ``[T, K]``, E for none, ``weights`` ``[T, K]`` the probabilities.
        """
        if self.capture is not None:
            self.capture.record(layer, experts, weights)

    def end_step(self) -> None:
        """Check, raise what :class:`OverflowCheck` and :class:`SelfCheck` do, publish and write."""
        self.steps += 1
        is_replayed = self._is_in_graph and not self._is_open
        self._is_open = False
        if self.exchange is not None:
            self.exchange.end_step(is_replayed)
        try:
            self.overflow.check()
            error = self.self_check.check()
        except RuntimeError:  # nothing of the step goes to the next one, which clears the device
            self.self_check.forget()
            if self.capture is not None:
                self.capture.forget()
            raise
        args = training_args()
        iteration = self.steps if args is None else args.curr_iteration + 1
        self.statistics.end_step()
        self.trace.end_step(iteration)
        if self.capture is not None:
            self.capture.end_step(iteration, TokenLayout.of_this_rank(self._is_sequence_parallel))
        if self.replay is not None:
            self.replay.end_step()
        if args is not None:
            self._publish(iteration, iteration % args.log_interval == 0, error)

    def _publish(self, iteration: int, at_log_interval: bool, error: float | None) -> None:
        """Hand the metrics of the interval to TensorBoard, wandb and the console."""
        values: dict[str, float] = {} if error is None else {"check_error": error}
        if self.self_check.ranks is not None:
            values["check_ranks"] = self.self_check.ranks
        if at_log_interval:
            values |= read_load_metrics(self.exchange) | self.statistics.read()
            if self.overflow.dropped:
                values["dropped"] = self.overflow.dropped
        values = {f"moe_echo/{name}": value for name, value in values.items()}
        if not values:
            return
        publish(values, iteration)
        has_line = self._has_clones and "moe_echo/overload_routed" in values
        if has_line and dist.get_rank() == dist.get_world_size() - 1:
            print(console_line(values, iteration), flush=True)


def _gather_again(chunks: Iterable[nn.Module]) -> None:
    """Let the hooks of ``--overlap-param-gather`` gather the parameters in the pass to come.

    After an evaluation or a save they are gathered already, and a step captured then would never
    do it again. The chunks are in Megatron's data-parallel wrapper or another.
    """
    for chunk in chunks:
        for name in ("bucket_groups", "expert_parallel_bucket_groups"):
            for group in getattr(chunk, name, ()):
                if group.param_gather_handle is None:  # none is under way
                    group.param_gather_dispatched = False


def _watch_calls(step_end: StepEnd) -> None:
    """Call ``note`` when the model is called in training; it is found when it is called first."""
    reference = weakref.ref(step_end)

    def note(module: nn.Module, *_: Any) -> None:
        alive, role = reference(), role_of_call()
        if alive is not None and module.training and role is not Role.UNRECORDED:
            alive.note(role)

    def find(module: nn.Module, *_: Any) -> None:
        alive = reference()
        if alive is not None and StepEnd.find(getattr(module, "config", None)) is alive:
            handle.remove()
            module.register_forward_pre_hook(note)
            note(module)

    handle = register_module_forward_pre_hook(find)
    weakref.finalize(step_end, handle.remove)
