"""Whether a CUDA graph could hold a function, found out on a CPU.

    def step(hidden, probs, routing_map):           # forward and backward, as it would be captured
        layer_stages(hidden, probs, routing_map).sum().backward()

    assert_capturable(step, balanced, skewed, empty)    # each a tuple of arguments

A replay runs the recorded kernels on the recorded addresses: whatever a call decides on the host is
decided for good. So several calls whose inputs differ in value, never in shape, must run the same
operators, with the same numbers, on the same memory:

* no host read, and no shape that depends on data (see :class:`no_host_sync`);
* no tensor made from Python numbers: a copy from pageable memory cannot be captured;
* the same operators in the same order, with the same constants and wiring;
* the same allocations: shape, strides, dtype and device of everything that is made;
* memory from outside at fixed addresses, none of it made by an earlier call.

What it cannot see: what :class:`no_host_sync` cannot, kernels and collectives inside an extension,
and operators that another thread starts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from megatron_echo.cpu_backend.recorded_graph import arrived
from megatron_echo.testing.no_host_sync import Hit, caller, no_host_sync


class Violation(NamedTuple):
    """One reason why the function cannot be captured.

    Its kind is ``"host read"``, ``"data-dependent shape"``, ``"host copy"``, ``"memory"``, or what
    differs between calls: ``"operators"``, ``"constants"``, ``"allocations"``, ``"wiring"``.
    """

    kind: str
    what: str  # what happens there
    where: str  # ``file:line`` outside torch; in torch's own backward the line that started it


class NotCapturableError(AssertionError):
    """A CUDA graph could not hold the function; :attr:`violations` says why."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = list(violations)
        lines = [f"  {v.kind}: {v.what}\n      at {v.where}" for v in self.violations]
        super().__init__(
            f"A CUDA graph cannot hold this function, for {len(lines)} reason(s). "
            "Decide on the device what depends on data.\n" + "\n".join(lines)
        )


class Made(NamedTuple):
    """A tensor as an operator takes or makes it.

    ``"made 3"`` is the fourth storage that the call allocated, ``"outside 0"`` the first of those
    that were there before.
    """

    memory: str
    layout: tuple  # shape, strides, offset, dtype, device and bytes of the storage

    def __str__(self) -> str:
        shape, _, _, dtype, *_ = self.layout
        return f"{str(dtype).removeprefix('torch.')}{list(shape)} ({self.memory})"


class Operator(NamedTuple):
    """One operator of a call: name, tensors in and out, other arguments, and ``file:line``."""

    name: str
    inputs: tuple[Made, ...]
    outputs: tuple[Made, ...]
    constants: tuple
    where: str

    def __str__(self) -> str:
        given = ", ".join(map(str, (*self.inputs, *self.constants)))
        return f"{self.name}({given}) -> {', '.join(map(str, self.outputs)) or 'nothing'}"


class _Memory:
    """Names of the storages that the calls meet; held weakly, so that no address comes again."""

    def __init__(self) -> None:
        self._known: dict[int, StorageWeakRef] = {}
        self._outside: dict[int, str] = {}
        self._made: dict[int, str] = {}
        self._number = 0
        self.stale: set[int] = set()

    def begin(self, are_kept: bool) -> None:
        """A call begins; what the last one made is ``stale`` unless it may be kept."""
        if not are_kept:
            self.stale.update(self._made)
        self._made, self._number = {}, 0

    def name(self, tensor: Tensor, is_output: bool) -> tuple[str, bool]:
        """The name of a tensor's storage, and whether an earlier call made it."""
        storage = StorageWeakRef(tensor.untyped_storage())
        key = storage.cdata
        is_new = key not in self._known
        self._known.setdefault(key, storage)
        if is_new and is_output:
            self._made[key] = f"made {self._number}"
            self._number += 1
        if key in self._made:
            return self._made[key], False
        return self._outside.setdefault(key, f"outside {len(self._outside)}"), key in self.stale


class _Recorder(TorchDispatchMode):
    """Writes down the operators of one call."""

    def __init__(self, memory: _Memory) -> None:
        super().__init__()
        self.operators: list[Operator] = []
        self.violations: list[Violation] = []
        self._memory = memory

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        code, line = caller()
        name, where = str(func), f"{code.co_filename}:{line}" if code else "unknown"
        is_copied = name == "aten.lift_fresh.default"
        if is_copied:
            what = "a tensor made from Python numbers is copied from the host (use torch.full)"
            self.violations.append(Violation("host copy", what, where))
        inputs = self._made(leaves, is_copied, name, where)
        outputs = self._made(tree_leaves(result), True, name, where)
        constants = tuple(_constant(leaf) for leaf in leaves if not isinstance(leaf, Tensor))
        self.operators.append(Operator(name, inputs, outputs, constants, where))
        return arrived(func, result)

    def _made(
        self, leaves: Sequence[Any], is_output: bool, operator: str, where: str
    ) -> tuple[Made, ...]:
        found = []
        for tensor in leaves:
            if not isinstance(tensor, Tensor):
                continue
            memory, is_stale = self._memory.name(tensor, is_output)
            layout = (
                tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype,
                tensor.device, tensor.untyped_storage().nbytes(),
            )  # fmt: skip
            found.append(Made(memory, layout))
            if is_stale:
                what = f"{operator} takes a tensor {list(tensor.shape)} that an earlier call made"
                self.violations.append(Violation("memory", what, where))
        return tuple(found)


