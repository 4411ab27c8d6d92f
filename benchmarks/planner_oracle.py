"""The exact optimum for small instances, by mixed-integer programming (HiGHS through SciPy).

For tests and benchmarks: minutes where the planner takes milliseconds.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array


@dataclass(frozen=True)
class Optimum:
    """What no plan can beat."""

    max_load: float
    """The lowest highest load, tokens taken as divisible (at most one below the integer one)."""

    num_clones: int | None
    """The fewest clones that reach the bound asked for; None if none was asked for."""


class _Program:
    """Variables ``x[e, r]`` tokens and ``y[e, r]`` clones off the home rank, and ``z`` the load."""

    def __init__(self, tokens: np.ndarray, num_ranks: int, num_slots: int) -> None:
        self.tokens, self.ranks = tokens.astype(float), num_ranks
        self.experts = len(tokens)
        self.size = self.experts * num_ranks
        self.home = np.arange(self.experts) // (self.experts // num_ranks)
        self._rows: list[tuple[np.ndarray, np.ndarray, float]] = []
        for expert in range(self.experts):
            row = self._x(expert)
            self._add(row, np.ones(num_ranks), self.tokens[expert])
            for rank in range(num_ranks):
                columns = np.array([row[rank], self.size + row[rank]])
                self._add(columns, np.array([1.0, -self.tokens[expert]]), 0.0)
        load = np.bincount(self.home, self.tokens, num_ranks)
        for rank in range(num_ranks):
            column = np.arange(rank, self.size, num_ranks)
            self._add(self.size + column, np.ones(self.experts), num_slots)
            away = np.concatenate([self._x(int(e)) for e in np.flatnonzero(self.home == rank)])
            columns = np.concatenate([column, away, [2 * self.size]])
            values = np.concatenate([np.ones(self.experts), -np.ones(len(away)), [-1.0]])
            self._add(columns, values, -load[rank])

    def _x(self, expert: int) -> np.ndarray:
        return np.arange(expert * self.ranks, (expert + 1) * self.ranks)

    def _add(self, columns: np.ndarray, values: np.ndarray, upper: float) -> None:
        self._rows.append((columns, values, upper))

    def minimise(self, cost: np.ndarray, highest_load: float, seconds: float) -> np.ndarray:
        """Solve; raises ``RuntimeError`` where no optimum was proven in time."""
        lengths = [len(columns) for columns, _, _ in self._rows]
        rows = np.repeat(np.arange(len(self._rows)), lengths)
        columns = np.concatenate([columns for columns, _, _ in self._rows])
        values = np.concatenate([values for _, values, _ in self._rows])
        matrix = coo_array((values, (rows, columns)), (len(self._rows), 2 * self.size + 1)).tocsr()
        is_home = self.home[:, None] == np.arange(self.ranks)
        allowed = np.where(is_home, 0.0, 1.0).ravel()
        upper = np.concatenate([allowed * np.repeat(self.tokens, self.ranks), allowed, [0.0]])
        upper[-1] = highest_load
        integral = np.concatenate([np.zeros(self.size), np.ones(self.size), [0.0]])
        result = milp(
            cost,
            constraints=LinearConstraint(matrix, -np.inf, [upper for _, _, upper in self._rows]),
            bounds=Bounds(0.0, upper),
            integrality=integral,
            options={"time_limit": seconds, "mip_rel_gap": 1e-6},
        )
        if result.x is None or not result.success:
            raise RuntimeError(f"No proven optimum within {seconds} s: {result.message}")
        return result.x


def optimum(
    counts: np.ndarray, num_slots: int, bound: float | None = None, seconds: float = 60.0
) -> Optimum:
    """The least possible maximum load, and the fewest clones within a bound.

    Args:
        counts: ``[R, E]`` tokens of each source rank for each expert, or their sum as ``[1, E]``
            repeated; only the column sums and R matter.
        num_slots: S, clones on each rank.
        bound: a load; if given, also the fewest clones with no rank above it.
        seconds: time limit of each of the two programs.

    Raises:
        RuntimeError: the optimum was not proven in time, or nothing satisfies the bound.
    """
    program = _Program(counts.sum(0), counts.shape[0], num_slots)
    cost = np.zeros(2 * program.size + 1)
    cost[-1] = 1.0
    total = float(counts.sum())
    max_load = float(program.minimise(cost, total, seconds)[-1])
    if bound is None:
        return Optimum(max_load, None)
    cost = np.concatenate([np.zeros(program.size), np.ones(program.size), [0.0]])
    best = program.minimise(cost, bound, seconds)
    return Optimum(max_load, round(best[program.size : 2 * program.size].sum()))
