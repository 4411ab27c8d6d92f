"""Triton's interpreter, mended where it is slow or does not compute what a GPU does."""

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter


def _convert_float(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object):
    """As a GPU converts between fp32 and bf16 or e4m3: to the nearest, and subnormals too."""
    if source == tl.bfloat16 and target == tl.float32:
        return (data.astype(np.uint32) << 16).view(np.uint32)
    if source == tl.float32 and target == tl.bfloat16:
        return torch.from_numpy(data).to(torch.bfloat16).view(torch.uint16).numpy()
    if source == tl.float32 and target == tl.float8e4nv:
        return torch.from_numpy(data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    return _unmended_convert_float(data, source, target, mode)


_unmended_convert_float = interpreter._convert_float
_unmended_dot = interpreter.InterpreterBuilder.create_dot
_unmended_patch = interpreter._patch_lang_tensor


def dot(builder: object, a, b, *args: object):
    """Not the product of the bit patterns of bf16, nor of e4m3 rounded to fp16's exponents."""
    if a.dtype in (tl.bfloat16, tl.float8e4nv):
        a, b = (builder.create_fp_to_fp(t, tl.float32, None) for t in (a, b))
    return _unmended_dot(builder, a, b, *args)


def _patch_lang_tensor(tensor: type, scope: object) -> None:
    """NumPy 2.5 makes no int of an array with one element, so that loops had no runtime bounds."""
    _unmended_patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def patch_once() -> None:
    """Patch Triton's language where a kernel starts, not again at each function that it calls.

    The second patch finds everything patched, and took half of the time of the planner's kernel.
    """

    def patch(function: types.FunctionType) -> object:
        languages = [v for v in function.__globals__.values() if v is tl or v is tl.core]
        is_patched = not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if is_patched else original(function)

    original, interpreter._patch_lang = interpreter._patch_lang, patch


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Run kernels in the interpreter; see the functions above for what is wrong with it."""
    with (
        mock.patch.object(interpreter, "_convert_float", _convert_float),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
        mock.patch.object(interpreter, "_patch_lang_tensor", _patch_lang_tensor),
    ):
        yield
