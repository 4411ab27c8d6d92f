"""Megatron's offloading flags and training loop, with this package's offloader.

Stock Megatron refuses ``--fine-grained-activation-offloading`` without Transformer Engine, and
with it wires its own manager into the layers. So the flags' values are parsed into names of our
own, Megatron sees its defaults, and the model is hooked into after it is built.
"""

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import Optimizer

from megatron_echo.environment import is_capturing
from megatron_echo.flags import add_flags, flag, flag_name
from megatron_echo.offload.config import POLICIES, OffloadConfig, setting_refusal
from megatron_echo.offload.manager import ActivationOffloader
from megatron_echo.record.metrics import publish
from megatron_echo.step_hooks import StepHook, watch_optimizers

_MEGATRON = {
    "fine_grained_activation_offloading": False,
    "offload_modules": [],
    "min_offloaded_tensor_size": 1024 * 1024,
    "activation_offload_fraction": 1.0,
    "delta_offload_bytes_across_pp_ranks": 0,
    "delay_offload_until_cuda_graph": False,
    "fine_grained_offloading_max_inflight_offloads": None,
}
"""Megatron's destinations and their defaults."""

_NUMBERS = {
    "min_tensor_bytes": "min_offloaded_tensor_size",
    "target_bytes": "offload_target_bytes",
    "max_slowdown": "offload_max_slowdown",
    "max_host_bytes": "offload_host_bytes",
}
"""Numbers of the offloader's settings and the flags that give them."""

_WHOLE_STEP = "full_iteration"
"""The ``--cuda-graph-impl`` that has the copies in its graph."""

_HIGHEST = ("peak_device_bytes", "host_bytes", "host_allocated_bytes")
"""Statistics of which the highest rank counts, not the sum."""


@dataclasses.dataclass
class OffloadArguments:
    """Flags beside Megatron's for offloading."""

    offload_implementation: str = flag(
        "echo",
        "Whose manager --fine-grained-activation-offloading starts. echo: this package's; works "
        "without Transformer Engine and knows the modules router and shared_experts too. "
        "megatron: the stock one.",
        group="offload",
        choices=("echo", "megatron"),
    )
    offload_policy: str = flag(
        "earliest",
        "Which storages go first where --activation-offload-fraction or --offload-target-bytes "
        "leave a choice.",
        group="offload",
        choices=POLICIES,
    )
    offload_target_bytes: int | None = flag(
        None,
        "Offload no more than brings the saved bytes of the modules down to this.",
        group="offload",
        metavar="N",
    )
    offload_max_slowdown: float = flag(
        0.0,
        "How much longer a step may take for offloading, 0.05 for 5 %. What the link cannot move "
        "within that stays on the device.",
        group="offload",
        metavar="X",
    )
    offload_host_bytes: int | None = flag(
        None,
        "Most host memory on each rank; when it is full, tensors stay on the device.",
        group="offload",
        metavar="N",
    )
    offload_strict: bool = flag(
        False,
        "A module name that matches nothing, or saves nothing, is an error, not a warning.",
        group="offload",
    )


