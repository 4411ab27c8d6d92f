"""Edge cases of the planner, shared by its tests: counts ``[R, E]`` by name."""

import torch

EDGES = {
    "no tokens": torch.zeros(4, 8),
    "fewer tokens than ranks": torch.eye(4).repeat(1, 2) * torch.tensor([[1], [1], [0], [0]]),
    "one rank": torch.ones(1, 4),
    "one expert a rank": torch.arange(16).reshape(4, 4),
    "one expert holds everything": torch.tensor([[0, 2**31] + [0] * 6] * 4),
    "one rank holds everything": torch.tensor([[9, 8, 7, 0, 0, 0, 0, 0, 0]] * 3),
    "remainder R - 1": torch.tensor([[7, 0, 0, 0]] + [[0] * 4] * 3),
    "a prime number of ranks": torch.arange(7 * 14).reshape(7, 14) ** 2,
    "all equal": torch.full((5, 10), 6),
    "two hot experts": torch.tensor([[0] * 16] * 7 + [[50000, 0, 30000] + [200] * 13]),
    "a source without tokens": torch.tensor([[0] * 6, [5, 1, 9, 2, 4, 3], [8, 8, 1, 1, 0, 2]]),
    "near 2^31": torch.full((8, 16), 2**31 - 1) * (torch.arange(16) % 3 == 0),
}