def _constant(value: Any) -> str:
    """The value, or the type of what has no value of its own, as a process group."""
    numbers = bool | int | float | complex | str | None
    words = torch.dtype | torch.device | torch.layout | torch.memory_format
    return repr(value) if isinstance(value, numbers | words) else type(value).__name__


def _shape_is_data(kind: str) -> bool:
    """True for a hit of an operator whose output's shape depends on data."""
    namespace, _, name = kind.partition(".")
    packet = getattr(torch.ops.aten, name, None) if namespace == "aten" else None
    if packet is None:
        return False
    tags = (getattr(packet, overload).tags for overload in packet.overloads())
    return any(torch.Tag.dynamic_output_shape in of_one for of_one in tags)


def _of_hit(hit: Hit) -> Violation:
    if _shape_is_data(hit.kind):
        return Violation("data-dependent shape", f"{hit.kind} makes it", hit.where)
    return Violation("host read", f"{hit.kind} needs a device value on the host", hit.where)


def _difference(first: list[Operator], other: list[Operator], number: int) -> Violation | None:
    """The first difference between call 0 and another."""
    for place, (expected, found) in enumerate(zip(first, other)):
        kind = _kind_of_difference(expected, found)
        if kind is not None:
            what = f"operator {place} is {expected} with input 0, {found} with input {number}"
            if found.where != expected.where:
                what += f" (there from {found.where})"
            return Violation(kind, what, expected.where)
    if len(first) == len(other):
        return None
    longer = max(first, other, key=len)
    following = longer[min(len(first), len(other))]
    which = 0 if longer is first else number
    what = f"{len(first)} with input 0, {len(other)} with input {number}; only input {which}"
    return Violation("operators", f"{what} goes on with {following}", following.where)


def _kind_of_difference(first: Operator, other: Operator) -> str | None:
    if first.name != other.name:
        return "operators"
    if first.constants != other.constants:
        return "constants"
    tensors, others = (*first.inputs, *first.outputs), (*other.inputs, *other.outputs)
    if [tensor.layout for tensor in tensors] != [tensor.layout for tensor in others]:
        return "allocations"
    return "wiring" if tensors != others else None


def _buffers(inputs: Sequence[Any]) -> list[Tensor]:
    """A buffer for each tensor of the first input; the others must fit into it."""
    leaves, structure = tree_flatten(inputs[0])
    for number, given in enumerate(inputs[1:], 1):
        others, other_structure = tree_flatten(given)
        pairs = list(zip(leaves, others, strict=False))
        if structure != other_structure or not all(_fits(*pair) for pair in pairs):
            raise ValueError(
                f"Input {number} differs from input 0 in structure, in a shape or a dtype, or in "
                "a value that is no tensor. Pass inputs that differ in the values of tensors only."
            )
    return [
        leaf.detach().clone().requires_grad_(leaf.requires_grad)
        for leaf in leaves
        if isinstance(leaf, Tensor)
    ]


def _fits(leaf: Any, other: Any) -> bool:
    if not (isinstance(leaf, Tensor) and isinstance(other, Tensor)):
        return type(leaf) is type(other) and bool(leaf == other)
    looks = [(t.shape, t.dtype, t.device, t.requires_grad) for t in (leaf, other)]
    return looks[0] == looks[1]


def assert_capturable(
    fn: Callable[..., object], *inputs: Any, warmup: int = 1, allow: Sequence[str] = ()
) -> list[Operator]:
    """Fail unless every call of ``fn`` does the same on the device, and reads nothing there.

    As in a capture, the tensors of an input are copied into buffers, the same for all, before each
    call. What a call changes, such as gradients that add up, stays changed.

    Args:
        fn: what would be captured; it runs backward itself, if at all.
        inputs: at least two; each a tuple of arguments, or one argument. They have equal shapes
            and should differ in what decides: a balanced, a skewed and an empty routing.
        warmup: calls with the first input that are not judged: they may read, and make what stays.
        allow: code that may read, as in :class:`no_host_sync`.

    Returns:
        The operators of one call, in order.

    Raises:
        NotCapturableError: with every read and, for each input, the first difference.
        ValueError: fewer than two inputs, or inputs that differ in more than values.
    """
    if len(inputs) < 2:
        raise ValueError(
            "One input cannot show what depends on data. Pass at least two that differ in value."
        )
    inputs = tuple(given if isinstance(given, tuple) else (given,) for given in inputs)
    buffers = _buffers(inputs)
    leaves, structure = tree_flatten(inputs[0])
    remaining = iter(buffers)
    leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    arguments = tree_unflatten(leaves, structure)
    calls: list[list[Operator]] = []
    violations: list[Violation] = []
    memory = _Memory()
    for call, given in enumerate((*inputs[:1] * warmup, *inputs), -warmup):
        tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        with torch.no_grad():
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor)
        memory.begin(are_kept=call <= 0)
        with _Recorder(memory) as recorder, no_host_sync("record", allow) as sync:
            fn(*arguments)
        if call >= 0:
            calls.append(recorder.operators)
            violations += [*map(_of_hit, sync.hits), *recorder.violations]
    for number, operators in enumerate(calls[1:], 1):
        difference = _difference(calls[0], operators, number)
        violations += [difference] if difference else []
    if violations:
        raise NotCapturableError(list(dict.fromkeys(violations)))
    return calls[0]
