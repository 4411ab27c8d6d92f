import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo.config

from megatron_echo import cpu_backend

pytestmark = pytest.mark.skipif(not cpu_backend.is_enabled(), reason="this machine has CUDA")


@pytest.fixture
def disabled() -> Iterator[None]:
    """The machine as it is without the backend."""
    cpu_backend.disable()
    yield
    cpu_backend.enable(verbose=False)


CUDA_DEVICES = ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0), 0]


@pytest.mark.parametrize("device", CUDA_DEVICES)
@pytest.mark.parametrize(
    "create",
    [
        lambda d: torch.zeros(2, device=d),
        lambda d: torch.tensor([1.0], device=d),
        lambda d: torch.as_tensor([1.0], device=d),
        lambda d: torch.empty(2, 3, dtype=torch.int32, device=d, pin_memory=True),
        lambda d: torch.arange(3, device=d),
        lambda d: torch.randn(3, device=d),
        lambda d: torch.full((2,), 1.0, device=d),
        lambda d: torch.zeros_like(torch.ones(2), device=d),
        lambda d: torch.ones(2).new_empty(3, device=d),
        lambda d: torch.ones(2).to(d),
        lambda d: torch.ones(2).to(device=d),
        lambda d: torch.ones(2).to(d, torch.float64),
        lambda d: torch.ones(2).cuda(d),
        lambda d: torch.nn.Linear(2, 2, device=d).weight,
        lambda d: torch.nn.Linear(2, 2).to(d).weight,
        lambda d: torch.nn.Linear(2, 2).cuda(d).weight,
    ],
)
def test_cuda_devices_become_the_cpu(create, device) -> None:
    assert create(device).device.type == "cpu"


def test_other_devices_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").device.type == "meta"
    assert torch.zeros(2).to("meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.zeros(2).device.type == "meta"
    with torch.device("cuda"):
        assert torch.zeros(2).device.type == "cpu"
    assert torch.ones(2).to(torch.float64).dtype == torch.float64


def test_it_holds_in_other_threads() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.zeros(1, device="cuda").device))
    thread.start()
    thread.join()
    assert found == [torch.device("cpu")]


def test_tensor_types_read_as_cuda_types() -> None:
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1, dtype=torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert torch.ones(1).type("torch.cuda.DoubleTensor").dtype == torch.float64
    assert torch.ones(1).type(torch.float16).dtype == torch.float16
    assert torch.cuda.FloatTensor([1.0]).dtype == torch.float32
    assert torch.cuda.LongTensor([1]).dtype == torch.int64


def test_streams_and_events_are_complete_at_once() -> None:
    stream, first, second = torch.cuda.Stream(), *(torch.cuda.Event(enable_timing=True),) * 2
    with torch.cuda.stream(stream), torch.cuda.device(0):
        first.record()
        torch.cuda.current_stream().wait_stream(stream)
    second = stream.record_event()
    assert first.query()
    assert stream.query()
    assert first.elapsed_time(second) >= 0
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="recorded"):
        torch.cuda.Event().elapsed_time(second)


def test_queries_describe_one_device() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.current_device() == 0
    assert torch.cuda.device_count() == 1
    assert not torch.accelerator.is_available()
    assert not torch.cuda.is_current_stream_capturing()
    assert torch.cuda.get_device_properties(0).total_memory > 0
    assert torch.cuda.memory_allocated() > 0
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] > 0


def test_both_generators_are_the_same() -> None:
    torch.cuda.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    state = torch.cuda.get_rng_state()
    assert torch.equal(torch.rand(3), expected)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), expected)
    kept = torch.cuda.default_generators[0].graphsafe_get_state()
    first = torch.rand(3)
    torch.cuda.default_generators[0].graphsafe_set_state(kept)
    assert torch.equal(torch.rand(3), first)


def test_loading_for_cuda(tmp_path: Path) -> None:
    torch.save(torch.ones(2), tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", map_location="cuda").device.type == "cpu"


def test_dataloader_with_pinned_memory() -> None:
    loader = torch.utils.data.DataLoader(range(4), batch_size=2, pin_memory=True)
    assert [batch.tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_disable_restores_everything(disabled: None) -> None:
    assert not torch.cuda.is_available()
    assert cpu_backend.changes() == ()
    from megatron.core.datasets import utils
    from megatron.core.tensor_parallel import random
    from megatron.training import initialize

    owners = [torch, torch.Tensor, torch.cuda, torch.cuda.random, torch.cuda.memory]
    owners += [torch.nn.Module, torch.accelerator, torch.distributed, torch.cuda.nvtx]
    owners += [torch.utils._device.DeviceContext, utils, random, initialize]

    def snapshot() -> dict:
        found = {(str(owner), k): v for owner in owners for k, v in vars(owner).items()}
        found |= {("env", key): value for key, value in os.environ.items()}
        found["filters"] = tuple(logging.getLogger(random.__name__).filters)
        found["dynamo"] = torch._dynamo.config.disable
        return found

    before = snapshot()
    assert cpu_backend.enable(verbose=False)
    assert len(cpu_backend.changes()) > 100
    cpu_backend.disable()
    after = snapshot()
    assert before.keys() == after.keys()
    assert all(before[k] is after[k] or before[k] == after[k] for k in before)


def test_enabling_twice_is_enabling_once(disabled: None, capsys: pytest.CaptureFixture) -> None:
    assert cpu_backend.enable()
    changes = cpu_backend.changes()
    assert cpu_backend.enable()
    assert cpu_backend.changes() == changes
    (line,) = capsys.readouterr().out.splitlines()
    assert "no CUDA device" in line


def test_it_does_nothing_where_cuda_works(disabled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not cpu_backend.enable()
    assert torch.zeros is zeros
    monkeypatch.undo()


def test_a_broken_driver_is_not_a_reason_to_train_on_the_cpu(
    disabled: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cpu_backend, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(RuntimeError, match="set CUDA_VISIBLE_DEVICES="):
        cpu_backend.enable()
    assert not cpu_backend.is_enabled()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cpu_backend.enable(verbose=False)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        pytest.param([], 2, marks=pytest.mark.slow),
        pytest.param(["--help"], 0, marks=pytest.mark.slow),
        (["absent.py"], 1),
    ],
)
def test_the_command_without_a_script(argv: list[str], code: int) -> None:
    command = [sys.executable, "-m", "megatron_echo.cpu_backend", *argv]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == code
    assert "usage" in finished.stdout or "no such script: absent.py" in finished.stderr
