"""Starts groups of training processes quickly: imports torch and Megatron once, then forks.

A torchrun of two ranks spends ten seconds importing before a tiny model trains for one. Standard
input is a socket on which it listens, for all processes of a pytest run. Reads one JSON job a line
and answers with one JSON line::

    {"script": "pretrain_gpt_moe.py", "argv": [...], "nprocs": 2, "env": {}, "log": FILE,
     "timeout": 300, "world_size": 2}   ->   {"codes": [0, 0]}

Every rank is a forked process with torchrun's environment variables; if one fails, the others get
ten seconds to end by themselves; then their stacks go to the log. See ``launch.py`` for the side
that tests use.
"""

import argparse
import atexit
import contextlib
import copy
import faulthandler
import functools
import gc
import hashlib
import importlib
import json
import os
import random
import re
import runpy
import signal
import socket
import socketserver
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GRACE_SECONDS = 10
IMPORTED_LATE = ("megatron.core.tokenizers.text", "megatron.core.models.mimo")
"""What every rank would import by itself: the tokenizers bring ``transformers``, for 2 s a rank."""


def free_port() -> int:
    """A free port below those that the system gives to connections, of which gloo makes many."""
    while True:
        with socket.socket() as listener, contextlib.suppress(OSError):
            port = random.randrange(15_000, 30_000)
            listener.bind(("127.0.0.1", port))
            return port


def run_rank(job: dict, rank: int, port: int) -> None:
    """In the forked process: become the rank, run the script, never return."""
    os.setsid()
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.register(signal.SIGUSR1, file=output, all_threads=True)
    os.environ.update(job["env"])
    size = str(job["world_size"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=size,
        MASTER_PORT=str(port),
    )
    if job["nprocs"] == job["world_size"]:  # else nobody comes whom rank 0 could wait for
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    sys.argv = [job["script"], *job["argv"]]
    code = 0
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_job(job: dict) -> list[int]:
    """Fork the ranks and wait for them; exit codes as ``subprocess`` gives them."""
    port = free_port()
    codes: dict[int, int] = {}
    pids: dict[int, int] = {}
    for rank in range(job["nprocs"]):
        pid = os.fork()
        if pid == 0:
            run_rank(job, rank, port)
        pids[pid] = rank
    deadline = time.monotonic() + job["timeout"]
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            code = codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it started
            if code:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            for other in pids:
                os.kill(other, signal.SIGUSR1)  # says where it hangs
            time.sleep(0.2)
            for other in pids:
                os.killpg(other, signal.SIGKILL)
        if pid == 0:
            time.sleep(0.01)
    return [codes[rank] for rank in range(job["nprocs"])]


def add_all(
    made: argparse.ArgumentParser, parser: argparse.ArgumentParser
) -> argparse.ArgumentParser:
    """Give a parser without flags copies of all those of ``made``."""
    memo: dict[int, object] = {id(action): copy.copy(action) for action in made._actions}
    memo |= {id(made): parser, id(made._registries): parser._registries}
    own = ("prog", "description", "_registries")
    vars(parser).update(
        copy.deepcopy({name: v for name, v in vars(made).items() if name not in own}, memo)
    )
    parser.set_defaults(  # which ``made`` has from its own process
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        inprocess_active_world_size=int(os.environ.get("WORLD_SIZE", "1")),
    )
    return parser


def share_gloo_device() -> None:
    """One device for all process groups of a rank: each of 40 has a thread that polls."""
    from torch.distributed import ProcessGroupGloo, default_pg_timeout

    device = functools.cache(ProcessGroupGloo.create_default_device)  # after the fork
    make = ProcessGroupGloo.__init__

    def __init__(group, store, rank: int, size: int, timeout=default_pg_timeout) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._timeout = [device()], timeout
        make(group, store, rank, size, options)

    ProcessGroupGloo.__init__ = __init__


def keep_indices_of_mock_data(folder: Path) -> None:
    """Of millions of samples, whose order depends on neither the layout nor the steps."""
    import numpy as np
    from megatron.core.datasets.gpt_dataset import MockGPTDataset

    build = MockGPTDataset._build_document_sample_shuffle_indices

    def indices(data: MockGPTDataset) -> tuple:
        if data._get_num_epochs(data._get_num_tokens_per_epoch()) > 1:
            return build(data)
        text = re.sub(r'"num_samples": .*', "", data.unique_description)
        place = folder / hashlib.sha256(text.encode()).hexdigest()
        if not place.exists():
            made = tempfile.mkdtemp(dir=folder)
            for number, array in enumerate(build(data)):
                np.save(f"{made}/{number}.npy", array)
            with contextlib.suppress(OSError):  # another rank was faster
                os.rename(made, place)
        return tuple(np.load(place / f"{number}.npy", mmap_mode="r") for number in range(3))

    MockGPTDataset._build_document_sample_shuffle_indices = indices


def warm_up(folder: Path) -> None:
    """Do what ranks have in common before they are forked."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.training import arguments
    from torch._dynamo import trace_rules

    import pretrain_gpt_moe  # noqa: F401

    for name in IMPORTED_LATE:
        importlib.import_module(name)
    # A run makes Megatron's parser four times, of 800 flags: a fifth of what a tiny one costs.
    made = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    arguments.add_megatron_arguments = functools.partial(add_all, made)
    share_gloo_device()
    keep_indices_of_mock_data(folder)
    trace_rules.get_torch_obj_rule_map()  # of the first function that a rank compiles
    # A rank that saves starts a process for its results, which would import all of this again.
    queue = filesystem_async.get_write_results_queue
    filesystem_async.get_write_results_queue = functools.partial(queue, mp_mode="fork")
    gc.collect()
    gc.freeze()  # a rank's collector writes to none of the pages that it shares


class Jobs(socketserver.StreamRequestHandler):
    """Those of one client, in a process of its own."""

    def handle(self) -> None:
        for line in self.rfile:
            self.wfile.write(json.dumps({"codes": run_job(json.loads(line))}).encode() + b"\n")


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """Ends with the process that started it."""

    parent = os.getppid()

    def service_actions(self) -> None:
        super().service_actions()
        if os.getppid() != self.parent:
            raise SystemExit


def main() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path.insert(0, str(ROOT))
    warm_up(Path(sys.argv[1]))
    with Server("", Jobs, bind_and_activate=False) as server:
        server.socket = socket.socket(fileno=0)
        server.serve_forever()


if __name__ == "__main__":
    main()
