"""Checks on a command line before Megatron starts: a bad run ends in one sentence, at once.

Megatron finds most of these too, but later, on every rank, as an assertion deep in a traceback.
"""

import errno
import json
import os
import re
import shutil
import struct
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron_echo import cpu_backend, environment
from megatron_echo.arguments import refuse_heterogeneous_layers
from megatron_echo.compatibility import argument_refusal
from megatron_echo.config import nearest_multiples

_INDEX_HEADER = b"MMIDIDX\x00\x00"
_INDEX_FIXED_BYTES = len(_INDEX_HEADER) + 8 + 1 + 8 + 8
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
_SHAPE_ARGUMENTS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
    "swiglu",
    "normalization",
    "multi_latent_attention",
    "untie_embeddings_and_output_weights",
)
# Of those, the ones that --use-checkpoint-args does not take over when they are given as well.
_NOT_TAKEN_OVER = _SHAPE_ARGUMENTS[:5]
_FULL_DISK_BYTES = 1 << 20
_UNSUPPORTED = (
    "sft",
    "fim_data",
    "hybrid_context_parallel",
    "hybrid_layer_pattern",
    "hybrid_override_pattern",
    "dataloader_inter_document_masking",
    "logits_load_dir",
)
_NEED_TRANSFORMER_ENGINE = {"layernorm", "moe_act", "mla_up_proj"}


def check_command_line(args: Namespace) -> None:
    """Check a parsed, not yet validated Megatron command line.

    Args:
        args: the result of ``megatron.training.arguments.parse_args``.

    Raises:
        ValueError: the fault, then what to do about it.
    """
    _check_backend(args)
    _check_layout(args)
    _check_unsupported(args)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        for prefix in _data_prefixes(args):
            check_indexed_dataset(prefix)
    if args.rank == 0:
        _check_save_folder(args)
        _check_checkpoint(args)


def check_schedule(args: Namespace) -> None:
    """Check what would stop or spoil a pipeline after or while its stages are built.

    Args:
        args: a validated command line, from ``parse_and_validate_args``.

    Raises:
        ValueError: the fault, then what to do about it.
    """
    if args.virtual_pipeline_model_parallel_size is None:
        return
    _check_mtp_rank(args)
    batches = [("--global-batch-size", args.global_batch_size, args.micro_batch_size)]
    if args.eval_iters:
        evaluated = args.eval_global_batch_size, args.eval_micro_batch_size
        batches.append(("--eval-global-batch-size", *evaluated))
    stages = args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or stages
    for flag, batch, micro_batch in batches:
        if batch is None:
            continue
        samples = micro_batch * args.data_parallel_size
        microbatches = batch // samples
        if microbatches < group or 0 < microbatches % group < stages:
            raise ValueError(
                f"{flag} {batch} is {microbatches} microbatches for each pipeline, which virtual "
                f"stages cannot run in groups of {group}. Use a multiple of {group * samples}."
            )


def _check_mtp_rank(args: Namespace) -> None:
    """MTP layers use the embedding; its copies are made equal between ranks, not within one.

    Their stage on the first rank would enter the all-reduce that does so a second time, which hangs
    if the output layer is tied; untied, its copy would stay zero.
    """
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    given = args.pipeline_model_parallel_layout
    if given is None or args.pipeline_model_parallel_size == 1:
        return
    ranks = PipelineParallelLayerLayout(given, args.pipeline_model_parallel_size).layout
    if not any(LayerType.mtp in stage for stage in ranks[0]):
        return
    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L"}
    stages = ["".join(letters.get(layer, "") for layer in s) for row in zip(*ranks) for s in row]
    moved = "|".join(stages).replace("L", "m" * args.mtp_num_layers + "L")
    raise ValueError(
        f"--pipeline-model-parallel-layout {given} puts MTP layers on the first pipeline rank, "
        f"where they would not share the embedding. Use {moved}, or another rank for them."
    )


def _check_backend(args: Namespace) -> None:
    if not cpu_backend.is_enabled():
        return
    if args.distributed_backend == "nccl":
        raise ValueError(
            "--distributed-backend nccl needs a CUDA device and there is none. Leave it out, gloo "
            "is set for you."
        )
    if args.transformer_impl == "transformer_engine":
        raise ValueError(
            "--transformer-impl transformer_engine needs a CUDA device and there is none. Leave "
            "it out, local is set for you."
        )


