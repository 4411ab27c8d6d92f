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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_echo.observe.simulation.calibration import calibrate
from megatron_echo.observe.simulation.cluster import (
    CLUSTERS,
    Assumptions,
    Cluster,
    load_cluster,
)
from megatron_echo.observe.simulation.cost_model import CostModel
from megatron_echo.observe.simulation.layout import Work
from megatron_echo.observe.simulation.models import MODELS, load_model
from megatron_echo.observe.simulation.output import (
    basis_lines,
    best_lines,
    calibration_lines,
    check_trace,
    megatron_flags,
    table,
    trace_lines,
)
from megatron_echo.observe.simulation.search import (
    PIPELINES,
    TRANSPORTS,
    Candidate,
    Search,
    Setting,
    candidates,
    fastest,
)
from megatron_echo.observe.simulation.workloads import (
    PUBLISHED,
    WORKLOADS,
    at_overload,
    load_workload,
)
from megatron_echo.planner.bound import MAX_TOLERANCE

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
"""In a checkout: the measurements that the model is compared with."""

OVERLOADS = (1.1, 1.5, 2.0, 3.0, 4.0)
"""Skews of the plot's last panel."""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m megatron_echo.observe.simulate",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    made.add_argument(
        "--loads",
        default="lognormal 1.0",
        metavar="NAME|DIR|FILE",
        help=f"{', '.join((*WORKLOADS, *PUBLISHED))}, 'overload X' (max/mean of ranks), a folder "
        "of traces, or a JSON file of experts' shares",
    )
    made.add_argument("--model", default="deepseek-v3", help=f"{', '.join(MODELS)}, or a .json")
    made.add_argument(
        "--cluster", default="h100-nvl8", help=f"{', '.join(CLUSTERS)}, or a .json or .yaml file"
    )
    for field in dataclasses.fields(Cluster)[1:]:
        kind = int if field.type is int else float
        made.add_argument(_flag(field.name), type=kind, help="in place of the cluster's own")
    _add_choices(made)
    made.add_argument("--by-node", action="store_true", help="tell the planner of nodes")
    made.add_argument("--seq-length", type=int, default=4096, help="tokens of a sequence")
    made.add_argument("--micro-batch-size", type=int, default=1, help="sequences")
    made.add_argument(
        "--global-batch-size", type=int, help="sequences; 8 microbatches a rank at PP=1"
    )
    made.add_argument(
        "--calls", type=int, default=48, help="layer calls to plan for each EP size, 0 for all"
    )
    made.add_argument("--trace-tolerance", type=float, default=0.02, help="of the traced run")
    made.add_argument("--trace-ranks-per-node", type=int, help="of the traced run")
    made.add_argument(
        "--results", type=Path, metavar="DIR",
        help="measurements that the model is compared with; in a checkout its own",
    )  # fmt: skip
    made.add_argument("--plot", type=Path, metavar="PNG", help="save the sweep's picture")
    made.add_argument("--json", type=Path, metavar="FILE", help="save all candidates")
    for field in dataclasses.fields(Assumptions):
        made.add_argument(
            _flag(field.name), type=float, default=field.default, help="assumed, see the source"
        )
    return made


def _add_choices(made: argparse.ArgumentParser) -> None:
    """What is tried."""
    made.add_argument("--ep", type=int, nargs="+", help="expert-parallel sizes; all that divide")
    made.add_argument("--pp", type=int, nargs="+", default=list(PIPELINES), help="pipeline sizes")
    made.add_argument(
        "--vpp", type=int, nargs="+", default=[1, 2], help="chunks of a pipeline rank"
    )
    made.add_argument("--tp", type=int, default=1, help="tensor parallelism, not of experts")
    made.add_argument("--cp", type=int, default=1, help="context parallelism")
    made.add_argument(
        "--offload-fraction", type=float, nargs="+", default=[0.0, 1.0], metavar="X",
        help="shares of what is kept for backward that may go to the host",
    )  # fmt: skip
    made.add_argument(
        "--token-transports", nargs="+", choices=TRANSPORTS,
        help="how tokens travel with clones; all that --moe-echo-token-transport takes",
    )  # fmt: skip
    made.add_argument(
        "--slots", nargs="+", default=["all", "1", "2"], metavar="S",
        help="clone slots of a rank; all: as many as it has experts",
    )  # fmt: skip
    made.add_argument("--tolerance", type=float, nargs="+", default=[0.02], help="of balance")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _slots(word: str) -> int | None:
    if word == "all":
        return None
    if not word.isdecimal() or int(word) == 0:
        raise ValueError(f"--slots {word} is not a number of slots. Use 1, 2, ... or all.")
    return int(word)


def _check_values(args: argparse.Namespace) -> None:
    counted = [
        (name, getattr(args, name)) for name in ("seq_length", "micro_batch_size", "tp", "cp")
    ]
    counted += [
        (name, value) for name in ("ep", "pp", "vpp") for value in getattr(args, name) or []
    ]
    if args.global_batch_size is not None:
        counted.append(("global_batch_size", args.global_batch_size))
    for name, value in counted:
        if value < 1:
            raise ValueError(f"{_flag(name)} {value} is below 1. Use 1 or more.")
    for field in dataclasses.fields(Assumptions):
        value = getattr(args, field.name)
        if not 0 <= value < float("inf") or (value == 0 and "efficiency" in field.name):
            raise ValueError(f"{_flag(field.name)} {value} is out of range. Use more than 0.")
    for value in args.tolerance:
        if not 0 <= value <= MAX_TOLERANCE:
            raise ValueError(f"--tolerance {value} is not between 0 and {MAX_TOLERANCE}. Use 0.02.")
    for value in args.offload_fraction:
        if not 0 <= value <= 1:
            raise ValueError(f"--offload-fraction {value} is no share. Use 0 to 1.")
    if args.calls < 0:
        raise ValueError(f"--calls {args.calls} is negative. Use 0 for all.")


