"""What this device can do: the bandwidth of a copy and the rate of a dense product."""

from functools import partial

import torch
from record import Case, Figures
from timing import copy_of, device, device_microseconds

PART, PRODUCT = "What the device can do", "dense bf16 product"


def copy_figures(num_bytes: int) -> Figures:
    """GB/s of a large copy, bytes read and bytes written."""
    microseconds = device_microseconds({"copy": copy_of(num_bytes)})["copy"]
    return {"gb_s": num_bytes / microseconds / 1e3, "gib": num_bytes / 2**30}


def product_figures(size: int) -> Figures:
    """TFLOP/s of a square product of random matrices."""
    left, right = (torch.randn(size, size, device=device()).bfloat16() for _ in range(2))
    microseconds = device_microseconds({"mm": lambda: left @ right})["mm"]
    return {"tflops": 2 * size**3 / microseconds / 1e6, "size": size}


def cases(dry: bool) -> list[Case]:
    """Both."""
    return [
        Case(PART, "copy on the device", partial(copy_figures, 2**20 if dry else 2**32)),
        Case(PART, PRODUCT, partial(product_figures, 64 if dry else 8192)),
    ]
