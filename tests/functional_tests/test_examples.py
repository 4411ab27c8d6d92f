"""The example scripts: clean shell, flags that the real parser and validation accept."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import launch
import pytest
from example_scripts import validate, words_of

SCRIPTS = sorted(
    [*(launch.ROOT / "examples").rglob("*.sh"), *(launch.ROOT / "examples").rglob("*.sbatch")]
)
# Those that run by themselves; the recipes have a test of their own.
EXAMPLES = [
    path
    for path in SCRIPTS
    if path.name in {"cpu.sh", "single_gpu.sh", "one_node.sbatch", "several_nodes.sbatch"}
]


def name_of(path: Path) -> str:
    return str(path.relative_to(launch.ROOT / "examples"))


def test_there_are_examples_of_every_kind() -> None:
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_shellcheck(script: Path) -> None:
    tool = Path(sys.executable).with_name("shellcheck")
    command = [str(tool) if tool.exists() else shutil.which("shellcheck") or "shellcheck"]
    finished = subprocess.run([*command, str(script)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_environment_variables_are_explained(script: Path) -> None:
    lines = script.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"export \w+=", line):
            assert "#" in line or lines[number - 1].startswith("#"), line


@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_flags_are_accepted_by_the_real_parser(example: Path, tmp_path: Path) -> None:
    processes, flags = words_of(example, tmp_path, ["--train-iters", "7"])
    assert flags[-2:] == ["--train-iters", "7"]
    validate(flags, processes, tmp_path)


def test_reinforcement_learning() -> None:
    """Two steps: what is trained has the sampler's log-probabilities, as it has its routing."""
    script = launch.ROOT / "examples" / "post_training" / "grpo.py"
    log = launch.run(["--steps", "2"], 2, script=script).check().output
    found = re.findall(r"reward (\S+) in step (\d); sampler and training differ by (\S+) in", log)
    assert [step for _, step, _ in found] == ["1", "2"]
    assert all(0 < float(reward) < 1 and float(off) < 1e-5 for reward, _, off in found)
    assert log.count("max/mean load of ranks: routed") == 2
