import json
from argparse import Namespace
from pathlib import Path

import torch

from megatron_echo.record.run_record import write_run_record

SIZES = {
    "world_size": 8,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "data_parallel_size": 4,
    "expert_model_parallel_size": 4,
    "expert_tensor_parallel_size": 1,
}


def test_flags_versions_and_layout(tmp_path: Path) -> None:
    args = Namespace(**SIZES, lr=1e-3, params_dtype=torch.bfloat16, data_path=["a", 0.5], spec=None)
    record = json.loads(
        write_run_record(tmp_path / "new", args, ["script", "--lr", "1"]).read_text()
    )
    assert record["layout"]["expert"] == 4
    assert record["layout"]["data"] == 4
    assert record["flags"]["lr"] == 1e-3
    assert record["flags"]["params_dtype"] == "torch.bfloat16"
    assert record["flags"]["data_path"] == ["a", 0.5]
    assert record["versions"]["megatron-core"] == "0.19.2"
    assert record["command"] == ["script", "--lr", "1"]
    assert record["device"]


def test_an_earlier_record_is_kept(tmp_path: Path) -> None:
    for lr in (1, 2, 3):
        write_run_record(tmp_path, Namespace(**SIZES, lr=lr))
    kept = {p.name: json.loads(p.read_text())["flags"]["lr"] for p in tmp_path.iterdir()}
    assert kept == {"run.1.json": 1, "run.2.json": 2, "run.json": 3}
