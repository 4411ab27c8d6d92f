import json
import re
import struct
from argparse import Namespace
from pathlib import Path

import pytest
from build_corpus import write_dataset

from megatron_echo import preflight
from megatron_echo.preflight import failures, layout

HEADER_BYTES = 34


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """A small, whole dataset."""
    source = tmp_path / "a.py"
    source.write_text("print('hello')\n" * 50)
    write_dataset(tmp_path / "text", [source, source])
    return str(tmp_path / "text")


def cut(path: str, size: int) -> None:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[:size])


def test_a_whole_dataset_passes(prefix: str) -> None:
    preflight.check_indexed_dataset(prefix)


@pytest.mark.parametrize("extension", [".bin", ".idx"])
def test_a_missing_file(prefix: str, extension: str) -> None:
    Path(prefix + extension).unlink()
    with pytest.raises(ValueError, match=rf"{extension} does not exist\. Give the prefix"):
        preflight.check_indexed_dataset(prefix)


@pytest.mark.parametrize("size", [0, 5, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 20])
def test_a_truncated_index(prefix: str, size: int) -> None:
    cut(prefix + ".idx", size)
    with pytest.raises(ValueError, match=r"text\.idx is (truncated|not a Megatron index)"):
        preflight.check_indexed_dataset(prefix)


@pytest.mark.parametrize("missing", [1, 700])
def test_truncated_data(prefix: str, missing: int) -> None:
    cut(prefix + ".bin", Path(prefix + ".bin").stat().st_size - missing)
    with pytest.raises(ValueError, match=r"text\.bin is truncated: \d+ bytes where its index"):
        preflight.check_indexed_dataset(prefix)


def test_a_foreign_file_and_an_unknown_type(prefix: str) -> None:
    content = Path(prefix + ".idx").read_bytes()
    Path(prefix + ".idx").write_bytes(content[:17] + b"\x63" + content[18:])
    with pytest.raises(ValueError, match="unknown type code 99"):
        preflight.check_indexed_dataset(prefix)
    Path(prefix + ".idx").write_bytes(b"PK\x03\x04" * 50)
    with pytest.raises(ValueError, match="not a Megatron index"):
        preflight.check_indexed_dataset(prefix)


def test_an_unreadable_file(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: not path.endswith(".bin"))
    with pytest.raises(ValueError, match=r"text\.bin cannot be read\. Check its permissions"):
        preflight.check_indexed_dataset(prefix)


def test_an_empty_dataset(tmp_path: Path) -> None:
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 0, 1) + struct.pack("<q", 0)
    (tmp_path / "x.idx").write_bytes(head)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no sequences"):
        preflight.check_indexed_dataset(str(tmp_path / "x"))


def test_blends_and_files_of_paths_are_checked(parsed, prefix: str, tmp_path: Path) -> None:
    split = ("--split", "50,50,0")
    preflight.check_command_line(parsed("--data-path", "0.3", prefix, "0.7", prefix, *split))
    with pytest.raises(ValueError, match=r"absent\.bin does not exist"):
        preflight.check_command_line(parsed("--data-path", "0.3", prefix, "0.7", "absent"))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [prefix], "valid": f"1.0 {prefix}", "test": None}))
    preflight.check_command_line(parsed("--per-split-data-args-path", str(splits)))
    splits.write_text("{")
    with pytest.raises(ValueError, match=r"splits\.json is not JSON"):
        preflight.check_command_line(parsed("--per-split-data-args-path", str(splits)))
    with pytest.raises(ValueError, match=r"--data-args-path nowhere cannot be read"):
        preflight.check_command_line(parsed("--data-args-path", "nowhere"))


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ("--save somewhere", 1, r"--save needs --save-interval N"),
        (
            "--reset-attention-mask --context-parallel-size 2",
            2,
            r"--reset-attention-mask with --context-parallel-size 2 needs Transformer Engine",
        ),
        ("--hybrid-layer-pattern DE", 1, r"DE has sparse attention \(D\), which needs Trans"),
        ("--fim-data", 1, r"--fim-data is not supported by pretrain_gpt_moe.py"),
        ("--sft --context-parallel-size 2", 2, r"--sft keeps .*size is 2 .*impl none. Use 1"),
        ("--dataloader-inter-document-masking --cuda-graph-impl local", 1, r"is 1 and .* local"),
        (
            "--sft --micro-batch-size 2 --pipeline-model-parallel-size 2 --num-layers 2",
            2,
            r"--sft makes one row of 2 samples, which pipeline stages do not expect",
        ),
        ("--create-all-gather-group", 1, r"--create-all-gather-group has no effect"),
        ("--distributed-backend nccl", 1, r"--distributed-backend nccl needs a CUDA device"),
        (
            "--use-cpu-initialization --expert-model-parallel-size 2 --num-experts 2",
            2,
            r"--use-cpu-initialization gives every expert-parallel rank the same experts",
        ),
    ],
)
def test_a_command_line_that_cannot_work(parsed, flags: str, world_size: int, message: str) -> None:
    args = parsed("--mock-data", *flags.split(), world_size=world_size)
    with pytest.raises(ValueError, match=message):
        preflight.check_command_line(args)


