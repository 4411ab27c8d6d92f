"""Time of a training step against Megatron's layer, step by step in turns.

    python benchmarks/step_time.py [--output benchmarks/results/step_time] [--ranks 2 4]
        [--skews 0 1] [--steps 40]

Runs in the shape of the main job, a real ``pretrain()`` each, are started together, and each step
is one run's turn while the others wait and use no CPU: a step of each makes a round, in changing
order. *CPU* is user and system time of all ranks, gloo's threads included, which other work on the
machine hardly moves; *wall* is that of the slowest rank. Ratios are of one round: median and
quartiles. *plan* is the CPU time of the planner in the step's layer calls.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

from processes import (  # noqa: E402
    as_table,
    lean_main_job,
    main_job_corpus,
    results_parser,
    write_results,
)
from torch.distributed import TCPStore  # noqa: E402

LAYER, WARMUP = "--moe-enable-echo", 4
RUNS = {
    "no clones": f"{LAYER} --moe-num-echo-experts 0",
    "exact": LAYER,
    "auto": f"{LAYER} --moe-echo-tolerance auto",
}
SIZES = {2: "", 4: "--expert-model-parallel-size 4 --micro-batch-size 4"}
STORE = "STEP_TIME_STORE"
"""Environment variable of a rank: port of the store, and the name of its run."""


def worker() -> None:
    """One rank: trains, a step whenever the store says so."""
    from megatron.training import training

    import pretrain_gpt_moe  # turns the CPU backend on: before Megatron
    from megatron_echo.dispatch import dispatcher

    port, name = os.environ[STORE].split(" ", 1)
    store, rank = connected(int(port)), os.environ["RANK"]
    numbers, planned = itertools.count(), [0.0]
    train_step, backend = training.train_step, dispatcher.planner_backend

    def in_turn(*args: Any, **kwargs: Any) -> Any:
        number = next(numbers)
        store.wait([f"{name} {number}"])
        planned[0], wall, cpu = 0.0, time.perf_counter(), time.process_time()
        result = train_step(*args, **kwargs)
        seconds = time.perf_counter() - wall, time.process_time() - cpu, planned[0]
        store.set(f"{name} {number} {rank}", json.dumps(seconds))
        return result

    def timed_backend(word: str) -> Any:
        plan = backend(word)

        def timed(*args: Any) -> Any:
            begin = time.process_time()
            result = plan(*args)
            planned[0] += time.process_time() - begin
            return result

        return timed

    training.train_step, dispatcher.planner_backend = in_turn, timed_backend
    pretrain_gpt_moe.main()


def connected(port: int, is_master: bool = False) -> TCPStore:
    """The store of turns; who waits for it uses no CPU."""
    return TCPStore("127.0.0.1", port, is_master=is_master, timeout=timedelta(minutes=5))


def measure(corpus: Path, ranks: int, skew: float, steps: int) -> list[dict[str, Any]]:
    """All runs in turns; a row for each, the first without our layer where there is no skew."""
    runs = RUNS if skew else {"Megatron's layer": "", **RUNS}
    store, processes = connected(0, is_master=True), []
    times: dict[str, list[list[list[float]]]] = {name: [] for name in runs}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in runs.items():
            words = lean_main_job(corpus, Path(folder) / name, steps + WARMUP)
            words += ["--log-interval", "1000", *SIZES[ranks].split(), *flags.split()]
            words += ["--moe-echo-force-skew", str(skew)] if skew else []
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(ranks), __file__, *words]
            fixed = {"OMP_NUM_THREADS": "1", STORE: f"{store.port} {name}"}
            output = (Path(folder) / f"{name}.log").open("w")
            processes.append(
                subprocess.Popen(command, env={**os.environ, **fixed}, stdout=output, stderr=output)
            )
        try:
            for number in range(steps + WARMUP):
                for name in list(runs)[:: 1 if number % 2 else -1]:
                    store.set(f"{name} {number}", "")
                    keys = [f"{name} {number} {rank}" for rank in range(ranks)]
                    store.wait(keys)
                    times[name].append([json.loads(store.get(key)) for key in keys])
        finally:
            for process in processes:
                process.terminate()
                process.wait()
    return rows(ranks, skew, {name: measured[WARMUP:] for name, measured in times.items()})


def rows(ranks: int, skew: float, times: dict[str, list[list[list[float]]]]) -> list[dict]:
    """Medians, and ratios to the first run; of ``auto`` that to the better of the two before it."""
    cpu = {name: [sum(rank[1] for rank in step) for step in t] for name, t in times.items()}
    wall = {name: [max(rank[0] for rank in step) for step in t] for name, t in times.items()}
    better = min(("no clones", "exact"), key=lambda name: statistics.median(cpu[name]))
    found = []
    for name, measured in times.items():
        first = next(iter(times))
        row: dict[str, Any] = {"EP": ranks, "skew": skew, "run": name}
        planning = statistics.median(sum(rank[2] for rank in step) for step in measured)
        row |= {"CPU ms": statistics.median(cpu[name]) * 1e3, "plan ms": planning * 1e3}
        row |= {"wall ms": statistics.median(wall[name]) * 1e3}
        for what, of in (("CPU", cpu), ("wall", wall)):
            ratios = [a / b for a, b in zip(of[name], of[first], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            row |= {f"{what} / first": middle, f"{what} quartiles": f"{low:.2f} to {high:.2f}"}
        if name == "auto":
            row["CPU / better"] = statistics.median(
                a / b for a, b in zip(cpu[name], cpu[better], strict=True)
            )
        found.append(row)
    return found


def main() -> None:
    """The command line."""
    parser = results_parser(__doc__, "step_time")
    parser.add_argument("--ranks", type=int, nargs="+", choices=SIZES, default=[2, 4])
    parser.add_argument("--skews", type=float, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    corpus = main_job_corpus()
    found = [
        row
        for ranks in args.ranks
        for skew in args.skews
        for row in measure(corpus, ranks, skew, args.steps)
    ]
    write_results(args.output, found)
    args.output.with_suffix(".md").write_text(as_table(found) + "\n")
    print(as_table(found))


if __name__ == "__main__":
    worker() if STORE in os.environ else main()
