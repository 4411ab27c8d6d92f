"""``--memory-ledger FILE``: what the first training step keeps for backward, on disk."""

from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from torch import nn

from megatron_echo.record.ledger import SavedTensorLedger
from megatron_echo.step_hooks import StepHook


class LedgerOfFirstStep(StepHook):
    """Opens a ledger when Megatron has built the model, closes it at the end of the first step.

    The first pipeline stage writes to ``path``, the others with ``-stage1`` and so on before
    the suffix; a picture, ``.png``, goes beside each.
    """

    def __init__(self, path: str, model_config: Any) -> None:
        self._path = Path(path)
        self._ledger: SavedTensorLedger | None = None
        super().__init__(model_config)

    def attach(self, chunks: list[nn.Module]) -> None:
        """Open the ledger, on one rank of each pipeline stage."""
        ranks = (
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        if not any(ranks):
            self._ledger = SavedTensorLedger(chunks).__enter__()

    def end_step(self) -> None:
        """After the first step write the ledger."""
        if self._ledger is not None:
            ledger, self._ledger = self._ledger, None
            ledger.__exit__(None, None, None)
            self._write(ledger)

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
