import json
from pathlib import Path

import pytest
from build_corpus import write_dataset

from megatron_echo.preflight import check_files


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Prefixes of datasets with so many documents."""
    folder = tmp_path_factory.mktemp("corpora")
    (folder / "a.py").write_text("print('hello')\n" * 5)
    for documents in (1, 40, 2000):
        write_dataset(folder / str(documents), [folder / "a.py"] * documents)
    return {documents: str(folder / str(documents)) for documents in (1, 40, 2000)}


@pytest.mark.parametrize(
    ("documents", "flags", "message"),
    [
        (40, "--eval-iters 0", "none of the 40 documents of .*/40 to test. Use --split 90,5,5."),
        (2000, "--split 100,0,0", "no documents to valid, which --eval-iters 100 needs. Use --sp"),
        (2000, "--split 0,50,50", "no documents to train, which training needs. Use --split 98"),
        (1, "", "none of the 1 documents .* Use --split 100,0,0 with --eval-iters 0, or more"),
        (40, "--split 0,0,0", "--split 0,0,0 is not up to three shares"),
        (40, "--split 1,1,1,1", "--split 1,1,1,1 is not up to three shares"),
    ],
)
def test_empty_splits(
    parsed, corpora: dict[int, str], documents: int, flags: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_files(parsed("--data-path", corpora[documents], *flags.split()))


@pytest.mark.parametrize(
    ("documents", "flags"),
    [
        (2000, ""),
        (40, "--split 90,5,5"),
        (40, "--split 100,0,0 --eval-iters 0"),
        (1, "--split 100,0,0 --eval-iters 0"),
        (40, "--split 50,50"),
        (40, "--split 0,50,50 --skip-train"),
    ],
)
def test_splits_with_documents(parsed, corpora: dict[int, str], documents: int, flags: str) -> None:
    check_files(parsed("--data-path", corpora[documents], *flags.split()))


def test_the_smallest_dataset_of_a_blend_counts(parsed, corpora: dict[int, str]) -> None:
    blend = ("--data-path", "0.5", corpora[2000], "0.5", corpora[40])
    with pytest.raises(ValueError, match="none of the 40 documents"):
        check_files(parsed(*blend))


def test_nothing_is_drawn_from_a_blend(parsed, corpora: dict[int, str]) -> None:
    blend = ("0.5", corpora[2000], "0.5", corpora[2000])
    line = ("--eval-iters", "0", "--data-path", *blend)
    with pytest.raises(ValueError, match="gives documents to valid"):
        check_files(parsed(*line, "--split", "90,5,5"))
    check_files(parsed(*line, "--split", "100,0,0"))
    line = ("--eval-iters", "0", "--train-data-path", *blend)
    check_files(parsed(*line))
    with pytest.raises(ValueError, match="--test-data-path gives documents to test"):
        check_files(parsed(*line, "--test-data-path", *blend))


def test_documents_are_split_as_megatron_splits_them(parsed, corpora: dict[int, str]) -> None:
    """The bounds are Megatron's own, so a split of one document more is not empty."""
    for split, is_empty in (("99,1,0", True), ("98,2,0", False), ("975,25,0", False)):
        line = ("--data-path", corpora[40], "--split", split)
        if is_empty:
            with pytest.raises(ValueError, match="to valid"):
                check_files(parsed(*line))
        else:
            check_files(parsed(*line))


def test_splits_with_data_of_their_own(parsed, corpora: dict[int, str], tmp_path: Path) -> None:
    train, valid = ("--train-data-path", corpora[40]), ("--valid-data-path", corpora[1])
    check_files(parsed(*train, *valid))
    check_files(parsed(*train, "--eval-iters", "0"))
    with pytest.raises(ValueError, match="no data to valid, which --eval-iters 100 needs"):
        check_files(parsed(*train))
    with pytest.raises(ValueError, match="no data to train, which training needs"):
        check_files(parsed(*valid))
    lists = tmp_path / "lists.json"
    for splits, message in (
        ({"train": [corpora[40]], "valid": None, "test": None}, "Give --valid-data-path"),
        ({"train": [corpora[40]], "valid": [corpora[1]]}, "has no list for each split"),
        ([corpora[40]], "has no list for each split"),
    ):
        lists.write_text(json.dumps(splits))
        with pytest.raises(ValueError, match=message):
            check_files(parsed("--per-split-data-args-path", str(lists)))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (["0.5", None, None], "--data-path has a weight for some datasets only"),
        ([None, "0.5"], "--data-path has a weight for some datasets only"),
        (["0.5", None, "nan", None], "has weights that are no shares"),
        (["0", None, "0", None], "has weights that are no shares"),
        (["-1", None, "2", None], "has weights that are no shares"),
    ],
)
def test_weights_of_a_blend(
    parsed, corpora: dict[int, str], weights: list[str | None], message: str
) -> None:
    words = [corpora[2000] if weight is None else weight for weight in weights]
    args = parsed("--mock-data")
    args.mock_data, args.data_path = None, words
    with pytest.raises(ValueError, match=message):
        check_files(args)
