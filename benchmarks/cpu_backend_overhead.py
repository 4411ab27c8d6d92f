"""What the CPU backend costs a training step that needs none of its rewriting.

Alternates, step by step in one process, plain torch, the backend as it is (wrapped tensor
factories and ``Tensor.to``), and the alternative that was not taken: a ``TorchFunctionMode`` that
looks at every torch call. Prints medians and ratios to plain torch::

    python benchmarks/cpu_backend_overhead.py [--rounds 200] [--write-readme]
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

from megatron_echo import cpu_backend, environment  # noqa: E402

BEGIN, END = "<!-- cpu-backend-overhead: begin -->", "<!-- cpu-backend-overhead: end -->"
SIZES = {"tiny (hidden 64, 2 x 64 tokens)": (64, 2, 64), "main job (hidden 128)": (128, 8, 256)}


class RedirectingMode(TorchFunctionMode):
    """Rewrites ``device="cuda"`` in every torch call, as a function mode would have to."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Look at the device of one call, then make it."""
        kwargs = kwargs or {}
        if "device" in kwargs and cpu_backend._names_cuda(kwargs["device"]):
            kwargs["device"] = "cpu"
        elif func is torch.Tensor.to and len(args) > 1 and cpu_backend._names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def backend() -> Iterator[None]:
    """The CPU backend as users have it."""
    cpu_backend.enable(verbose=False)
    try:
        yield
    finally:
        cpu_backend.disable()


def training_step(hidden: int, batch: int, sequence: int) -> Callable[[], None]:
    """One step (forward, backward, Adam) of a small transformer, free of CUDA calls."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    x = torch.randn(batch, sequence, hidden)

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


def measure(step: Callable[[], None], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds a step for each way, and the median over rounds of its ratio to plain.

    The machine's speed drifts over a minute, hardly within a round: ratios are of one round.
    """
    ways: dict[str, Callable] = {
        "plain torch": contextlib.nullcontext,
        "cpu_backend": backend,
        "function mode": RedirectingMode,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            with way():
                begin = time.perf_counter()
                step()
                elapsed = time.perf_counter() - begin
            if number >= 2:
                seconds[name].append(elapsed)
    plain = seconds["plain torch"]
    return {
        name: {
            "milliseconds": statistics.median(values) * 1e3,
            "ratio": statistics.median(v / p for v, p in zip(values, plain, strict=True)),
        }
        for name, values in seconds.items()
    }


def as_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The results as a Markdown table."""
    lines = ["| step | way | median ms | against plain torch |", "|---|---|---|---|"]
    for size, ways in results.items():
        for name, result in ways.items():
            cost = (result["ratio"] - 1) * 100
            lines.append(f"| {size} | {name} | {result['milliseconds']:.2f} | {cost:+.1f} % |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=200, help="steps of each way")
    parser.add_argument(
        "--write-docs", action="store_true", help="put the table into docs/running.md"
    )
    default = ROOT / "benchmarks" / "results" / "cpu_backend_overhead.json"
    parser.add_argument("--output", type=Path, default=default)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)  # before minutes of work
    if torch.cuda.is_available():
        parser.error("this machine has a CUDA device: the CPU backend is never enabled here.")
    torch.set_num_threads(1)
    results = {name: measure(training_step(*size), args.rounds) for name, size in SIZES.items()}
    machine = environment.device_name()
    note = (
        f"{args.rounds} alternating steps each, one thread, {machine}, {date.today()}; the last "
        "column is the median over rounds of the ratio in a round."
    )
    text = f"{as_table(results)}\n\n{note}"
    print(text)
    record = {"machine": machine, "rounds": args.rounds, "results": results}
    args.output.write_text(json.dumps(record, indent=2) + "\n")
    if args.write_docs:
        page = ROOT / "docs" / "running.md"
        before, rest = page.read_text().split(BEGIN)
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
