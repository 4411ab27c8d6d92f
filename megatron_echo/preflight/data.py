"""Checks of the datasets on a command line: their files, their weights and their splits."""

import json
import math
import os
import re
import struct
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

_INDEX_HEADER = b"MMIDIDX\x00\x00"
_INDEX_FIXED_BYTES = len(_INDEX_HEADER) + 8 + 1 + 8 + 8
_TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 8, 7: 4, 8: 2}
_SPLITS = ("train", "valid", "test")
_DEFAULT_SPLIT = "969, 30, 1"
_OTHER_SPLITS = ("98,1,1", "90,5,5", "80,10,10", "99,1,0", "90,10,0", "50,50,0", "100,0,0")
_CANNOT_BLEND_NOTHING = (
    "Megatron-Core 0.19.2 cannot draw the 0 samples of --eval-iters 0 from a blend with weights"
)


@dataclass(frozen=True)
class _Blend:
    """Datasets of one flag."""

    flag: str  # where they were named, with its file if they stand in one
    split: str | None  # the only split that draws from them; None if ``--split`` cuts them
    prefixes: list[str]  # without weights
    is_weighted: bool  # whether there were weights


def check_data(args: Namespace) -> None:
    """Check every dataset, and that each split has something to draw from."""
    if args.sft:
        return  # conversations in files of JSON lines, which its dataset reads
    sequences: dict[str, int] = {}
    blends = list(_blends(args))
    for blend in blends:
        for prefix in blend.prefixes:
            if "://" not in prefix:
                sequences[prefix] = check_indexed_dataset(prefix)
    if args.mock_data or not blends:
        return
    if blends[0].split is None:
        _check_cut(args, blends[0], sequences)
    else:
        _check_given(args, blends)


def _blends(args: Namespace) -> Iterator[_Blend]:
    """Every list of datasets on the command line."""
    if args.data_path:
        yield _blend("--data-path", None, args.data_path)
    if args.data_args_path:
        flag = f"--data-args-path {args.data_args_path}"
        yield _blend(flag, None, _read_text("--data-args-path", args.data_args_path).split())
    for split in _SPLITS:
        if words := getattr(args, f"{split}_data_path"):
            yield _blend(f"--{split}-data-path", split, words)
    if args.per_split_data_args_path:
        yield from _blends_of_file(args.per_split_data_args_path)


def _blends_of_file(path: str) -> Iterator[_Blend]:
    flag = f"--per-split-data-args-path {path}"
    form = 'Give an object with the keys "train", "valid" and "test".'
    try:
        splits = json.loads(_read_text("--per-split-data-args-path", path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is not JSON ({error}). {form}") from error
    if not isinstance(splits, dict) or not splits.keys() >= set(_SPLITS):
        raise ValueError(f"{flag} has no list for each split. {form}")
    for split in _SPLITS:
        words = splits[split]
        words = words.split() if isinstance(words, str) else words
        if words:
            yield _blend(flag, split, [str(word) for word in words])


def _blend(flag: str, split: str | None, words: Sequence[str]) -> _Blend:
    """Take the weights off, as Megatron does."""
    weights = [_weight(word) for word in words]
    if all(weight is None for weight in weights):
        return _Blend(flag, split, list(words), False)
    given = weights[::2]
    alternate = len(words) % 2 == 0 and None not in given and set(weights[1::2]) == {None}
    if not alternate:
        raise ValueError(
            f"{flag} has a weight for some datasets only ({' '.join(words)}). Give a weight before "
            "each prefix, or none at all."
        )
    if not any(given) or not all(0 <= weight < math.inf for weight in given if weight is not None):
        raise ValueError(
            f"{flag} has weights that are no shares ({' '.join(words)}). Use 0 or more, and one "
            "above 0."
        )
    return _Blend(flag, split, list(words[1::2]), True)


def _weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _needed(args: Namespace) -> dict[str, str]:
    """The splits that the run draws from, and the flag that says so."""
    needed = {} if args.skip_train else {"train": "training"}
    if args.full_validation:
        needed["valid"] = "--full-validation"
    elif args.eval_iters:
        needed["valid"] = f"--eval-iters {args.eval_iters}"
    return needed


def _check_cut(args: Namespace, blend: _Blend, sequences: dict[str, int]) -> None:
    """Check ``--split``: Megatron loops for ever over a split that rounds to no document."""
    split = args.split or _DEFAULT_SPLIT
    shares = re.findall(r"[.0-9]+", split)
    if not 0 < len(shares) <= len(_SPLITS) or not any(_weight(share) for share in shares):
        raise ValueError(f"--split {split} is not up to three shares. Use 969,30,1 or the like.")
    problem = _empty(args, split, blend, sequences)
    if problem is None:
        return
    others = (s for s in _OTHER_SPLITS if _empty(args, s, blend, sequences) is None)
    choice = next(others, "100,0,0 with --eval-iters 0, or more documents")
    raise ValueError(f"--split {split} gives {problem}. Use --split {choice}.")


def _empty(args: Namespace, split: str, blend: _Blend, sequences: dict[str, int]) -> str | None:
    """Which split is empty and should not be, None if there is none."""
    needed = _needed(args)
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for name, share in zip(_SPLITS, matrix, strict=True):
        if share is None:
            if name in needed:
                return f"no documents to {name}, which {needed[name]} needs"
            continue
        if name != "train" and blend.is_weighted and _draws_nothing(args):
            return f"documents to {name}, and {_CANNOT_BLEND_NOTHING}"
        begin, end = share
        for prefix in blend.prefixes:
            count = sequences.get(prefix)
            if count is not None and round(begin * count) == round(end * count):
                return f"none of the {count} documents of {prefix} to {name}"
    return None


def _draws_nothing(args: Namespace) -> bool:
    return args.eval_iters == 0 and not args.full_validation


def _check_given(args: Namespace, blends: list[_Blend]) -> None:
    """Check that each split which the run draws from was given data of its own."""
    for blend in blends:
        if blend.split != "train" and blend.is_weighted and _draws_nothing(args):
            raise ValueError(
                f"{blend.flag} gives documents to {blend.split}, and {_CANNOT_BLEND_NOTHING}. "
                "Leave them out."
            )
    given = {blend.split for blend in blends}
    for name, reason in _needed(args).items():
        if name not in given:
            raise ValueError(
                f"There is no data to {name}, which {reason} needs. Give --{name}-data-path"
                + ("." if name == "train" else ", or --eval-iters 0.")
            )


def _read_text(flag: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(
            f"{flag} {path} cannot be read ({reason}). Check the path and its permissions."
        ) from error


def check_indexed_dataset(prefix: str) -> int:
    """Check that ``prefix.idx`` and ``prefix.bin`` are whole; the number of sequences in them.

    Layout of the index (Megatron's ``indexed_dataset.py``): 9 bytes of magic, uint64 version,
    uint8 type code, uint64 sequences, uint64 documents, then per sequence an int32 length and
    an int64 position in the data file, then the documents as int64.

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
    return sequences


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