def test_no_data(parsed) -> None:
    with pytest.raises(ValueError, match="--mock-data"):
        preflight.check_command_line(parsed())


def test_trackers(tmp_path: Path) -> None:
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert preflight.latest_checkpoint(None) is None
    assert preflight.latest_checkpoint(str(tmp_path)) is None
    tracker.write_text("12\n")
    assert preflight.latest_checkpoint(str(tmp_path)) == tmp_path / "iter_0000012"
    tracker.write_text("release")
    assert preflight.latest_checkpoint(str(tmp_path)) == tmp_path / "release"
    tracker.write_text("1e")
    with pytest.raises(ValueError, match=r"holds '1e', neither an iteration"):
        preflight.latest_checkpoint(str(tmp_path))


def test_a_tracker_that_names_nothing(parsed, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(ValueError, match="iter_0000012, which is not there"):
        preflight.check_command_line(parsed("--mock-data", "--load", str(tmp_path)))


def test_a_folder_that_cannot_be_made(parsed, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save .*file/ckpt cannot be made \(Not a directory\)"):
        preflight.check_command_line(
            parsed("--mock-data", "--save", str(tmp_path / "file/ckpt"), "--save-interval", "1")
        )


def test_dist_optimizer_says_at_the_start_that_it_cannot_resume(
    parsed, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ("--mock-data", "--use-distributed-optimizer")
    preflight.check_command_line(parsed(*flags, "--save", str(tmp_path), "--save-interval", "1"))
    assert "cannot resume the optimizer" in capsys.readouterr().out
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "iter_0000003/mp_rank_00").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"cannot resume from --load .* add --no-load-optim"):
        preflight.check_command_line(parsed(*flags, "--load", str(tmp_path)))
    preflight.check_command_line(parsed(*flags, "--load", str(tmp_path), "--no-load-optim"))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "release/mp_rank_00").mkdir(parents=True)
    preflight.check_command_line(parsed(*flags, "--load", str(tmp_path)))