def prepare(args: argparse.Namespace) -> tuple[CostModel, Search]:
    """The cost model and what is to be tried.

    Raises:
        ValueError: bad values, names or files.
        FileNotFoundError: a file or trace that is not there.
    """
    _check_values(args)
    changes = {field.name: getattr(args, field.name) for field in dataclasses.fields(Cluster)[1:]}
    cluster = load_cluster(args.cluster, changes)
    model = load_model(args.model)
    assumed = Assumptions(
        **{field.name: getattr(args, field.name) for field in dataclasses.fields(Assumptions)}
    )
    data = max(1, cluster.gpus // (args.tp * args.cp))
    batch = args.global_batch_size or 8 * data * args.micro_batch_size
    work = Work(args.seq_length, args.micro_batch_size, batch)
    sizes = args.ep or [
        size
        for size in (2**n for n in range(1, 11))
        if model.experts % size == 0 and size <= cluster.gpus
    ]
    settings = tuple(
        Setting(_slots(word), tolerance) for word in args.slots for tolerance in args.tolerance
    )
    if not sizes:
        raise ValueError(f"No EP size divides {model.experts} experts. Give --ep 1.")
    search = Search(
        loads=load_workload(args.loads),
        gpus=cluster.gpus,
        experts=tuple(sizes),
        pipelines=tuple(args.pp),
        settings=settings,
        calls=args.calls,
        by_node=args.by_node,
        virtuals=tuple(args.vpp),
        tensor=args.tp,
        context=args.cp,
        offloads=tuple(dict.fromkeys(args.offload_fraction)),
        transports=tuple(args.token_transports or TRANSPORTS),
    )
    return CostModel(cluster, model, work, assumed), search


def gains(
    model: CostModel, search: Search, found: Sequence[Candidate]
) -> list[tuple[float, float]]:
    """How much longer plain EP takes than clones, by max/mean as routed, at the winner's sizes."""
    hbm = model.cluster.hbm_gib
    winner = fastest((one for one in found if one.kind == "echo"), hbm)
    if winner is None:
        return []
    layout = winner.layout
    same = dataclasses.replace(
        search,
        experts=(layout.expert,),
        pipelines=(layout.pipeline,),
        virtuals=(layout.virtual,),
        settings=(Setting(winner.placed.slots, winner.placed.tolerance),),
        calls=16,
    )
    points = []
    for overload in OVERLOADS:
        try:
            loads = at_overload(f"overload {overload}", overload, "drawn")
            tried, _ = candidates(model, dataclasses.replace(same, loads=loads))
        except ValueError:  # so much skew is not possible at this size
            continue
        plain = fastest((one for one in tried if one.kind == "plain"), hbm)
        echo = fastest((one for one in tried if one.kind == "echo"), hbm)
        if plain and echo:
            routed = float(plain.placed.overload_routed.mean())
            points.append((routed, plain.time.total / echo.time.total - 1))
    return points


def _record(model: CostModel, search: Search, one: Candidate) -> dict[str, Any]:
    placed = one.placed
    return {
        "name": one.name,
        "kind": one.kind,
        "layout": dataclasses.asdict(one.layout),
        "slots": placed.slots,
        "tolerance": placed.tolerance,
        "overload_routed": float(placed.overload_routed.mean()),
        "overload_placed": float(placed.overload_placed.mean()),
        "clones": float(placed.clones.mean()),
        "seconds": {**dataclasses.asdict(one.time), "total": one.time.total},
        "gib": {**dataclasses.asdict(one.memory), "total": one.memory.total},
        "fits": one.memory.total <= model.cluster.hbm_gib,
        "flags": shlex.split(" ".join(megatron_flags(model, one, search.by_node)))
        if one.kind != "what if"
        else None,
    }


def simulate(args: argparse.Namespace) -> list[str]:
    """The report's lines; writes the picture and the record, if asked for.

    Raises:
        ValueError: bad values, names or files.
        FileNotFoundError: a file or trace that is not there.
    """
    model, search = prepare(args)
    work, shape = model.work, model.model
    lines = [
        f"{shape.name} ({shape.parameters / 1e9:.1f} G parameters) on {search.gpus:,} GPUs of "
        f"{model.cluster.name}, TP={search.tensor}, CP={search.context}, {work.global_batch:,} "
        f"sequences of {work.sequence} tokens a step; loads: {search.loads.name} "
        f"({search.loads.basis})",
        "",
    ]
    if search.loads.traces:
        node = args.trace_ranks_per_node
        check = check_trace(search.loads.traces, args.trace_tolerance, node)
        lines += [*trace_lines(check, args.trace_tolerance), ""]
    results = args.results or (RESULTS if RESULTS.is_dir() else None)
    compared = calibrate(results) if results is not None else None
    found, left_out = candidates(model, search)
    lines += [f"Left out: {reason}" for reason in left_out]
    lines += [*table(model, found), "", *best_lines(model, search, found), ""]
    if compared is not None:
        lines += [*calibration_lines(compared), ""]
    lines += basis_lines(model, search)
    if args.plot is not None:
        from megatron_echo.observe.simulation.plots import save_plot

        save_plot(model, found, gains(model, search, found), search.loads.name, args.plot)
    if args.json is not None:
        records = [_record(model, search, one) for one in found]
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