def add_offload_arguments(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Add what Megatron's offloading flags lack, and take those over.

    Args:
        parser: Megatron's.
        argv: the command line; with ``--offload-implementation megatron`` in it Megatron's flags
            stay as they are.
    """
    add_flags(parser, dataclasses.fields(OffloadArguments))
    peek = ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--offload-implementation")
    if peek.parse_known_args(argv)[0].offload_implementation != "megatron":
        _take_over(parser)


def _take_over(parser: ArgumentParser) -> None:
    """Let Megatron's offloading flags set names of our own, ``echo_...``."""
    for action in parser._actions:
        if action.dest in _MEGATRON:
            parser.set_defaults(**{action.dest: _MEGATRON[action.dest]})
            action.dest = f"echo_{action.dest}"
            if action.dest == "echo_offload_modules":
                action.choices = None  # ours are checked by OffloadConfig


def offload_config(args: Namespace) -> OffloadConfig | None:
    """The offloader's settings from a validated command line, see :func:`add_offload_arguments`.

    ``--min-offloaded-tensor-size`` counts elements in Megatron; here it becomes bytes of the
    parameters' dtype.

    Returns:
        None if offloading was not asked for, or Megatron's manager was.

    Raises:
        ValueError: a setting is out of range or does not fit another flag, and what to use.
    """
    if args.offload_implementation == "megatron":
        return None
    for setting, name in _NUMBERS.items():
        value = getattr(args, f"echo_{name}" if name in _MEGATRON else name)
        problem = setting_refusal(setting, value)
        if problem is not None:
            raise ValueError(f"{flag_name(name)} {value} {problem}")
    config = OffloadConfig(
        modules=tuple(args.echo_offload_modules),
        fraction=args.echo_activation_offload_fraction,
        min_tensor_bytes=args.echo_min_offloaded_tensor_size * args.params_dtype.itemsize,
        policy=args.offload_policy,
        target_bytes=args.offload_target_bytes,
        max_slowdown=args.offload_max_slowdown,
        max_host_bytes=args.offload_host_bytes,
        strict=args.offload_strict,
    )
    if not args.echo_fine_grained_activation_offloading:
        return None
    has_graph = args.cuda_graph_impl == _WHOLE_STEP
    for refused, reason in (
        (not args.echo_offload_modules, "needs names. Give --offload-modules."),
        (
            args.echo_delta_offload_bytes_across_pp_ranks,
            "knows no --delta-offload-bytes-across-pp-ranks. Use --offload-target-bytes, with "
            "which each stage offloads what it needs.",
        ),
        (
            args.cuda_graph_impl not in ("none", _WHOLE_STEP),
            "orders its copies in Python between the modules, which graphs of single layers skip. "
            f"Use --cuda-graph-impl {_WHOLE_STEP}, not {args.cuda_graph_impl}.",
        ),
        (
            has_graph and args.cuda_graph_warmup_steps < config.learning_steps,
            "learns its plan in the steps before the graph. Use --cuda-graph-warmup-steps "
            f"{config.learning_steps} or more, not {args.cuda_graph_warmup_steps}.",
        ),
        (
            args.echo_delay_offload_until_cuda_graph and not has_graph,
            "takes --delay-offload-until-cuda-graph for copies that are in the graph of the step. "
            f"Use --cuda-graph-impl {_WHOLE_STEP}, or leave it out.",
        ),
        (
            args.echo_fine_grained_offloading_max_inflight_offloads is not None,
            "has no queue of its own for --fine-grained-offloading-max-inflight-offloads. Leave "
            "it out; --offload-target-bytes says how much may stay on the device.",
        ),
        (
            args.overlap_moe_expert_parallel_comm,
            "follows the modules' forward order, which --overlap-moe-expert-parallel-comm "
            "changes. Leave one of the two out.",
        ),
        (
            args.cpu_offloading_num_layers,
            "takes the place of --cpu-offloading-num-layers. Use one.",
        ),
    ):
        if refused:
            raise ValueError(f"--fine-grained-activation-offloading {reason}")
    return config


class OffloadedTraining(StepHook):
    """An offloader in Megatron's training loop.

    With ``--cuda-graph-impl full_iteration`` a step ends inside its graph, at capture only. Each
    replay does what the capture did; so its statistics are published before the optimizer.
    """

    def __init__(self, config: OffloadConfig, model_config: Any) -> None:
        """Hook into a model that is going to be built.

        Args:
            config: what to offload.
            model_config: Megatron's, for example ``GPTModelConfig``.
        """
        super().__init__(model_config)
        self.offloader = ActivationOffloader(config)
        self._is_replayed = False
        self._published = 0
        self._values: dict[str, float] = {}
        watch_optimizers(self)

    def attach(self, chunks: list[nn.Module]) -> None:
        """Hook into the modules."""
        self.offloader.attach(chunks)

    def end_step(self) -> None:
        """End the offloader's step and publish its statistics."""
        self.offloader.step_end()
        self._is_replayed, self._values = is_capturing(), {}
        if not self._is_replayed:
            self._publish()

    def before_optimizer(self, optimizer: Optimizer) -> None:
        """Publish the statistics of a replay, once in an iteration."""
        if self._is_replayed and _iteration() != self._published:
            self._publish()

    def _publish(self) -> None:
        """Sum over ranks, once for all replays, and hand on to TensorBoard and wandb."""
        if not self._values:
            self._values = _over_ranks(self.offloader.statistics())
        self._published = _iteration()
        publish(self._values, self._published)


def _iteration() -> int:
    from megatron.training import global_vars

    return global_vars.get_args().curr_iteration + 1


def _over_ranks(statistics: dict[str, float]) -> dict[str, float]:
    """Sums over all ranks, and of peaks the highest."""
    names = sorted(statistics)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sums = torch.tensor([statistics[name] for name in names], dtype=torch.float64, device=device)
    highest = sums.clone()
    dist.all_reduce(sums, op=dist.ReduceOp.SUM)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return {
        name: most if name.removeprefix("offload/") in _HIGHEST else total
        for name, total, most in zip(names, sums.tolist(), highest.tolist(), strict=True)
    }


def announcement(config: OffloadConfig) -> str:
    """A line for the start of a run."""
    given = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default and field.name != "extra_regions"
    }
    words = ", ".join(f"{name}={_spelled(value)}" for name, value in given.items())
    return f"[megatron_echo] activation offloading by this package's manager: {words}"


def _spelled(value: Any) -> str:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return "+".join(value) if is_list else str(value)
