"""What this machine and this Python have, asked once and in one place.

The answers become Megatron flags: stock Megatron's defaults assume CUDA, Transformer Engine and
apex, and fail late and obscurely where one of them is missing.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import socket
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def on_gpu(tensor: torch.Tensor) -> bool:
    """True for a tensor that kernels can work on: fake ones say CUDA and have no memory."""
    return tensor.is_cuda and not isinstance(tensor, FakeTensor)


def interprets_triton() -> bool:
    """Whether Triton's kernels run on a CPU, in its interpreter, which the tests have to mend."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs_triton(tensor: torch.Tensor) -> bool:
    """True for a tensor that Triton's kernels work on: :func:`on_gpu`, or in its interpreter."""
    is_real_cpu = tensor.is_cpu and not isinstance(tensor, FakeTensor)
    return on_gpu(tensor) or (is_real_cpu and interprets_triton())


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _find_transformer_engine() -> bool:
    """True if it imports: an installed one whose libraries do not fit is as good as none."""
    if importlib.util.find_spec("transformer_engine") is None:
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _find_apex() -> bool:
    """True for NVIDIA apex; the package of that name on the package index is something else."""
    try:
        return importlib.util.find_spec("apex.multi_tensor_apply") is not None
    except ModuleNotFoundError:
        return False


def find_hybrid_ep() -> Any:
    """DeepEP's ``HybridEPBuffer``; None where it is not installed or too old to be static."""
    try:
        buffer = importlib.import_module("deep_ep").HybridEPBuffer
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None
    parameters = inspect.signature(buffer.dispatch_with_permute).parameters
    return buffer if "non_blocking" in parameters else None


_OLDEST_NCCL_EP = (2, 30, 4)


def find_nccl_ep() -> Any:
    """Megatron's module over NCCL EP; None where Transformer Engine or NCCL is too old for it."""
    from megatron.core.transformer.moe import fused_a2a

    if fused_a2a.new_nccl_ep_buffer is None or torch.cuda.nccl.version() < _OLDEST_NCCL_EP:
        return None
    return fused_a2a


HAVE_TRANSFORMER_ENGINE = _find_transformer_engine()
HAVE_APEX = _find_apex()
HAVE_MASKED_SOFTMAX_KERNEL = importlib.util.find_spec("scaled_masked_softmax_cuda") is not None
HAVE_WGRAD_FUSION = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None

Flag = tuple[str, ...]
"""A flag and its values, as they stand on a command line."""

_LOCAL_LAYERS: Flag = ("--transformer-impl", "local")
_NO_MASKED_SOFTMAX: Flag = ("--no-masked-softmax-fusion",)
_NO_WGRAD_FUSION: Flag = ("--no-gradient-accumulation-fusion",)
_NO_PERSISTENT_NORM: Flag = ("--no-persist-layer-norm",)
_NO_ROPE_FUSION: Flag = ("--no-rope-fusion",)
_NO_FUSED_MEAN: Flag = ("--no-gradient-reduce-div-fusion",)  # gloo has no sum that scales
_WITHOUT_CUDA: tuple[Flag, ...] = (
    ("--distributed-backend", "gloo"), _LOCAL_LAYERS, _NO_MASKED_SOFTMAX, _NO_WGRAD_FUSION,
    _NO_PERSISTENT_NORM, ("--no-bias-swiglu-fusion",), ("--no-bias-gelu-fusion",), _NO_ROPE_FUSION,
    ("--no-bias-dropout-fusion",),
)  # fmt: skip
_ALWAYS: tuple[Flag, ...] = (("--eval-interval", "1000"),)


def is_flag_given(flag: str, argv: Sequence[str]) -> bool:
    """True if ``flag`` is on the command line, as ``--flag value`` or ``--flag=value``."""
    return any(word == flag or word.startswith(flag + "=") for word in argv)


def flags_to_add(argv: Sequence[str], has_cuda: bool) -> list[Flag]:
    """The flags that this machine, with CUDA or without, needs and a command line leaves unset.

    A flag that the user gave is never touched, even where it cannot work here.
    """
    wanted: list[Flag] = list(_ALWAYS)
    if not has_cuda:
        wanted += _WITHOUT_CUDA
        if "--use-megatron-fsdp" in argv:
            wanted.append(_NO_FUSED_MEAN)
    else:
        if not HAVE_TRANSFORMER_ENGINE:
            wanted += [_LOCAL_LAYERS, _NO_ROPE_FUSION]
        if not (HAVE_TRANSFORMER_ENGINE or HAVE_APEX):
            wanted.append(_NO_PERSISTENT_NORM)
        if not (HAVE_TRANSFORMER_ENGINE or HAVE_MASKED_SOFTMAX_KERNEL):
            wanted.append(_NO_MASKED_SOFTMAX)
        if not HAVE_WGRAD_FUSION:
            wanted.append(_NO_WGRAD_FUSION)
    return [flag for flag in wanted if not is_flag_given(flag[0], argv)]


