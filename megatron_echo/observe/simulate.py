"""What clones would bring on a cluster, before anything is started.

    python -m megatron_echo.observe.simulate --model deepseek-v3 --cluster h100-nvl8 --gpus 2048
    python -m megatron_echo.observe.simulate --loads runs/train/traces --model my_model.json ...

Loads come from a routing trace, a named workload or a published figure; the real planner places
them. Step time and memory are arithmetic on data sheets and printed assumptions.
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

from megatron_echo.flags import add_flags
from megatron_echo.observe.simulation.output import megatron_flags, report_lines
from megatron_echo.observe.simulation.search import Candidate, Search, candidates


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m megatron_echo.observe.simulate",
        description=(__doc__ or "").split("\n\n")[0],
    )
    add_flags(made, dataclasses.fields(Search))
    made.add_argument("--json", type=Path, metavar="FILE", help="save all candidates")
    return made


def search_of(args: argparse.Namespace) -> Search:
    """What is to be tried.

    Args:
        args: of :func:`parser`.

    Raises:
        ValueError: a value out of range.
    """
    return Search(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Search)})


def _record(search: Search, one: Candidate) -> dict[str, Any]:
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
        "seconds": {**one.time._asdict(), "total": one.time.total},
        "gib": {**one.memory._asdict(), "total": one.memory.total},
        "fits": one.memory.total <= search.run.cluster.hbm_gib,
        "flags": shlex.split(" ".join(megatron_flags(search.run, one, search.by_node))),
    }


def simulate(args: argparse.Namespace) -> list[str]:
    """The report's lines; writes the record, if asked for.

    Raises:
        ValueError: bad values, names or files.
        FileNotFoundError: a file or trace that is not there.
    """
    search = search_of(args)
    found, left_out = candidates(search)
    if args.json is not None:
        records = [_record(search, one) for one in found]
        args.json.write_text(json.dumps(records, indent=1) + "\n")
    return report_lines(search, found, left_out)


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
