"""Build a Megatron dataset from the Python standard library's source files: real text, anywhere.

Tokens are bytes (0..255) with 256 at the end of each file, for
``--tokenizer-type NullTokenizer --vocab-size 257``. One file in fifty is held out, chosen by a
hash of its name, so the split is the same on every machine::

    python tools/build_corpus.py --output-dir runs/corpus
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_echo.progress import track

END_OF_FILE = 256
VOCAB_SIZE = 257
HELD_OUT_ONE_IN = 50
CACHE = "cache"
"""Where a training run on this corpus keeps Megatron's index of it."""


def source_files(root: Path) -> list[Path]:
    """Python files below ``root``, installed packages left out, in a fixed order."""
    return sorted(
        path
        for path in root.rglob("*.py")
        if "site-packages" not in path.parts and "dist-packages" not in path.parts
    )


def is_held_out(name: str) -> bool:
    """True for one file in ``HELD_OUT_ONE_IN``, by the hash of its relative path."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token of a distribution given by counts ``[V]``.

    It is the lowest loss that a model without any context can have on those tokens.
    """
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def write_dataset(prefix: Path, files: Iterable[Path]) -> dict[str, Any]:
    """Write ``prefix.bin`` and ``prefix.idx``, one document a file.

    Returns:
        ``files``, ``tokens``, and ``unigram_entropy`` in nats.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    dtype = DType.optimal_dtype(VOCAB_SIZE)
    builder = IndexedDatasetBuilder(f"{prefix}.bin.part", dtype=dtype)
    number = 0
    for path in track(files, f"Corpus: {prefix.name}"):
        content = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int32)
        tokens = np.append(content, END_OF_FILE)
        counts += np.bincount(tokens, minlength=VOCAB_SIZE)
        builder.add_document(torch.from_numpy(tokens), [len(tokens)])
        number += 1
    if number == 0:
        raise ValueError(f"No Python files for {prefix}. Give another --source folder.")
    builder.finalize(f"{prefix}.idx.part")
    for extension in (".bin", ".idx"):
        os.replace(f"{prefix}{extension}.part", f"{prefix}{extension}")
    return {
        "files": number,
        "tokens": int(counts.sum()),
        "unigram_entropy": unigram_entropy(counts),
    }


def build_corpus(output_dir: Path, source: Path) -> dict[str, Any]:
    """Write ``train`` and ``heldout`` datasets and ``corpus.json``; reuses a finished one.

    Args:
        output_dir: the folder to write to; created where it is missing.
        source: the folder whose Python files are taken.

    Returns:
        The content of ``corpus.json``: for ``train`` and ``heldout`` what
        :func:`write_dataset` returns, ``source``, and the Python it came with.
    """
    record = output_dir / "corpus.json"
    if record.is_file():
        corpus = json.loads(record.read_text())
        files = [output_dir / f"{s}{x}" for s in ("train", "heldout") for x in (".bin", ".idx")]
        same = (corpus["source"], corpus.get("python")) == (str(source), sys.version)
        if same and all(file.is_file() for file in files):
            return corpus
    # Megatron's index cache is keyed by the path, not by the content.
    shutil.rmtree(output_dir / CACHE, ignore_errors=True)
    files = source_files(source)
    held_out = [path for path in files if is_held_out(path.relative_to(source).as_posix())]
    train = sorted(set(files) - set(held_out))
    corpus = {
        "source": str(source),
        "python": sys.version,
        "train": write_dataset(output_dir / "train", train),
        "heldout": write_dataset(output_dir / "heldout", held_out),
    }
    record.write_text(json.dumps(corpus, indent=2) + "\n")
    return corpus


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the datasets")
    parser.add_argument(
        "--source",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder of Python files (default: this Python's standard library)",
    )
    args = parser.parse_args()
    if not args.source.is_dir():
        parser.error(f"--source {args.source} is not a folder.")
    corpus = build_corpus(args.output_dir, args.source)
    for split in ("train", "heldout"):
        part = corpus[split]
        bits = part["unigram_entropy"] / math.log(2)
        print(
            f"{split}: {part['files']} files, {part['tokens'] / 1e6:.1f} M tokens, unigram "
            f"entropy {part['unigram_entropy']:.3f} nats ({bits:.2f} bits)"
        )


if __name__ == "__main__":
    main()
