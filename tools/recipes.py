"""The figures in ``examples/*/flags.sh``: each recipe's memory, and what clones would bring it.

The comment between ``figures: begin`` and ``figures: end`` comes from the recipe's own flags, and
the table in ``examples/README.md`` from the comments::

    python tools/recipes.py --write deepseek_v3     # makes them again, minutes a recipe
    python tools/recipes.py --check                 # says where they are not what would be made

Memory is :mod:`megatron_echo.memory.estimate`'s, for the first two pipeline ranks, which keep the
most microbatches, and the last, which has the loss; offloading is left out, since what it moves
depends on measured times. The gain is the arithmetic of :mod:`megatron_echo.observe.simulate` for
the recipe's own layout, with clones and without; of a hybrid model memory is too, since Mamba's
kernels do not run on the estimate's tensors without values.
"""

import argparse
import hashlib
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_echo import cpu_backend  # noqa: E402

cpu_backend.enable(verbose=False)  # before Megatron is imported

from megatron.core.transformer.pipeline_parallel_layer_layout import (  # noqa: E402
    PipelineParallelLayerLayout,
)

from megatron_echo.memory.estimate import estimate  # noqa: E402
from megatron_echo.observe.simulate import parser as simulator_parser  # noqa: E402
from megatron_echo.observe.simulate import search_of  # noqa: E402
from megatron_echo.observe.simulation.search import Candidate, candidates  # noqa: E402
from megatron_echo.planner import auto_slots  # noqa: E402

