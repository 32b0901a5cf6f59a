"""search_sparsity: feasibility first, then generations of candidates, each evaluated at most once."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol, get_args

from sparsevit_cli.errors import BudgetError, ConfigError, NonFiniteError
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

from .budget import FIELD, Budget, Cost, format_cost
from .evolution import Evolution
from .feasible import FeasibleSpace
from .results import Evaluation, Progress, SearchResult, best_first, rank
from .strategy import Strategy

StrategyName = Literal["surrogate", "evolution", "random", "optuna"]
WITH_MODEL = ("surrogate", "optuna")
"""Strategies that take a few candidates at a time; `population` and `generations` are of the others."""
Evaluate = Callable[[SparsityConfig], float]
EvaluateAll = Callable[[Sequence[SparsityConfig]], Iterable[float]]

POPULATION, GENERATIONS, MUTATION = 100, 20, 0.1
"""The authors' settings; their 25 parents are a quarter of the population."""

MODEL_EVALUATIONS = 100
"""Of a search with a model, `surrogate` or `optuna`, at most, if `max_evaluations` is not given."""


class Known(Protocol):
    """Metrics paid for earlier: a ledger, or a plain dict."""

    def get(self, config: SparsityConfig, /) -> float | None:
        """Metric of `config`, or None."""


