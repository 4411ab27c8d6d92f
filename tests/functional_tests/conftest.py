"""Fixtures of the functional tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a small dataset of real text: the sources of ``json`` and ``email``."""
    import email

    from build_corpus import source_files, write_dataset

    folder = Path(email.__file__).parent
    prefix = tmp_path_factory.mktemp("corpus") / "text"
    write_dataset(prefix, source_files(folder))
    return prefix


@pytest.fixture(scope="session")
def text_flags(tiny_corpus: Path) -> dict[str, object]:
    """Flags (for ``launch.tiny_model``) that train on ``tiny_corpus``."""
    return {
        "mock_data": None,
        "data_path": tiny_corpus,
        "split": "90,5,5",
        "vocab_size": 257,
        "data_cache_path": tiny_corpus.parent / "cache",
    }
