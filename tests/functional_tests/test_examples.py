"""The example scripts: clean shell, flags that the real parser and validation accept."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import launch
import pytest

from megatron_echo import environment

EXAMPLES = sorted(
    [*(launch.ROOT / "examples").rglob("*.sh"), *(launch.ROOT / "examples").rglob("*.sbatch")]
)
SLURM = {
    "SLURM_SUBMIT_DIR": str(launch.ROOT),
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NODELIST": "node[1-4]",
    "SLURM_NNODES": "4",
}
# Stands for torchrun, srun and scontrol: srun runs its command, torchrun prints its words.
FAKES = {
    "srun": '#!/bin/sh\nwhile [ "$1" != torchrun ]; do shift; done\nexec "$@"\n',
    "scontrol": "#!/bin/sh\necho node1\necho node2\n",
    "torchrun": f"#!{sys.executable}\nimport json, sys\nprint('WORDS', json.dumps(sys.argv[1:]))\n",
}
VALIDATE = """
import os
import pretrain_gpt_moe as script
from megatron.training.arguments import validate_args

if __name__ == "__main__":
    os.environ["WORLD_SIZE"] = os.environ["EXAMPLE_WORLD_SIZE"]
    args = script.parse_args(script.extra_args_provider)
    script.check_command_line(args)
    validate_args(args)
    config = script.echo_config_from_args(args)
    assert config.num_moe_experts == args.num_experts
    print("VALID", args.world_size, args.num_experts, args.run_dir)
"""


def words_of(example: Path, tmp_path: Path) -> list[str]:
    """The words that the example gives to torchrun."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {**os.environ, **SLURM, "PATH": f"{folder}:{os.environ['PATH']}"}
    finished = subprocess.run(
        ["bash", str(example), "--train-iters", "7"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = [x for x in finished.stdout.splitlines() if x.startswith("WORDS ")]
    return json.loads(line.removeprefix("WORDS "))


def test_there_are_examples_of_every_kind() -> None:
    names = {path.name for path in EXAMPLES}
    assert {"cpu.sh", "single_gpu.sh", "one_node.sbatch", "several_nodes.sbatch"} <= names


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_shellcheck(example: Path) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    command = [str(tool) if tool.exists() else shutil.which("shellcheck") or "shellcheck"]
    finished = subprocess.run([*command, str(example)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_environment_variables_are_explained(example: Path) -> None:
    lines = example.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"export \w+=", line):
            assert "#" in line or lines[number - 1].startswith("#"), line


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_flags_are_accepted_by_the_real_parser(example: Path, tmp_path: Path) -> None:
    words = words_of(example, tmp_path)
    at = words.index("pretrain_gpt_moe.py")
    launcher, flags = words[:at], words[at + 1 :]
    assert flags[-2:] == ["--train-iters", "7"]
    processes = int(launcher[launcher.index("--nproc-per-node") + 1])
    nodes = int(launcher[launcher.index("--nnodes") + 1]) if "--nnodes" in launcher else 1
    script = tmp_path / "validate.py"
    script.write_text(VALIDATE)
    on_gpu = environment.add_missing_flags(flags, has_cuda=True, verbose=False)[len(flags) :]
    stand_ins = [*on_gpu, "--distributed-backend", "gloo"]  # what a GPU without TE would get
    runs = ["--save", str(tmp_path / "ckpt"), "--load", str(tmp_path / "ckpt")]
    argv = [*flags, *stand_ins, *(runs if "--save" in flags else [])]
    size = str(processes * nodes)
    result = launch.run(argv, script=script, env={"EXAMPLE_WORLD_SIZE": size}).check()
    assert f"VALID {size}" in result.output
