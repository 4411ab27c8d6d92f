"""What a clone costs, in rows: the exchange rate by which the planner takes the shortest time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_echo.environment import Speeds

MAX_ROWS = 1 << 30
"""Of a price: above any load of a rank that fits a GPU."""


@dataclass(frozen=True)
class ClonePrice:
    """How many rows a rank computes while one clone more travels to it or from it.

    The predicted time of a layer call is that of its fullest rank's rows, and of the clones of the
    rank that sends or receives most of them. Links inside a node and between nodes work at the
    same time.

    Attributes:
        inside: rows for a clone inside its home's node.
        across: rows for a clone in another node; not used where the planner knows no nodes.
        row_seconds: of a row, forward and backward; for people, plans do not depend on it.
    """

    inside: int
    across: int
    row_seconds: float = 0.0

    def __post_init__(self) -> None:
        for rows in (self.inside, self.across):
            if not 0 <= rows <= MAX_ROWS:
                raise ValueError(
                    f"A clone's price of {rows} rows is out of range. Use 0 to {MAX_ROWS:,}."
                )

    @classmethod
    def of_layer(
        cls, speeds: Speeds, elements: int, row_bytes: int, clone_bytes: int,
        ranks: int, ranks_per_node: int,
    ) -> "ClonePrice":  # fmt: skip
        """The price in a layer of these sizes.

        A row is 6 operations for each of the ``elements`` of an expert, forward and backward. Of
        the rows of a rank all but its own part of ``1 / R`` come from others, and go back: that
        moves ``row_bytes`` each in all passes together, 0 where a transport's traffic does not
        depend on the plan. A clone moves ``clone_bytes``, weights and gradients; 0 likewise.
        """
        near, far = (ranks_per_node - 1) / ranks, (ranks - ranks_per_node) / ranks
        travel = row_bytes * max(near / speeds.inside, far / speeds.across)
        row = 6 * elements / speeds.flops + travel
        inside, across = (clone_bytes / link / row for link in (speeds.inside, speeds.across))
        return cls(min(round(inside), MAX_ROWS), min(round(across), MAX_ROWS), row)


def clone_time(is_clone: Tensor, price: ClonePrice, ranks_per_node: int | None) -> Tensor:
    """Time of the clones of the busiest rank, in rows, int64 ``[...]``: those it sends or receives.

    ``is_clone``, bool ``[..., E, R]``, says whether rank ``r`` computes tokens of ``e`` as a clone;
    ``ranks_per_node`` is None if all links are alike.
    """
    ranks = is_clone.shape[-1]
    pairs = is_clone.unflatten(-2, (ranks, -1)).sum(-2)  # [..., home, receiver]
    if ranks_per_node is None:
        return _busiest(pairs) * price.inside
    node = torch.arange(ranks, device=pairs.device) // ranks_per_node
    together = node[:, None] == node
    return torch.maximum(
        _busiest(pairs * together) * price.inside, _busiest(pairs * ~together) * price.across
    )


def _busiest(pairs: Tensor) -> Tensor:
    return torch.maximum(pairs.sum(-1), pairs.sum(-2)).amax(-1)
