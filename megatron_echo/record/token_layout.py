"""Which tokens of a step's global batch a rank has: the same answer for every parallel layout.

Megatron gives microbatch ``m`` of data-parallel rank ``d`` the samples ``(m * D + d) * b`` to
``(m * D + d + 1) * b - 1`` of a step. Context parallelism cuts a sample of S tokens into 2 C parts,
of which rank ``c`` has the parts ``c`` and ``2 C - 1 - c``; sequence parallelism cuts those into P
parts in a row. A layer sees its tokens sequence first, ``[s, b]``.
"""

from typing import NamedTuple, Self

import numpy as np
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_micro_batch_size


class TokenLayout(NamedTuple):
    """A rank's place in the layout of a run."""

    data_rank: int  # d
    data_size: int  # D
    context_rank: int  # c
    context_size: int  # C
    sequence_rank: int  # p
    sequence_size: int  # P
    micro_batch_size: int  # b

    @classmethod
    def of_this_rank(cls, is_sequence_parallel: bool) -> Self | None:
        """From Megatron's groups; None where its training has not set a microbatch's size."""
        try:
            batch = get_micro_batch_size()
        except AttributeError:  # its calculator does not exist
            return None
        size = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        return cls(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            parallel_state.get_context_parallel_rank(),
            parallel_state.get_context_parallel_world_size(),
            rank if is_sequence_parallel else 0,
            size if is_sequence_parallel else 1,
            batch,
        )

    def positions(self, tokens: int, microbatch: int) -> np.ndarray:
        """Where a microbatch's T tokens of this rank are in a step's ``[samples * S]``.

        The result is int64 ``[T]``, in the order of the layer's rows.
        """
        batch = self.micro_batch_size
        length = tokens // batch * self.sequence_size * self.context_size
        mine = np.arange(length)
        if self.context_size > 1:
            parts = mine.reshape(2 * self.context_size, -1)
            mine = np.concatenate((parts[self.context_rank], parts[-1 - self.context_rank]))
        positions = mine.reshape(self.sequence_size, -1)[self.sequence_rank]
        samples = (microbatch * self.data_size + self.data_rank) * batch + np.arange(batch)
        return (samples * length + positions[:, None]).reshape(-1)
