"""What experts compute in: formats of FP8 as values, which one a run takes, and why it may not."""

from dataclasses import dataclass
from typing import Any

import torch

from megatron_echo.flags import Rows, first_refusal

_PIECE = 16
"""Bytes: packed rows and experts begin at multiples of it, as products of FP8 want."""


@dataclass(frozen=True)
class Fp8Format:
    """How elements in e4m3 share scales. All scales are powers of two.

    Attributes:
        block: elements along what a product sums over that share a scale, in E8M0; None: all that
            are summed do, in fp32.
        lines: outputs of an expert (in backward inputs) that share it too, in its weights.
        capability: of the GPUs for which torch has the products; None if it has none.
    """

    block: int | None = None
    lines: int = 1
    capability: tuple[int, int] | None = None

    @property
    def alignment(self) -> int:
        """Of widths and of the rows of a group: no scale is for two groups."""
        return self.block or _PIECE

    def scale_bytes(self, width: int, lines: int = 1) -> int:
        """Of the scales of a packed row, with the padding behind them; or of a matrix.

        Args:
            width: elements of a line.
            lines: of the matrix.
        """
        if self.block is None:
            size = lines * torch.float32.itemsize
        else:
            size = max(lines // self.lines, 1) * (width // self.block)
        return -(-size // _PIECE) * _PIECE

    def width(self, row_bytes: int) -> int:
        """Elements of a packed row of so many bytes."""
        most = _PIECE * (1 + self.block) if self.block else row_bytes  # with 16 bytes of scales
        return row_bytes - -(-row_bytes // most) * _PIECE

    def has_product(self) -> bool:
        """Whether torch multiplies it here; on a CPU the reference does."""
        if not torch.accelerator.is_available():
            return True
        return torch.cuda.get_device_capability() == self.capability


FORMATS = {
    "fp8-rowwise": Fp8Format(capability=(9, 0)),
    "mxfp8": Fp8Format(32, capability=(10, 0)),
    "fp8-blockwise": Fp8Format(128, lines=128),
}
"""By the word of ``--moe-echo-expert-precision``."""

_OF_RECIPES = {"mxfp8": "mxfp8", "blockwise": "fp8-blockwise"}
_OLDEST_FOR_TRITON = (8, 9)

_LACKS = {
    (9, 0): "needs a GPU of compute capability 9.0 (H100, H200), or from 8.9 on with "
    "--moe-echo-grouped-gemm triton. Use params-dtype.",
    (10, 0): "needs a GPU of compute capability 10.0 (B200, GB200), or from 8.9 on with "
    "--moe-echo-grouped-gemm triton. Use fp8-rowwise on 9.0, or params-dtype.",
    None: "needs a GPU of compute capability 8.9 or newer, and kernels of this package. Use "
    "--moe-echo-grouped-gemm auto there, or params-dtype.",
}


def _has_kernels(config: Any, form: Fp8Format) -> bool:
    chosen = "triton" if form.capability else "auto"
    is_chosen = config.moe_echo_grouped_gemm in ("triton", chosen)
    return is_chosen and torch.cuda.get_device_capability() >= _OLDEST_FOR_TRITON


def _refusals(form: Fp8Format) -> Rows:
    return (
        (
            lambda c: (c.moe_latent_size or c.hidden_size) % form.alignment,
            f"needs a width of a multiple of {form.alignment}. Use another --hidden-size or "
            "--moe-latent-size, or params-dtype.",
        ),
        (
            lambda c: c.moe_ffn_hidden_size % (form.alignment * c.expert_tensor_parallel_size),
            f"needs a multiple of {form.alignment} of the inner width on each expert-tensor rank, "
            "but --moe-ffn-hidden-size is {config.moe_ffn_hidden_size}. Use another one, or "
            "params-dtype.",
        ),
        (
            lambda c: torch.accelerator.is_available() and c.params_dtype != torch.bfloat16,
            "gives bf16 on a GPU, not {config.params_dtype}. Use --bf16.",
        ),
        (lambda c: not (form.has_product() or _has_kernels(c, form)), _LACKS[form.capability]),
    )


def precision_refusal(precision: str, config: Any) -> str | None:
    """Why experts cannot compute in a precision, and what to do; None if they can.

    Args:
        precision: a word of ``--moe-echo-expert-precision`` but ``auto`` and ``params-dtype``.
        config: the transformer's configuration.
    """
    if precision == "nvfp4":
        return (
            "is not built: it needs compute capability 10.0 and Transformer Engine's "
            "GroupedLinear with use_grouped_tensor, with cuBLAS 13.3 or newer. Use mxfp8."
        )
    return first_refusal(_refusals(FORMATS[precision]), config)


def expert_precision(config: Any) -> tuple[str, str | None]:
    """What experts compute in, and why ``auto`` did not take the format of the recipe.

    Args:
        config: the transformer's configuration, with the fields of this package or without.

    Returns:
        A word of ``--moe-echo-expert-precision`` but ``auto``, and a reason or None.
    """
    given: str = getattr(config, "moe_echo_expert_precision", "auto")
    if given != "auto":
        return given, None
    precision = _OF_RECIPES.get(getattr(config, "fp8_recipe", None) or "") if config.fp8 else None
    if precision is None:
        return "params-dtype", None
    if config.first_last_layers_bf16:
        return "params-dtype", f"{precision} is for all layers, unlike --first-last-layers-bf16"
    reason = precision_refusal(precision, config)
    return ("params-dtype" if reason else precision), reason and f"{precision} {reason}"