EXAMPLES = ROOT / "examples"
README = EXAMPLES / "README.md"
ARRAYS = ("MODEL", "MOE", "ECHO", "PARALLEL", "MEMORY", "OFFLOAD", "TRAINING")
BEGIN, END = "figures: begin", "figures: end"
CLUSTER = "h100-nvl8"
LOADS = ("ultraep-low", "ultraep-high")
"""The least and the most skew that has been published of real runs."""
MOCK_DATA = ("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "31999")
WITHOUT_PEERS = ("--moe-echo-expert-dispatcher-type", "p2p")
"""An estimate has no peers: its tokens go by the all-gather, whose buffers are about those of
symmetric memory."""
WIDTH = 100


def recipes() -> list[str]:
    """Every folder with a ``flags.sh``."""
    return sorted(path.parent.name for path in EXAMPLES.glob("*/flags.sh"))


def flags_file(name: str) -> Path:
    """Where a recipe's flags and figures are."""
    return EXAMPLES / name / "flags.sh"


def flags_of(name: str, arrays: Sequence[str] = ARRAYS) -> list[str]:
    """The words of some of a recipe's arrays, as bash reads them."""
    listed = " ".join(f'"${{{array}[@]}}"' for array in arrays)
    script = f'set -eu; source "$1"; printf "%s\\0" {listed}'
    command = ["bash", "-c", script, "bash", str(flags_file(name))]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return words.split("\0")[:-1]


def gpus_of(name: str) -> int:
    """GPUs of a recipe's job."""
    header = (EXAMPLES / name / "train.sbatch").read_text()
    nodes, gpus = (
        int(re.findall(rf"^#SBATCH --{option}=(\d+)$", header, re.MULTILINE)[0])
        for option in ("nodes", "gpus-per-node")
    )
    return nodes * gpus


def digest_of(name: str) -> str:
    """Names what the figures were made from: the flags and the number of GPUs."""
    words = [str(gpus_of(name)), *flags_of(name)]
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def settings_of(name: str) -> Namespace:
    """The flags that the simulator asks for, and those that choose among its candidates."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--expert-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--num-layers-per-virtual-pipeline-stage", type=int)
    parser.add_argument("--pipeline-model-parallel-layout")
    parser.add_argument("--hybrid-layer-pattern")
    parser.add_argument("--seq-length", type=int)
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--global-batch-size", type=int)
    parser.add_argument("--num-experts", type=int)
    parser.add_argument("--recompute-granularity")
    return parser.parse_known_args(flags_of(name))[0]


def chunks_of(asked: Namespace) -> int:
    """Model chunks on each pipeline rank."""
    stages = asked.pipeline_model_parallel_size
    if asked.hybrid_layer_pattern is not None:
        return (asked.hybrid_layer_pattern.count("|") + 1) // stages
    if asked.pipeline_model_parallel_layout is not None:
        layout = PipelineParallelLayerLayout(asked.pipeline_model_parallel_layout, stages)
        return layout.virtual_pipeline_model_parallel_size
    layers = asked.num_layers_per_virtual_pipeline_stage
    return 1 if layers is None else asked.num_layers // (stages * layers)


def memory_lines(name: str) -> list[str]:
    """The estimate's command and its fullest rank."""
    if settings_of(name).hybrid_layer_pattern is not None:
        found = simulated(name, LOADS[0])[1].memory
        parts = f"states {found.states:.1f}, activations {found.activations:.1f}"
        return [
            "Memory: of the simulator, with the command below",
            f"  {found.total - found.reserve:.1f} GiB on the fullest pipeline rank ({parts})",
        ]
    stages = settings_of(name).pipeline_model_parallel_size
    wanted = sorted({0, min(1, stages - 1), stages - 1})
    flags = flags_of(name, [array for array in ARRAYS if array != "OFFLOAD"])
    found = estimate(
        [*flags, *WITHOUT_PEERS, *MOCK_DATA], gpus_of(name), flash_attention=True, stages=wanted
    )
    most = max(found, key=lambda one: one.peak)
    parts = ", ".join(
        f"{part} {getattr(most, part) / 2**30:.1f}"
        for part in ("weights", "gradients", "optimizer", "activations")
    )
    return [
        f"Memory: python -m megatron_echo.memory.estimate --ranks {gpus_of(name)} "
        f"--flash-attention --stages {' '.join(map(str, wanted))} -- all arrays but OFFLOAD, "
        + " ".join(WITHOUT_PEERS),
        f"  {most.peak / 2**30:.1f} GiB on pipeline rank {most.rank} ({parts})",
    ]


def simulator_command(name: str) -> str:
    """The simulator's flags, all but the loads."""
    asked = settings_of(name)
    return (
        f"--model {name.replace('_', '-')} --cluster {CLUSTER} --gpus {gpus_of(name)} "
        f"--ep {asked.expert_model_parallel_size} --pp {asked.pipeline_model_parallel_size} "
        f"--vpp {chunks_of(asked)} --offload-fraction 0 "
        "--token-transports symmetric_memory "
        f"--slots {auto_slots(asked.expert_model_parallel_size, asked.num_experts)} "
        f"--seq-length {asked.seq_length} "
        f"--micro-batch-size {asked.micro_batch_size} "
        f"--global-batch-size {asked.global_batch_size}"
    )


def simulated(name: str, loads: str) -> tuple[Candidate, Candidate]:
    """The recipe's layout without clones, and with them as its flags say.

    The simulator knows recomputation of whole layers only, which stands for any. Its first layout
    has even pipeline stages; those of a recipe's own layout differ by a layer.
    """
    words = [*simulator_command(name).split(), "--loads", loads]
    asked, search = settings_of(name), search_of(simulator_parser().parse_args(words))
    is_recomputed = asked.recompute_granularity is not None
    found = [one for one in candidates(search)[0] if one.layout.recompute == is_recomputed]
    plain = next(one for one in found if one.kind == "plain")
    # The simulator's p2p moves what symmetric memory does: each clone in use once.
    return plain, next(one for one in found if one.layout.weights_by == "p2p")


def gain_lines(name: str) -> list[str]:
    """The simulator's command, and balance and speed at the loads that are published."""
    command = simulator_command(name)
    lines = [f"Gain: python -m megatron_echo.observe.simulate {command} --loads ..."]
    for loads in LOADS:
        plain, echo = simulated(name, loads)
        lines.append(
            f"  {loads}: fullest rank {plain.placed.overload_routed.mean():.2f} x the mean, with "
            f"clones {echo.placed.overload_placed.mean():.2f}; "
            f"{100 * (plain.time.total / echo.time.total - 1):+.0f} % tokens a second"
        )
    return lines


def as_comment(lines: Sequence[str]) -> str:
    """Lines as a shell comment, long ones continued two places further in."""
    text = []
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        while len(line) > WIDTH - 2:
            cut = line.rindex(" ", 0, WIDTH - 2)
            text.append(line[:cut])
            line = indent + line[cut + 1 :]
        text.append(line)
    return "".join(f"# {line}\n" for line in text)


def block_of(name: str) -> str:
    """A recipe's figures, made now: what belongs between the marks.

    Raises:
        ValueError: its flags do not run, or the simulator does not know its layout.
    """
    head = (
        f"{gpus_of(name)} GPUs of 80 GB; flags {digest_of(name)}. "
        f"Again: python tools/recipes.py --write {name}"
    )
    return as_comment([head, *memory_lines(name), *gain_lines(name)])


def _parts(path: Path) -> tuple[str, str, str]:
    """A file's text up to the first mark's line, between the marks, and from the second's on."""
    text = path.read_text()
    begin = text.index("\n", text.index(BEGIN)) + 1
    end = text.rindex("\n", 0, text.index(END)) + 1
    return text[:begin], text[begin:end], text[end:]


def read_block(path: Path) -> str:
    """What stands between the marks."""
    return _parts(path)[1]


def write_block(path: Path, block: str) -> None:
    """Replace what stands between the marks."""
    before, _, after = _parts(path)
    path.write_text(before + block + after)


def table() -> str:
    """A line for each recipe, with the figures of the comments."""
    lines = [
        "| model | GPUs | layout | memory | clones would give | start |",
        "|---|---|---|---|---|---|",
    ]
    for name in recipes():
        title = flags_file(name).read_text().splitlines()[1].removeprefix("# ").split(":")[0]
        asked, block = settings_of(name), read_block(flags_file(name)).replace("\n# ", " ")
        memory = " ".join(re.findall(r"[\d.]+ GiB", block)[:1])
        gains = " to ".join(re.findall(r"([+-]\d+ %) tokens", re.sub(r" +", " ", block)))
        lines.append(
            f"| [{title}]({name}/flags.sh) | {gpus_of(name)} | EP "
            f"{asked.expert_model_parallel_size}, PP {asked.pipeline_model_parallel_size} | "
            f"{memory} | {gains} | `sbatch examples/{name}/train.sbatch` |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command line; 1 if a check found old figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    way = parser.add_mutually_exclusive_group(required=True)
    way.add_argument("--write", action="store_true", help="replace the figures")
    way.add_argument("--check", action="store_true", help="compare them")
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="which; all")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(recipes()))
    if unknown:
        parser.error(f"there is no recipe {unknown[0]}. Use {', '.join(recipes())}.")
    made = {flags_file(name): block_of(name) for name in args.names or recipes()}
    if args.write:
        for path, block in made.items():
            write_block(path, block)
        write_block(README, table())
        return 0
    old = [path for path, block in made.items() if read_block(path) != block]
    old += [README] if read_block(README) != table() else []
    for path in old:
        print(f"{path.relative_to(ROOT)} is not what would be made. Run tools/recipes.py --write.")
    return int(bool(old))


if __name__ == "__main__":
    raise SystemExit(main())
