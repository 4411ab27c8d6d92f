"""Checks of the checkpoint that a run loads: whole, of the same model, and one it can resume."""

import json
import os
import re
from argparse import Namespace
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_echo import environment

_SHAPE_ARGUMENTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "mtp_num_layers",
    "swiglu", "normalization", "multi_latent_attention", "untie_embeddings_and_output_weights",
)  # fmt: skip
# Of those, the ones that --use-checkpoint-args does not take over when they are given as well.
_NOT_TAKEN_OVER = _SHAPE_ARGUMENTS[:5]


def latest_checkpoint(folder: str | None, step: int | None = None) -> Path | None:
    """The checkpoint that Megatron would load from a folder, of a step or the newest; or None."""
    if not folder:
        return None
    if step is not None:
        return Path(folder) / f"iter_{step:07d}"
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    text = tracker.read_text(errors="replace").strip()
    if text != "release" and not re.fullmatch(r"\d+", text):
        raise ValueError(
            f"{tracker} holds {text!r}, neither an iteration nor 'release'. Write the number of "
            "the iteration to load into it."
        )
    return Path(folder) / ("release" if text == "release" else f"iter_{int(text):07d}")


def check_checkpoint(args: Namespace) -> None:
    """Check what ``--load`` or ``--pretrained-checkpoint`` names."""
    loaded = latest_checkpoint(args.load, args.ckpt_step)
    flag, folder = "--load", args.load
    if loaded is None and args.pretrained_checkpoint:
        flag, folder = "--pretrained-checkpoint", args.pretrained_checkpoint
        loaded = latest_checkpoint(folder)
    saved = None
    if loaded is not None:
        if not loaded.is_dir():
            named = "--ckpt-step" if args.ckpt_step is not None else "its tracker file"
            raise ValueError(
                f"{flag} {folder}: {named} names {loaded.name}, which is not there. Name an "
                "iteration that is there, with --ckpt-step or in "
                "latest_checkpointed_iteration.txt."
            )
        saved = _saved_arguments(loaded, f"{flag} {folder}")
        if saved is not None:
            _check_checkpoint_shape(args, saved, f"{flag} {folder}", loaded.name)
            _check_padding(args, saved, f"{flag} {folder}")
    takes_optimizer = flag == "--load" and loaded is not None and loaded.name != "release"
    if args.no_load_optim or args.finetune or getattr(saved, "no_save_optim", None):
        takes_optimizer = False
    if takes_optimizer and saved is not None:
        _check_expert_groups(args, saved)
    _check_distributed_optimizer(args, takes_optimizer)


def _check_distributed_optimizer(args: Namespace, takes_optimizer: bool) -> None:
    has_optimizer = environment.HAVE_TRANSFORMER_ENGINE or environment.HAVE_APEX
    if has_optimizer or not args.use_distributed_optimizer:
        return
    if takes_optimizer:
        raise ValueError(
            f"--use-distributed-optimizer cannot resume from --load {args.load} without "
            "Transformer Engine or apex: Megatron-Core 0.19.2 cannot build the template for "
            "torch's Adam. Install one of them, or add --no-load-optim --no-load-rng to load the "
            "weights only."
        )
    if args.save:
        print(
            "WARNING: --use-distributed-optimizer with --save, without Transformer Engine or apex: "
            "Megatron-Core 0.19.2 cannot resume the optimizer from these checkpoints, only the "
            "weights (--no-load-optim). Use the plain optimizer to resume here.",
            flush=True,
        )


