"""Plan a pipeline layout from a file of layer costs.

    python -m megatron_echo.memory.plan_layout costs.json -p 16 -v 2 --budget-gib 70

Prints why, then the value for Megatron's --pipeline-model-parallel-layout. This file is the command
line only: ``from megatron_echo.memory import plan_layout`` gives the function.
"""

import argparse
from pathlib import Path

from megatron_echo.memory.pipeline_layout import explain, plan_layout, read_costs
from megatron_echo.memory.schedules import SCHEDULES


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_echo.memory.plan_layout",
        description="Plan a pipeline layout from a file of layer costs.",
    )
    parser.add_argument(
        "costs",
        type=Path,
        help='{"layers": [{"kind": "E|t|m|L", "count": 1, "seconds": ..., "activation_bytes": ..., '
        '"static_bytes": ..., "workspace_bytes": ...}, ...]}, in the order of the model',
    )
    parser.add_argument("-p", "--pipeline-size", type=int, required=True, help="pipeline ranks")
    parser.add_argument("-v", "--virtual-size", type=int, default=1, help="chunks a rank")
    parser.add_argument("--schedule", choices=SCHEDULES, help="1f1b, or interleaved with -v")
    parser.add_argument("--num-microbatches", type=int, help="of a step; enough if left out")
    parser.add_argument("--group-size", type=int, help="microbatches a chunk runs in a row")
    parser.add_argument("--budget-gib", type=float, help="peak of a GPU; that of the even split")
    parser.add_argument(
        "--prefer",
        choices=("time", "memory"),
        default="time",
        help="the shortest step that fits, or the lowest peak with no slower step than even",
    )
    return parser


def main(words: list[str] | None = None) -> None:
    """The command line: these words after the program's name, or this process's."""
    parser = _parser()
    args = parser.parse_args(words)
    budget = None if args.budget_gib is None else args.budget_gib * 2**30
    try:
        layout = plan_layout(
            read_costs(args.costs), args.pipeline_size, args.virtual_size, args.schedule,
            args.num_microbatches, args.group_size, budget, args.prefer,
        )  # fmt: skip
        print(explain(layout))
    except ValueError as error:
        parser.exit(2, f"plan_layout: error: {error}\n")
    layout.check_with_megatron()
    print(f'--pipeline-model-parallel-layout "{layout.string}"   (read back by Megatron\'s parser)')


if __name__ == "__main__":
    main()
