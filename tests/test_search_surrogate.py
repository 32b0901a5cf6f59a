"""The space by numbers, its staircase, and the search that models the metric over it."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import combinations_with_replacement, product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.search import AdditiveCost, Budget, best_first, search_sparsity
from sparsevit_cli.search import feasible as feasible_module
from sparsevit_cli.search.enumeration import Enumeration, configurations, tenths_of
from sparsevit_cli.search.feasible import FeasibleSpace, one_tenth_lower
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

SPACE = SearchSpace((2, 2, 4, 2))


def random_cost(space: SearchSpace, seed: int) -> AdditiveCost:
    """Entries in any order: a table that was measured need not fall with the ratio."""
    rng = Random(seed)
    pairs = tuple(
        tuple(tuple(rng.uniform(0.5, 2) * (10 - t) for t in range(9)) for _ in range(count)) for count in space.pairs
    )
    return AdditiveCost(rng.random(), pairs, tuple(rng.random() for _ in space.pairs))


spaces = st.builds(
    SearchSpace, st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple), st.sampled_from([0.1, 0.3, 0.5])
)


@given(spaces, st.integers(0, 999), st.floats(0, 1), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_staircase_is_what_brute_force_finds(space: SearchSpace, seed: int, share: float, functions: bool) -> None:
    costs = [random_cost(space, seed), random_cost(space, seed + 1000)]
    limits = [share * cost(space.dense) + (1 - share) * cost(space.sparsest) for cost in costs]

    def fits(config: SparsityConfig) -> bool:
        return all(cost(config) <= limit for cost, limit in zip(costs, limits, strict=True))

    constraints = [(cost, Budget(limit, "latency_ms")) for cost, limit in zip(costs, limits, strict=True)]
    if functions:
        constraints = [(cost.__call__, budget) for cost, budget in constraints]
    found = Enumeration(space).staircase(constraints)
    within = [config for config in space if fits(config)]
    expected = [config for config in within if not any(map(fits, one_tenth_lower(config)))]
    assert configurations(space, found.tenths) == expected
    assert found.feasible == len(within)


@given(spaces, st.integers(0, 999))
@settings(max_examples=15, deadline=None)
def test_costs_of_numbers_are_those_of_configurations_to_the_bit(space: SearchSpace, seed: int) -> None:
    enumeration, cost, configs = Enumeration(space), random_cost(space, seed), list(space)
    numbers = np.arange(len(enumeration))
    assert configurations(space, enumeration.tenths(numbers)) == configs
    assert (enumeration.tenths(numbers) == tenths_of(configs)).all()
    assert enumeration.costs(cost, numbers).tolist() == list(map(cost, configs))


def test_the_staircase_of_eighteen_blocks_is_as_large_as_counting_says() -> None:
    """17.7 million configurations. Each tenth that is kept more costs as much, so that these tenths alone decide."""
    space, kept_more = SearchSpace((2, 2, 18, 2)), 12
    cost = linear_cost(space)
    limit = cost(space.sparsest) + 0.4 * (kept_more + 0.5)
    found = Enumeration(space).staircase([(cost, Budget(limit, "latency_ms"))])
    counts = Counter({0: 1})  # configurations by the tenths that they keep more than the sparsest one
    for pairs in space.pairs:
        of_stage = Counter(sum(8 - t for t in row) for row in combinations_with_replacement(range(9), pairs))
        both = Counter[int]()
        for (more, count), (there, times) in product(counts.items(), of_stage.items()):
            both[more + there] += count * times
        counts = both
    assert counts.total() == space.size == 17_721_990
    assert found.feasible == sum(counts[more] for more in range(kept_more + 1))
    assert len(found.tenths) == counts[kept_more]


# -- the search ---------------------------------------------------------------------------------------------------


def linear_cost(space: SearchSpace = SPACE) -> AdditiveCost:
    pairs = tuple(tuple(tuple(4.0 * (10 - t) / 10 for t in range(9)) for _ in range(n)) for n in space.pairs)
    return AdditiveCost(4.0, pairs, (0.0,) * len(pairs))


def accuracy(config: SparsityConfig) -> float:
    """Early stages are sensitive, and skipping a lot at once hurts more than its parts."""
    sensitivity = (3.0, 2.0, 0.8, 1.5)
    losses = [k * (t / 10) ** 2 for k, stage in zip(sensitivity, config.tenths, strict=False) for t in stage]
    return 90 - sum(losses) - 0.3 * math.prod(1 + loss for loss in losses)


@cache
def optimum(limit: float) -> float:
    cost = linear_cost()
    return max(accuracy(config) for config in SPACE if cost(config) <= limit)


def search(limit: float = 16, cost=None, **kwargs):
    cost = cost or linear_cost()
    return search_sparsity(SPACE, accuracy, cost, Budget(limit, "latency_ms"), strategy="surrogate", **kwargs)


def found(result) -> list[tuple]:
    return [(e.config, e.metric, e.cost, e.generation) for e in result.history]


@pytest.mark.parametrize("limit", [14, 16, 20])
def test_forty_evaluations_find_what_is_within_a_twentieth_of_a_point_of_the_best(limit: float) -> None:
    for seed in range(3):
        assert search(limit, seed=seed, max_evaluations=40).best_metric >= optimum(limit) - 0.05


def test_candidates_are_distinct_and_maximal_and_all_that_is_over_budget_is_counted() -> None:
    cost, result = linear_cost(), search(max_evaluations=14)
    assert len({e.config for e in result.history}) == len(result.history) == result.evaluations == 14
    assert all(e.cost == cost(e.config) <= 16 < min(map(cost, one_tenth_lower(e.config))) for e in result.history)
    assert result.infeasible == sum(cost(config) > 16 for config in SPACE)
    assert [e.generation for e in result.history] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2


def test_same_seed_same_history_and_a_plain_function_finds_the_same() -> None:
    first = search(max_evaluations=14)
    assert search(max_evaluations=14) == first
    assert found(search(max_evaluations=14, cost=linear_cost().__call__)) == found(first)
    assert found(search(max_evaluations=14, seed=1)) != found(first)


@pytest.mark.parametrize("stopped_after", [0, 1, 11, 15])
def test_a_stopped_search_goes_on_as_if_never_stopped(stopped_after: int) -> None:
    straight = search(max_evaluations=16)
    known = {e.config: e.metric for e in straight.history[:stopped_after]}
    resumed = search(max_evaluations=16, known=known)
    assert found(resumed) == found(straight)
    assert resumed.evaluations == len(straight.history) - stopped_after


def test_a_search_ends_where_nothing_promises_a_gain() -> None:
    result = search()
    assert len(result.history) < 60
    assert result.best_metric >= optimum(16) - 0.01


def test_a_lucky_score_does_not_win_over_what_its_neighbours_say() -> None:
    """One score is half a point too high; without noise the order of the scores is kept."""
    honest = search(max_evaluations=40)
    assert honest.judged[0].metric == max(e.metric for e in honest.history) == honest.best_metric
    rng = Random(5)
    noise = {config: rng.gauss(0, 0.1) for config in SPACE}
    regrets: dict[str, list[float]] = {"judged": [], "highest score": []}
    for limit in (13, 14, 15, 16, 17, 18, 19, 20):
        noisy = search_sparsity(
            SPACE, lambda config: accuracy(config) + noise[config], linear_cost(), Budget(limit, "latency_ms"),
            strategy="surrogate", max_evaluations=40,
        )  # fmt: skip
        for name, config in (("judged", noisy.best), ("highest score", best_first(noisy.history)[0].config)):
            regrets[name].append(optimum(limit) - accuracy(config))
    assert sum(regrets["judged"]) < sum(regrets["highest score"])


def test_what_was_paid_for_other_budgets_informs_without_counting() -> None:
    first = search(16)
    informed = {e.config: e.metric for e in first.history}
    again = search(16, informed=informed)
    assert again.best_metric >= first.best_metric - 1e-3
    assert again.evaluations <= 8  # nothing, or the last doubts
    second, alone = search(14, informed=informed), search(14)
    assert second.evaluations < alone.evaluations
    assert second.best_metric >= optimum(14) - 0.05
    assert all(e.cost <= 14 for e in second.history)
    wider = search(18, informed=informed, max_evaluations=5)
    assert [e.cached for e in wider.history] == [True] * len(first.history) + [False] * wider.evaluations
    assert wider.evaluations <= 5


def test_a_space_too_large_to_enumerate_is_searched_on_a_sampled_staircase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feasible_module, "SAMPLED", 200)
    space = SearchSpace((2, 2, 18, 2))
    cost = linear_cost(space)
    budget = Budget(0.7 * cost(space.dense), "latency_ms")
    result = search_sparsity(space, accuracy, cost.__call__, budget, strategy="surrogate", max_evaluations=30, seed=3)
    assert all(cost(e.config) <= budget.limit < min(map(cost, one_tenth_lower(e.config))) for e in result.history)
    drawn = search_sparsity(space, accuracy, cost, budget, strategy="random", max_evaluations=30, seed=3)
    assert result.best_metric > drawn.best_metric


@pytest.mark.parametrize("most", [5, None])
def test_a_staircase_on_which_every_metric_is_equal_is_searched_whole(most: int | None) -> None:
    """Nothing says that a member is worse than it may be, so that every one still promises something."""
    cost, budget = linear_cost(), Budget(9, "latency_ms")
    result = search_sparsity(SPACE, lambda _: 1.0, cost, budget, strategy="surrogate", max_evaluations=most)
    members = FeasibleSpace(SPACE, [(cost, budget)]).staircase(0)
    assert 5 < len(members) <= 100
    assert len(result.history) == min(len(members), most or 100)


def test_a_configuration_of_another_model_has_no_cost() -> None:
    with pytest.raises(ConfigError, match=r"block pairs \[1, 1\], the model \[1, 1, 2, 1\]"):
        linear_cost()(SparsityConfig(((0,), (0,))))
    short = AdditiveCost(0, (((2, 1),),), (0,))
    assert short(SparsityConfig(((1,),))) == 1
    with pytest.raises(ConfigError, match=r"ratios above 0\.1"):
        short(SparsityConfig(((2,),)))


@pytest.mark.parametrize("limit", [5.5, 6.2, 6.9, 7.6])
def test_no_candidate_comes_twice_from_a_small_staircase(limit: float) -> None:
    """The first candidates of a small one came twice, and were paid twice."""
    space = SearchSpace(depths=(2, 2))
    for seed in range(5):
        found = search_sparsity(
            space, evaluate=lambda config: -sum(map(sum, config.ratios)), seed=seed, strategy="surrogate",
            cost=lambda config: 8 - 4 * config.ratios[0][0] - 4 * config.ratios[1][0], budget=Budget(limit, "macs"),
        )  # fmt: skip
        asked = [evaluation.config for evaluation in found.history]
        assert len(asked) == len(set(asked))
