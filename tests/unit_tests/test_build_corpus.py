import json
import math
from pathlib import Path

import build_corpus
import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "site-packages").mkdir(parents=True)
    (folder / "site-packages" / "skipped.py").write_text("no")
    for number in range(60):
        (folder / f"file{number:02}.py").write_bytes(f"x = {number}  # ä\n".encode() * 3)
    (folder / "note.txt").write_text("no")
    return folder


def test_the_split_is_by_file_and_complete(source: Path, tmp_path: Path) -> None:
    corpus = build_corpus.build_corpus(tmp_path / "out", source)
    assert corpus["train"]["files"] + corpus["heldout"]["files"] == 60
    assert 0 < corpus["heldout"]["files"] < 6
    texts = []
    for split in ("train", "heldout"):
        dataset = IndexedDataset(str(tmp_path / "out" / split))
        assert len(dataset) == corpus[split]["files"]
        assert sum(dataset.sequence_lengths) == corpus[split]["tokens"]
        for document in dataset:
            assert document[-1] == build_corpus.END_OF_FILE
            texts.append(bytes(document[:-1].astype(np.uint8)))
    assert sorted(texts) == sorted(p.read_bytes() for p in source.glob("file*.py"))


def test_a_finished_corpus_is_reused(source: Path, tmp_path: Path) -> None:
    first = build_corpus.build_corpus(tmp_path / "out", source)
    stamp = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    cache = tmp_path / "out" / build_corpus.CACHE
    cache.mkdir()
    assert build_corpus.build_corpus(tmp_path / "out", source) == first
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == stamp
    assert cache.exists()
    record = json.loads((tmp_path / "out" / "corpus.json").read_text())
    (tmp_path / "out" / "corpus.json").write_text(json.dumps({**record, "source": "elsewhere"}))
    assert build_corpus.build_corpus(tmp_path / "out", source) == first
    assert not cache.exists(), "an index of the old files would be taken for the new ones"


def test_unigram_entropy() -> None:
    assert build_corpus.unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert build_corpus.unigram_entropy(np.array([0, 9])) == 0


def test_no_files(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="No Python files"):
        build_corpus.build_corpus(tmp_path / "out", tmp_path / "empty")