def _check_layout(args: Namespace) -> None:
    sizes = {
        "--tensor-model-parallel-size": args.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        "--context-parallel-size": args.context_parallel_size,
    }
    _check_divides(sizes, args.world_size)
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    experts = args.expert_model_parallel_size
    _check_divides(
        {
            "--expert-tensor-parallel-size": expert_tensor,
            "--expert-model-parallel-size": experts,
            "--pipeline-model-parallel-size": args.pipeline_model_parallel_size,
        },
        args.world_size,
    )
    if args.num_experts and args.num_experts % experts:
        raise ValueError(
            f"--num-experts {args.num_experts} is not divisible by --expert-model-parallel-size "
            f"{experts}. Use {nearest_multiples(args.num_experts, experts)}."
        )
    if experts > 1 and args.use_cpu_initialization:
        raise ValueError(
            "--use-cpu-initialization gives every expert-parallel rank the same experts. "
            f"Leave it out with --expert-model-parallel-size {experts}."
        )
    if experts > 1 and not args.num_experts and not args.use_checkpoint_args:
        raise ValueError(
            f"--expert-model-parallel-size {experts} needs a mixture of experts. "
            "Give --num-experts, or leave it out."
        )


def _check_divides(sizes: dict[str, int], world_size: int) -> None:
    product = 1
    for size in sizes.values():
        product *= size
    if world_size % product:
        named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        raise ValueError(
            f"{named} needs a multiple of {product} processes, and {world_size} were started. "
            f"Start a multiple of {product} (torchrun --nproc-per-node), or change the sizes."
        )


def _check_unsupported(args: Namespace) -> None:
    refuse_heterogeneous_layers(args)
    for name in _UNSUPPORTED:
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')} is not supported by pretrain_gpt_moe.py. Leave it "
                "out, or add --spec megatron_echo.layer_specs gpt_moe_block_spec to Megatron's "
                "own pretrain_gpt.py."
            )
    if args.create_all_gather_group:
        raise ValueError(
            "--create-all-gather-group has no effect on a model that Megatron-Core 0.19.2 builds "
            "from a configuration, as it does here. Leave it out."
        )
    problem = argument_refusal(args) if args.moe_enable_echo else None
    if problem is not None:
        raise ValueError(f"--moe-enable-echo {problem}")
    modules = set(args.recompute_modules or ())
    without_output = sorted(modules & _NEED_TRANSFORMER_ENGINE)
    if without_output and not (cpu_backend.is_enabled() or environment.HAVE_TRANSFORMER_ENGINE):
        raise ValueError(
            f"--recompute-modules {' '.join(without_output)} needs Transformer Engine in "
            "Megatron-Core 0.19.2. Install it, or recompute other modules."
        )
    is_local = args.transformer_impl == "local"
    if args.reset_attention_mask and args.context_parallel_size > 1 and is_local:
        raise ValueError(
            "--reset-attention-mask with --context-parallel-size "
            f"{args.context_parallel_size} needs Transformer Engine: the local attention knows "
            "only the causal mask then. Leave one of the two out."
        )
    if args.save and args.save_interval is None:
        raise ValueError("--save needs --save-interval N: how many iterations between checkpoints.")
    if not _has_data(args) and not args.skip_train:
        raise ValueError(
            "No data was given. Use --data-path PREFIX (of a .bin/.idx pair) or --mock-data."
        )


def _has_data(args: Namespace) -> bool:
    names = ("data_path", "data_args_path", "per_split_data_args_path", "train_data_path")
    return args.mock_data or any(getattr(args, name) for name in names)


def _data_prefixes(args: Namespace) -> Iterator[str]:
    """Every dataset prefix on the command line, weights of a blend left out."""
    words: list[str] = []
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words += getattr(args, name) or []
    if args.data_args_path:
        words += _read_text("--data-args-path", args.data_args_path).split()
    if args.per_split_data_args_path:
        path = args.per_split_data_args_path
        try:
            splits = json.loads(_read_text("--per-split-data-args-path", path))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--per-split-data-args-path {path} is not JSON ({error}). Give an object with "
                'the keys "train", "valid" and "test".'
            ) from error
        for value in splits.values():
            words += value.split() if isinstance(value, str) else (value or [])
    return (word for word in words if not _is_number(word) and "://" not in word)


