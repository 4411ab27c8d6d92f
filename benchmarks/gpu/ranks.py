"""Processes of a script that wait, with Megatron imported, until it is their turn."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from processes import ROOT

_WAIT = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
import pretrain_gpt_moe
if sys.stdin.readline():
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class WaitingRanks:
    """A script on some ranks; its imports, most of a minute on a cold disk, need no GPU.

    They end with this process, whose end closes their standard input.
    """

    def __init__(
        self, script: Path, argv: Sequence[str], nprocs: int = 1,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """Start the processes, without torchrun, which takes seconds.

        Args:
            script: what to run.
            argv: its command line.
            nprocs: ranks.
            env: further environment variables.
        """
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        common = {
            "WORLD_SIZE": nprocs, "LOCAL_WORLD_SIZE": nprocs, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(), "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        command = [sys.executable, "-c", _WAIT.format(root=str(ROOT)), str(script), *argv]
        self._processes = []
        for rank in range(nprocs):
            names = {**common, "RANK": rank, "LOCAL_RANK": rank}
            variables = {name: str(value) for name, value in names.items()}
            self._processes.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **variables, **(env or {})},
                    stdin=subprocess.PIPE,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                )
            )

    def run(self, seconds: float) -> str:
        """Let them begin, and wait for them; returns what they printed.

        Args:
            seconds: they may take.

        Raises:
            RuntimeError: one failed or took longer.
        """
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(b"\n")
            process.stdin.flush()
        deadline, codes = time.monotonic() + seconds, self._codes()
        while None in codes and not any(codes) and time.monotonic() < deadline:
            time.sleep(0.02)
            codes = self._codes()
        self.close()
        self._log.seek(0)
        output = self._log.read()
        if any(code != 0 for code in codes):
            print(output[-8000:], flush=True)
            problem = f"exit codes {codes}" if any(codes) else f"took over {seconds:.0f} s"
            raise RuntimeError(f"{problem}; last: {last_line(output)}")
        return output

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self._processes]

    def close(self) -> None:
        """End what is left of them."""
        for process in self._processes:
            process.kill()
            process.wait()


def last_line(output: str) -> str:
    """The last line that speaks of an error, or the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or [""]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])
