"""search_sparsity: the budget, determinism, small spaces, both strategies. Lambdas instead of models."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevit_cli.errors import BudgetError, ConfigError, NonFiniteError
from sparsevit_cli.search import (
    Budget,
    Evaluation,
    Progress,
    best_first,
    pareto_front,
    search_sparsity,
    spearman,
)
from sparsevit_cli.search.evolution import cross, mutate
from sparsevit_cli.search.feasible import one_tenth_lower
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

SWIN_T = SearchSpace((2, 2, 6, 2))


def cost_of(config: SparsityConfig, base: float = 4.0, pair: float = 4.0) -> float:
    """Additive, like a latency table: Swin-T costs 28 dense and 8.8 at its sparsest."""
    return base + sum(pair * (10 - t) / 10 for stage in config.tenths for t in stage)


def accuracy(config: SparsityConfig) -> float:
    """Early stages are sensitive, and skipping a lot at once hurts more than its parts."""
    sensitivity = (3.0, 2.0, 0.8, 1.5)
    losses = [k * (t / 10) ** 2 for k, stage in zip(sensitivity, config.tenths, strict=False) for t in stage]
    return 90 - sum(losses) - 0.3 * math.prod(1 + loss for loss in losses)


def latency(limit: float) -> Budget:
    return Budget(limit, "latency_ms")


def search(limit: float = 20, space: SearchSpace = SWIN_T, **kwargs):
    settings = {"strategy": "evolution", "population": 20, "parents": 5, "generations": 6} | kwargs
    return search_sparsity(space, accuracy, cost_of, latency(limit), **settings)


def found(result) -> list[tuple]:
    return [(e.config, e.metric, e.cost, e.generation) for e in result.history]


def test_the_room_imports_neither_torch_nor_numpy():
    code = "import sys, sparsevit_cli.search; sys.exit(bool({'torch', 'numpy', 'timm'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("strategy", ["evolution", "random"])
def test_result_is_the_best_of_a_history_within_budget(strategy):
    result = search(strategy=strategy)
    assert len(result.history) == result.evaluations == 20 * 7
    assert len({e.config for e in result.history}) == len(result.history)
    assert all(e.cost == cost_of(e.config) <= 20 and e.metric == accuracy(e.config) for e in result.history)
    assert all(e.config in SWIN_T and not e.cached for e in result.history)
    assert [e.generation for e in result.history] == [g for g in range(7) for _ in range(20)]
    best = best_first(result.history)[0]
    assert (result.best, result.best_metric, result.best_cost) == (best.config, best.metric, best.cost)
    assert result.infeasible > 0
    assert result.note == ""


@pytest.mark.parametrize("strategy", ["evolution", "random"])
def test_same_seed_same_history_other_seed_another(strategy):
    assert search(strategy=strategy, seed=3) == search(strategy=strategy, seed=3)
    assert found(search(strategy=strategy, seed=3)) != found(search(strategy=strategy, seed=4))


def test_history_does_not_depend_on_the_hash_seed():
    code = (
        "from sparsevit_cli.search import *; from sparsevit_cli.sparsity import *;"
        "r = search_sparsity(SearchSpace((2, 2, 6, 2)), lambda c: hash(c.tenths) % 97,"
        "lambda c: 99 - sum(map(sum, c.tenths)),"
        "Budget(80, 'macs'), strategy='evolution', population=10, generations=3);"
        "print([str(e.config) for e in r.history])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_evolution_beats_random_with_as_many_evaluations():
    """The claim of the paper, on ten seeds and three budgets: better on average, and mostly."""
    for limit in (17, 20, 24):
        gains = []
        for seed in range(10):
            evolved = search(limit, seed=seed, max_evaluations=140)
            drawn = search(limit, seed=seed, max_evaluations=140, strategy="random")
            assert len(evolved.history) == len(drawn.history) == 140
            assert found(evolved)[:20] == found(drawn)[:20]  # the same first population
            gains.append(evolved.best_metric - drawn.best_metric)
        assert sum(gains) / len(gains) > 0.1
        assert sum(gain > 0 for gain in gains) >= 7


def test_evolution_finds_the_optimum_of_swin_t_with_the_authors_settings():
    """2,100 of 120,285 configurations, checked against all of them."""
    optimum = max(accuracy(config) for config in SWIN_T if cost_of(config) <= 20)
    assert search_sparsity(SWIN_T, accuracy, cost_of, latency(20), strategy="evolution").best_metric == optimum


@given(
    depths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    max_ratio=st.sampled_from([0.1, 0.3, 0.8]),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
    strategy=st.sampled_from(["evolution", "random"]),
)
@settings(max_examples=60, deadline=None)
def test_budget_is_met_whenever_the_sparsest_meets_it(depths, max_ratio, share, seed, strategy):
    """Also where cost is not monotone, and whole spaces are searched where they are small."""
    space = SearchSpace(tuple(depths), max_ratio)

    def noisy(config):
        return cost_of(config) * (1 + 0.1 * Random(f"{seed}{config}").random())

    limit = noisy(space.sparsest) + share * (noisy(space.dense) - noisy(space.sparsest))
    result = search_sparsity(
        space, accuracy, noisy, latency(limit), strategy=strategy, seed=seed, population=30, generations=2
    )
    assert all(noisy(e.config) <= limit for e in result.history)
    assert len({e.config for e in result.history}) == len(result.history)
    if space.size <= 1000 and noisy(space.dense) > limit:
        feasible = [config for config in space if noisy(config) <= limit]
        assert len(result.history) == min(len(feasible), 90)
        if len(feasible) <= 90:
            assert result.best_metric == max(map(accuracy, feasible))


@pytest.mark.parametrize("strategy", ["evolution", "random"])
@pytest.mark.parametrize("space", [SWIN_T, SearchSpace((2, 2)), SearchSpace((2, 2, 18, 2))], ids=str)
def test_tight_budgets_end_with_the_few_that_fit(space, strategy):
    only = search(cost_of(space.sparsest), space, strategy=strategy)
    assert [e.config for e in only.history] == [space.sparsest]
    one_step = search(cost_of(space.sparsest) + 0.4001, space, strategy=strategy)
    configs = {e.config for e in one_step.history}
    sparsest = space.sparsest.tenths
    steps = {SparsityConfig((*sparsest[:s], (7, *stage[1:]), *sparsest[s + 1 :])) for s, stage in enumerate(sparsest)}
    assert steps <= configs <= steps | {space.sparsest}
    assert space.sparsest in configs or space.size > 150_000  # smaller spaces are searched whole
    assert one_step.best in steps


def test_unreachable_budget_costs_two_measurements_and_no_evaluation():
    asked = []

    def cost(config):
        asked.append(config)
        return cost_of(config)

    with pytest.raises(BudgetError) as caught:
        search_sparsity(SWIN_T, pytest.fail, cost, latency(3.1))
    assert "3.1 ms is below the sparsest configuration (8.8 ms); reachable is 8.8 ms to 28 ms" in str(caught.value)
    assert caught.value.exit_code == 5
    assert asked == [SWIN_T.dense, SWIN_T.sparsest]


@pytest.mark.parametrize("limit", [28, 1000])
def test_budget_of_dense_or_more_returns_dense_and_says_so(limit):
    result = search(limit, seed=5)
    assert result.best == SWIN_T.dense
    assert len(result.history) == result.evaluations == 1
    assert "dense is within budget (28 ms" in result.note


def test_dense_that_is_cheaper_than_the_sparsest_is_found():
    result = search_sparsity(SWIN_T, accuracy, lambda c: 10 + 0.1 * sum(map(sum, c.tenths)), latency(10))
    assert result.best == SWIN_T.dense
    with pytest.raises(BudgetError, match=r"9 ms is below the dense model.*reachable is 10 ms to 14\.8 ms"):
        search_sparsity(SWIN_T, accuracy, lambda c: 10 + 0.1 * sum(map(sum, c.tenths)), latency(9))


def test_all_constraints_hold():
    def macs(config):
        return 1e9 * (1 + sum(8 - t for t in config.tenths[0]))

    result = search(20, constraints=[(macs, Budget(4e9, "macs"))])
    assert all(e.cost <= 20 and macs(e.config) <= 4e9 for e in result.history)
    assert min(t for e in result.history for t in e.config.tenths[0]) == 5
    with pytest.raises(
        BudgetError, match=r"search\.budget_macs: 500 MMACs is below .* reachable is 1 GMACs to 9 GMACs"
    ):
        search(20, constraints=[(macs, Budget(5e8, "macs"))])


def test_budgets_that_exclude_each_other_are_told():
    """Latency is met by dense alone, macs by the sparsest alone: each is reachable, both at once are not."""
    space = SearchSpace((2, 2))
    with pytest.raises(BudgetError, match="no configuration was found within 5 ms and 1 GMACs at once"):
        search_sparsity(
            space,
            pytest.fail,
            lambda c: 5.0 if c.is_dense else 6.0,
            latency(5),
            constraints=[(lambda c: 1e9 if c == space.sparsest else 2e9, Budget(1e9, "macs"))],
        )


@pytest.mark.parametrize("strategy", ["evolution", "random"])
@pytest.mark.parametrize("stopped_after", [0, 1, 19, 20, 73, 139, 140])
def test_a_stopped_search_goes_on_as_if_never_stopped(strategy, stopped_after):
    straight = search(strategy=strategy, max_evaluations=140)
    known = {e.config: e.metric for e in straight.history[:stopped_after]}
    resumed = search(strategy=strategy, max_evaluations=140, known=known)
    assert found(resumed) == found(straight)
    assert resumed.best == straight.best
    assert [e.cached for e in resumed.history] == [i < stopped_after for i in range(140)]
    assert resumed.evaluations == 140 - stopped_after


@pytest.mark.parametrize("stopped_after", [5, 24])
def test_optuna_keeps_the_budget_and_a_stopped_search_goes_on(stopped_after):
    pytest.importorskip("optuna")
    straight = search(strategy="optuna", max_evaluations=24)
    assert len({e.config for e in straight.history}) == len(straight.history) == straight.evaluations == 24
    assert all(e.cost <= 20 and e.config in SWIN_T for e in straight.history)
    known = {e.config: e.metric for e in straight.history[:stopped_after]}
    resumed = search(strategy="optuna", max_evaluations=24, known=known)
    assert found(resumed) == found(straight)
    assert resumed.evaluations == 24 - stopped_after


def test_optuna_learns_from_what_it_is_told():
    """Better than a random search of as many evaluations, at the mean of a few seeds."""
    pytest.importorskip("optuna")
    gains = [
        search(seed=seed, strategy="optuna", max_evaluations=40).best_metric
        - search(seed=seed, strategy="random", max_evaluations=40).best_metric
        for seed in range(3)
    ]
    assert sum(gains) > 0


def test_without_optuna_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"optuna is needed.*sparsevit-cli\[optuna\]"):
        search(strategy="optuna")


def test_a_second_budget_pays_only_for_what_is_new():
    first = search(20)
    known = {e.config: e.metric for e in first.history}
    second = search(18, known=known)
    assert 0 < second.evaluations < len(second.history)
    assert found(second) == found(search(18))


@pytest.mark.parametrize("cap", [1, 7, 20, 33])
@pytest.mark.parametrize("strategy", ["evolution", "random"])
def test_max_evaluations_caps_what_is_asked_for(cap, strategy):
    assert found(search(strategy=strategy, max_evaluations=cap)) == found(search(strategy=strategy))[:cap]


def test_a_small_cap_still_breeds_unless_the_population_is_given():
    bred = search_sparsity(SWIN_T, accuracy, cost_of, latency(20), strategy="evolution", max_evaluations=50)
    assert bred.history[-1].generation == 4
    assert "nothing was bred" in search(max_evaluations=20).note


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_or_cost_that_is_not_finite_names_the_candidate(bad):
    first = search().history[0].config
    with pytest.raises(NonFiniteError) as caught:
        search_sparsity(SWIN_T, lambda config: bad, cost_of, latency(20), strategy="evolution", population=20)
    assert str(first) in str(caught.value)
    with pytest.raises(NonFiniteError, match="cost of candidate"):
        search_sparsity(SWIN_T, accuracy, lambda config: bad, latency(20))


@pytest.mark.parametrize("strategy", ["surrogate", "evolution", "random", "optuna"])
def test_of_configurations_that_cost_the_same_the_one_that_keeps_more_is_asked_for(strategy):
    """Ratios of 0.1 and 0.2, and of 0.4 to 0.6, cost the same: the smallest of each is enough to know."""
    if strategy == "optuna":
        pytest.importorskip("optuna")
    space, steps = SearchSpace((2, 2, 4)), (10, 9, 9, 7, 5, 5, 5, 2, 1)

    def cost(config):
        return 4.0 + sum(steps[t] for stage in config.tenths for t in stage)

    result = search_sparsity(
        space, lambda config: Random(str(config)).random(), cost, latency(30),
        strategy=strategy, seed=1, max_evaluations=24, population=12,
    )  # fmt: skip
    assert len(result.history) > 10
    for evaluation in result.history:
        assert evaluation.cost < min((cost(lower) for lower in one_tenth_lower(evaluation.config)), default=math.inf)


def test_what_evaluate_raises_passes_through():
    def fail(config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search_sparsity(SWIN_T, fail, cost_of, latency(20))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("population", 1),
        ("parents", 0),
        ("parents", 21),
        ("generations", -1),
        ("mutation", 1.5),
        ("mutation", math.nan),
        ("max_evaluations", 0),
        ("max_evaluations", -3),
        ("strategy", "annealing"),
    ],
)
def test_settings_out_of_range_name_their_field(setting, value):
    with pytest.raises(ConfigError, match=f"search.{setting}"):
        search(**{setting: value})


@pytest.mark.parametrize("settings", [{"mutation": 0.0}, {"mutation": 1.0}, {"parents": 1}, {"generations": 0}])
def test_extreme_settings_still_fill_every_generation(settings):
    result = search(**settings)
    assert len(result.history) == 20 * (settings.get("generations", 6) + 1)


def test_progress_is_told_after_every_evaluation():
    seen: list[Progress] = []
    known = {search().history[2].config: 1.0}
    result = search(max_evaluations=30, on_progress=seen.append, known=known)
    assert [p.asked for p in seen] == list(range(1, 31))
    assert [p.last for p in seen] == list(result.history)
    assert [p.cached for p in seen] == [0, 0] + [1] * 28
    assert all(p.total == 30 for p in seen)
    assert all(after.best.metric >= before.best.metric for before, after in pairwise(seen))
    assert seen[-1].best.config == result.best
    assert seen[-1].infeasible <= result.infeasible


@given(st.randoms(use_true_random=False), st.floats(0, 1))
def test_children_take_their_genes_from_parents_or_the_grid(rng, mutation):
    parents = [SWIN_T.sample(rng) for _ in range(2)]
    child = cross(SWIN_T, parents, rng)
    for stage, mother, father in zip(child.tenths, *(p.tenths for p in parents), strict=True):
        assert all(t in mother + father for t in stage)
        assert min(sorted(mother)[0], sorted(father)[0]) <= stage[0]
    assert mutate(SWIN_T, parents, mutation, rng) in SWIN_T
    assert mutate(SWIN_T, parents, 0.0, rng) in parents


def test_ties_are_ranked_by_cost_then_tenths():
    def entry(metric, cost, tenths):
        return Evaluation(SparsityConfig(((tenths,),)), metric, cost, 0, False)

    order = [entry(2, 9, 1), entry(1, 3, 2), entry(1, 3, 4), entry(1, 5, 0)]
    assert best_first(reversed(order)) == order


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_pareto_front_is_what_nothing_dominates(points):
    rng = Random(0)
    history = [Evaluation(SWIN_T.sample(rng), float(m), float(c), 0, False) for m, c in points]
    front = pareto_front(history)
    for e in history:
        dominated = any(
            o.metric >= e.metric and o.cost <= e.cost and (o.metric, o.cost) != (e.metric, e.cost) for o in history
        )
        assert ((e.metric, e.cost) in {(f.metric, f.cost) for f in front}) == (not dominated)
    assert [f.cost for f in front] == sorted({f.cost for f in front})


def test_spearman_against_known_values_and_scipy():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)
    assert math.isnan(spearman([1, 1], [1, 2]))
    assert math.isnan(spearman([], []))
    stats = pytest.importorskip("scipy.stats")
    rng = Random(1)
    for _ in range(20):
        a, b = ([rng.randint(0, 6) for _ in range(12)] for _ in range(2))
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
