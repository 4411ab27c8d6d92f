"""Every command in README, CONTRIBUTING and the documentation is run, or says what it needs.

``WAYS`` has a row for each: what runs in its place here, which other test runs it, or the words
that must stand beside it. A new command without a row fails the first test.
"""

import ast
import dataclasses
import fcntl
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import launch
import pytest

PAGES = [
    path
    for path in (
        launch.ROOT / "README.md",
        launch.ROOT / "CONTRIBUTING.md",
        launch.ROOT / "examples" / "README.md",
        *sorted((launch.ROOT / "docs").glob("*.md")),
    )
    if path.exists()
]
BEGINS = re.compile(
    r"(\.venv/bin/)?(make|python3?|torchrun|sbatch|srun|bash|sh|pip|pipx|pre-commit|mkdocs) +\S"
)


@dataclasses.dataclass(frozen=True)
class Way:
    """How a kind of command is tried out.

    Attributes:
        pattern: of the whole command, without a comment.
        run: what runs in its place, with ``{tmp}`` for a folder; it must end with code 0.
        test: the test that runs it.
        needs: words that must stand in its line, or in the paragraph or row that it is in.
    """

    pattern: str
    run: str = ""
    test: str = ""
    needs: str = ""


UNIT, FUNCTIONAL = "tests/unit_tests", "tests/functional_tests"
THE_TESTS = "the run that this test is part of"
OTHER_SCRIPTS = f"{FUNCTIONAL}/test_entry_script.py::test_any_megatron_script_takes_our_layer"
WAYS = (
    Way(r"make (test|test-all|lint|format)", test=THE_TESTS),
    Way(r"python -m pytest tests/\S+( tests/\S+)*", test=THE_TESTS),
    Way(r"make train( ARGS=.*)?",
        run="python tools/main_job.py --train-iters 5 --lr-warmup-iters 0 --eval-iters 1 "
        "--moe-router-topk 4 --run-dir {tmp} --tensorboard-dir {tmp}/tb --save {tmp}/ckpt"),
    Way(r"make docs", test=f"{UNIT}/test_docs.py::test_the_site_builds"),
    Way(r"make goldens .*",
        run="python tests/functional_tests/record_goldens.py moe_echo_ep1 --dry-run"),
    Way(r"make overhead",
        run="python benchmarks/cpu_backend_overhead.py --rounds 1 --output {tmp}/overhead.json"),
    Way(r"make gpu-check.*", needs="needs (GPUs|a CUDA device)"),
    Way(r"python tools/gpu_check\.py --stage 2 --dry-run",
        test=f"{UNIT}/test_gpu_benchmarks.py::test_the_second_stage"),
    Way(r"python tools/compile_kernels\.py .*",
        test=f"{UNIT}/test_gpu_benchmarks.py::"
        "test_kernels_are_compiled_once_wherever_their_folder_lies"),
    Way(r"bash examples/single_gpu\.sh", needs="needs GPUs"),
    Way(r"sbatch examples/slurm/\w+\.sbatch", needs="needs a cluster"),
    Way(r"(DATA=\S+ TOKENIZER=\S+ )?sbatch examples/\w+/train\.sbatch",
        test=f"{FUNCTIONAL}/test_recipes.py::test_the_job_parses_and_resumes"),
    Way(r"bash examples/smoke\.sh \w+",
        test=f"{FUNCTIONAL}/test_recipes.py::test_the_small_twin_trains"),
    Way(r"(pip|pipx|pre-commit) .*", needs="needs the network"),
    Way(r"bash examples/cpu\.sh( .*)?",
        run="bash examples/cpu.sh --train-iters 2 --run-dir {tmp} --tensorboard-dir {tmp}"),
    Way(r"(python|torchrun .*) -m megatron_echo\.cpu_backend pretrain_gpt\.py FLAGS",
        test=OTHER_SCRIPTS),
    Way(r"torchrun \.\.\. pretrain_gpt_moe\.py YOUR FLAGS .*",
        test=f"{FUNCTIONAL}/test_production.py::test_watching_changes_nothing"),
    Way(r"(torchrun|python -m torch\.distributed\.run) --nproc-per-node 2 "
        r"examples/post_training/grpo\.py",
        test=f"{FUNCTIONAL}/test_examples.py::test_reinforcement_learning"),
    Way(r"torchrun .* --spec megatron_echo\.layer_specs gpt_moe_block_spec", test=OTHER_SCRIPTS),
    Way(r"python -m megatron_echo\.observe\.report .*",
        test=f"{UNIT}/observe/test_report.py::test_two_runs"),
    Way(r"python -m megatron_echo\.observe\.simulate .*",
        run="python -m megatron_echo.observe.simulate --model deepseek-v3 --cluster h100-nvl8 "
        "--gpus 1024 --ep 8 --pp 8 --calls 2"),
    Way(r"python -m megatron_echo\.memory\.estimate .*",
        test=f"{UNIT}/memory/test_estimate.py::test_command_line"),
    Way(r"python -m megatron_echo\.memory\.plan_layout .*",
        test=f"{UNIT}/memory/test_pipeline_layout.py::test_command_line"),
    Way(r"python tools/flag_reference\.py .*",
        test=f"{UNIT}/test_docs.py::test_an_outdated_flag_reference_is_noticed"),
    Way(r"python tests/functional_tests/flag_table\.py",
        test=f"{FUNCTIONAL}/test_flag_table.py::test_the_page_is_up_to_date"),
    Way(r"python benchmarks/planner\.py",
        run="python benchmarks/planner.py --quick --output {tmp}/planner"),
    Way(r"python benchmarks/traffic\.py.*",
        run="python benchmarks/traffic.py --quick --output {tmp}/traffic"),
    Way(r"python benchmarks/kept_bytes\.py",
        run="python benchmarks/kept_bytes.py --quick --output {tmp}/kept"),
    Way(r"python benchmarks/homecoming_bytes\.py",
        run="python benchmarks/homecoming_bytes.py --quick"),
    Way(r"python benchmarks/planner_slots\.py",
        run="python benchmarks/planner_slots.py --quick"),
    Way(r"python benchmarks/moe_layer\.py( --routings packed .*)?",
        run="python benchmarks/moe_layer.py --quick --no-training --output {tmp}/layer "
        "--routings natural packed"),
    Way(r"python benchmarks/same_mathematics\.py.*",
        run="python benchmarks/same_mathematics.py --steps 11 --only 1 --output {tmp}/same"),
    Way(r"python benchmarks/echo\.py.*",
        run="python benchmarks/echo.py --rounds 1 --iterations 3 --ranks 2 --output {tmp}/echo"),
    Way(r"python benchmarks/router_losses\.py",
        run="python benchmarks/router_losses.py --steps 11 --output {tmp}/losses"),
    Way(r"python benchmarks/memory_over_step\.py",
        run="python benchmarks/memory_over_step.py --output {tmp}/memory_over_step"),
    Way(r"python benchmarks/fp8_loss\.py.*",
        run="python benchmarks/fp8_loss.py --steps 11 --ranks 1 --seeds 1 --output {tmp}/fp8_loss"),
    Way(r"python benchmarks/aux_loss\.py",
        run="python benchmarks/aux_loss.py --output {tmp}/aux.json"),
    Way(r"python benchmarks/offload_simulator\.py",
        run="python benchmarks/offload_simulator.py --output {tmp}/offload"),
    Way(r"python benchmarks/pipeline_layout\.py",
        run="python benchmarks/pipeline_layout.py --output {tmp}/layout"),
)  # fmt: skip


