"""How a run is spread over ranks: the batch, the groups, the pipeline's stages."""

import math
from dataclasses import dataclass

from megatron_echo.observe.simulation.models import Model


@dataclass(frozen=True)
class Work:
    """What is trained, besides the model.

    Attributes:
        sequence: tokens of a sequence.
        micro_batch: sequences of a microbatch.
        global_batch: sequences of a step.
    """

    sequence: int
    micro_batch: int
    global_batch: int

    @property
    def tokens(self) -> int:
        """Of a microbatch on one rank."""
        return self.sequence * self.micro_batch


@dataclass(frozen=True)
class Layout:
    """How the run is spread and what moves tokens and weights.

    Attributes:
        gpus: all of them.
        expert: EP, R ranks.
        pipeline: stages.
        recompute: whether whole layers are recomputed in backward.
        tokens_by: ``megatron`` (its all-to-all of just the rows that leave), ``all_gather``,
            ``all_to_all`` (equal parts) of this package; or what no program does: ``exact``,
            clones with just the rows that leave, and ``balanced``, Megatron's with equal loads.
        weights_by: ``collective`` or ``p2p``, of this package; empty without clones.
        peer_capacity: of ``all_to_all``.
    """

    gpus: int
    expert: int
    pipeline: int = 1
    recompute: bool = False
    tokens_by: str = "megatron"
    weights_by: str = ""
    peer_capacity: float = 1.0

    @property
    def data(self) -> int:
        """Data-parallel size of what is not an expert."""
        return self.gpus // self.pipeline

    def microbatches(self, work: Work) -> int:
        """Of a step on one rank."""
        return work.global_batch // (work.micro_batch * self.data)

    def check(self, model: Model, work: Work) -> None:
        """Refuse sizes that do not divide.

        Raises:
            ValueError: says which.
        """
        if self.gpus % (self.expert * self.pipeline):
            raise ValueError(
                f"{self.gpus} GPUs are not divisible by EP={self.expert} x PP={self.pipeline}. "
                f"Use a multiple of {self.expert * self.pipeline} GPUs or smaller groups."
            )
        if (
            self.pipeline > 1
            and model.layers - largest_stage(model, self) * (self.pipeline - 1) < 1
        ):
            raise ValueError(
                f"PP={self.pipeline} leaves a stage without layers of {model.layers}. Use fewer."
            )
        if work.global_batch % (work.micro_batch * self.data):
            raise ValueError(
                f"The global batch {work.global_batch} is not divisible by micro-batch "
                f"{work.micro_batch} x data-parallel size {self.data}. Use a multiple of "
                f"{work.micro_batch * self.data}."
            )


@dataclass(frozen=True)
class Stage:
    """A pipeline stage.

    Attributes:
        dense: its dense layers.
        moe: its layers with experts.
        first: whether it has the embedding.
        last: whether it has the output.
        in_flight: microbatches whose activations it keeps at once, under 1F1B.
    """

    dense: int
    moe: int
    first: bool
    last: bool
    in_flight: int


def largest_stage(model: Model, layout: Layout) -> int:
    """Layers of the stages but the last, which has what is left."""
    return math.ceil(model.layers / layout.pipeline)


def stages(model: Model, layout: Layout, microbatches: int) -> list[Stage]:
    """All stages of a layout with so many microbatches."""
    size = largest_stage(model, layout)
    found = []
    for number in range(layout.pipeline):
        begin, end = number * size, min((number + 1) * size, model.layers)
        dense = max(0, min(end, model.dense_layers) - begin)
        found.append(
            Stage(
                dense,
                end - begin - dense,
                number == 0,
                number == layout.pipeline - 1,
                min(layout.pipeline - number, microbatches),
            )
        )
    return found
