import io
import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron_echo.preflight import check_files

NAME = "iter_0000002"
MODEL = {
    "vocab_size": 100,
    "padded_vocab_size": 128,
    "expert_model_parallel_size": 1,
    "num_layers": 2,
}


def save(folder: Path, **arguments: object) -> str:
    """Write a checkpoint of Megatron's form with these arguments; returns its ``--load``."""
    common = io.BytesIO()
    torch.save([{"args": Namespace(**{**MODEL, **arguments})}], common)
    state = {"common_state/shard_0_1": common, "weight": torch.zeros(4096)}
    writer = dcp.FileSystemWriter(folder / NAME)
    dcp.save(state, storage_writer=writer, no_dist=True)
    (folder / NAME / "metadata.json").write_text(
        json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return str(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save(folder)
    return folder


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def replace_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda at: cut(at / "__0_0.distcp", 3000), r"__0_0.distcp has 3000 bytes in place of \d+"),
        (lambda at: cut(at / "__0_0.distcp", 0), "__0_0.distcp has 0 bytes"),
        (lambda at: (at / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda at: cut(at / ".metadata", 200), ".metadata cannot be read"),
        (lambda at: cut(at / ".metadata", 0), ".metadata cannot be read"),
        (lambda at: (at / ".metadata").unlink(), ".metadata is missing"),
        (lambda at: (at / "metadata.json").write_text("{"), "metadata.json cannot be read"),
        (lambda at: (at / "metadata.json").write_text("[]"), "metadata.json cannot be read"),
        (lambda at: (at / "metadata.json").write_bytes(b"\xff"), "metadata.json cannot be read"),
        (lambda at: (at / "metadata.json").unlink(), "metadata.json is missing"),
        (lambda at: (at / "common.pt").write_bytes(b"PK"), "its arguments cannot be read"),
        (replace_folder, "it is empty"),
    ],
)
def test_a_damaged_checkpoint(parsed, whole: Path, tmp_path: Path, damage, fault: str) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    damage(tmp_path / "copy" / NAME)
    with pytest.raises(ValueError, match=f"copy: {NAME} is damaged: {fault}.* Copy it again"):
        check_files(parsed("--mock-data", "--load", str(tmp_path / "copy")))


def test_damage_inside_a_file(parsed, whole: Path, tmp_path: Path) -> None:
    """The sizes are right, the arguments are not."""
    shutil.copytree(whole, tmp_path / "copy")
    data = tmp_path / "copy" / NAME / "__0_0.distcp"
    data.write_bytes(b"\xa5" * data.stat().st_size)
    with pytest.raises(ValueError, match="its arguments cannot be read"):
        check_files(parsed("--mock-data", "--load", str(tmp_path / "copy")))


def test_a_tracker_that_is_no_text(parsed, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "copy")
    (tmp_path / "copy" / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="neither an iteration nor 'release'"):
        check_files(parsed("--mock-data", "--load", str(tmp_path / "copy")))


def test_a_whole_checkpoint_and_other_forms(parsed, whole: Path, tmp_path: Path) -> None:
    check_files(parsed("--mock-data", "--load", str(whole)))
    legacy = tmp_path / NAME / "mp_rank_00"
    legacy.mkdir(parents=True)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    check_files(parsed("--mock-data", "--load", str(tmp_path)))
    dcp.save({"weight": torch.zeros(8)}, checkpoint_id=tmp_path / NAME, no_dist=True)
    check_files(parsed("--mock-data", "--load", str(tmp_path)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--vocab-size 100", None),
        ("--vocab-size 100 --tensor-model-parallel-size 2", "by 64, which keeps it"),
        ("--tensor-model-parallel-size 2", "by 64, which keeps it"),
        ("--vocab-size 100 --make-vocab-size-divisible-by 1", "by 128, which keeps it"),
        ("--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 64", None),
        ("--tensor-model-parallel-size 3", "Use a --tensor-model-parallel-size that divides 128"),
    ],
)
def test_padding_of_the_vocabulary(parsed, whole: Path, flags: str, message: str | None) -> None:
    """As the loss is a softmax over the padded rows too."""
    args = parsed("--mock-data", "--load", str(whole), *flags.split())
    if message is None:
        check_files(args)
        return
    with pytest.raises(ValueError, match="its vocabulary is padded to 128, and .*" + message):
        check_files(args)


def test_experts_of_one_rank_and_of_several(parsed, whole: Path, tmp_path: Path) -> None:
    one, two = str(whole), save(tmp_path, expert_model_parallel_size=2)
    ep = ("--num-experts", "4", "--expert-model-parallel-size")
    check_files(parsed("--mock-data", *ep, "2", "--load", two, world_size=2))
    for load, size in ((one, "2"), (two, "1")):
        line = ("--mock-data", *ep, size, "--load", load)
        with pytest.raises(ValueError, match=f"cannot take it over with {size}. Add --no-load-opt"):
            check_files(parsed(*line, world_size=2))
        check_files(parsed(*line, "--no-load-optim", world_size=2))
        check_files(parsed(*line, "--finetune", world_size=2))