def add_missing_flags(argv: Sequence[str], has_cuda: bool, verbose: bool = True) -> list[str]:
    """Append the flags that this machine needs and ``argv``, Megatron's command line, leaves unset.

    ``verbose`` prints one line that lists what was added, on the process with ``RANK`` 0.
    """
    added = flags_to_add(argv, has_cuda)
    if verbose and added and os.environ.get("RANK", "0") == "0":
        words = " ".join(" ".join(flag) for flag in added)
        print(f"[megatron_echo] flags set for this machine, left unset by you: {words}", flush=True)
    return [*argv, *(word for flag in added for word in flag)]


def skip_dataset_compilation(replace: Callable[[Any, str, Any], None] = setattr) -> bool:
    """Keep Megatron from running ``make`` for a dataset helper that is already compiled.

    The megatron-core wheel ships ``helpers_cpp`` compiled but without its Makefile, and
    ``compile_helpers()`` ends the process when ``make`` fails. Where the compiled module is
    there, the call is replaced by nothing, with ``replace(module, name, value)``, and the
    answer is True.
    """
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return False
    from megatron.core.datasets import utils

    replace(utils, "compile_helpers", lambda: None)
    return True


def peer_memory_refusal(
    ranks: int, group: str = "expert-parallel group", flag: str = "--expert-model-parallel-size"
) -> str | None:
    """Why ranks cannot address each other's memory here, and what to do; None if they may.

    Args:
        ranks: consecutive expert-parallel ones that must.
        group: what they are called.
        flag: that says how many they are.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    if local % ranks:
        return (
            f"needs each {group} on one machine, but its size is {ranks} and a machine runs "
            f"{local} processes. Use auto, or for {flag} a divisor of {local}."
        )
    if ranks > 1 and torch.accelerator.is_available():
        from torch.distributed import _symmetric_memory as symmetric_memory

        if symmetric_memory.get_backend(torch.device("cuda")) is None:
            return "needs a PyTorch with symmetric memory for CUDA. Use another transport."
    return None


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def machine_number() -> int:
    """A number below 2^32 of this machine since it was started."""
    boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
    return zlib.crc32((socket.gethostname() + boot).encode())


def has_peer_memory() -> bool:
    """Whether this process's GPU reaches the memory of the others that it sees."""
    from torch.distributed import _symmetric_memory as symmetric_memory

    if symmetric_memory.get_backend(torch.device("cuda")) is None:
        return False
    here = torch.cuda.current_device()
    others = (other for other in range(torch.cuda.device_count()) if other != here)
    return all(torch.cuda.can_device_access_peer(here, other) for other in others)


@dataclass(frozen=True)
class Speeds:
    """What one device reaches: half of the products and 0.8 of the links on its data sheet."""

    flops: float  # of products in bf16, operations a second
    inside: float  # bytes a second in one direction to ranks of its node
    across: float  # to ranks of other nodes
    fp8_gain: float = 2.0  # how many times as fast products in FP8 are


_SPEEDS = {
    8: Speeds(156e12, 240e9, 20e9),  # A100, 200 Gbit/s
    9: Speeds(494e12, 360e9, 40e9),  # H100, H200, 400 Gbit/s
    10: Speeds(1125e12, 720e9, 40e9),  # B200
    None: Speeds(5e10, 1e9, 1e9, 1.0),  # a core of a CPU in fp32, gloo
}
"""By the major number of the compute capability; None for a CPU."""


def device_speeds() -> Speeds:
    """Of this device as stated, of the nearest known one where it is not."""
    if not torch.accelerator.is_available():  # the CPU backend leaves it truthful
        return _SPEEDS[None]
    major, _ = torch.cuda.get_device_capability()
    return _SPEEDS[min(max(major, 8), 10)]


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide what a run computes; None where one is absent."""
    names = ("megatron-core", "torch", "triton", "transformer-engine", "numpy", "megatron-echo")
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name() -> str:
    """The GPU's name, or the CPU's model name where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, os.uname().machine)


def training_args() -> Any:
    """Megatron's arguments while its training loop runs, None outside it."""
    try:
        from megatron.training import global_vars
    except ImportError:  # where only Megatron-Core is used
        return None
    args = global_vars._GLOBAL_ARGS
    return args if hasattr(args, "curr_iteration") else None
