"""What a call of a layer in training is: asked where it happens, never guessed from its order.

Autograd knows. Backward runs in a graph task; the node that it works on is the ``ctx`` that a
checkpoint's forward had, the same Python object. Inside any ``autograd.Function.forward`` forward
mode is switched off as well as gradient mode; a plain ``torch.no_grad()`` leaves it on.

A checkpoint's ``ctx`` lives as long as a graph refers to it. That of a pass under ``no_grad`` (a
reference model's, with full recomputation) is gone at once: that pass belonged to no step.
"""

import sys
import weakref
from enum import Enum
from typing import Any

import torch
from torch.autograd.function import FunctionCtx


class Role(Enum):
    """What the pass through a layer that runs now is."""

    RECORDED = "recorded"  # gradients are recorded
    FIRST_PASS = "first pass"  # of a checkpoint, without gradients
    RECOMPUTED = "recomputed"  # that pass again, in backward, with gradients
    REPEATED = "repeated"  # again in backward, though recorded at first (not re-entrant)
    UNRECORDED = "unrecorded"  # nothing of the kind, trains nothing: ``no_grad``, inference

    @property
    def counts(self) -> bool:
        """Whether this is the one pass of its tokens that is counted: with gradients, once."""
        return self in (Role.RECORDED, Role.RECOMPUTED)

    @property
    def is_again(self) -> bool:
        """Whether backward runs a pass of these tokens once more."""
        return self in (Role.RECOMPUTED, Role.REPEATED)


_FIRST_PASSES: weakref.WeakSet[FunctionCtx] = weakref.WeakSet()
"""Checkpoints whose first pass had a layer in it."""


def role_of_call() -> Role:
    """The role of the pass that runs now."""
    in_backward = torch._C._current_graph_task_id() != -1
    is_known = checkpoint_run_again() is not None
    if torch.is_grad_enabled():
        if not in_backward:
            return Role.RECORDED
        return Role.RECOMPUTED if is_known else Role.REPEATED
    if torch.is_inference_mode_enabled() or torch._C._is_fwd_grad_enabled():
        return Role.UNRECORDED
    checkpoints = checkpoints_of_first_pass()
    if not checkpoints:
        return Role.UNRECORDED
    if in_backward and not is_known:
        return Role.REPEATED
    _FIRST_PASSES.update(checkpoints)
    return Role.FIRST_PASS


def checkpoint_run_again() -> FunctionCtx | None:
    """The checkpoint that backward runs again now, if its first pass had a layer in it."""
    if torch._C._current_graph_task_id() == -1:
        return None
    node = torch._C._current_autograd_node()
    return node if isinstance(node, FunctionCtx) and node in _FIRST_PASSES else None


def checkpoints_of_first_pass() -> list[FunctionCtx]:
    """The ``ctx`` of each ``autograd.Function.forward`` on the Python stack, innermost first.

    Only such frames are opened: ``f_locals`` of others would keep their tensors alive.
    """
    found, frame = [], sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            first: Any = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, FunctionCtx):
                found.append(first)
        frame = frame.f_back  # type: ignore[assignment]
    return found
