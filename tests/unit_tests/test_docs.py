"""The documentation says what the source says: messages, flags, files, links."""

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import flag_reference
import launch
import pytest
import yaml

from megatron_echo.observe import simulate

DOCS = launch.ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *launch.ROOT.glob("*.md")])
SOURCES = sorted(
    [*(launch.ROOT / "megatron_echo").rglob("*.py"), *(launch.ROOT / "tools").glob("*.py")]
) + [launch.ROOT / "pretrain_gpt_moe.py"]
GAP = "\0"
"""Stands for what an f-string puts in."""


def text_of(node: ast.AST) -> str:
    """The text that an expression makes, with gaps."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return GAP


@cache
def texts() -> tuple[str, ...]:
    """Every text in the source, and the recipes of the Makefile."""
    found = {(launch.ROOT / "Makefile").read_text()}
    for path in SOURCES:
        found |= {text_of(node) for node in ast.walk(ast.parse(path.read_text()))}
    return tuple(re.sub(r"\{config\.\w+\}", GAP, text) for text in found if text.strip(GAP))


def matches(message: str, text: str) -> bool:
    """Whether the parts of a documented message stand in a text in their order."""
    place = 0
    for part in filter(str.strip, message.split("...")):
        place = text.find(part, place) + len(part)
        if place < len(part):
            return False
    return True


def rows(page: str) -> Iterator[list[str]]:
    """The cells of the tables of a page, heads left out."""
    lines = (DOCS / page).read_text().splitlines()
    for line, following in zip(lines, [*lines[1:], ""]):
        if line.startswith("|") and not line.startswith("|---") and not following.startswith("|--"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


@cache
def documented() -> tuple[str, ...]:
    """The messages that the page of troubles quotes."""
    return tuple(row[0].strip("`") for row in rows("troubleshooting.md"))


def test_every_quoted_message_is_in_the_source() -> None:
    assert len(documented()) > 150
    assert len(set(documented())) == len(documented())
    missing = [m for m in documented() if not any(matches(m, text) for text in texts())]
    assert not missing


def is_message(function: str, node: ast.AST) -> bool:
    """A raised error, or what a check of the configuration returns."""
    if isinstance(node, ast.Raise):
        return isinstance(node.exc, ast.Call) and bool(node.exc.args)
    checks = function.startswith("_check") or function == "refusal"
    return checks and isinstance(node, ast.Return) and node.value is not None


FOR_PROGRAMMERS = re.compile(  # what they say is told to whoever calls them
    r"megatron_echo/(testing|planner|experts)/|record/routing_capture|cuda_stand_ins"
    r"|record/ledger|free_ticket|memory/layout_search\.py"
)


def messages(path: Path) -> Iterator[str]:
    """What a module tells a user who did something wrong."""
    tree = ast.parse(path.read_text())
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if is_message(function.name, node):
                value = node.exc.args[0] if isinstance(node, ast.Raise) else node.value
                either = (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
                yield from map(text_of, either)
    if path.name in ("compatibility.py", "flag_checks.py"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Tuple) and len(node.elts) == 2:
                yield re.sub(r"\{config\.\w+\}", GAP, text_of(node.elts[1]))


def test_every_message_of_a_command_line_is_documented() -> None:
    """A new refusal needs a line in ``docs/troubleshooting.md``."""
    missing = []
    for path in SOURCES:
        if not FOR_PROGRAMMERS.search(path.as_posix()):
            missing += [
                text
                for text in messages(path)
                if "." in text and not any(matches(m, text) for m in documented())
            ]
    assert [text.replace(GAP, "...") for text in missing] == []


def test_the_flag_reference_is_up_to_date() -> None:
    parser = flag_reference.training_parser()
    page = flag_reference.PAGE.read_text()
    assert page == flag_reference.render(parser), "python tools/flag_reference.py --write"
    for flag in ("--moe-enable-echo", "--run-dir", "--offload-policy", "--offload-modules"):
        assert f"| `{flag}" in page


def test_an_outdated_flag_reference_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "flag_reference.md"
    old.write_text("old")
    monkeypatch.setattr(flag_reference, "PAGE", old)
    monkeypatch.setattr(flag_reference, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="out of date"):
        flag_reference.main(["--check"])
    flag_reference.main(["--write"])
    flag_reference.main(["--check"])


def test_every_flag_in_the_docs_exists() -> None:
    """In the real parser of training, or in the source of a tool."""
    parsers = (flag_reference.training_parser(), simulate.parser())
    known = {name for p in parsers for a in p._actions for name in a.option_strings}
    known |= {"--nproc-per-node", "--no-deps", "--strict", "--help"}  # torchrun, pip, mkdocs
    folders = ("megatron_echo/observe", "megatron_echo/memory", "benchmarks", "tools")
    tools = [path for folder in folders for path in (launch.ROOT / folder).rglob("*.py")]
    for path in (*tools, launch.ROOT / "tests/functional_tests/record_goldens.py"):
        known |= set(re.findall(r'"(--[a-z][a-z-]+)"', path.read_text()))
    unknown = {
        (page.name, flag)
        for page in PAGES
        for code in re.findall(r"```.*?```|`[^`]+`", page.read_text(), re.DOTALL)
        for flag in re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]*)\b(?!-)", code)
        if flag not in known and not code.startswith("```diff")
    }
    assert not unknown


def test_every_file_and_command_of_a_measurement_exists() -> None:
    """A claim names a command, whose script is there, and where the result is kept, the file."""
    table = list(rows("measurements.md"))
    assert len(table) > 20
    for claim, command, result in table:
        assert command.startswith(("`", "the same")), claim
        for code in re.findall(r"`([^`]+)`", command):
            words = code.split()
            assert words[0] in ("python", "make"), claim
            for word in words[1:]:
                if "/" in word:
                    assert (launch.ROOT / word).exists(), claim
            if "-m" in words and words[words.index("-m") + 1] != "pytest":
                assert importlib.util.find_spec(words[words.index("-m") + 1]), claim
            if words[0] == "make":
                assert f"\n{words[1]}:" in (launch.ROOT / "Makefile").read_text(), claim
        kept = [w for w in re.findall(r"`([^`]+)`", result) if "*" not in w]
        for name in kept:
            assert (launch.ROOT / name).exists(), claim


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_navigation() -> None:
    config = yaml.safe_load((launch.ROOT / "mkdocs.yml").read_text())
    named = [page for entry in config["nav"] for page in entry.values()]
    pages = [*(path.name for path in DOCS.glob("*.md")), "examples/README.md"]
    assert sorted(named) == sorted(pages)


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="the extra docs is missing")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    subprocess.run(command, cwd=launch.ROOT, check=True, capture_output=True)
    assert (tmp_path / "concepts.html").is_file()


def test_the_workflow_and_the_hooks() -> None:
    path = launch.ROOT / ".github" / "workflows" / "ci.yml"
    jobs = yaml.safe_load(path.read_text())["jobs"]
    ends = {name: job["steps"][-1]["run"] for name, job in jobs.items()}
    assert ends == {"test": "make lint test", "docs": "make docs PYTHON=python"}
    version = (launch.ROOT / ".python-version").read_text().strip()
    for step in (step for job in jobs.values() for step in job["steps"]):
        if "setup-python" in step.get("uses", ""):
            assert step["with"]["python-version"] == version
    hooks = yaml.safe_load((launch.ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]
    assert [hook["id"] for hook in hooks["hooks"]] == ["ruff-format", "ruff-check", "mypy"]