def commands() -> Iterator[tuple[str, str]]:
    """Each command, and the text around it that may say what it needs."""
    for page in PAGES:
        for number, part in enumerate(re.split(r"^```.*\n", page.read_text(), flags=re.MULTILINE)):
            if number % 2:  # between fences
                found = [(line, line) for line in part.splitlines()]
            else:
                blocks = re.split(r"\n\n|\n(?=\|)", part)
                found = [(code, b) for b in blocks for code in re.findall(r"`([^`]+)`", b)]
            for code, around in found:
                if BEGINS.match(code):
                    command = re.sub(r"\s+#.*", "", code).removeprefix(".venv/bin/")
                    yield " ".join(command.split()), " ".join(around.split())


COMMANDS = sorted(set(commands()))


def way_of(command: str) -> Way | None:
    return next((way for way in WAYS if re.fullmatch(way.pattern, command)), None)


def test_every_command_has_a_way_and_every_way_a_command() -> None:
    assert len(COMMANDS) > 40
    assert [command for command, _ in COMMANDS if way_of(command) is None] == []
    used = {way_of(command) for command, _ in COMMANDS}
    assert [way.pattern for way in WAYS if way not in used] == []


def test_what_a_command_needs_stands_beside_it() -> None:
    """Somebody without GPUs must see it before they start the command."""
    silent = [
        command
        for command, around in COMMANDS
        if (way := way_of(command)) and way.needs and not re.search(way.needs, around)
    ]
    assert silent == []


def test_a_new_command_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("Run\n\n```\npython tools/new.py   # now\n```\n\nor `make cake`, not `make`.\n")
    monkeypatch.setattr(sys.modules[__name__], "PAGES", [page])
    found = [command for command, _ in commands()]
    assert found == ["python tools/new.py", "make cake"]
    assert not any(map(way_of, found))


@pytest.mark.parametrize("way", [way for way in WAYS if "::" in way.test], ids=lambda w: w.test)
def test_the_named_test_exists(way: Way) -> None:
    file, name = way.test.split("::")
    tree = ast.parse((launch.ROOT / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_word_that_looks_like_a_file_is_one() -> None:
    missing = [
        (command, word)
        for command, _ in COMMANDS
        for word in command.split()
        if re.match(r"(tests|tools|benchmarks|examples)/", word)
        and not (launch.ROOT / word).exists()
    ]
    assert missing == []


def test_make_targets_exist_and_start_files_that_do() -> None:
    targets = sorted({c.split()[1] for c, _ in COMMANDS if c.startswith("make ")})
    command = ["make", "--dry-run", "PYTHON=python3", *targets]
    finished = subprocess.run(command, cwd=launch.ROOT, capture_output=True, text=True, check=True)
    scripts = re.findall(r"\bpython3 (\S+\.py)", finished.stdout)
    assert len(scripts) >= 4
    assert all((launch.ROOT / script).is_file() for script in scripts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", [way for way in WAYS if way.run], ids=lambda way: way.pattern)
def test_command(way: Way, tmp_path: Path) -> None:
    """One at a time: several build the same corpus, and all of them measure."""
    words = shlex.split(way.run.format(tmp=tmp_path))
    scripts = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{scripts}:{os.environ['PATH']}",
        "PYTHONPATH": launch.PYTHONPATH,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    environment.pop("TRITON_INTERPRET", None)  # conftest's
    if words[0] == "python":
        words[0] = sys.executable
    with open(Path(tmp_path).parents[1] / "documented_commands.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        finished = subprocess.run(
            words, cwd=launch.ROOT, env=environment, capture_output=True, text=True, check=False
        )
    assert finished.returncode == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"
