"""Peak memory of each pipeline rank for a Megatron command line, before anything is started.

    python -m megatron_echo.memory.estimate --ranks 64 -- --num-layers 61 --moe-enable-echo ...

Nothing is derived on paper. For every pipeline rank one process builds Megatron's model,
distributed-data-parallel buffers and optimizer from the command line and trains a step through
Megatron's own schedule, with fake tensors (shapes and dtypes, no values, no memory) and a process
group that sends nothing. The bytes of the storages alive are counted at every operator. So
recomputation, the distributed optimizer's shards, the clone pool and the dispatch buffers are in it
because they are in the run.

Fake tensors have no values, so shapes must not depend on them: Megatron's own dispatchers of tokens
ask how many tokens each expert got, ``--moe-enable-echo`` does not. What the run does on the CPU is
counted: the reference of a kernel, attention with its scores, no memory of NCCL or the CUDA
context, no fragmentation. ``--flash-attention`` leaves the scores out, as a GPU's kernels do.

``auto`` transports are decided as GPUs over NCCL would, on machines of ``--ranks-per-node`` that
reach each other's memory, without engines, and said. Clones stay inside nodes, and buffers are as
large, where they would. Tokens over symmetric memory or by an engine are counted as by
``all_gather``, and weights over symmetric memory as by ``p2p``, whose buffers are about theirs.
"""

import argparse
import contextlib
import dataclasses
import gc
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_echo import cpu_backend, environment
from megatron_echo.memory.live_bytes import LiveBytes, bytes_of

RANKS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class RankEstimate:
    """What one pipeline rank needs, in bytes."""

    rank: int  # the pipeline rank
    parameters: int  # their number on this rank
    weights: int  # the model's parameters, with the distributed optimizer's buffer
    gradients: int  # the gradient buffers
    optimizer: int  # main parameters and moments, this rank's shard of them
    forward_backward: int  # highest total during the forward and backward passes
    step: int  # highest total during the optimizer's step
    transports: str = ""  # how tokens and clones would travel, as the first step says it

    @property
    def peak(self) -> int:
        """The highest total."""
        return max(self.forward_backward, self.step)

    @property
    def activations(self) -> int:
        """The peak of the passes without weights, gradients and optimizer: kept and working."""
        return self.forward_backward - self.weights - self.gradients - self.optimizer


def estimate(
    argv: Sequence[str],
    ranks: int,
    flash_attention: bool = False,
    stages: Sequence[int] | None = None,
    ranks_per_node: int = RANKS_PER_NODE,
) -> list[RankEstimate]:
    """Estimate pipeline ranks of a run, in order; the first process of a stage stands for it.

    Args:
        argv: flags of ``pretrain_gpt_moe.py``.
        ranks: processes of the run, over all nodes.
        flash_attention: attention without scores, see :mod:`megatron_echo.memory.shapes_only`.
        stages: which pipeline ranks, by default all.
        ranks_per_node: GPUs of a machine, which reach each other's memory.

    Raises:
        ValueError: the command line does not run; the message has the reason.
    """
    # A process of its own: what this one has done with torch.distributed must not matter.
    context = multiprocessing.get_context("spawn")
    wanted = range(_value_of("--pipeline-model-parallel-size", argv)) if stages is None else stages
    machine = flash_attention, ranks_per_node
    answer = _run(context, _estimate_stages, list(argv), ranks, machine, list(wanted))
    if isinstance(answer, str):
        raise ValueError(f"This command line cannot be estimated:\n{answer}")
    return answer


