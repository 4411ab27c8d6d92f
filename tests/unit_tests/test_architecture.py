"""Imports point down the house of ``docs/architecture.md``, and in no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import launch

PACKAGE = launch.ROOT / "megatron_echo"
FLOORS = (
    ("observe",),
    ("memory", "testing"),
    ("preflight",),
    ("arguments",),
    ("model_builder",),
    ("layer_specs",),
    ("transformer_layer",),
    ("moe_layer",),
    ("experts",),
    ("dispatch", "routing"),
    ("step",),
    ("free_ticket", "offload"),
    ("record", "plan_settings"),
    ("config",),
    ("flag_checks",),
    ("compatibility", "loss_settings"),
    ("planner", "cpu_backend", "host_copy", "precision"),
    (
        "flags", "host_reads", "copy_lanes", "collectives", "step_hooks", "call_roles",
        "environment", "local_modules", "per_model", "progress",
    ),
)  # fmt: skip
"""Rooms from the top; a room imports itself and rooms of floors below its own."""

FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def name_of(path: Path) -> str:
    """``dispatch.layout`` of ``megatron_echo/dispatch/layout.py``."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Each module, and the modules of this package that it imports, wherever in its text."""
    paths = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    paths.pop("__init__", None)
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            head, _, module = node.module.partition(".")
            if head != "megatron_echo":
                continue
            for alias in node.names:
                full = f"{module}.{alias.name}".strip(".")
                found[name].add(full if full in paths else module)
        found[name] -= {name, ""}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_is_in_a_room() -> None:
    assert {room(module) for module in imports()} == set(FLOOR_OF)


def test_imports_point_down() -> None:
    rising = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room(module) != room(other) and FLOOR_OF[room(module)] >= FLOOR_OF[room(other)]
    ]
    assert rising == []


def test_no_circle_of_files() -> None:
    """A package's ``__init__`` only hands names on; who imports it imports those files."""
    try:
        tuple(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None
