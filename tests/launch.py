"""Runs training scripts and small distributed functions for the tests."""

import atexit
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "pretrain_gpt_moe.py"
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
"""For child processes: the package, then whatever this process was given."""

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": PYTHONPATH}
SERVER = "RANK_SERVER"
"""The variable with the socket of ``rank_server.py``."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run left: exit codes by rank (one, under torchrun) and everything it printed."""

    codes: tuple[int, ...]
    output: str

    def check(self) -> "Result":
        """Fail the test with the end of the output if a rank failed."""
        assert not any(self.codes), f"exit codes {self.codes}\n{self.output[-6000:]}"
        return self


def start_server() -> None:
    """Start the process that ranks are forked from, for this one and all that it starts."""
    folder = tempfile.TemporaryDirectory(prefix="ranks-")
    place = folder.name + "/socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "rank_server.py"), folder.name],
            stdin=listener,
            env={**os.environ, **_ENVIRONMENT},
        )
    atexit.register(folder.cleanup)
    atexit.register(server.kill)
    os.environ[SERVER] = place


@functools.cache
def _connection() -> TextIO:
    if SERVER not in os.environ:
        start_server()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ[SERVER])
        return connection.makefile("rw")


def run(
    argv: Sequence[object],
    nprocs: int = 1,
    script: Path = SCRIPT,
    env: dict[str, str] | None = None,
    timeout: float = 300,
    world_size: int | None = None,
) -> Result:
    """Run a script on ``nprocs`` ranks, forked from a process that has imported Megatron.

    Args:
        world_size: what the ranks are told, for scripts that end before they meet.
    """
    is_fsdp = "--use-megatron-fsdp" in argv
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        job = {
            "script": str(script),
            "argv": [str(word) for word in argv],
            "nprocs": nprocs,
            # The processes that this one forks have what the CPU backend set here.
            "env": ({"CUDA_DEVICE_MAX_CONNECTIONS": "2"} if is_fsdp else {}) | (env or {}),
            "log": log.name,
            "timeout": timeout,
            "world_size": world_size or nprocs,
        }
        _connection().write(json.dumps(job) + "\n")
        _connection().flush()
        answer = json.loads(_connection().readline())
        return Result(tuple(answer["codes"]), Path(log.name).read_text(errors="replace"))


def torchrun_command(
    argv: Sequence[object], nprocs: int = 1, script: Path = SCRIPT, module: str | None = None
) -> list[str]:
    """The command line of a real torchrun on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nprocs)]
    command += ["-m", module] if module is not None else []
    return command + [str(script), *(str(word) for word in argv)]


def torchrun(
    argv: Sequence[object],
    nprocs: int = 1,
    script: Path = SCRIPT,
    module: str | None = None,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> Result:
    """Run a script with torchrun, as a user does.

    Args:
        module: a module to run with ``-m`` that gets the script as its first argument.
    """
    finished = subprocess.run(
        torchrun_command(argv, nprocs, script, module),
        env={**os.environ, **_ENVIRONMENT, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Result((finished.returncode,), finished.stdout)


def on_ranks(*quick: int, slow: Sequence[int] = ()) -> pytest.MarkDecorator:
    """Parametrizes a test by ``ranks``; those of ``slow`` have the mark of that name."""
    others = [pytest.param(ranks, marks=pytest.mark.slow) for ranks in slow]
    return pytest.mark.parametrize("ranks", [*quick, *others])


def thinned_on_ranks(*quick: int, slow: Sequence[int] = (), every: int = 3) -> pytest.MarkDecorator:
    """Parametrizes a test by ``ranks`` and ``every``, which a worker finds as ``EVERY``.

    The quick ones take each N-th combination of their settings, N being ``every``; the slow ones,
    on those numbers of ranks and those of ``slow``, take all.
    """
    whole = [pytest.param(ranks, 1, marks=pytest.mark.slow) for ranks in (*quick, *slow)]
    return pytest.mark.parametrize(("ranks", "every"), [*((r, every) for r in quick), *whole])


def tiny_model(**overrides: object) -> list[str]:
    """Flags of a model that trains a step in a tenth of a second; ``None`` takes a flag out.

    Args:
        overrides: flag names with underscores; ``True`` is a flag without a value.
    """
    flags: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "num_experts": 8,
        "moe_router_topk": 2,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "attention_dropout": 0,
        "hidden_dropout": 0,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_iters": 4,
        "lr": 1e-3,
        "mock_data": True,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 128,
        "num_workers": 0,
        "log_interval": 1,
        "eval_iters": 0,
        **overrides,
    }
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return words
