"""What clones would bring on a cluster, before anything is started.

    python -m megatron_echo.observe.simulate --model deepseek-v3 --cluster h100-nvl8 --gpus 2048
    python -m megatron_echo.observe.simulate --loads runs/train/traces --model my_model.json ...

Loads come from a routing trace, a named workload, a published figure or a file of shares; the real
planner places them. Step time and memory are arithmetic on data sheets and printed assumptions.
"""

import argparse
import dataclasses
import json
import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from megatron_echo.observe.simulation.inputs import CLUSTERS, MODELS, load
from megatron_echo.observe.simulation.layout import Run, Work
from megatron_echo.observe.simulation.output import (
    basis_lines,
    best_lines,
    megatron_flags,
    table,
    trace_lines,
)
from megatron_echo.observe.simulation.search import TRANSPORTS, Candidate, Search, candidates
from megatron_echo.observe.simulation.workloads import PUBLISHED, WORKLOADS, load_workload
from megatron_echo.planner.bound import MAX_TOLERANCE


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m megatron_echo.observe.simulate",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    names = ", ".join((*WORKLOADS, *PUBLISHED))
    add("--loads", default="lognormal 1.0", metavar="NAME|DIR|FILE",
        help=f"{names}, 'overload X' (max/mean of ranks), a folder of traces, or a JSON file of "
        "experts' shares")  # fmt: skip
    add("--model", default="deepseek-v3", help=f"{', '.join(MODELS)}, or a .json file")
    add("--cluster", default="h100-nvl8", help=f"{', '.join(CLUSTERS)}, or a .json file")
    add("--gpus", type=int, help="in place of the cluster's own")
    add("--ep", type=int, nargs="+", help="expert-parallel sizes; all that divide")
    add("--pp", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="pipeline sizes")
    add("--vpp", type=int, nargs="+", default=[1, 2], help="chunks of a pipeline rank")
    add("--tp", type=int, default=1, help="tensor parallelism, not of experts")
    add("--cp", type=int, default=1, help="context parallelism")
    add("--offload-fraction", type=float, nargs="+", default=[0.0, 1.0], metavar="X",
        help="shares of what is kept for backward that may go to the host")  # fmt: skip
    add("--token-transports", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS),
        help="how tokens travel with clones")  # fmt: skip
    add("--slots", nargs="+", default=["all", "1", "2"], metavar="S",
        help="clone slots of a rank; all: as many as it has experts")  # fmt: skip
    add("--tolerance", type=float, nargs="+", default=[0.02], help="of balance")
    add("--by-node", action="store_true", help="tell the planner of nodes")
    add("--seq-length", type=int, default=4096, help="tokens of a sequence")
    add("--micro-batch-size", type=int, default=1, help="sequences")
    add("--global-batch-size", type=int, help="sequences; 8 microbatches a rank at PP=1")
    add("--calls", type=int, default=48, help="layer calls to plan for each EP size, 0 for all")
    add("--plot", type=Path, metavar="PNG", help="save the sweep's picture")
    add("--json", type=Path, metavar="FILE", help="save all candidates")
    return made


def _slots(word: str) -> int | None:
    if word == "all":
        return None
    if not word.isdecimal() or int(word) == 0:
        raise ValueError(f"--slots {word} is not a number of slots. Use 1, 2, ... or all.")
    return int(word)


def _check_values(args: argparse.Namespace) -> None:
    batch = args.global_batch_size
    for flag, values in (
        ("seq-length", [args.seq_length]), ("micro-batch-size", [args.micro_batch_size]),
        ("global-batch-size", [] if batch is None else [batch]), ("ep", args.ep or []),
        ("pp", args.pp), ("vpp", args.vpp), ("tp", [args.tp]), ("cp", [args.cp]),
    ):  # fmt: skip
        if min(values, default=1) < 1:
            raise ValueError(f"--{flag} {min(values)} is below 1. Use 1 or more.")
    for value in args.tolerance:
        if not 0 <= value <= MAX_TOLERANCE:
            raise ValueError(f"--tolerance {value} is not between 0 and {MAX_TOLERANCE}. Use 0.02.")
    for value in args.offload_fraction:
        if not 0 <= value <= 1:
            raise ValueError(f"--offload-fraction {value} is no share. Use 0 to 1.")
    if args.calls < 0:
        raise ValueError(f"--calls {args.calls} is negative. Use 0 for all.")


