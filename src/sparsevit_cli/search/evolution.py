"""The paper's evolutionary search (SparseViT, section 3.3), whole on one screen.

Generation 0 is filled by rejection sampling under the budget. Every later one is bred from the best candidates of
all that were evaluated before: the first half by mutation, the rest by crossover, the order of ratios within a stage
repaired by sorting. Children over budget or evaluated before are dropped and drawn again. Candidate i of generation g
is a function of (seed, g, i, ranked results up to g - 1) alone: it depends neither on timing nor on how many work.

Without parents nothing is bred. That is random search, the control: every generation is drawn as the first one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random

from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

from .feasible import FeasibleSpace
from .results import Evaluation
from .strategy import Strategy


@dataclass(frozen=True)
class Evolution(Strategy):
    """`population` candidates per generation, the best `parents` breed, a gene mutates with probability `mutation`."""

    seed: int
    population: int
    parents: int
    mutation: float

    def propose(self, feasible: FeasibleSpace, generation: int, ranked: Sequence[Evaluation]) -> list[SparsityConfig]:
        """The candidates of `generation`; `ranked` holds all earlier evaluations, best first."""
        space, slots = feasible.space, range(self.population)
        rngs = [Random(f"{self.seed}/{generation}/{slot}") for slot in slots]
        seen = {evaluation.config for evaluation in ranked}
        if not ranked or not self.parents:
            return feasible.fill(rngs, seen)
        parents = [evaluation.config for evaluation in ranked[: self.parents]]
        mutants = partial(mutate, space, parents, self.mutation)
        crosses = partial(cross, space, parents)
        return feasible.fill(rngs, seen, [mutants if slot < self.population // 2 else crosses for slot in slots])


def mutate(space: SearchSpace, parents: Sequence[SparsityConfig], probability: float, rng: Random) -> SparsityConfig:
    """A parent whose genes are each drawn anew with `probability`."""
    parent, top = rng.choice(parents), space.max_tenths
    return space.repair(
        [[rng.randint(0, top) if rng.random() < probability else gene for gene in stage] for stage in parent.tenths]
    )


def cross(space: SearchSpace, parents: Sequence[SparsityConfig], rng: Random) -> SparsityConfig:
    """Each gene from one of two parents."""
    mother, father = rng.sample(parents, 2) if len(parents) > 1 else (parents[0], parents[0])
    return space.repair(
        [
            [rng.choice(genes) for genes in zip(*stages, strict=True)]
            for stages in zip(mother.tenths, father.tenths, strict=True)
        ]
    )
