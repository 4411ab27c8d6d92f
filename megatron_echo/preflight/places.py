"""Checks of the files and folders that a run reads by name and writes."""

import os
from argparse import Namespace
from pathlib import Path

from megatron_echo.flags import flag_name

_FOLDERS = (
    "save", "run_dir", "moe_echo_trace_dir", "moe_echo_capture_routing", "tensorboard_dir",
    "wandb_save_dir", "data_cache_path",
)  # fmt: skip
_FILES_WRITTEN = ("memory_ledger",)
_FILES_READ = ("moe_echo_replay_routing", "vocab_file", "merge_file", "per_dataset_sequences_path")


def check_places(args: Namespace) -> None:
    """Make the folders that the run writes to, and look for the files that it reads."""
    for name in _FOLDERS:
        _make_folder(flag_name(name), getattr(args, name, None))
    for name in _FILES_WRITTEN:
        path = getattr(args, name, None)
        if path and os.path.isdir(path):
            raise ValueError(f"{flag_name(name)} {path} is a folder. Give the path of a file.")
        _make_folder(flag_name(name), path, Path(path).parent if path else None)
    for name in _FILES_READ:
        _look_for(flag_name(name), getattr(args, name, None))
    model = args.tokenizer_model
    # Hugging Face takes the name of a model as well, "name" or "organisation/name".
    if model and not (args.tokenizer_type == "HuggingFaceTokenizer" and _is_hub_name(model)):
        _look_for("--tokenizer-model", model)


def _make_folder(flag: str, value: str | None, folder: str | Path | None = None) -> None:
    if not value or "://" in value:
        return
    folder = folder or value
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{flag} {value} cannot be made ({error.strerror}). Give another folder."
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{flag} {value} cannot be written to. Check its permissions.")


def _is_hub_name(model: str) -> bool:
    return model.count("/") < 2 and not model.startswith((".", "/", "~"))


def _look_for(flag: str, path: str | None) -> None:
    if path and "://" not in path and not os.path.exists(path):
        raise ValueError(f"{flag} {path} is not there. Check the path.")
