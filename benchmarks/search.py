"""How many evaluations a search needs, on problems whose optimum is known.

Problems are a trained model whose whole space was evaluated (search_table.py), with ten seeds for each of three
budgets, and synthetic worlds (search_worlds.py) of ten seeds that nothing was designed on.

Every strategy is asked for the best of what it evaluated after 1, 2, 3 ... evaluations; the regret is how much worse
its true metric is than the optimum. `surrogate` names the best by its model, all others by the score. Where a score
holds noise, five are named, and the best of these by its true metric counts: `sparsevit search` scores five finalists
on all images. These five are not among the evaluations.

Optuna and pymoo are run if they are installed. They see genes, repaired by sorting as ours are. What they propose
beyond the budget costs no evaluation: they are told by how much. Nor does what was evaluated before.

usage: python benchmarks/search.py [--trained [GROUPS] | --depths 2 2 18 2 --noise 0.2] [--strategies surrogate ...]
           adds to benchmarks/results/search/worlds.json
       python benchmarks/search.py --table
           writes the tables of docs/search.md from it
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
from search_table import GROUPS, SHARES, Tabulated
from search_worlds import NOISE, World

from sparsevit_cli.atomic import write_json
from sparsevit_cli.search import Evaluation, best_first, search_sparsity
from sparsevit_cli.search.surrogate import Surrogate
from sparsevit_cli.sparsity import SparsityConfig

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "search" / "worlds.json"
PAGE = HERE.parent / "docs" / "search.md"
BEGIN, END = "<!-- search: begin -->", "<!-- search: end -->"
SEEDS = range(1000, 1010)
"""Held out: all of the design was done on seeds 0 to 19."""
MARKS = (20, 40, 60, 100, 300, 550, 1000)
NEAR = 0.1
PROPOSALS = 10
"""Most that an engine from outside may propose per evaluation."""

Problem = Tabulated | World
Curve = list[float]
"""Regret after each evaluation."""


def ours(strategy: Any, most: int, **settings: int) -> Callable[[Problem], Curve]:
    """One of our strategies."""

    def run(world: Problem) -> Curve:
        result = search_sparsity(
            world.space, world.evaluate, world.cost, world.budget,
            strategy=strategy, seed=world.seed, max_evaluations=most, **settings,
        )  # fmt: skip
        judge = Surrogate(world.seed) if strategy == "surrogate" else None
        curve, leaders = Curve(), list[Evaluation]()
        for count, evaluation in enumerate(result.history, 1):
            if judge is not None:
                leaders = judge.judged(best_first(result.history[:count]))[: world.finalists]
            else:
                leaders = best_first([*leaders, evaluation])[: world.finalists]
            curve.append(regret(world, [leader.config for leader in leaders]))
        return curve

    return run


def regret(world: Problem, leaders: list[SparsityConfig]) -> float:
    """How far the best one of the finalists is from the optimum."""
    return world.optimum - max(map(world.true_metric, leaders))


class _Told:
    """What an engine from outside may ask: the metric within the budget, the overrun beyond it."""

    def __init__(self, world: Problem, most: int) -> None:
        self.world, self.most, self.scored, self.curve = world, most, dict[SparsityConfig, float](), Curve()

    def __call__(self, genes: list[int]) -> tuple[float, float]:
        """Metric (higher is better, 0 if there is none) and milliseconds over the budget."""
        stages, first = [], 0
        for pairs in self.world.space.pairs:
            stages.append(genes[first : first + pairs])
            first += pairs
        config = self.world.space.repair(stages)
        over = self.world.cost(config) - self.world.budget.limit
        if over > 0:
            return 0.0, over
        if config not in self.scored and not self.is_done:
            self.scored[config] = self.world.evaluate(config)
            self.curve.append(regret(self.world, nlargest(self.world.finalists, self.scored, self.scored.__getitem__)))
        return self.scored.get(config, 0.0), over

    @property
    def is_done(self) -> bool:
        """True once all evaluations are spent."""
        return len(self.curve) >= self.most


def optuna_with(sampler: str, most: int) -> Callable[[Problem], Curve]:
    """Optuna, ask and tell."""

    def run(world: Problem) -> Curve:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        told, genes = _Told(world, most), sum(world.space.pairs)
        samplers = {"TPE": optuna.samplers.TPESampler, "NSGA-II": optuna.samplers.NSGAIISampler}
        made = samplers[sampler](seed=world.seed)
        study = optuna.create_study(direction="maximize", sampler=made)
        for _ in range(PROPOSALS * most):
            if told.is_done:
                break
            trial = study.ask()
            metric, over = told([trial.suggest_int(f"gene {gene}", 0, 8) for gene in range(genes)])
            trial.set_constraint("over", over)
            study.tell(trial, metric)
        return told.curve

    return run


def pymoo_ga(most: int) -> Callable[[Problem], Curve]:
    """pymoo's genetic algorithm on integers, its defaults else."""

    def run(world: Problem) -> Curve:
        from pymoo.algorithms.soo.nonconvex.ga import GA
        from pymoo.core.problem import ElementwiseProblem
        from pymoo.operators.crossover.sbx import SBX
        from pymoo.operators.mutation.pm import PM
        from pymoo.operators.repair.rounding import RoundingRepair
        from pymoo.operators.sampling.rnd import IntegerRandomSampling

        told, genes = _Told(world, most), sum(world.space.pairs)

        class Problem(ElementwiseProblem):
            def __init__(self) -> None:
                super().__init__(n_var=genes, n_obj=1, n_ieq_constr=1, xl=0, xu=8, vtype=int)

            def _evaluate(self, x: Any, out: Any, *args: Any, **kwargs: Any) -> None:
                metric, over = told([int(gene) for gene in x])
                out["F"], out["G"] = -metric, over

        algorithm = GA(
            pop_size=50, sampling=IntegerRandomSampling(), eliminate_duplicates=True,
            crossover=SBX(vtype=float, repair=RoundingRepair()), mutation=PM(vtype=float, repair=RoundingRepair()),
        )  # fmt: skip
        algorithm.setup(Problem(), termination=("n_eval", PROPOSALS * most), seed=world.seed, verbose=False)
        while algorithm.has_next() and not told.is_done:
            algorithm.next()
        return told.curve

    return run


