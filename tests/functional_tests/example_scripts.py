"""Runs the example scripts with stand-ins for Slurm and torchrun, for the words they would give."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import launch

from megatron_echo import environment

SLURM = {
    "SLURM_SUBMIT_DIR": str(launch.ROOT),
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "node[1-4]",
    "SLURM_NNODES": "4",
}
# Stands for torchrun, srun and scontrol: srun runs its command, torchrun prints its words, and
# scontrol more names than a pipe holds.
FAKES = {
    "srun": '#!/bin/sh\nwhile [ "$1" != torchrun ]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/sh\nexec seq -f node%g 20000\n",
    "torchrun": f"#!{sys.executable}\nimport json, sys\nprint('WORDS', json.dumps(sys.argv[1:]))\n",
}
KERNEL_STAND_INS = Path(__file__).resolve().parent / "kernel_stand_ins.py"
VALIDATE = """
import os
import sys
import pretrain_gpt_moe as script
if "kernel_stand_ins" in os.environ["EXAMPLE_SCRIPT"]:
    sys.path.insert(0, os.path.dirname(os.environ["EXAMPLE_SCRIPT"]))
    import kernel_stand_ins
    kernel_stand_ins.install()
from megatron_echo import preflight
from megatron.training.arguments import validate_args

if __name__ == "__main__":
    os.environ["WORLD_SIZE"] = os.environ["EXAMPLE_WORLD_SIZE"]
    args = script.parse_args(script.extra_args_provider)
    preflight.check_command_line(args)
    validate_args(args)
    preflight.check_schedule(args)
    config = script.echo_config_from_args(args)
    script.offload_config(args)
    assert config.num_moe_experts == args.num_experts
    print("VALID", args.world_size, args.num_experts, args.run_dir)
"""


def nodes_of(example: Path) -> str:
    """How many nodes its header asks for; one without a header."""
    (count,) = re.findall(r"^#SBATCH --nodes=(\d+)$", example.read_text(), re.MULTILINE) or ["1"]
    return count


def start(
    example: Path, tmp_path: Path, words: Sequence[str] = (), **variables: str
) -> subprocess.CompletedProcess:
    """Run a script where torchrun only prints what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    job = {**SLURM, "SLURM_NNODES": nodes_of(example), **variables}
    return subprocess.run(
        ["bash", str(example), *words],
        env={**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"},
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def words_of(
    example: Path, tmp_path: Path, words: Sequence[str] = (), **variables: str
) -> tuple[int, list[str]]:
    """How many processes the example asks torchrun for, and the flags of the training script."""
    finished = start(example, tmp_path, words, **variables)
    assert finished.returncode == 0, finished.stderr
    (line,) = [x for x in finished.stdout.splitlines() if x.startswith("WORDS ")]
    given = json.loads(line.removeprefix("WORDS "))
    at = given.index("pretrain_gpt_moe.py")
    launcher, flags = given[:at], given[at + 1 :]
    processes = int(launcher[launcher.index("--nproc-per-node") + 1])
    nodes = int(launcher[launcher.index("--nnodes") + 1]) if "--nnodes" in launcher else 1
    return processes * nodes, flags


def validate(
    flags: Sequence[str], processes: int, tmp_path: Path, start_with: Path = launch.SCRIPT
) -> None:
    """Parse and validate a command line as ``pretrain_gpt_moe.py`` does, for so many processes.

    ``start_with`` may be ``KERNEL_STAND_INS``, where Mamba's packages are missing.
    """
    script = tmp_path / "validate.py"
    script.write_text(VALIDATE)
    on_gpu = environment.add_missing_flags(flags, has_cuda=True, verbose=False)[len(flags) :]
    stand_ins = [*on_gpu, "--distributed-backend", "gloo"]  # what a GPU without TE would get
    runs = ["--save", str(tmp_path / "ckpt"), "--load", str(tmp_path / "ckpt")]
    argv = [*flags, *stand_ins, *(runs if "--save" in flags else [])]
    size = str(processes)
    result = launch.run(
        argv, script=script, env={"EXAMPLE_WORLD_SIZE": size, "EXAMPLE_SCRIPT": str(start_with)}
    ).check()
    assert f"VALID {size}" in result.output