def prepare(args: argparse.Namespace) -> tuple[Run, Search]:
    """What is run where, and what is to be tried.

    Raises:
        ValueError: bad values, names or files.
        FileNotFoundError: a file or trace that is not there.
    """
    _check_values(args)
    cluster, model = load(CLUSTERS, args.cluster), load(MODELS, args.model)
    if args.gpus is not None:
        cluster = dataclasses.replace(cluster, gpus=args.gpus)
    data = max(1, cluster.gpus // (args.tp * args.cp))
    batch = args.global_batch_size or 8 * data * args.micro_batch_size
    powers = [2**n for n in range(1, 11)]
    sizes = args.ep or [n for n in powers if model.experts % n == 0 and n <= cluster.gpus]
    search = Search(
        loads=load_workload(args.loads), experts=tuple(sizes), pipelines=tuple(args.pp),
        slots=tuple(map(_slots, args.slots)), tolerances=tuple(args.tolerance), calls=args.calls,
        by_node=args.by_node, virtuals=tuple(args.vpp), tensor=args.tp, context=args.cp,
        offloads=tuple(dict.fromkeys(args.offload_fraction)),
        transports=tuple(args.token_transports),
    )  # fmt: skip
    return Run(cluster, model, Work(args.seq_length, args.micro_batch_size, batch)), search


def _record(run: Run, search: Search, one: Candidate) -> dict[str, Any]:
    placed = one.placed
    words = shlex.split(" ".join(megatron_flags(run, one, search.by_node)))
    return {
        "name": one.name,
        "kind": one.kind,
        "layout": dataclasses.asdict(one.layout),
        "slots": placed.slots,
        "tolerance": placed.tolerance,
        "overload_routed": float(placed.overload_routed.mean()),
        "overload_placed": float(placed.overload_placed.mean()),
        "clones": float(placed.clones.mean()),
        "seconds": {**one.time._asdict(), "total": one.time.total},
        "gib": {**one.memory._asdict(), "total": one.memory.total},
        "fits": one.memory.total <= run.cluster.hbm_gib,
        "flags": None if one.kind == "what if" else words,
    }


def simulate(args: argparse.Namespace) -> list[str]:
    """The report's lines; writes the picture and the record, if asked for.

    Raises:
        ValueError: bad values, names or files.
        FileNotFoundError: a file or trace that is not there.
    """
    run, search = prepare(args)
    (cluster, model, work), loads = run, search.loads
    lines = [
        f"{model.name} ({model.parameters / 1e9:.1f} G parameters) on {cluster.gpus:,} GPUs of "
        f"{cluster.name}, TP={search.tensor}, CP={search.context}, {work.global_batch:,} "
        f"sequences of {work.sequence} tokens a step; loads: {loads.name} ({loads.basis})",
        "",
    ]
    if loads.traces:
        node = cluster.gpus_per_node if search.by_node else None
        lines += [*trace_lines(loads.traces, search.tolerances[0], node), ""]
    found, left_out = candidates(run, search)
    lines += [f"Left out: {reason}" for reason in left_out]
    lines += [*table(run, found), "", *best_lines(run, search, found), ""]
    lines += basis_lines(run, search)
    if args.plot is not None:
        from megatron_echo.observe.simulation.plots import save_plot

        save_plot(run, search, found, args.plot)
    if args.json is not None:
        records = [_record(run, search, one) for one in found]
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    return lines


def main(words: list[str] | None = None) -> None:
    """The command line.

    Args:
        words: without the program's name; None for those of this process.
    """
    args = parser().parse_args(words)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron warns of each optional package that is absent
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        print("\n".join(simulate(args)))
    except (ValueError, OSError) as error:
        print(f"simulate: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
