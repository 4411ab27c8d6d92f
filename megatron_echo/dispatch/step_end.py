"""What the layers of a model do once a step: checks, metrics and traces.

Megatron calls ``config.finalize_model_grads_func`` after the backward passes of all microbatches
and before the optimizer, on every rank. There, and nowhere else, values are read from the device.
With ``--cuda-graph-impl full_iteration`` that call is inside the graph, where nothing may be read
and Python does not run again: then the end of the step is what PyTorch calls before an optimizer's
step. It is so too for a script that puts another function there after the model was built. Weights
and optimizer state are as they were before the step in both places.
"""

import weakref
from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from megatron_echo.config import echo_setting, num_clone_slots, token_capacity
from megatron_echo.dispatch.overflow import OverflowCheck
from megatron_echo.dispatch.self_check import SelfCheck
from megatron_echo.observe.metrics import publish
from megatron_echo.observe.statistics import StepStatistics, console_line
from megatron_echo.observe.trace import RoutingTrace
from megatron_echo.routing.capture import RoutingCapture
from megatron_echo.routing.counts import RouterStep
from megatron_echo.routing.metrics import read_load_metrics
from megatron_echo.step_hooks import EndOfStep


class StepEnd(EndOfStep):
    """The end of a step for the MoE layers of a model. One object for each model: :meth:`of`.

    Attributes:
        overflow: whether every token-expert pair had a row.
        statistics: what the planner did.
        self_check: ``--moe-echo-check-every``.
        trace: ``--moe-echo-trace-dir``.
        capture: ``--moe-echo-capture-routing``, None without it.
    """

    def __init__(self, config: Any, finalize: Any, routers: RouterStep) -> None:
        """Use :meth:`of`.

        Args:
            config: the model's ``TransformerConfig``.
            finalize: Megatron's function, or what stands in for it.
            routers: the model's, for their metrics.
        """
        super().__init__(finalize)
        self._routers = routers
        self._has_clones = num_clone_slots(config) > 0
        self._steps = 0
        self._ended: int | None = None
        self._is_in_graph = config.cuda_graph_impl == "full_iteration"
        register_optimizer_step_pre_hook(_EndBeforeOptimizer(self))
        policy = echo_setting(config, "moe_echo_overflow")
        is_auto = token_capacity(config, num_clone_slots(config)) is None
        self.overflow = OverflowCheck(policy, is_auto)
        self.statistics = StepStatistics()
        self.self_check = SelfCheck(
            echo_setting(config, "moe_echo_check_every") if self._has_clones else 0
        )
        self.trace = RoutingTrace(
            echo_setting(config, "moe_echo_trace_dir") if self._has_clones else None,
            echo_setting(config, "moe_echo_trace_every"),
        )

        folder = echo_setting(config, "moe_echo_capture_routing")
        self.capture: RoutingCapture | None = None
        self._captured: Counter[int] = Counter()
        if folder is not None:
            slots = echo_setting(config, "moe_echo_capture_slots")
            rank = dist.get_rank() if dist.is_initialized() else 0
            self.capture = RoutingCapture(folder, slots, config.num_moe_experts, rank)

    @classmethod
    def of(cls, config: Any) -> "StepEnd":
        """The object of a model, from its ``TransformerConfig``; installed on first use."""
        if not isinstance(config.finalize_model_grads_func, cls):
            routers = RouterStep.of(config)
            finalize = config.finalize_model_grads_func
            config.finalize_model_grads_func = cls(config, finalize, routers)
        return config.finalize_model_grads_func

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Finish the gradients, then :meth:`end_step` if that may read here."""
        if self._is_in_graph:
            return self._finalize(*args, **kwargs)
        training = _training_args()
        self._ended = None if training is None else training.curr_iteration
        return super().__call__(*args, **kwargs)

    def before_optimizer(self) -> None:
        """:meth:`end_step`, once a step, where it has not been called: see the module's text."""
        training = _training_args()
        if training is None:  # a loop of its own, which calls config.finalize_model_grads_func
            if self._is_in_graph:
                self.end_step()
        elif training.curr_iteration != self._ended:
            self._ended = training.curr_iteration
            self._routers.end_step()
            self.end_step()

    def record_routing(self, layer: int, experts: Tensor, weights: Tensor) -> None:
        """Capture one forward pass of a layer, if asked for; a recomputation must not call.

        Args:
            layer: its number.
            experts: int32 ``[T, K]``, the number of experts for none.
            weights: ``[T, K]``, the probabilities.
        """
        if self.capture is not None and self.capture.is_on:
            microbatch = self._captured[layer]
            self._captured[layer] += 1
            self.capture.record(layer, microbatch, experts, weights.detach())

    def end_step(self) -> None:
        """Check, raise, publish and write.

        Raises:
            MoEOverflowError: see :meth:`OverflowCheck.check`.
            EchoCheckError: see :meth:`SelfCheck.check`.
        """
        self._steps += 1
        try:
            self.overflow.check()
            error = self.self_check.check()
        except RuntimeError:
            self._forget()
            raise
        args = _training_args()
        iteration = self._steps if args is None else args.curr_iteration + 1
        self.trace.end_step(iteration)
        if self.capture is not None:
            self.capture.end_step(iteration)
            self._captured.clear()
        if args is not None:
            self._publish(iteration, iteration % args.log_interval == 0, error)

    def _forget(self) -> None:
        """Leave nothing of a step that failed to the next one."""
        self.self_check.forget()
        self.trace.forget()
        self._captured.clear()
        if self.capture is not None:
            self.capture.forget()

    def _publish(self, iteration: int, at_log_interval: bool, error: float | None) -> None:
        """Hand the metrics of the interval to TensorBoard, wandb and the console."""
        self.statistics.end_step()
        values = {} if error is None else {"check_error": error}
        if at_log_interval:
            values |= read_load_metrics(self._routers.exchange)
            if self.overflow.dropped:
                values["dropped"] = self.overflow.dropped
        if at_log_interval and self._has_clones:
            values |= self.statistics.read()
        values = {f"moe_echo/{name}": value for name, value in values.items()}
        if not values:
            return
        publish(values, iteration)
        if at_log_interval and self._has_clones and dist.get_rank() == dist.get_world_size() - 1:
            print(console_line(values, iteration), flush=True)


class _EndBeforeOptimizer:
    """The hook; it does not keep the model's object alive."""

    def __init__(self, step_end: StepEnd) -> None:
        self._step_end = weakref.ref(step_end)

    def __call__(self, *_: Any) -> None:
        step_end = self._step_end()
        if step_end is not None:
            step_end.before_optimizer()


def _training_args() -> Any:
    """Megatron's arguments while its training loop runs, None outside it."""
    try:
        from megatron.training import global_vars
    except ImportError:  # where only Megatron-Core is used
        return None
    args = global_vars._GLOBAL_ARGS
    return args if hasattr(args, "curr_iteration") else None
