"""How a run is spread over ranks: the batch, the groups, the pipeline's stages."""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from megatron_echo.memory.schedules import Pipeline
from megatron_echo.observe.simulation.inputs import Cluster, Model


class Work(NamedTuple):
    """A step's tokens: of a sequence; its sequences: of a microbatch, and of all."""

    sequence: int
    micro_batch: int
    global_batch: int


class Run(NamedTuple):
    """What does not change between layouts: where, what, and how much of it a step."""

    cluster: Cluster
    model: Model
    work: Work


@dataclass(frozen=True)
class Layout:
    """How the run is spread and what moves tokens and weights.

    ``tokens_by`` is ``megatron`` (its all-to-all of just the rows that leave); of this package
    ``all_gather``, ``all_to_all`` (equal parts) and, for just the rows that leave,
    ``symmetric_memory`` inside a node and ``hybrid_ep``.
    """

    gpus: int  # all of them
    expert: int  # EP, R ranks
    pipeline: int = 1  # PP, ranks of a pipeline
    virtual: int = 1  # VPP, model chunks of each of them
    tensor: int = 1  # TP, with sequence parallelism; experts are not split
    context: int = 1  # CP
    layers: tuple[int, ...] | None = None  # decoder layers of each stage; None: Megatron's split
    recompute: bool = False  # whether whole layers are recomputed in backward
    offload: float = 0.0  # share of what is kept for backward that may go to the host
    tokens_by: str = "megatron"
    weights_by: str = ""  # collective or p2p, of this package; empty without clones
    peer_capacity: float = 1.0  # of all_to_all

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
        """The pipeline's order of passes."""
        return Pipeline.make("interleaved", self.pipeline, self.virtual, self.microbatches(work))

    def counts(self, model: Model) -> tuple[int, ...]:
        """Decoder layers of each stage; without a plan all have as many, the last what is left."""
        if self.layers is not None:
            return self.layers
        number = self.pipeline * self.virtual
        size = math.ceil(model.layers / number)
        return (*[size] * (number - 1), model.layers - size * (number - 1))

    def stages(self, model: Model) -> list[list[str]]:
        """What each of the PP x VPP stages has, in no order: kinds of :class:`.Costs`."""
        kinds = model.kinds
        found = [[kinds.pop(0) for _ in range(count)] for count in self.counts(model)]
        found[0].append("embedding")
        found[-1].append("output")
        return found

    def check(self, model: Model, work: Work) -> None:
        """Refuse sizes that do not divide by a ``ValueError`` that says which."""
        if model.experts % self.expert:
            raise ValueError(
                f"EP={self.expert} does not divide {model.experts} experts. Use a divisor of "
                f"{model.experts}."
            )
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
        counts = self.counts(model)
        if min(counts[1:-1] if self.layers else counts, default=1) < 1:
            raise ValueError(
                f"PP={self.pipeline} x VPP={self.virtual} leaves a stage without layers of "
                f"{model.layers}. Use fewer."
            )
        self.schedule(work)


@cache
def held(schedule: Pipeline) -> list[list[tuple[int, ...]]]:
    """For each rank the microbatches that its chunks hold at the worst moments, ``[VPP]`` each."""
    return [schedule.live(rank) for rank in range(schedule.ranks)]
