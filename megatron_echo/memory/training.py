"""``--memory-ledger FILE``: what the first training step keeps for backward, on disk."""

from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import unwrap_model
from torch import nn

from megatron_echo.memory.ledger import SavedTensorLedger


class LedgerOfFirstStep:
    """Opens a ledger when Megatron has built the model, closes it at the end of the first step.

    It stands in for ``config.finalize_model_grads_func``, the end of a step's backward passes.
    """

    def __init__(self, path: str, model_config: Any) -> None:
        """Hook into a model that is going to be built.

        Args:
            path: JSON file for the first pipeline stage; the others get ``-stage1`` and so on
                before the suffix. A picture, ``.png``, goes beside each.
            model_config: Megatron's, for example ``GPTModelConfig``.
        """
        self._path = Path(path)
        self._ledger: SavedTensorLedger | None = None
        transformer = model_config.transformer
        self._finalize = transformer.finalize_model_grads_func or finalize_model_grads
        transformer.finalize_model_grads_func = self
        model_config.post_wrap_hooks.append(self._open)

    def __deepcopy__(self, memo: dict) -> "LedgerOfFirstStep":
        return self  # Megatron copies configurations for some layers; the model stays one

    def _open(self, chunks: list[nn.Module]) -> list[nn.Module]:
        ranks = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        if not any(ranks):
            self._ledger = SavedTensorLedger([unwrap_model(chunk) for chunk in chunks]).__enter__()
        return chunks

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Finish the gradients; after the first step write the ledger."""
        result = self._finalize(*args, **kwargs)
        if self._ledger is not None:
            ledger, self._ledger = self._ledger, None
            ledger.__exit__(None, None, None)
            self._write(ledger)
        return result

    def _write(self, ledger: SavedTensorLedger) -> None:
        stage = parallel_state.get_pipeline_model_parallel_rank()
        path = self._path.with_stem(f"{self._path.stem}-stage{stage}") if stage else self._path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            ledger.write_json(path)
            ledger.plot(path.with_suffix(".png"))
        except OSError as error:
            print(f"WARNING: {path} cannot be written ({error}).", flush=True)
            return
        peak = ledger.peak_bytes() / 2**20
        print(f"[megatron_echo] kept for backward: {peak:.1f} MiB at most, {path}", flush=True)