STRATEGIES: dict[str, tuple[str, Callable[[Problem], Curve]]] = {
    "surrogate": ("", ours("surrogate", 100)),
    "evolution, the authors' population of 100": ("", ours("evolution", 1000, population=100, parents=25)),
    "evolution, population 50": ("", ours("evolution", 550, population=50, parents=12)),
    "random": ("", ours("random", 1000, population=100)),
    "Optuna TPE": ("optuna", optuna_with("TPE", 60)),
    "Optuna NSGA-II": ("optuna", optuna_with("NSGA-II", 300)),
    "pymoo GA": ("pymoo", pymoo_ga(300)),
}


def synthetic(depths: tuple[int, ...], noise: float) -> tuple[str, dict[str, Problem]]:
    """A world per seed."""
    title = f"Synthetic worlds, depths {'-'.join(map(str, depths))}, noise of an evaluation {noise:g} points"
    return title, {str(seed): World(seed, depths, noise) for seed in SEEDS}


def trained(groups: int) -> tuple[str, dict[str, Problem]]:
    """Ten seeds for each budget of the trained model, candidates scored on `groups` of ten groups of images."""
    images = "all images" if groups == GROUPS else f"{groups} of {GROUPS} groups of images"
    problems = {f"{share:.0%} {seed}": Tabulated(seed, share, groups) for share in SHARES for seed in SEEDS}
    return f"Trained model, candidates scored on {images}", dict(problems)