def search_sparsity(
    space: SearchSpace,
    evaluate: Evaluate,
    cost: Cost,
    budget: Budget,
    *,
    strategy: StrategyName = "surrogate",
    seed: int = 0,
    max_evaluations: int | None = None,
    population: int | None = None,
    parents: int | None = None,
    generations: int = GENERATIONS,
    mutation: float = MUTATION,
    constraints: Sequence[tuple[Cost, Budget]] = (),
    known: Known | None = None,
    informed: Mapping[SparsityConfig, float] | None = None,
    evaluate_all: EvaluateAll | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """The configuration of `space` with the best `evaluate` (higher is better) whose `cost` is within `budget`.

    `surrogate` names the one its model expects most of, which is that one unless evaluations are noisy.

    Both are functions: the same configuration gets the same answer (hand in a latency table, not a stopwatch).
    `constraints` are further (cost, budget) pairs that must hold too. `known` is asked before `evaluate`.
    `evaluate_all`, if given, takes its place: it gets what is new of a generation, and gives the metrics in that order,
    each as soon as it likes.

    Of configurations that cost the same, and from one to the other of which ratios are lowered by tenths, every
    strategy asks for the one that keeps more.

    `evolution` and `random` ask for population * (generations + 1) configurations at most, or `max_evaluations` if that
    is less; known ones count, so that a search that was stopped and resumed equals the straight one. Defaults:
    population 100, or a fifth of `max_evaluations` where that is less (a population as large as the cap would never
    breed); parents a quarter of the population.

    `surrogate` asks for `max_evaluations` at most, 100 by default, and ends where nothing promises a gain. `informed`
    are metrics paid for before this search began, within its budget or not: its model starts from them, and those
    within budget compete, without counting. It asks what every configuration costs, so that a cost has to be fast. An
    `AdditiveCost`, such as a latency table's, tells the costs of millions at once. `optuna` asks for as many.

    Deterministic in `seed`. Where dense is within budget it is evaluated alone and returned. Raises BudgetError
    where no configuration is within budget (before anything is evaluated), NonFiniteError for a metric or cost that
    is not finite, ConfigError for a setting; what `evaluate` raises passes through.
    """
    if population is None:
        population = min(POPULATION, max(2, (max_evaluations or 5 * POPULATION) // 5))
    if parents is None:
        parents = max(1, population // 4)
    _check_settings(population, parents, generations, mutation, max_evaluations)
    chosen = _strategy(strategy, seed, population, parents, mutation, informed or {})
    feasible = FeasibleSpace(space, ((cost, budget), *constraints))

    feasible.check_reachable()
    dense_fits = space.dense in feasible
    total = most_evaluations(strategy, population, generations, max_evaluations)
    if strategy in WITH_MODEL:
        generations = total
    if dense_fits:
        generations, total = 0, 1

    history: list[Evaluation] = []
    if strategy == "surrogate" and not dense_fits:
        fitting = [config for config in sorted(informed or {}) if config in space and config in feasible]
        history += [Evaluation(config, (informed or {})[config], feasible.cost(config), 0, True) for config in fitting]
        total += len(history)
    for generation in range(generations + 1):
        proposed = [space.dense] if dense_fits else chosen.propose(feasible, generation, best_first(history))
        candidates = proposed[: total - len(history)]
        had = {} if known is None else {config: known.get(config) for config in candidates}
        new = [config for config in candidates if had.get(config) is None]
        found = iter(evaluate_all(new) if evaluate_all is not None else map(evaluate, new))
        for config in candidates:
            metric = _finite(config, next(found) if config in new else had[config])
            history.append(Evaluation(config, metric, feasible.cost(config), generation, config not in new))
            if on_progress is not None:
                on_progress(_progress(history, feasible.infeasible, generations, total))
        if not candidates or len(history) == total:
            break
    if not history:
        limits = " and ".join(str(each) for _, each in ((cost, budget), *constraints))
        got = f"no configuration was found within {limits} at once"
        raise BudgetError(FIELD[budget.metric], got, "Raise one of the budgets.")

    judged = chosen.judged(best_first(history))
    best, note = judged[0], ""
    if dense_fits:
        note = f"dense is within budget ({format_cost(best.cost, budget.metric)} <= {budget}): nothing to prune"
    elif strategy == "evolution" and total <= population:
        note = f"{total} evaluations do not exceed the population of {population}: nothing was bred"
    paid = sum(not evaluation.cached for evaluation in history)
    return SearchResult(
        best.config, best.metric, best.cost, tuple(history), feasible.infeasible, paid, tuple(judged), note
    )


def most_evaluations(strategy: str, population: int, generations: int, max_evaluations: int | None) -> int:
    """How many configurations a search asks for at most."""
    if strategy in WITH_MODEL:
        return max_evaluations or MODEL_EVALUATIONS
    return min(population * (generations + 1), max_evaluations or sys.maxsize)


def _finite(config: SparsityConfig, value: float | None) -> float:
    assert value is not None
    metric = float(value)
    if not math.isfinite(metric):
        got = f"the metric is {metric}"
        raise NonFiniteError(f"candidate {config}", got, "Check the weights and the data, or search with fp32.")
    return metric


def _progress(history: Sequence[Evaluation], infeasible: int, generations: int, total: int) -> Progress:
    return Progress(
        generation=history[-1].generation,
        generations=generations,
        asked=len(history),
        total=total,
        cached=sum(evaluation.cached for evaluation in history),
        infeasible=infeasible,
        best=min(history, key=rank),
        last=history[-1],
    )


def _strategy(
    name: str, seed: int, population: int, parents: int, mutation: float, informed: Mapping[SparsityConfig, float]
) -> Strategy:
    if name == "evolution":
        return Evolution(seed, population, parents, mutation)
    if name == "surrogate":
        from .surrogate import Surrogate  # numpy, which the other strategies do without

        return Surrogate(seed, informed)
    if name == "optuna":
        from .optuna_search import OptunaSearch  # needs what an extra brings

        return OptunaSearch(seed)
    if name == "random":
        return Evolution(seed, population, parents=0, mutation=0.0)
    raise ConfigError("search.strategy", f"{name!r}; allowed are {' and '.join(get_args(StrategyName))}", "Choose one.")


def _check_settings(
    population: int, parents: int, generations: int, mutation: float, max_evaluations: int | None
) -> None:
    checks = (
        ("population", population, population >= 2, "at least 2"),
        ("parents", parents, 1 <= parents <= population, f"1 to the population, {population}"),
        ("generations", generations, generations >= 0, "at least 0"),
        ("mutation", mutation, 0 <= mutation <= 1, "0 to 1"),
        ("max_evaluations", max_evaluations, max_evaluations is None or max_evaluations >= 1, "at least 1"),
    )
    for name, value, valid, allowed in checks:
        if not valid:
            raise ConfigError(f"search.{name}", f"{value}; allowed is {allowed}", "Change it.")