def _run(context: Any, work: Any, *args: Any) -> Any:
    """What a function sends from a process of its own; words if it sends nothing."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return "its process ended without an answer"
    finally:
        process.join()


def _estimate_stages(
    sender: Connection, argv: list[str], ranks: int, machine: tuple[bool, int], stages: list[int]
) -> None:
    """Send the estimates of some pipeline ranks, or what is wrong."""
    cpu_backend.enable(verbose=False)
    import megatron.training  # noqa: F401  (once, for all children)

    context = multiprocessing.get_context("fork")
    found = []
    for rank in stages:
        answer = _run(context, _child, argv, ranks, rank, *machine)
        if isinstance(answer, str):
            sender.send(f"pipeline rank {rank}: {answer}")
            return
        found.append(answer)
    sender.send(found)


def _value_of(flag: str, argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, type=int, default=1, dest="value")
    return parser.parse_known_args(list(argv))[0].value


def _child(sender: Connection, *args: Any) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            answer: Any = dry_run(*args)
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/torch/" not in frame.filename][-3:]
        where = "".join(traceback.format_list(ours))
        answer = f"{where}{type(error).__name__}: {error}"
    sender.send(answer)
    sender.close()


def dry_run(
    argv: Sequence[str],
    ranks: int,
    pipeline_rank: int,
    flash_attention: bool = False,
    ranks_per_node: int = RANKS_PER_NODE,
) -> RankEstimate:
    """Build and train one stage on fake tensors, once in a process; see :func:`estimate`."""
    with _process_of(ranks, pipeline_rank, argv):
        args, container = _parse()
        from megatron.training.initialize import initialize_megatron

        initialize_megatron()
        from megatron_echo.memory.shapes_only import stand_ins

        with (
            stand_ins(flash_attention, ranks_per_node) as said,
            FakeTensorMode(allow_non_fake_inputs=True),
            LiveBytes(skip_collectives=True) as live,
        ):
            model, optimizer = _build(container)
            optimizer.step()  # makes its state, from gradients that are zero
            passes, step = _train(args, model, optimizer, live)
            parameters = [p for chunk in model for p in chunk.parameters()]
            gradients = bytes_of(getattr(p, "main_grad", p.grad) for p in parameters)
            weights = bytes_of(parameters)
            return RankEstimate(
                rank=pipeline_rank,
                parameters=sum(p.numel() for p in parameters),
                weights=weights,
                gradients=gradients,
                optimizer=bytes_of(_optimizer_tensors(optimizer), besides=parameters),
                forward_backward=passes,
                step=step,
                transports=" ".join(said),
            )


@contextlib.contextmanager
def _process_of(ranks: int, pipeline_rank: int, argv: Sequence[str]) -> Iterator[None]:
    """Be the first process of a stage, in a job whose others are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    own_rank = pipeline_rank * (ranks // _value_of("--pipeline-model-parallel-size", argv))
    has_cuda = not cpu_backend.is_enabled()
    words = environment.add_missing_flags(list(argv), has_cuda, verbose=False)
    job = {"RANK": str(own_rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks)}
    new_group = dist.new_group

    def fake_group(ranks: Any = None, *_: Any, **options: Any) -> Any:
        return new_group(ranks, group_desc=options.get("group_desc"), backend="fake")

    def own_object(gathered: list, value: Any, *_: Any, **__: Any) -> None:
        gathered[:] = [value] * len(gathered)

    with (
        mock.patch.dict(os.environ, job),
        mock.patch.object(sys, "argv", ["estimate", *words]),
        mock.patch.object(dist, "new_group", fake_group),
        mock.patch.object(dist, "all_gather_object", own_object),
    ):
        environment.skip_dataset_compilation()
        dist.init_process_group("fake", store=FakeStore(), rank=own_rank, world_size=ranks)
        yield


def _parse() -> tuple[Any, Any]:
    """Megatron's arguments, and its configuration of the run."""
    from megatron.training.argument_utils import (
        gpt_config_from_args,
        pretrain_cfg_container_from_args,
    )
    from megatron.training.arguments import parse_and_validate_args

    from megatron_echo.arguments import add_echo_arguments, echo_config_from_args
    from megatron_echo.model_builder import EchoGPTModelConfig
    from megatron_echo.offload.training import add_offload_arguments, offload_config

    def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_offload_arguments(parser, sys.argv[1:])
        return add_echo_arguments(parser)

    args = parse_and_validate_args(add_arguments)
    if offload_config(args) is not None:
        raise ValueError(
            "--fine-grained-activation-offloading: what is offloaded depends on measured times. "
            "Leave it out: the estimate is then the most that is needed."
        )
    args.perform_initialization = False  # no values
    args.inference_rng_tracker = True  # forks nothing
    args.check_for_nan_in_loss_and_grad = False
    config = echo_config_from_args(args)
    if config.mtp_standalone:
        raise ValueError(
            "--pipeline-model-parallel-layout: with MTP layers and the loss on different ranks, "
            "pipeline ranks tell each other shapes, which fake tensors cannot. Put m before L in "
            "one stage."
        )
    model_config = gpt_config_from_args(args, config, EchoGPTModelConfig)
    return args, pretrain_cfg_container_from_args(args, model_config)


def _build(container: Any) -> tuple[Any, Any]:
    """Model chunks and optimizer, as ``pretrain`` builds and connects them."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.utils import get_model_config
    from megatron.training.training import setup_model_and_optimizer

    model, optimizer, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=container,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    return model, optimizer


def _train(args: Any, model: Any, optimizer: Any, live: LiveBytes) -> tuple[int, int]:
    """One step; the highest totals of the passes and of the optimizer.

    Twice as many microbatches as pipeline ranks fill the pipeline; more of them keep no more. What
    only empties it again is left out.
    """
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    live.peak = live.live
    stages, chunks = args.pipeline_model_parallel_size, len(model)
    microbatches = min(get_num_microbatches(), 2 * stages)
    forward: list[Any] = []
    backward: list[Any] = []

    def begin_backward(chunk: Any) -> None:
        is_over = len(forward) == chunks * microbatches or len(backward) > chunks * stages
        if stages > 1 and is_over and all(one in backward for one in model):
            raise _IsEmptying
        backward.append(chunk)

    def step(_: Any, chunk: Any) -> tuple[Tensor, Any]:
        output, loss = _forward_step(args, chunk)
        forward.append(chunk)
        output.register_hook(lambda _: begin_backward(chunk))
        return output, loss

    with contextlib.suppress(_IsEmptying):
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[None] * chunks,
            model=model,
            num_microbatches=microbatches,
            seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size,
            forward_only=False,
        )
    gc.collect()
    passes, live.peak = live.peak, live.live
    optimizer.step()
    return passes, live.peak


class _IsEmptying(Exception):
    """A pipeline has been as full as it gets, with a backward pass of each chunk."""


def _forward_step(args: Any, model: Any) -> tuple[Tensor, Any]:
    """One microbatch of no particular tokens, as ``pretrain_gpt_moe.py`` gets it."""
    size = args.micro_batch_size, args.seq_length // args.context_parallel_size
    tokens, positions, labels = (torch.zeros(size, dtype=torch.int64) for _ in range(3))
    loss_mask, mask = torch.ones(size), None
    if args.create_attention_mask_in_dataloader:
        mask = torch.ones(size[0], 1, size[1], args.seq_length, dtype=torch.bool)
    output = model(tokens, positions, mask, labels=labels, loss_mask=loss_mask)

    def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = torch.sum(output.view(-1).float() * loss_mask.view(-1))
        count = loss_mask.sum().to(torch.int)
        return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

    return output, loss


def _optimizer_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Main parameters and states of all optimizers in a chain."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = getattr(part, "optimizer", None)
        if inner is None:
            continue
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def table(estimates: Sequence[RankEstimate]) -> str:
    """A line a rank, in GiB."""
    columns = ("weights", "gradients", "optimizer", "activations", "step", "peak")
    lines = ["rank    parameters " + " ".join(f"{name:>11}" for name in columns) + "   (GiB)"]
    for one in estimates:
        sizes = " ".join(f"{getattr(one, name) / 2**30:11.4f}" for name in columns)
        lines.append(f"{one.rank:4} {one.parameters:13,} {sizes}")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """The command line: these words after the program's name, or this process's."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_echo.memory.estimate",
        description="Peak memory of each pipeline rank, before anything is started.",
    )
    parser.add_argument("--ranks", type=int, required=True, help="processes over all nodes")
    parser.add_argument(
        "--flash-attention", action="store_true", help="attention without scores, as on a GPU"
    )
    parser.add_argument(
        "--stages", type=int, nargs="+", metavar="N", help="which pipeline ranks; all"
    )
    parser.add_argument(
        "--ranks-per-node", type=int, default=RANKS_PER_NODE, metavar="N", help="GPUs of a machine"
    )
    parser.add_argument("flags", nargs="+", help="-- and the flags of pretrain_gpt_moe.py")
    args = parser.parse_args(words)
    if args.ranks_per_node < 1:
        parser.error(f"--ranks-per-node {args.ranks_per_node} is below 1. Give a machine's GPUs.")
    try:
        estimates = estimate(
            args.flags, args.ranks, args.flash_attention, args.stages, args.ranks_per_node
        )
    except ValueError as error:
        parser.exit(2, f"estimate: error: {error}\n")
    print(table(estimates))
    for line in dict.fromkeys(one.transports for one in estimates if one.transports):
        print(f"On machines of {args.ranks_per_node} GPUs that reach each other's memory: {line}")


if __name__ == "__main__":
    main()