def measure(title: str, worlds: dict[str, Problem], names: list[str]) -> None:
    """Run strategies in every world, and keep their curves."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    problem = kept.setdefault(title, {})
    for name in names:
        package, run = STRATEGIES[name]
        if package and importlib.util.find_spec(package) is None:
            print(f"{name}: left out, {package} is not installed")
            continue
        began = time.perf_counter()
        curves = {label: _changes(run(world)) for label, world in worlds.items()}
        problem[name] = {"curves": curves, "version": importlib.metadata.version(package) if package else ""}
        lengths = [changes[-1][0] for changes in curves.values()]
        print(f"{name}: {time.perf_counter() - began:.0f} s, evaluations {lengths}")
        write_json(RESULTS, kept)


def _changes(curve: Curve) -> list[tuple[int, float]]:
    """The evaluations at which the regret changed, counted from 1, and the last one."""
    rounded = [round(regret, 4) for regret in curve]
    kept = [at for at in range(len(rounded)) if at in (0, len(rounded) - 1) or rounded[at] != rounded[at - 1]]
    return [(at + 1, rounded[at]) for at in kept]


def _curve_of(changes: list[tuple[int, float]]) -> Curve:
    ends = [count for count, _ in changes[1:]] + [changes[-1][0] + 1]
    return [regret for (count, regret), end in zip(changes, ends, strict=True) for _ in range(count, end)]


def near(curve: Curve) -> int | None:
    """Evaluations until the regret is NEAR at most."""
    return next((count for count, regret in enumerate(curve, 1) if regret <= NEAR), None)


def table(problem: dict[str, Any]) -> list[str]:
    """A line per strategy: median and worst of all runs."""
    heads = " | ".join(f"after {mark}" for mark in MARKS)
    lines = [f"| strategy | until within {NEAR} of the optimum | {heads} |", "|---|---|" + "---|" * len(MARKS)]
    for name, kept in problem.items():
        curves = [_curve_of(changes) for changes in kept["curves"].values()]
        longest = max(map(len, curves))
        until = [near(curve) or np.inf for curve in curves]
        cells = [
            "" if mark > longest and mark not in MARKS[1:3]
            else _two([curve[min(mark, len(curve)) - 1] for curve in curves])
            for mark in MARKS
        ]  # fmt: skip
        version = f" {kept['version']}" if kept["version"] else ""
        found = f"{_count(statistics.median(until), longest)}, {_count(max(until), longest)}"
        lines.append(f"| {name}{version} | {found} | {' | '.join(cells)} |")
    return lines


def against_random(problem: dict[str, Any]) -> str:
    """In how many worlds `surrogate` was behind a random search of as many evaluations."""
    here, there = ([_curve_of(curve) for curve in problem[name]["curves"].values()] for name in ("surrogate", "random"))
    counts = [
        (mark, sum(a[min(mark, len(a)) - 1] > b[mark - 1] for a, b in zip(here, there, strict=True)))
        for mark in MARKS[:3]
    ]
    told = ", ".join(f"{count} after {mark}" for mark, count in counts)
    return f"Runs of {len(here)} in which `surrogate` is behind `random` with as many evaluations: {told}."


def _count(until: float, longest: int) -> str:
    return f"{until:g}" if np.isfinite(until) else f"over {longest}"


def _two(regrets: list[float]) -> str:
    return f"{statistics.median(regrets):.2f}, {max(regrets):.2f}"


def write_tables() -> None:
    """Between the marks of the page."""
    kept = json.loads(RESULTS.read_text("utf-8"))
    told = []
    for problem, strategies in sorted(kept.items(), key=lambda each: "Trained" not in each[0]):
        told += [f"{problem}:", "", *table(strategies), ""]
        told += [against_random(strategies), ""]
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(told).rstrip() + f"\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trained", type=int, nargs="?", const=GROUPS, metavar="GROUPS", help="not synthetic worlds")
    parser.add_argument("--depths", type=int, nargs="+", default=(2, 2, 6, 2))
    parser.add_argument("--noise", type=float, default=NOISE)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--table", action="store_true", help="write the page's tables and measure nothing")
    typed = parser.parse_args()
    if not typed.table:
        problem = trained(typed.trained) if typed.trained else synthetic(tuple(typed.depths), typed.noise)
        measure(*problem, typed.strategies)
    else:
        write_tables()