def test_a_checkpoint_step_is_looked_at_instead_of_the_tracker(parsed, tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("9")
    (tmp_path / "iter_0000003/mp_rank_00").mkdir(parents=True)
    load = ("--mock-data", "--load", str(tmp_path), "--ckpt-step")
    preflight.check_command_line(parsed(*load, "3"))
    with pytest.raises(ValueError, match="--ckpt-step names iter_0000004, which is not there"):
        preflight.check_command_line(parsed(*load, "4"))


def test_checkpoint_arguments_may_name_the_experts(parsed, tmp_path: Path) -> None:
    flags = ("--expert-model-parallel-size", "2", "--use-checkpoint-args", "--load", str(tmp_path))
    preflight.check_command_line(parsed("--mock-data", *flags, world_size=2))


def test_recomputation_that_needs_transformer_engine(parsed, monkeypatch) -> None:
    flags = ("--mock-data", "--recompute-granularity", "selective", "--recompute-modules")
    monkeypatch.setattr(layout.cpu_backend, "is_enabled", lambda: False)
    preflight.check_command_line(parsed(*flags, "core_attn"))
    with pytest.raises(ValueError, match="--recompute-modules layernorm needs Transformer Engine"):
        preflight.check_command_line(parsed(*flags, "core_attn", "layernorm"))


def test_only_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = Namespace(save=str(tmp_path))
    assert failures.explain_full_disk(ValueError("x"), args) is None
    assert failures.explain_full_disk(RuntimeError("Worker failure"), args) is None
    full = RuntimeError("outer")
    full.__cause__ = OSError(28, "No space left on device")
    assert "No checkpoint is there yet" in (failures.explain_full_disk(full, args) or "")
    other = OSError(28, "No space left on device", "/dev/shm/x")
    assert "The disk of /dev/shm/x is full" in (failures.explain_full_disk(other, args) or "")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Namespace(free=10))
    assert "is full" in (failures.explain_full_disk(RuntimeError("Worker failure"), args) or "")
    assert failures.explain_full_disk(full, Namespace(save=None)) is None


@pytest.mark.parametrize(
    ("layout", "stages", "better"),
    [
        ("Et|t|m|L", 2, "Et|t||mL"),
        ("E|t|tm|L", 2, "E|t|t|mL"),
        ("Et*2|(t|)*2mm|t|L", 3, "Ett|t|t||t|mmL"),
        ("Et|t||mL", 2, None),
        ("Et|t|t|m||L", 3, "Et|t|t|||mL"),
        ("Et|t|t||m|L", 3, None),
        ("Et|t|mL", 1, None),
        (None, 2, None),
    ],
)
def test_mtp_layers_on_the_first_rank(layout: str | None, stages: int, better: str | None) -> None:
    """Megatron hangs over them, or trains them with an embedding of zeros."""
    args = Namespace(
        virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=stages,
        global_batch_size=None, micro_batch_size=2, eval_iters=0, mtp_num_layers=1,
        microbatch_group_size_per_vp_stage=None, pipeline_model_parallel_layout=layout,
    )  # fmt: skip
    if layout is not None and "mm" in layout:
        args.mtp_num_layers = 2
    if better is None:
        preflight.check_schedule(args)
    else:
        with pytest.raises(ValueError, match=f" Use {re.escape(better)},"):
            preflight.check_schedule(args)


@pytest.mark.parametrize(
    ("batch", "group", "problem"),
    [
        (64, None, None),
        (48, None, "12 microbatches .* groups of 8. Use a multiple of 32"),
        (16, None, "4 microbatches"),
        (72, 10, None),
        (52, 10, "13 microbatches .* groups of 10. Use a multiple of 40"),
        (None, None, None),
    ],
)
def test_microbatches_of_virtual_stages(
    batch: int | None, group: int | None, problem: str | None
) -> None:
    """As Megatron's interleaved schedule has it: a last group is none, or a whole pipeline."""
    args = Namespace(
        virtual_pipeline_model_parallel_size=2, pipeline_model_parallel_size=8,
        global_batch_size=batch, micro_batch_size=2, data_parallel_size=2,
        microbatch_group_size_per_vp_stage=group, eval_iters=0,
        pipeline_model_parallel_layout=None,
    )  # fmt: skip
    if problem is None:
        preflight.check_schedule(args)
    else:
        with pytest.raises(ValueError, match=problem):
            preflight.check_schedule(args)
        values = vars(args) | {"global_batch_size": None, "eval_iters": 1}
        evaluation = Namespace(**values, eval_global_batch_size=batch, eval_micro_batch_size=2)
        with pytest.raises(ValueError, match=f"--eval-global-batch-size .* {problem}"):
            preflight.check_schedule(evaluation)
    args.virtual_pipeline_model_parallel_size = None
    preflight.check_schedule(args)
