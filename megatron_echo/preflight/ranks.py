"""All ranks of a run end when one of them fails before the first step.

A rank that fails alone would leave the others in a collective, for ever or until NCCL's timeout.
Where that can happen, until training begins, each rank has a thread that asks the store of the
process group four times a second whether one has failed.
"""

import contextlib
import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.checkpoint.api import CheckpointException

from megatron_echo.preflight.failures import explain, explain_full_disk, report

_POLL_SECONDS = 0.25
_LINGER_SECONDS = 5.0  # rank 0 serves the store: it goes last
_BEHIND_SECONDS = 1.0  # so that torchrun names the rank that failed
_LOST_SECONDS = 60.0
_CHECKED, _FAILED, _SPEAKERS, _ENDED = "checked", "failed", "speakers", "ended"


class Ranks:
    """The ranks of a run, from the first check of a file to the end of training."""

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._is_training = False
        self._stop = threading.Event()
        self._store = _store(args)

    def wait_for_first(self) -> None:
        """Go on when rank 0 has come here too: it checks files that the others would trip over."""
        if self._store is None:
            return
        if self._args.rank == 0:
            self._store.set(_CHECKED, "")
        while not self._store.check([_CHECKED]):
            time.sleep(_POLL_SECONDS)

    def begin_training(self) -> None:
        """Stop watching: the first step begins, or there is none."""
        self._is_training = True
        self._stop.set()

    @contextlib.contextmanager
    def end_together(self) -> Iterator[None]:
        """Around what may fail on one rank alone.

        A known fault is said once, by the first rank that meets it, and ends all with its code, by
        a ``SystemExit``. An unknown one keeps its traceback, and ends the others with code 1 before
        training.
        """
        self._stop = threading.Event()
        if self._store is not None:
            watched = (self._store, self._stop)
            threading.Thread(target=self._watch, args=watched, daemon=True).start()
        try:
            yield
        except (Exception, CheckpointException) as error:  # torch derives the latter otherwise
            self._stop.set()
            known = explain(error, self._args, self._is_training)
            if known is None and self._is_training:
                if disk := explain_full_disk(error, self._args):
                    report(disk)
                raise
            is_first, code = self._tell(known.code if known is not None else 1)
            if known is not None and is_first:
                report(known.text)
            self._linger()
            if known is None and (is_first or code == 1):
                raise
            raise SystemExit(code) from error
        finally:
            self._stop.set()

    def _tell(self, code: int) -> tuple[bool, int]:
        """Tell the others; whether this rank is the first to do so, and the first one's code."""
        if self._store is None:
            return os.environ.get("LOCAL_RANK", "0") == "0", code
        try:
            is_first = self._store.add(_SPEAKERS, 1) == 1
            if is_first:
                self._store.set(_FAILED, str(code))
            code = int(self._store.get(_FAILED))
            self._store.set(f"{_ENDED}/{self._args.rank}", "")
            return is_first, code
        except DistError:  # rank 0 is gone: better said twice than never
            return True, code

    def _linger(self) -> None:
        """Let rank 0, whose process serves the store, wait until all others have heard."""
        if self._store is None or self._args.rank != 0:
            return
        deadline = time.monotonic() + _LINGER_SECONDS
        others = [f"{_ENDED}/{rank}" for rank in range(1, self._args.world_size)]
        while time.monotonic() < deadline and not self._store.check(others):
            time.sleep(_POLL_SECONDS)

    def _watch(self, store: Store, stop: threading.Event) -> None:
        """End this process when another rank has failed."""
        while not stop.wait(_POLL_SECONDS):
            try:
                if not store.check([_FAILED]):
                    continue
                code = int(store.get(_FAILED))
                store.set(f"{_ENDED}/{self._args.rank}", "")
                if _is_served():
                    time.sleep(_BEHIND_SECONDS)
                self._linger()
            except DistError:  # rank 0 is gone without a word; the main thread may end by itself
                if stop.wait(_LOST_SECONDS):
                    return
                code = 1
            sys.stdout.flush()
            os._exit(code)


def _store(args: Namespace) -> Store | None:
    """A connection to the store that ``init_process_group`` will use, served by rank 0.

    None where nobody else waits, or where Megatron's in-process restart deals with failures.
    """
    if args.world_size == 1 or args.inprocess_restart or args.fake_process_group:
        return None
    if "MASTER_ADDR" not in os.environ:
        return None  # Megatron will say so
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        args.world_size,
        is_master=args.rank == 0 and not _is_served(),
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"megatron_echo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _is_served() -> bool:
    """Whether torchrun serves the store, in place of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