def _saved_arguments(checkpoint: Path, flag: str) -> Namespace | None:
    """A distributed checkpoint's arguments, None for other formats; refuses a damaged one."""
    if not any(checkpoint.iterdir()):
        raise _damaged(flag, checkpoint, "it is empty")
    has_index = (checkpoint / ".metadata").is_file()
    keys = _check_parts(checkpoint, flag) if has_index else set()
    if not (checkpoint / "metadata.json").is_file():
        if any(key.startswith("common_state/") for key in keys):
            raise _damaged(flag, checkpoint, "metadata.json is missing")
        return None
    try:
        backend = json.loads((checkpoint / "metadata.json").read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(flag, checkpoint, "metadata.json cannot be read") from error
    if backend == "torch_dist" and not has_index:
        raise _damaged(flag, checkpoint, ".metadata is missing")
    from megatron.core import dist_checkpointing

    try:
        return dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")
    except (Exception, CheckpointException) as error:  # torch derives the latter otherwise
        raise _damaged(flag, checkpoint, "its arguments cannot be read") from error


def _check_parts(checkpoint: Path, flag: str) -> set[str]:
    """Look whether each part of the index is inside a file; returns the keys of the parts."""
    try:
        index = FileSystemReader(checkpoint).read_metadata()
    except Exception as error:  # a damaged pickle raises anything
        raise _damaged(flag, checkpoint, ".metadata cannot be read") from error
    parts = index.storage_data
    ends: dict[str, int] = {}
    for part in parts.values():
        ends[part.relative_path] = max(ends.get(part.relative_path, 0), part.offset + part.length)
    for name, end in sorted(ends.items()):
        file = checkpoint / name
        if not file.is_file():
            raise _damaged(flag, checkpoint, f"{name} is missing")
        size = os.path.getsize(file)
        if size < end:
            raise _damaged(flag, checkpoint, f"{name} has {size} bytes in place of {end}")
    return set(index.state_dict_metadata)


def _damaged(flag: str, checkpoint: Path, fault: str) -> ValueError:
    return ValueError(
        f"{flag}: {checkpoint.name} is damaged: {fault}. Copy it again, or name another iteration "
        "with --ckpt-step."
    )


def _check_checkpoint_shape(args: Namespace, saved: Namespace, flag: str, name: str) -> None:
    """Compare the flags that decide the tensors' shapes; Megatron checks three of them."""
    differences = []
    for key in _NOT_TAKEN_OVER if args.use_checkpoint_args else _SHAPE_ARGUMENTS:
        asked, held = getattr(args, key, None), getattr(saved, key, None)
        if asked is not None and held is not None and asked != held:
            differences.append(f"--{key.replace('_', '-')} is {held} there and {asked} here")
    asked, held = args.vocab_size, getattr(saved, "vocab_size", None)
    if asked and held:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        if -(-asked // multiple) != -(-held // multiple):
            differences.append(f"--vocab-size is {held} there and {asked} here")
    if differences:
        raise ValueError(
            f"{flag} holds a model of another shape ({name}): {'; '.join(differences)}. Give the "
            "checkpoint's values (or none of them, with --use-checkpoint-args), or another folder."
        )


def _check_padding(args: Namespace, saved: Namespace, flag: str) -> None:
    """The rows that pad the vocabulary are part of the softmax: other ones shift the loss."""
    held = getattr(saved, "padded_vocab_size", None)
    words = args.vocab_size or getattr(saved, "vocab_size", None)
    if not held or not words or args.padded_vocab_size:
        return
    ranks = args.tensor_model_parallel_size
    multiple = args.make_vocab_size_divisible_by * ranks
    asked = -(-words // multiple) * multiple
    if asked == held:
        return
    if held % ranks:
        remedy = f"Use a --tensor-model-parallel-size that divides {held}"
    else:
        remedy = f"Give --make-vocab-size-divisible-by {held // ranks}, which keeps it"
    raise ValueError(
        f"{flag}: its vocabulary is padded to {held}, and with --make-vocab-size-divisible-by "
        f"{args.make_vocab_size_divisible_by} x --tensor-model-parallel-size {ranks} it would be "
        f"{asked} here, which changes the loss. {remedy}."
    )


def _check_expert_groups(args: Namespace, saved: Namespace) -> None:
    """With experts on several ranks their parameters are a group of the optimizer of their own."""
    held = getattr(saved, "expert_model_parallel_size", None) or 1
    asked = args.expert_model_parallel_size
    if args.use_distributed_optimizer or (held > 1) == (asked > 1):
        return
    raise ValueError(
        f"--load {args.load} was saved with --expert-model-parallel-size {held}, and the plain "
        f"optimizer cannot take it over with {asked}. Add --no-load-optim --no-load-rng to load "
        f"the weights only, or use --expert-model-parallel-size {held}."
    )
