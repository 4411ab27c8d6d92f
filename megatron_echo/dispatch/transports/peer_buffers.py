"""The buffers of peer memory that all layers of a model share, and when they may be written.

Two movements do everything. A *push* writes rows into the buffers of peers, and each rank copies
what came to it. In a *pull* each rank lays rows open, and the others sum those that they want. A
movement is safe on these terms:

1. It writes, passes one barrier of the group, and reads. So whoever reads sees all that was
   written for it.
2. A buffer may be written once every rank has read what was in it before. A rank that arrives at
   a barrier has finished all reads that came before it, so one barrier of another movement in
   between is enough. A movement whose buffer may still be read passes a barrier before it writes;
   those of tokens take turns, and none of them has to.
3. Nothing refers to a buffer after its movement: autograd keeps copies and places. A buffer may
   hold anything between movements. Only weights of clones are used where they lie, by products.

Every rank makes the same movements in the same order, as with collectives. On CUDA rows are moved
in one stream and matrices in another, each with barriers of its own, which are waited for by the
stream and not by the host. Nothing orders a movement of rows with one of matrices, so no barrier
of the one counts for a buffer of the other. What compute reads of a matrix that came is
over at a barrier of matrices only if it was launched before the movement of that barrier began:
that is not so of the last ``unread`` pushes, which were begun early and wait to be used.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.copy_lanes import stream_backend
from megatron_echo.dispatch.transports.peer_memory import (
    PeerRows,
    PlainMemory,
    peer_memory,
)
from megatron_echo.environment import is_capturing
from megatron_echo.per_model import PerModel


class PeerBuffers(PerModel):
    """The buffers of one model, of each shape and purpose one.

    Attributes:
        group: of the ranks that share them.
        backend: of the stream that matrices are moved in.
        unread: pushes of matrices that compute will read and was not told to yet; set before the
            next movement of matrices.
    """

    def __init__(self, group: dist.ProcessGroup, has_layer_graphs: bool = False) -> None:
        """Find out how the ranks of the group reach each other; they call it together.

        Args:
            group: R ranks.
            has_layer_graphs: whether graphs are of single layers, replayed in any order.

        Raises:
            ValueError: they do not.
        """
        self.group, self.backend, self.unread = group, stream_backend(), 0
        self._memory = peer_memory(group)
        self._rows: dict[tuple, PeerRows] = {}
        self._readable: list[list[PeerRows]] = [[], []]
        self._pushed: list[PeerRows] = []
        self._is_in_graph = [False, False]
        self._has_layer_graphs = has_layer_graphs

    def push(self, name: str, moved: list[tuple[Tensor, Tensor]], num_rows: int) -> list[Tensor]:
        """Write rows to other ranks and give back views of what came to this one.

        Args:
            name: the purpose.
            moved: values ``[T, H]`` and their places, int32 ``[T, K]``; see ``PeerRows.put``.
            num_rows: B.

        Returns:
            For each ``[B, H]``, *in the buffer*: copy it before the next movement. Rows that
            nobody wrote hold anything.
        """
        buffers = self._take(name, num_rows, [values for values, _ in moved])
        for buffer, (values, places) in zip(buffers, moved, strict=True):
            buffer.put(values, places)
        self._memory.barrier()
        return [buffer.own[:-1] for buffer in buffers]

    def pull(
        self, name: str, moved: list[tuple[Tensor, Tensor]], sums: Tensor | None = None
    ) -> list[Tensor]:
        """Lay rows open, and sum those of all ranks that this one wants.

        Args:
            name: the purpose.
            moved: rows ``[B, H]``, and the places to sum, int32 ``[T, K]``.
            sums: int32 ``[B, K]``; of the first pair, sums of these rows are laid open, B for none.

        Returns:
            For each ``[T, H]``, in the wide dtype.
        """
        buffers = self._take(name, len(moved[0][0]), [rows for rows, _ in moved])
        for number, (buffer, (rows, _)) in enumerate(zip(buffers, moved, strict=True)):
            buffer.offer(rows, sums if number == 0 else None)
        self._memory.barrier()
        both = zip(buffers, moved, strict=True)
        return [buffer.pull(places) for buffer, (_, places) in both]

    def push_matrices(self, name: str, matrices: Tensor, source: Tensor) -> Tensor:
        """Write matrices into slots of other ranks and give back a view of this rank's slots.

        Args:
            name: the purpose.
            matrices: ``[M, out, in]``, contiguous.
            source: int32 ``[R, S]``, which of them goes to each slot of each rank, -1 for none.

        Returns:
            ``[S, out, in]``, *in the buffer*. Slots that nobody wrote hold anything.
        """
        (_, out, width), slots = matrices.shape, source.shape[1]
        (buffer,) = self._take(name, slots * out, [matrices.flatten(0, 1)], lane=1)
        self._pushed = [*self._pushed[-self.unread :], buffer] if self.unread else [buffer]
        buffer.put_matrices(matrices, source)
        self._memory.barrier(1)
        return buffer.own[:-1].view(slots, out, width)

    def add_matrices(
        self, name: str, matrices: Tensor, used: Tensor, places: Tensor, home: Tensor
    ) -> None:
        """Lay matrices open in slots, and add those of all ranks that this one wants.

        Args:
            name: the purpose.
            matrices: ``[S, out, in]``, contiguous.
            used: int32 ``[S]``, each slot's own number where it is laid open, else -1.
            places: int32 ``[m, n]``, ``rank * S + slot`` of what is added, -1 for nothing.
            home: ``[m, out, in]``, contiguous; see ``PeerRows.add_matrices``.
        """
        slots, rows = len(matrices), matrices.flatten(0, 1)
        (buffer,) = self._take(name, len(rows), [rows], lane=1)
        buffer.offer_matrices(matrices, used)
        self._memory.barrier(1)
        buffer.add_matrices(places, slots, home)

    @property
    def nbytes(self) -> int:
        """Bytes held on this rank."""
        return sum(rows.own.nbytes for rows in self._rows.values())

    @property
    def rows(self) -> tuple[PeerRows, ...]:
        """All buffers."""
        return tuple(self._rows.values())

    def _take(
        self, name: str, num_rows: int, values: list[Tensor], lane: int = 0
    ) -> list[PeerRows]:
        """Buffers to write to now, in the lane of rows or of matrices; the host waits for new ones.

        Their movement passes a barrier after this.
        """
        keys = [
            (name, number, num_rows, tensor.shape[1], tensor.dtype, tensor.device)
            for number, tensor in enumerate(values)
        ]
        for key in keys:
            if key not in self._rows:
                *_, columns, dtype, device = key
                is_meta = device.type == "meta"
                memory = PlainMemory(self.group.size(), device) if is_meta else self._memory
                with torch.inference_mode(False):  # evaluation may come first
                    self._rows[key] = memory.allocate(num_rows + 1, columns, dtype)
        # A replay may come after other movements than its capture did.
        was_in_graph, self._is_in_graph[lane] = self._is_in_graph[lane], is_capturing()
        is_first_of_graph = self._is_in_graph[lane] and not was_in_graph
        is_unknown = is_first_of_graph or self._has_layer_graphs
        taken = [self._rows[key] for key in keys]
        if is_unknown or any(old is new for old in self._readable[lane] for new in taken):
            self._memory.barrier(lane)
        unread = self._pushed[-self.unread :] if lane == 1 and self.unread else []
        self._readable[lane] = [*taken, *unread]
        return taken


class NodeBuffers(PeerBuffers):
    """Those of the ranks of a node, where the model's others are on several."""
