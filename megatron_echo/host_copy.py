"""The one way in which a layer brings values to the host: asked for, counted, waited for late."""

from typing import Any

import torch
from torch import Tensor

from megatron_echo.environment import on_gpu


class HostCopy:
    """A tensor on its way to the host.

    :meth:`read` waits for it. That is the only host read of the layer, so
    ``no_host_sync(allow=["host_copy.py:HostCopy.read"])`` is how to watch everything else.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._arrived = tensor, None
        self._values: list[Any] | None = None
        if on_gpu(tensor):
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> list[Any]:
        """The values, as nested lists."""
        if self._values is None:
            if self._arrived is not None:
                self._arrived.synchronize()
            self._values = self._host.tolist()
        return self._values
