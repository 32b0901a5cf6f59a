"""Every configuration of a space by its number: what it costs, which ones fit, and the staircase of those.

The **staircase** holds the maximal configurations: those within every budget of which no ratio can be lowered by a
tenth within the budgets. Where pruning never helps a metric, the best configuration stands on it.

Memory: a block of `BLOCK` configurations at a time, about 60 MB; beside it 8 bytes per member of the staircase, and
8 bytes per configuration and budget for a cost that is a plain function. Swin-T takes a few milliseconds, the 17.7
million configurations of an 18-block model some seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

from .additive import AdditiveCost
from .budget import Budget, Cost
from .feasible import ENUMERABLE

BLOCK = 2**20
"""Configurations that are looked at together."""
LARGEST = 50_000_000
"""Spaces above this size are not enumerated."""
MOST_PAIRS = 19
"""Of one stage, so that its tenths are the digits of one 64-bit integer."""

Array = NDArray[Any]
Fits = Callable[[Array], Array]
"""From configuration numbers to True where all budgets are met."""


@dataclass(frozen=True)
class Staircase:
    """Tenths of the maximal configurations (members, genes), and how many of all configurations fit the budgets."""

    tenths: Array
    feasible: int


def can_enumerate(space: SearchSpace, costs: Sequence[Cost]) -> bool:
    """True where the space is small enough for these costs."""
    additive = all(isinstance(cost, AdditiveCost) for cost in costs)
    return space.size <= (LARGEST if additive else ENUMERABLE) and max(space.pairs) <= MOST_PAIRS


class Enumeration:
    """The configurations of `space`, numbered in the order of iteration over it: the last stage counts fastest."""

    def __init__(self, space: SearchSpace) -> None:
        assert max(space.pairs) <= MOST_PAIRS, f"a stage of {max(space.pairs)} block pairs"
        self.space = space
        self.stages = tuple(_sorted_rows(space.max_tenths, pairs) for pairs in space.pairs)
        """Tenths of every configuration of a stage (configurations of the stage, pairs)."""
        counts = [len(rows) for rows in self.stages]
        self._strides = [int(np.prod(counts[stage + 1 :], dtype=np.int64)) for stage in range(len(counts))]

    def __len__(self) -> int:
        return self.space.size

    def rows(self, numbers: Array, stage: int) -> Array:
        """Row in `stages[stage]` of each configuration."""
        rows: Array = numbers // self._strides[stage] % len(self.stages[stage])
        return rows

    def tenths(self, numbers: Array) -> Array:
        """Tenths of these configurations, stage after stage (configurations, genes), as 8-bit integers."""
        return np.concatenate([rows[self.rows(numbers, stage)] for stage, rows in enumerate(self.stages)], axis=1)

    def costs(self, cost: AdditiveCost, numbers: Array) -> Array:
        """Cost of these configurations, to the bit as `cost` tells it one by one."""
        return self._additive(cost)(numbers)

    def staircase(self, constraints: Sequence[tuple[Cost, Budget]]) -> Staircase:
        """The maximal configurations within all budgets."""
        fits, found, feasible = self._fits(constraints), [], 0
        lower = [_lowered(rows) for rows in self.stages]
        for numbers in self._blocks():
            left = numbers[fits(numbers)]
            feasible += len(left)
            for stage, pair in self._genes():
                here = self.rows(left, stage)
                there = lower[stage][here, pair]
                can = np.flatnonzero(there >= 0)
                lowered = left[can] + (there[can] - here[can]) * self._strides[stage]
                left = np.delete(left, can[fits(lowered)])
            found.append(left)
        return Staircase(self.tenths(np.concatenate(found)), feasible)

    def _blocks(self) -> Iterator[Array]:
        for start in range(0, len(self), BLOCK):
            yield np.arange(start, min(start + BLOCK, len(self)), dtype=np.int64)

    def _genes(self) -> Iterator[tuple[int, int]]:
        return ((stage, pair) for stage, pairs in enumerate(self.space.pairs) for pair in range(pairs))

    def _fits(self, constraints: Sequence[tuple[Cost, Budget]]) -> Fits:
        of_numbers = [(self._of_numbers(cost), budget.limit) for cost, budget in constraints]

        def fits(numbers: Array) -> Array:
            met = np.ones(len(numbers), dtype=bool)
            for costs, limit in of_numbers:
                met &= costs(numbers) <= limit
            return met

        return fits

    def _of_numbers(self, cost: Cost) -> Callable[[Array], Array]:
        if isinstance(cost, AdditiveCost):
            return self._additive(cost)
        return np.array([cost(config) for config in self.space], dtype=np.float64).__getitem__

    def _additive(self, cost: AdditiveCost) -> Callable[[Array], Array]:
        parts = [cost.of_stage(stage, rows) for stage, rows in enumerate(self.stages)]

        def costs(numbers: Array) -> Array:
            total = np.full(len(numbers), cost.base, dtype=np.float64)
            for stage, part in enumerate(parts):
                total += part[self.rows(numbers, stage)]
            return total

        return costs


def configurations(space: SearchSpace, tenths: Array) -> list[SparsityConfig]:
    """Configurations from their tenths (configurations, genes)."""
    ends = np.cumsum(space.pairs).tolist()
    bounds = list(zip([0, *ends[:-1]], ends, strict=True))
    return [SparsityConfig(tuple(tuple(row[first:end]) for first, end in bounds)) for row in tenths.tolist()]


def tenths_of(configs: Sequence[SparsityConfig]) -> Array:
    """Tenths of configurations (configurations, genes), as 8-bit integers."""
    return np.array([[t for stage in config.tenths for t in stage] for config in configs], dtype=np.int8)


def _sorted_rows(top: int, pairs: int) -> Array:
    return np.array(list(combinations_with_replacement(range(top + 1), pairs)), dtype=np.int8)


def _lowered(rows: Array) -> Array:
    """Row with one pair lowered by a tenth (configurations of the stage, pairs); -1 where the order forbids it."""
    digits = 9 ** np.arange(rows.shape[1] - 1, -1, -1, dtype=np.int64)
    keys = rows.astype(np.int64) @ digits  # ascending, as the rows are
    before = np.concatenate([np.zeros_like(rows[:, :1]), rows[:, :-1]], axis=1)
    lowered = np.searchsorted(keys, keys[:, None] - digits)
    return np.where(rows > before, lowered, -1)