def _read_text(flag: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ValueError(
            f"{flag} {path} cannot be read ({error.strerror}). Check the path and its permissions."
        ) from error


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def check_indexed_dataset(prefix: str) -> None:
    """Check that ``prefix.idx`` and ``prefix.bin`` are whole and belong together.

    Layout of the index (Megatron's ``indexed_dataset.py``): 9 bytes of magic, uint64 version,
    uint8 type code, uint64 sequences, uint64 documents, then per sequence an int32 length and
    an int64 position in the data file, then the documents as int64.

    Args:
        prefix: path without the extension.

    Raises:
        ValueError: a file is missing, unreadable, foreign or too short.
    """
    bin_size = _size(prefix, ".bin")
    idx_size = _size(prefix, ".idx")
    again = "Build the dataset again, or copy it again from where it was built."
    try:
        with open(prefix + ".idx", "rb") as file:
            head = file.read(_INDEX_FIXED_BYTES)
            if not head.startswith(_INDEX_HEADER):
                raise ValueError(f"{prefix}.idx is not a Megatron index: bad header. {again}")
            if len(head) < _INDEX_FIXED_BYTES:
                raise ValueError(f"{prefix}.idx is truncated inside its header. {again}")
            _, code, sequences, documents = struct.unpack("<QBQQ", head[len(_INDEX_HEADER) :])
            needed = _INDEX_FIXED_BYTES + sequences * (4 + 8) + documents * 8
            if idx_size < needed:
                raise ValueError(
                    f"{prefix}.idx is truncated: {idx_size} bytes where its header announces "
                    f"{needed}. {again}"
                )
            if code not in _TOKEN_BYTES:
                raise ValueError(f"{prefix}.idx has the unknown type code {code}. {again}")
            if sequences == 0:
                raise ValueError(f"{prefix}.idx holds no sequences. {again}")
            file.seek(_INDEX_FIXED_BYTES + (sequences - 1) * 4)
            (last_length,) = struct.unpack("<i", file.read(4))
            file.seek(_INDEX_FIXED_BYTES + sequences * 4 + (sequences - 1) * 8)
            (last_position,) = struct.unpack("<q", file.read(8))
    except PermissionError as error:
        raise ValueError(f"{prefix}.idx cannot be read. Check its permissions.") from error
    needed = last_position + last_length * _TOKEN_BYTES[code]
    if bin_size < needed:
        raise ValueError(
            f"{prefix}.bin is truncated: {bin_size} bytes where its index announces {needed}. "
            + again
        )


def _size(prefix: str, extension: str) -> int:
    path = prefix + extension
    if not os.path.isfile(path):
        raise ValueError(
            f"Dataset {prefix}: {path} does not exist. Give the prefix of a .bin/.idx pair, "
            "without an extension."
        )
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read. Check its permissions.")
    return os.path.getsize(path)


def latest_checkpoint(folder: str | None, step: int | None = None) -> Path | None:
    """The checkpoint that Megatron would load from ``folder``, or None.

    Args:
        folder: the value of ``--load`` or ``--save``.
        step: the value of ``--ckpt-step``; None asks the tracker file for the newest one.
    """
    if not folder:
        return None
    if step is not None:
        return Path(folder) / f"iter_{step:07d}"
    tracker = Path(folder) / "latest_checkpointed_iteration.txt"
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    if text != "release" and not re.fullmatch(r"\d+", text):
        raise ValueError(
            f"{tracker} holds {text!r}, neither an iteration nor 'release'. Write the number of "
            "the iteration to load into it."
        )
    return Path(folder) / ("release" if text == "release" else f"iter_{int(text):07d}")


def _check_save_folder(args: Namespace) -> None:
    if not args.save or "://" in args.save:
        return
    try:
        os.makedirs(args.save, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--save {args.save} cannot be made ({error.strerror}). Give another folder."
        ) from error
    if not os.access(args.save, os.W_OK):
        raise ValueError(f"--save {args.save} cannot be written to. Check its permissions.")


def _check_checkpoint(args: Namespace) -> None:
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
        saved = _saved_arguments(loaded)
        if saved is not None:
            _check_checkpoint_shape(args, saved, f"{flag} {folder}", loaded.name)
    if environment.HAVE_TRANSFORMER_ENGINE or environment.HAVE_APEX:
        return
    if not args.use_distributed_optimizer:
        return
    takes_optimizer = flag == "--load" and loaded is not None and loaded.name != "release"
    if saved is not None and getattr(saved, "no_save_optim", None):
        takes_optimizer = False
    if takes_optimizer and not args.no_load_optim and not args.finetune:
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


def _saved_arguments(checkpoint: Path) -> Namespace | None:
    """The arguments that a distributed checkpoint was saved with; None for other formats."""
    if not (checkpoint / "metadata.json").is_file():
        return None
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(str(checkpoint)).get("args")


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


def explain_failure(error: BaseException, args: Namespace) -> str | None:
    """What to tell the user about an exception from training, beyond its traceback.

    Megatron writes checkpoints in worker processes and reports only that one of them failed.

    Returns:
        A sentence on a full disk and what is still there, or None for any other failure.
    """
    if not args.save or not os.path.isdir(args.save):
        return None
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return _describe_full_disk(chain.filename or args.save, args.save)
        if "Worker failure" in str(chain) and _has_no_room(args.save):
            return _describe_full_disk(args.save, args.save)
        chain = chain.__cause__ or chain.__context__
    return None


def _has_no_room(save: str) -> bool:
    """True if another checkpoint like the last one does not fit."""
    kept = latest_checkpoint(save)
    needed = sum(file.stat().st_size for file in kept.iterdir()) if kept else _FULL_DISK_BYTES
    return shutil.disk_usage(save).free < needed


def _describe_full_disk(path: str, save: str) -> str:
    kept = latest_checkpoint(save)
    state = f"{kept.name} is complete and untouched" if kept else "No checkpoint is there yet"
    free = shutil.disk_usage(save).free / 1e6
    return (
        f"The disk of {path} is full ({free:.1f} MB free on that of --save). {state}; free some "
        "space, then start again with --load."
    )
