"""``pretrain_gpt_moe.py`` with a second model beside it: loss and gradients compared at each step.

The run trains the model that its flags ask for, the reference. Before each optimizer step a second
model, with the settings in ``STEP_BY_STEP_FIELDS`` (JSON, fields of the configuration), gets the
reference's parameters and the same microbatches, and its loss and every gradient are compared with
the reference's. A line of JSON a step goes to ``STEP_BY_STEP_FILE``: ``loss``, the relative
difference of the losses, and ``grad``, the largest norm-wise relative difference of a gradient.
"""

import copy
import dataclasses
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import pretrain_gpt_moe  # noqa: E402  (turns the CPU backend on: before Megatron)

# isort: split
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.num_microbatches_calculator import get_num_microbatches  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.training import get_args, training  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_echo.model_builder import EchoGPTModelBuilder, EchoGPTModelConfig  # noqa: E402
from megatron_echo.step.step_end import StepEnd  # noqa: E402

LOCAL_EXPERT = re.compile(r"(.*\.experts)\.local_experts\.(\d+)\.(linear_fc[12]\.weight)")


def by_expert(name: str, parameter: Any, what: str) -> dict[str, Tensor]:
    """A parameter's data or final gradient under names that stock and stacked experts share."""
    tensor = parameter.data if what == "data" else parameter.main_grad
    if match := LOCAL_EXPERT.fullmatch(name):
        return {f"{match[1]}.{match[3]}.{match[2]}": tensor}
    if re.fullmatch(r".*\.experts\.linear_fc[12]\.weight", name):
        return {f"{name}.{i}": part for i, part in enumerate(tensor)}
    return {name: tensor}


def tensors(model: Any, what: str) -> dict[str, Tensor]:
    """All parameters, or all final gradients, of a pipeline stage."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        found |= by_expert(name, parameter, what)
    return found


class Beside:
    """The second model, and what it needs to repeat a step of the reference."""

    def __init__(self, reference: Any, fields: dict[str, Any]) -> None:
        config = copy.copy(reference.config)
        config.finalize_model_grads_func = None
        vars(config).pop(StepEnd._name(), None)  # a model of its own, with steps of its own
        for name, value in fields.items():
            setattr(config, name, value)
        config.validate_echo()
        args = get_args()
        model_config = EchoGPTModelConfig.__new__(EchoGPTModelConfig)
        vars(model_config).update(vars(pretrain_gpt_moe.model_config_from_args(args)))
        model_config.transformer = config
        module: Any = EchoGPTModelBuilder(model_config).build_model(
            ProcessGroupCollection.use_mpu_process_groups()
        )
        module.cuda()
        if config.bf16 or config.fp16:
            module = Float16Module(config, module)
        ddp_config = dataclasses.replace(
            reference.ddp_config, check_for_nan_in_grad=False, overlap_param_gather=False
        )
        self.model = DistributedDataParallel(config, ddp_config, module)
        config.finalize_model_grads_func = (
            config.finalize_model_grads_func or training.finalize_model_grads
        )
        if reference.ddp_config.overlap_grad_reduce:
            config.no_sync_func = self.model.no_sync
            if config.grad_sync_func is not None:
                config.grad_sync_func = self.model.start_grad_sync
        config.param_sync_func = None

    def repeat(self, reference: Any) -> list[dict[str, Any]]:
        """One forward and backward pass over the recorded microbatches; the losses."""
        args = get_args()
        with torch.no_grad():
            source = tensors(reference, "data")
            for name, target in tensors(self.model, "data").items():
                target.copy_(source[name])
        self.model.zero_grad_buffer()
        args.check_for_nan_in_loss_and_grad = False  # those checks belong to Megatron's own step
        return get_forward_backward_func()(
            forward_step_func=pretrain_gpt_moe.forward_step,
            data_iterator=None,
            model=[self.model],
            num_microbatches=get_num_microbatches(),
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )


def relative(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    difference = (actual.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def mean_loss(losses: list[dict[str, Any]]) -> float:
    """The loss of a step on this rank, 0 where this pipeline stage computes none."""
    total = torch.stack([each["lm loss"] for each in losses]).sum(0) if losses else None
    return (total[0] / total[1]).item() if total is not None else 0.0


def main() -> None:
    """Patch the reference's run and start it."""
    fields = json.loads(os.environ["STEP_BY_STEP_FIELDS"])
    batches: list[Any] = []
    replaying: list[Any] = []
    get_batch, train_step = pretrain_gpt_moe.get_batch, training.train_step
    schedule = training.get_forward_backward_func
    state: dict[str, Any] = {}

    def recorded(*args: Any, **kwargs: Any) -> Any:
        if replaying:
            return replaying.pop(0)
        batches.append(get_batch(*args, **kwargs))
        return batches[-1]

    def recording_schedule(**settings: Any) -> Any:
        run = schedule(**settings)

        def forward_backward(**kwargs: Any) -> Any:
            state["losses"] = run(**kwargs)
            return state["losses"]

        return forward_backward

    def compared_step(forward_step: Any, iterator: Any, model: Any, optimizer: Any, *rest: Any,
                      **kwargs: Any) -> Any:  # fmt: skip
        reference, step = model[0], optimizer.step
        if "beside" not in state:
            state["beside"] = Beside(reference, fields)

        def compare_then_step() -> Any:
            replaying.extend(batches)
            batches.clear()
            losses = state["beside"].repeat(reference)
            actual, expected = (tensors(m, "grad") for m in (state["beside"].model, reference))
            assert actual.keys() == expected.keys()
            here = torch.tensor([
                abs(mean_loss(losses) / (mean_loss(state["losses"]) or 1.0) - bool(losses)),
                max(relative(actual[name], grad) for name, grad in expected.items()),
            ], dtype=torch.float64)  # fmt: skip
            dist.all_reduce(here, op=dist.ReduceOp.MAX)
            if dist.get_rank() == 0:
                line = {"loss": here[0].item(), "grad": here[1].item()}
                with Path(os.environ["STEP_BY_STEP_FILE"]).open("a") as file:
                    file.write(json.dumps(line) + "\n")
            return step()

        optimizer.step = compare_then_step
        try:
            return train_step(forward_step, iterator, model, optimizer, *rest, **kwargs)
        finally:
            optimizer.step = step

    pretrain_gpt_moe.get_batch = recorded
    training.train_step = compared_step
    training.get_forward_backward_func = recording_schedule
    pretrain_gpt_moe.main()


if __name__ == "__main__":
    main()
