"""The control of the evolutionary search: as many candidates, each drawn blindly under the budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from sparsevit_cli.sparsity import SparsityConfig

from .feasible import FeasibleSpace
from .results import Evaluation


@dataclass(frozen=True)
class RandomSearch:
    """`population` new feasible candidates per generation; the first ones are those of the evolution of that seed."""

    seed: int
    population: int

    def propose(self, feasible: FeasibleSpace, generation: int, ranked: Sequence[Evaluation]) -> list[SparsityConfig]:
        """The candidates of `generation`: a function of (seed, generation) and of what was drawn before."""
        rngs = [Random(f"{self.seed}/{generation}/{slot}") for slot in range(self.population)]
        return feasible.fill(rngs, {evaluation.config for evaluation in ranked})

    def judged(self, ranked: Sequence[Evaluation]) -> list[Evaluation]:
        """As they scored."""
        return list(ranked)
