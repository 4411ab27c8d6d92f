"""What clones would bring on a cluster, before anything is started.

    python -m megatron_echo.observe.simulate --model deepseek-v3 --cluster h100-nvl8 --gpus 2048
    python -m megatron_echo.observe.simulate --loads runs/train/traces --model my_model.json ...

Loads come from a routing trace, a named workload or a published figure; the real planner places
them. Step time and memory are arithmetic on data sheets and printed assumptions.
"""

import argparse
import dataclasses
import logging
import warnings

import torch

from megatron_echo.flags import add_flags
from megatron_echo.observe.simulation.output import report_lines
from megatron_echo.observe.simulation.search import Search, candidates


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m megatron_echo.observe.simulate",
        description=(__doc__ or "").split("\n\n")[0],
    )
    add_flags(made, dataclasses.fields(Search))
    return made


def search_of(args: argparse.Namespace) -> Search:
    """What is to be tried, from the arguments of :func:`parser`; raises as :class:`.Search`."""
    return Search(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Search)})


def simulate(args: argparse.Namespace) -> list[str]:
    """The report's lines; raises ``ValueError`` or ``OSError`` for bad values, names or files."""
    search = search_of(args)
    return report_lines(search, *candidates(search))


def main(words: list[str] | None = None) -> None:
    """The command line: these words after the program's name, or this process's."""
    args = parser().parse_args(words)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # Megatron warns of each optional package that is absent
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        print("\n".join(simulate(args)))
    except (ValueError, OSError) as error:
        parser().exit(2, f"simulate: error: {error}\n")


if __name__ == "__main__":
    main()
