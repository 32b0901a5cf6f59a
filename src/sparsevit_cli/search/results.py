"""What a search records and returns: frozen values and their one order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sparsevit_cli.sparsity import SparsityConfig


@dataclass(frozen=True)
class Evaluation:
    """One candidate and what it scored: metric (higher is better), cost in the unit of the budget.

    `cached`: the metric was known before (the ledger), nothing was run for it.
    """

    config: SparsityConfig
    metric: float
    cost: float
    generation: int
    cached: bool


def rank(evaluation: Evaluation) -> tuple[float, float, SparsityConfig]:
    """Sorting key, best first: metric, ties by lower cost, then by tenths, so that arrival never decides."""
    return -evaluation.metric, evaluation.cost, evaluation.config


def best_first(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """Evaluations in the one order of the search."""
    return sorted(evaluations, key=rank)


@dataclass(frozen=True)
class SearchResult:
    """The winner and how it was found.

    `history`: one entry per evaluation asked for, distinct configurations, in order. `evaluations` of them were
    run, the others were known. `infeasible`: distinct configurations drawn that exceeded a budget; of an enumerated
    space all of them. `judged`: the history as the strategy judges noisy scores, the best one first.
    `note`: what the user should know about the outcome; empty where all went as asked.
    """

    best: SparsityConfig
    best_metric: float
    best_cost: float
    history: tuple[Evaluation, ...]
    infeasible: int
    evaluations: int
    judged: tuple[Evaluation, ...]
    note: str = ""


@dataclass(frozen=True)
class Progress:
    """State after each evaluation: `asked` of at most `total` are done, `cached` of them were known before."""

    generation: int
    generations: int
    asked: int
    total: int
    cached: int
    infeasible: int
    best: Evaluation
    last: Evaluation
