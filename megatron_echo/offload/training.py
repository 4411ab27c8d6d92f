"""Megatron's offloading flags and training loop, with this package's offloader.

Stock Megatron refuses ``--fine-grained-activation-offloading`` without Transformer Engine, and
with it wires its own manager into the layers. So the flags' values are parsed into names of our
own, Megatron sees its defaults, and the model is hooked into after it is built.
"""

import dataclasses
import functools
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

_SETTINGS = {
    "modules": "echo_offload_modules",
    "fraction": "echo_activation_offload_fraction",
    "min_tensor_bytes": "echo_min_offloaded_tensor_size",
    "policy": "offload_policy",
    "target_bytes": "offload_target_bytes",
    "max_slowdown": "offload_max_slowdown",
    "max_host_bytes": "offload_host_bytes",
    "strict": "offload_strict",
}
"""The offloader's settings, and where the flags put them."""

_flag = functools.partial(flag, group="offload")

_WHOLE_STEP = "full_iteration"
"""The ``--cuda-graph-impl`` that has the copies in its graph."""

_HIGHEST = ("peak_device_bytes", "host_bytes", "host_allocated_bytes")
"""Statistics of which the highest rank counts, not the sum."""


@dataclasses.dataclass
class OffloadArguments:
    """Flags beside Megatron's for offloading."""

    offload_implementation: str = _flag(
        "echo",
        "Whose manager --fine-grained-activation-offloading starts. echo: this package's; works "
        "without Transformer Engine and knows the modules router and shared_experts too. "
        "megatron: the stock one.",
        choices=("echo", "megatron"),
    )
    offload_policy: str = _flag(
        "earliest",
        "Which storages go first where --activation-offload-fraction or --offload-target-bytes "
        "leave a choice.",
        choices=POLICIES,
    )
    offload_target_bytes: int | None = _flag(
        None,
        "Offload no more than brings the saved bytes of the modules down to this.",
        metavar="N",
    )
    offload_max_slowdown: float = _flag(
        0.0,
        "How much longer a step may take for offloading, 0.05 for 5 %. What the link cannot move "
        "within that stays on the device.",
        metavar="X",
    )
    offload_host_bytes: int | None = _flag(
        None,
        "Most host memory on each rank; when it is full, tensors stay on the device.",
        metavar="N",
    )
    offload_strict: bool = _flag(
        False,
        "A module name that matches nothing, or saves nothing, is an error, not a warning.",
    )


def add_offload_arguments(parser: ArgumentParser, argv: Sequence[str]) -> None:
    """Add what Megatron's offloading flags lack, and let those set names of our own, ``echo_...``.

    With ``--offload-implementation megatron`` in ``argv``, the command line, they stay as they are.
    """
    add_flags(parser, dataclasses.fields(OffloadArguments))
    peek = ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--offload-implementation")
    if peek.parse_known_args(argv)[0].offload_implementation == "megatron":
        return
    for action in parser._actions:
        if action.dest in _MEGATRON:
            parser.set_defaults(**{action.dest: _MEGATRON[action.dest]})
            action.dest = f"echo_{action.dest}"
            if action.dest == "echo_offload_modules":
                action.choices = None  # ours are checked by OffloadConfig


def offload_config(args: Namespace) -> OffloadConfig | None:
    """The offloader's settings from a validated command line, see :func:`add_offload_arguments`.

    ``--min-offloaded-tensor-size`` counts elements in Megatron; here it becomes bytes of the
    parameters' dtype. None if offloading was not asked for, or Megatron's manager was.

    Raises:
        ValueError: a setting is out of range or does not fit another flag, and what to use.
    """
    if args.offload_implementation == "megatron":
        return None
    settings = {setting: getattr(args, name) for setting, name in _SETTINGS.items()}
    for setting, value in settings.items():
        problem = setting_refusal(setting, value)
        if problem is not None:
            name = flag_name(_SETTINGS[setting].removeprefix("echo_"))
            raise ValueError(f"{name} {value} {problem}")
    settings["modules"] = tuple(settings["modules"])
    settings["min_tensor_bytes"] *= args.params_dtype.itemsize
    config = OffloadConfig(**settings)
    if not args.echo_fine_grained_activation_offloading:
        return None
    has_graph = args.cuda_graph_impl == _WHOLE_STEP
    refused = {
        "needs names. Give --offload-modules.": not args.echo_offload_modules,
        "knows no --delta-offload-bytes-across-pp-ranks. Use --offload-target-bytes, with which "
        "each stage offloads what it needs.": args.echo_delta_offload_bytes_across_pp_ranks,
        "orders its copies in Python between the modules, which graphs of single layers skip. Use "
        f"--cuda-graph-impl {_WHOLE_STEP}, not {args.cuda_graph_impl}.": (
            args.cuda_graph_impl not in ("none", _WHOLE_STEP)
        ),
        "learns its plan in the steps before the graph. Use --cuda-graph-warmup-steps "
        f"{config.learning_steps} or more, not {args.cuda_graph_warmup_steps}.": (
            has_graph and args.cuda_graph_warmup_steps < config.learning_steps
        ),
        "takes --delay-offload-until-cuda-graph for copies that are in the graph of the step. Use "
        f"--cuda-graph-impl {_WHOLE_STEP}, or leave it out.": (
            args.echo_delay_offload_until_cuda_graph and not has_graph
        ),
        "has no queue of its own for --fine-grained-offloading-max-inflight-offloads. Leave it "
        "out; --offload-target-bytes says how much may stay on the device.": (
            args.echo_fine_grained_offloading_max_inflight_offloads is not None
        ),
        "follows the modules' forward order, which --overlap-moe-expert-parallel-comm changes. "
        "Leave one of the two out.": args.overlap_moe_expert_parallel_comm,
        "takes the place of --cpu-offloading-num-layers. Use one.": args.cpu_offloading_num_layers,
    }
    for problem, is_refused in refused.items():
        if is_refused:
            raise ValueError(f"--fine-grained-activation-offloading {problem}")
    return config


class OffloadedTraining(StepHook):
    """An offloader in Megatron's training loop.

    With ``--cuda-graph-impl full_iteration`` a step ends inside its graph, at capture only. Each
    replay does what the capture did; so its statistics are published before the optimizer.
    """

    def __init__(self, config: OffloadConfig, model_config: Any) -> None:
        """Hook into a model that is built of ``model_config``, for example a ``GPTModelConfig``."""
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
    given["modules"] = "+".join(config.modules)
    words = ", ".join(f"{name}={value}" for name, value in given.items())
    return f"[megatron_echo] activation offloading by this package's manager: {words}"
