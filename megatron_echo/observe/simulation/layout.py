"""How a run is spread over ranks: the batch, the groups, the pipeline's stages."""

import math
from dataclasses import dataclass
from functools import cache

from megatron_echo.memory.schedules import Pipeline
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


@dataclass(frozen=True)
class Layout:
    """How the run is spread and what moves tokens and weights.

    Attributes:
        gpus: all of them.
        expert: EP, R ranks.
        pipeline: PP, ranks of a pipeline.
        virtual: VPP, model chunks of each of them.
        tensor: TP, with sequence parallelism; experts are not split.
        context: CP.
        layers: decoder layers of each of the PP x VPP stages; None for Megatron's own split.
        recompute: whether whole layers are recomputed in backward.
        offload: share of what is kept for backward that may go to the host.
        tokens_by: ``megatron`` (its all-to-all of just the rows that leave); of this package
            ``all_gather``, ``all_to_all`` (equal parts) and, for just the rows that leave,
            ``symmetric_memory`` inside a node and ``hybrid_ep``; or, what no program does,
            ``balanced``, Megatron's with equal loads.
        weights_by: ``collective`` or ``p2p``, of this package; empty without clones.
        peer_capacity: of ``all_to_all``.
    """

    gpus: int
    expert: int
    pipeline: int = 1
    virtual: int = 1
    tensor: int = 1
    context: int = 1
    layers: tuple[int, ...] | None = None
    recompute: bool = False
    offload: float = 0.0
    tokens_by: str = "megatron"
    weights_by: str = ""
    peer_capacity: float = 1.0

    @property
    def data(self) -> int:
        """Data-parallel size of what is not an expert."""
        return self.gpus // (self.pipeline * self.tensor * self.context)

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same experts, and share their optimizer's state."""
        return self.gpus // (self.pipeline * self.expert)

    @property
    def dense_copies(self) -> int:
        """Ranks that hold the same part of all else."""
        return self.data * self.context

    def tokens(self, work: Work) -> int:
        """Of a microbatch on one rank."""
        return work.sequence * work.micro_batch // (self.tensor * self.context)

    def microbatches(self, work: Work) -> int:
        """Of a step on one rank."""
        return work.global_batch // (work.micro_batch * self.data)

    def schedule(self, work: Work) -> Pipeline:
        """The pipeline's order of passes.

        Raises:
            ValueError: microbatches that do not fit it.
        """
        name = "1f1b" if self.virtual == 1 else "interleaved"
        return Pipeline.make(name, self.pipeline, self.virtual, self.microbatches(work))

    def check(self, model: Model, work: Work) -> None:
        """Refuse sizes that do not divide.

        Raises:
            ValueError: says which.
        """
        split = self.tensor * self.context
        for sizes, group in (
            (f"EP={self.expert} x PP={self.pipeline}", self.expert * self.pipeline),
            (f"TP={self.tensor} x CP={self.context} x PP={self.pipeline}", split * self.pipeline),
        ):
            if self.gpus % group:
                raise ValueError(
                    f"{self.gpus} GPUs are not divisible by {sizes}. Use a multiple of {group} "
                    "GPUs or smaller groups."
                )
        if work.sequence % (split * (2 if self.context > 1 else 1)) or model.heads % self.tensor:
            raise ValueError(
                f"TP={self.tensor} x CP={self.context} does not divide {work.sequence} tokens and "
                f"{model.heads} heads. Use smaller groups."
            )
        if work.global_batch % (work.micro_batch * self.data):
            raise ValueError(
                f"The global batch {work.global_batch} is not divisible by micro-batch "
                f"{work.micro_batch} x data-parallel size {self.data}. Use a multiple of "
                f"{work.micro_batch * self.data}."
            )
        if min(stage_layers(model, self)[1:-1], default=1) < 1 or (
            self.layers is None and min(stage_layers(model, self)) < 1
        ):
            raise ValueError(
                f"PP={self.pipeline} x VPP={self.virtual} leaves a stage without layers of "
                f"{model.layers}. Use fewer."
            )
        self.schedule(work)


@dataclass(frozen=True)
class Stage:
    """A pipeline stage.

    Attributes:
        dense: its dense layers.
        moe: its layers with experts.
        first: whether it has the embedding.
        last: whether it has the output.
    """

    dense: int
    moe: int
    first: bool
    last: bool


def stage_layers(model: Model, layout: Layout) -> tuple[int, ...]:
    """Decoder layers of each stage; without a plan all have as many, the last what is left."""
    if layout.layers is not None:
        return layout.layers
    number = layout.pipeline * layout.virtual
    size = math.ceil(model.layers / number)
    return (*[size] * (number - 1), model.layers - size * (number - 1))


def stages(model: Model, layout: Layout) -> list[Stage]:
    """All PP x VPP stages of a layout, in the order of the model."""
    found, begin = [], 0
    counts = stage_layers(model, layout)
    for number, count in enumerate(counts):
        dense = max(0, min(begin + count, model.dense_layers) - begin)
        found.append(Stage(dense, count - dense, number == 0, number == len(counts) - 1))
        begin += count
    return found


@cache
def held(schedule: Pipeline) -> list[list[tuple[int, ...]]]:
    """For each rank the microbatches that its chunks hold at the worst moments, ``[VPP]`` each."""
    return [schedule.live(rank) for rank in range(schedule.ranks)]
