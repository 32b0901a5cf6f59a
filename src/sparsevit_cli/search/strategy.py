"""What a search strategy is: where candidates come from, and how their scores are judged in the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from sparsevit_cli.sparsity import SparsityConfig

from .feasible import FeasibleSpace
from .results import Evaluation


class Strategy(Protocol):
    """Derive from it: then scores are judged as they are, unless `judged` says otherwise."""

    def propose(self, feasible: FeasibleSpace, generation: int, ranked: Sequence[Evaluation]) -> list[SparsityConfig]:
        """Distinct feasible candidates outside `ranked` (all earlier evaluations, best first); empty at the end."""

    def judged(self, ranked: Sequence[Evaluation]) -> list[Evaluation]:
        """All evaluations in the order in which they deserve to win; `ranked` is by their scores."""
        return list(ranked)
