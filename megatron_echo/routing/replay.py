"""``--moe-echo-replay-routing``: in each step every token takes the experts of another run.

A folder holds one of two things for a step:

* what ``--moe-echo-capture-routing`` wrote, one file a rank, of any parallel layout of that run;
* ``step-<iteration, 8 digits>.npz`` with ``ids``, integers ``[samples * s, layers, K]``: the
  samples of the step one after the other, the MoE layers by their depth, as inference engines
  record them.

The probabilities are those of this run's scores at the replayed experts. A call of a layer takes
the next microbatch of its step; a recomputation, which runs in the same order, that of its first
pass. Evaluation and other passes without gradients choose for themselves.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_echo.call_roles import Role, role_of_call
from megatron_echo.compatibility import moe_layer_pattern
from megatron_echo.config import echo_setting
from megatron_echo.environment import training_args
from megatron_echo.per_model import PerModel
from megatron_echo.record.routing_capture import read_captures
from megatron_echo.record.token_layout import TokenLayout


class ReplayedRouting(PerModel):
    """The experts of every token of the step in progress, for the layers of a model."""

    def __init__(self, config: Any) -> None:
        """Use :meth:`of`, with the model's ``TransformerConfig``."""
        self._folder = Path(echo_setting(config, "moe_echo_replay_routing"))
        self._experts, self._topk = config.num_moe_experts, config.moe_router_topk
        self._is_sequence_parallel = config.sequence_parallel
        self._moe_layers = _moe_layers(config)
        self._layout: TokenLayout | None = None
        self._calls: dict[tuple[int, bool], int] = {}
        self._step: dict[int, np.ndarray] = {}

    def end_step(self) -> None:
        """The next call belongs to another step."""
        self._calls, self._step = {}, {}

    def ids(self, layer: int, role: Role, tokens: int) -> Tensor:
        """The experts of the T ``tokens`` of a layer's next call, int64 ``[T, K]`` on the host.

        Raises:
            ValueError: the folder does not have them.
        """
        key = layer, role.is_again
        microbatch = self._calls.get(key, 0)
        self._calls[key] = microbatch + 1
        if self._layout is None:
            self._layout = TokenLayout.of_this_rank(self._is_sequence_parallel)
        args = training_args()
        if self._layout is None or args is None:
            raise ValueError(
                "--moe-echo-replay-routing needs Megatron's training loop, which cuts a batch into "
                "microbatches. In a loop of your own use Megatron's RouterReplay."
            )
        if not self._step:
            self._iteration = args.curr_iteration + 1
            self._step = self._read()
        if layer not in self._step:
            raise self._error(
                f"holds no layer {layer}",
                "Use the model of the recorded run, and the files of all of its ranks.",
            )
        positions, recorded = self._layout.positions(tokens, microbatch), self._step[layer]
        if positions.size and positions[-1] >= len(recorded):
            raise self._error(
                f"holds {len(recorded)} tokens, fewer than this step has",
                "Use the batch size and sequence length of the recorded run.",
            )
        return torch.from_numpy(recorded[positions].astype(np.int64))

    def _read(self) -> dict[int, np.ndarray]:
        """The experts of all tokens of the step, ``[samples * s, K]``, by layer."""
        path = self._folder / f"step-{self._iteration:08d}.npz"
        layers = self._of_an_engine(path) if path.exists() else self._captured()
        for layer, ids in layers.items():
            if ids.shape[1] != self._topk or ids.min() < 0 or ids.max() > self._experts:
                raise self._error(
                    f"holds {ids.shape[1]} experts a token, numbered {ids.min()} to {ids.max()}, "
                    f"but the model chooses {self._topk} of {self._experts}",
                    "Use the model of the recorded run.",
                )
            # Padding has none, and no expert will compute it.
            some = np.arange(self._topk, dtype=ids.dtype)
            layers[layer] = np.where(ids == self._experts, some, ids)
        return layers

    def _of_an_engine(self, path: Path) -> dict[int, np.ndarray]:
        with np.load(path, allow_pickle=False) as file:
            ids = file["ids"]
        if ids.ndim != 3 or ids.shape[1] != len(self._moe_layers):
            raise self._error(
                f"has ids of shape {ids.shape}, but the model has {len(self._moe_layers)} MoE "
                "layers",
                "Write them as [tokens, MoE layers, experts of a token].",
            )
        return {layer: ids[:, depth] for depth, layer in enumerate(self._moe_layers)}

    def _captured(self) -> dict[int, np.ndarray]:
        """Put together what the ranks of a run captured; those of one position have the same."""
        parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        try:
            for capture in read_captures(self._folder, iteration=self._iteration):
                if capture.layout is None:
                    raise self._error("has no layout of its run", "Capture it with this version.")
                for (layer, microbatch), call in capture.calls.items():
                    positions = capture.layout.positions(len(call.ids), microbatch)
                    parts.setdefault(layer, []).append((positions, call.ids.numpy()))
        except FileNotFoundError as error:
            raise self._error("is not there", "Capture as many steps as you replay.") from error
        return {layer: self._whole(layer, found) for layer, found in parts.items()}

    def _whole(self, layer: int, parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        positions, ids = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        if (found := len(np.unique(positions))) <= positions.max():
            raise self._error(
                f"holds {found} of {positions.max() + 1} tokens for layer {layer}",
                "Put the files of all ranks of the recorded run there.",
            )
        whole = np.empty((found, ids.shape[1]), dtype=ids.dtype)
        whole[positions] = ids
        return whole

    def _error(self, fault: str, remedy: str) -> ValueError:
        return ValueError(
            f"--moe-echo-replay-routing {os.fspath(self._folder)}: step {self._iteration} {fault}. "
            f"{remedy}"
        )


def _moe_layers(config: Any) -> list[int]:
    """Megatron's numbers of the MoE layers, from 1; those of MTP come after the others."""
    layers = [number for number, is_moe in enumerate(moe_layer_pattern(config), 1) if is_moe]
    return layers + [config.num_layers + 1 + depth for depth in range(config.mtp_num_layers or 0)]


class ReplayedLayer:
    """Stands in a router where Megatron's ``RouterReplay`` does."""

    def __init__(self, routing: ReplayedRouting) -> None:
        """Set up for one layer; ``routing`` is the model's."""
        self._routing = routing
        self.layer_number = 0

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The scores ``[T, K]`` at the replayed experts, the best first as in ``topk``, and those.

        In passes that train nothing Megatron's ``default_compute_topk`` chooses.
        """
        role = role_of_call()
        if role is Role.UNRECORDED:
            assert default_compute_topk is not None
            return default_compute_topk(scores, topk, num_groups, group_topk)
        ids = self._routing.ids(self.layer_number, role, len(scores))
        if scores.is_cuda:
            ids = ids.pin_memory()
        ids = ids.to(scores.device, non_blocking=True)
        order = scores.detach().gather(1, ids).argsort(dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
        return scores.gather(1, ids), ids
