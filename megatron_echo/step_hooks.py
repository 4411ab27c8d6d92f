"""The moments of Megatron's training loop that this package hooks into without a patch."""

import weakref
from abc import ABC, abstractmethod
from typing import Any, Self

from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import unwrap_model
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook


class EndOfStep(ABC):
    """Stands in for ``config.finalize_model_grads_func``.

    Megatron calls that on every rank after the backward passes of all microbatches and before the
    optimizer. What stood there is kept as ``_finalize`` and called first.
    """

    def __init__(self, finalize: Any) -> None:
        """Keep what stood there; None for Megatron's function."""
        self._finalize = finalize or finalize_model_grads

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # Megatron copies configurations for some layers; the model stays one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Finish the gradients, then :meth:`end_step`."""
        result = self._finalize(*args, **kwargs)
        self.end_step()
        return result

    @abstractmethod
    def end_step(self) -> None:
        """All gradients of the step are there."""


class StepHook(EndOfStep):
    """Sees the model once it is built, and the end of each step's backward passes."""

    def __init__(self, model_config: Any) -> None:
        """Hook into a model that is built of ``model_config``, for example a ``GPTModelConfig``."""
        transformer = model_config.transformer
        super().__init__(transformer.finalize_model_grads_func)
        transformer.finalize_model_grads_func = self
        model_config.post_wrap_hooks.append(self._built)

    def _built(self, chunks: list[nn.Module]) -> list[nn.Module]:
        self.attach([unwrap_model(chunk) for chunk in chunks])
        return chunks

    @abstractmethod
    def attach(self, chunks: list[nn.Module]) -> None:
        """Hook into the model chunks of this rank, without their wrappers."""


def watch_optimizers(watcher: Any) -> None:
    """Call ``watcher.before_optimizer(optimizer)`` before each of an optimizer's steps.

    It does not keep the object alive. A step that is replayed calls nothing else.
    """
    reference = weakref.ref(watcher)

    def before(optimizer: Optimizer, *_: Any) -> None:
        if (alive := reference()) is not None:
            alive.before_optimizer(optimizer)

    weakref.finalize(watcher, register_optimizer_step_pre_hook(before).remove)
