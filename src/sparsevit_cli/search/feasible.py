"""The part of a search space that meets every budget, drawn from with bounded effort."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import cache, cached_property
from random import Random
from typing import TYPE_CHECKING

from sparsevit_cli.errors import NonFiniteError
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

from .additive import AdditiveCost
from .budget import Budget, Cost, check_reachable

if TYPE_CHECKING:
    from .enumeration import Array

Breed = Callable[[Random], SparsityConfig]

TRIES = 50
"""Draws per way of drawing before the next way is tried."""
SAMPLED = 2_000
"""Members of a staircase that cannot be enumerated."""
ENUMERABLE = 150_000
"""Spaces up to this size (Swin-T has 120,285) are enumerated, in a second or two, when drawing finds nothing new, or
for a staircase under costs that are plain functions."""


class FeasibleSpace:
    """Configurations of `space` within all `constraints`: (cost function, budget) pairs, the first one leading.

    Every configuration is judged by its own cost; nothing is inferred from a neighbour's. Costs are asked for once
    per configuration. What is drawn keeps most among those that cost the same.
    """

    def __init__(self, space: SearchSpace, constraints: Sequence[tuple[Cost, Budget]]) -> None:
        self.space = space
        self._given = tuple(constraints)
        self._constraints = [(cache(_finite(cost)), budget) for cost, budget in constraints]
        self._staircase: Array | None = None
        self._verdicts: dict[SparsityConfig, bool] = {}
        self.infeasible = 0
        """Distinct configurations drawn so far that exceed a budget; all of them, once the space was enumerated."""

    def cost(self, config: SparsityConfig) -> float:
        """Cost under the leading constraint."""
        return self._constraints[0][0](config)

    def overrun(self, config: SparsityConfig) -> float:
        """Largest share by which a budget is exceeded; 0 or less where all are met."""
        return max(cost(config) / budget.limit for cost, budget in self._constraints) - 1

    def __contains__(self, config: SparsityConfig) -> bool:
        if config not in self._verdicts:
            self._verdicts[config] = self._meets(config)
            self.infeasible += not self._verdicts[config]
        return self._verdicts[config]

    def check_reachable(self) -> None:
        """Raise BudgetError where a budget is out of reach; asks for the costs of dense and sparsest alone."""
        for cost, budget in self._constraints:
            check_reachable(budget, cost(self.space.dense), cost(self.space.sparsest))

    def staircase(self, seed: int) -> Array:
        """Tenths of the maximal configurations (members, genes): those in which nothing can be kept more.

        All of them where the space can be enumerated; `infeasible` then counts every configuration over budget. Else
        `SAMPLED` draws, each with its ratios lowered one after the other while the budgets allow.
        """
        from .enumeration import Enumeration, can_enumerate, tenths_of  # numpy

        if self._staircase is not None:
            return self._staircase
        if can_enumerate(self.space, [cost for cost, _ in self._given]):
            known = [(cost if isinstance(cost, AdditiveCost) else checked, budget)
                     for (cost, _), (checked, budget) in zip(self._given, self._constraints, strict=True)]  # fmt: skip
            found = Enumeration(self.space).staircase(known)
            self._staircase, self.infeasible = found.tenths, self.space.size - found.feasible
        else:
            rng = Random(f"{seed}/staircase")
            drawn = (self.draw(rng, frozenset()) for _ in range(SAMPLED))
            self._staircase = tenths_of(sorted({self._lowered(config, rng) for config in drawn if config is not None}))
        return self._staircase

    def draw(self, rng: Random, seen: AbstractSet[SparsityConfig], breed: Breed | None = None) -> SparsityConfig | None:
        """A feasible configuration outside `seen`, or None where none was found.

        Bred, if `breed` is given; else by rejection sampling; else from the whole space where it can be
        enumerated, or by walking a sample towards the sparsest configuration where it cannot.
        """
        for propose in (breed, self.space.sample):
            for _ in range(TRIES if propose else 0):
                config = propose(rng)  # type: ignore[misc]
                if config in self and (config := self.keeping_more(config)) not in seen:
                    return config
        if self.space.size <= ENUMERABLE:
            for config in rng.choices(self._all, k=TRIES) if self._all else ():
                if config not in seen:
                    return config
            unseen = [config for config in self._all if config not in seen]
            return rng.choice(unseen) if unseen else None
        for _ in range(TRIES):
            config = self._walk_to_sparsest(self.space.sample(rng), rng)
            if config in self and (config := self.keeping_more(config)) not in seen:
                return config
        return None

    def fill(
        self,
        rngs: Sequence[Random],
        seen: AbstractSet[SparsityConfig],
        breed: Sequence[Breed] | None = None,
    ) -> list[SparsityConfig]:
        """Distinct feasible configurations outside `seen`, one per generator; fewer where the space runs out."""
        population: list[SparsityConfig] = []
        taken = set(seen)
        for slot, rng in enumerate(rngs):
            config = self.draw(rng, taken, breed[slot] if breed else None)
            if config is None:
                break
            population.append(config)
            taken.add(config)
        return population

    def keeping_more(self, config: SparsityConfig) -> SparsityConfig:
        """`config` with its ratios lowered by a tenth, one after the other, as long as every cost stays the same.

        That happens where a map has few windows: then two ratios keep the same number of them.
        """
        while (lower := self._as_cheap_below(config)) is not None:
            config = lower
        return config

    def _as_cheap_below(self, config: SparsityConfig) -> SparsityConfig | None:
        costs = [cost(config) for cost, _ in self._constraints]
        lower = one_tenth_lower(config)
        return next((each for each in lower if [cost(each) for cost, _ in self._constraints] == costs), None)

    @cached_property
    def _all(self) -> list[SparsityConfig]:
        return [config for config in self.space if self._meets(config) and self._as_cheap_below(config) is None]

    def _meets(self, config: SparsityConfig) -> bool:
        return all(budget.allows(cost(config)) for cost, budget in self._constraints)

    def _lowered(self, config: SparsityConfig, rng: Random) -> SparsityConfig:
        """A maximal configuration below `config`: ratios lowered by a tenth in a random order, while one can be."""
        while True:
            lower = list(one_tenth_lower(config))
            rng.shuffle(lower)
            step = next((each for each in lower if each in self), None)
            if step is None:
                return config
            config = step

    def _walk_to_sparsest(self, config: SparsityConfig, rng: Random) -> SparsityConfig:
        """A stop on a random path that raises one gene by one tenth at a time; found by bisection.

        Feasible wherever the sparsest configuration is: a stop is returned only if it was tested, or is the last.
        """
        steps = [
            (stage, pair)
            for stage, genes in enumerate(config.tenths)
            for pair, tenths in enumerate(genes)
            for _ in range(self.space.max_tenths - tenths)
        ]
        rng.shuffle(steps)

        def stop(count: int) -> SparsityConfig:
            genes = [list(stage) for stage in config.tenths]
            for stage, pair in steps[:count]:
                genes[stage][pair] += 1
            return self.space.repair(genes)

        return stop(bisect_left(range(len(steps)), True, key=lambda count: stop(count) in self))


def one_tenth_lower(config: SparsityConfig) -> Iterator[SparsityConfig]:
    """The configurations that keep a tenth more in one block pair."""
    for number, stage in enumerate(config.tenths):
        for pair, tenths in enumerate(stage):
            if tenths > (stage[pair - 1] if pair else 0):
                row = (*stage[:pair], tenths - 1, *stage[pair + 1 :])
                yield SparsityConfig((*config.tenths[:number], row, *config.tenths[number + 1 :]))


def _finite(cost: Cost) -> Cost:
    def checked(config: SparsityConfig) -> float:
        value = float(cost(config))
        if not math.isfinite(value):
            raise NonFiniteError(f"cost of candidate {config}", str(value), "Check the cost function or latency table.")
        return value

    return checked
