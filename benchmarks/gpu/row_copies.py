"""Tokens into rows and back, and the activation between: bandwidth beside a plain copy's.

bf16, all experts on one GPU, even routing. The bytes of a floor are those that must move: each
token and row in use is read once and written once. ``of_copy`` is the time of a plain copy that
moves so many bytes over the operation's own.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from record import Case, Figures
from timing import copy_of, device, device_microseconds, release_memory
from torch import Tensor

from megatron_echo.dispatch.layout import DispatchLayout, build_layout, round_rows
from megatron_echo.dispatch.permute import rows_to_tokens, tokens_to_rows
from megatron_echo.dispatch.reroute import compact_routing
from megatron_echo.experts.activation import expert_activation, weighted_activation

PART = "Copies of rows, and the activation"
Shape = tuple[int, int, int, int, int]
SHAPES: dict[str, Shape] = {  # tokens, hidden size, width of an expert, experts of a token, experts
    "DeepSeek-V3": (4096, 7168, 2048, 8, 256),
    "Qwen3-30B-A3B": (8192, 2048, 768, 8, 128),
    "Mixtral-8x7B": (8192, 4096, 14336, 2, 8),
}
DRY_SHAPES: dict[str, Shape] = {"dry run": (32, 16, 8, 2, 4)}
OPERATIONS = ("dispatch", "combine", "activation")
DIRECTIONS = ("forward", "backward")
TARGETS = ("of_copy >= 0.8",)
SWIGLU = SimpleNamespace(
    gated_linear_unit=True, activation_func=torch.nn.functional.silu,
    activation_func_clamp_value=None, glu_linear_offset=0.0,
)  # fmt: skip


def draw(*shape: int) -> Tensor:
    """Random bf16 numbers on the device."""
    return torch.randn(shape, device=device()).bfloat16()


def draw_layout(shape: Shape) -> DispatchLayout:
    """The layout of a random even routing in a buffer that just holds it."""
    tokens, _, _, topk, experts = shape
    chosen = torch.rand(tokens, experts, device=device()).topk(topk).indices
    return build_layout(chosen, experts, round_rows(tokens * topk))


def operation_of(name: str, shape: Shape) -> tuple[Callable[[], Tensor], list[Tensor], list[int]]:
    """An operation, the tensors that have gradients, and the floor's bytes in both directions."""
    tokens, hidden, ffn, topk, _ = shape
    layout = draw_layout(shape)
    pairs, rows = tokens * topk, layout.rows
    buffer_rows = rows.row_src.shape[0]
    if name == "dispatch":
        given = [draw(tokens, hidden).requires_grad_()]
        floor = 2 * hidden * (tokens + pairs)
        return partial(tokens_to_rows, *given, rows), given, [floor, floor]
    if name == "combine":  # fp32 on the side of the tokens
        given = [draw(buffer_rows, hidden).requires_grad_()]
        floor = hidden * (4 * tokens + 2 * pairs)
        return partial(rows_to_tokens, *given, rows), given, [floor, floor]
    given = [draw(buffer_rows, 2 * ffn), torch.rand(buffer_rows, device=device())]
    given = [tensor.requires_grad_() for tensor in given]
    floors = [pairs * (2 * 3 * ffn + 4), pairs * (2 * 5 * ffn + 8)]
    activation = expert_activation(SWIGLU)
    return partial(weighted_activation, *given, layout.ends, activation), given, floors


def measure(name: str, direction: str, shape: Shape) -> Figures:
    """Time and bandwidth of one operation in one direction."""
    torch.manual_seed(0)
    operation, given, floors = operation_of(name, shape)
    floor = floors[DIRECTIONS.index(direction)]
    function: Callable[[], object] = operation
    if direction == "backward":
        output = operation()
        gradient = torch.randn_like(output)
        function = partial(torch.autograd.grad, output, given, gradient, retain_graph=True)
    times = device_microseconds({"kernel": function, "copy": copy_of(floor)})
    return {
        "kernel_us": times["kernel"],
        "floor_mib": floor / 2**20,
        "gb_s": floor / times["kernel"] / 1e3,
        "copy_gb_s": floor / times["copy"] / 1e3,
        "of_copy": times["copy"] / times["kernel"],
    }


def measure_layout(shape: Shape) -> Figures:
    """Microseconds of what decides the rows: the map's choices, then the layout."""
    tokens, _, _, topk, experts = shape
    chosen = torch.rand(tokens, experts, device=device()).topk(topk).indices
    chosen_map = torch.zeros(tokens, experts, dtype=torch.bool, device=device())
    chosen_map.scatter_(1, chosen, True)
    compact = partial(compact_routing, chosen_map, topk)
    layout = partial(build_layout, compact(), experts, round_rows(tokens * topk))
    times = device_microseconds({"compact": compact, "layout": layout})
    return {f"{name}_us": value for name, value in times.items()}


def cases(dry: bool) -> list[Case]:
    """Each operation of each model in both directions; then what has no floor."""

    def alone(name: str, direction: str, shape: Shape) -> Figures:
        release_memory()
        return measure(name, direction, shape)

    shapes = DRY_SHAPES if dry else SHAPES
    found = [
        Case(PART, f"{model}, {name} {direction}", partial(alone, name, direction, shape), TARGETS)
        for model, shape in shapes.items()
        for name in OPERATIONS
        for direction in DIRECTIONS
    ]
    return found + [
        Case(PART, f"{model}, layout", partial(measure_layout, shape))
        for model, shape in shapes.items()
    ]
