"""A search that knows its space: a model of the metric over the ratios chooses which configurations are worth scoring.

Candidates are the staircase: configurations within the budgets of which nothing can be kept more. A Gaussian process is
fitted to all that was scored. Its prior says that a metric is a sum of curves, one per gene, of products of two genes,
and of a smooth rest; how strong each of them is follows from the data (largest marginal likelihood). The next batch is
what promises the largest expected improvement, one member after the other, as if the earlier ones had met their
prediction. The search ends where no candidate promises anything.

Batch and model are functions of the seed and of the ranked results alone, so that a stopped search goes on as it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from sparsevit_cli.seeding import derive_seed
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

from .enumeration import Array, configurations, tenths_of
from .feasible import FeasibleSpace
from .results import Evaluation

BATCH = 4
"""Candidates per generation: few enough to learn from each other, enough for several devices."""
FIRST = 2
"""First generations that explore, for every gene."""
POOL = 20_000
"""Members of the staircase that are looked at in one generation."""
NEAR = 5
"""Best results near which a staircase of more than POOL members is looked at closely."""
MOST = 300
"""Results that the model is fitted to: the best ones."""
WORTH = 2e-3
"""The search ends where the expected improvement is below this share of what was gained over the median so far."""


@dataclass(frozen=True)
class Prior:
    """Standard deviations of the parts of the metric, its spread being 1; `length` is in ratios of all genes."""

    curves: float = 1.0
    products: float = 1.0
    rest: float = 0.1
    length: float = 0.5
    noise: float = 0.05


GRIDS: dict[str, tuple[float, ...]] = {
    "curves": (0.3, 1.0, 3.0, 10.0),
    "products": (0.1, 0.3, 1.0, 3.0, 10.0),
    "rest": (0.01, 0.03, 0.1, 0.3, 1.0),
    "length": (0.3, 0.5, 1.0),
    "noise": (0.003, 0.01, 0.03, 0.1, 0.3),
}
COMMON = 10.0
"""Standard deviation of what all genes share: level, slope and curvature."""
TOLERANCE = 0.1
"""Share of its distance to the best that a result may be off: far below the best nobody needs the model to be right."""


def covariance(a: Array, b: Array, prior: Prior) -> Array:
    """Of the metrics of two sets of ratios (configurations, genes)."""
    dot = a @ b.T
    squares = a**2 @ (b**2).T
    cubes = a**3 @ (b**3).T
    sums = a.sum(axis=1)[:, None] * b.sum(axis=1)
    sums_of_squares = (a**2).sum(axis=1)[:, None] * (b**2).sum(axis=1)
    common = COMMON**2 * (1 + (sums + sums_of_squares + (sums / a.shape[1]) ** 2) / a.shape[1] ** 2)
    curves = prior.curves**2 * (dot + squares + cubes)
    products = prior.products**2 * (dot**2 - squares) / 2
    distance = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * dot
    rest = prior.rest**2 * np.exp(-np.maximum(distance, 0) / (2 * prior.length**2))
    total: Array = common + curves + products + rest
    return total


class Model:
    """The metric over the ratios, as far as `metrics` of `ratios` (configurations, genes) tell.

    Means and deviations are in units of `scale`, relative to `best`: what is to be beaten.
    """

    def __init__(self, ratios: Array, metrics: Array, best: float, prior: Prior) -> None:
        self.ratios, self.metrics, self.best, self.prior = ratios, metrics, best, prior
        self.scale = float(metrics[metrics >= np.median(metrics)].std()) or float(metrics.std()) or 1.0
        self.targets = (metrics - best) / self.scale
        tolerated = TOLERANCE * np.minimum(self.targets, 0)
        covariances = covariance(ratios, ratios, prior) + np.diag(prior.noise**2 + tolerated**2)
        self._factor = np.linalg.cholesky(covariances)
        self._whitened = np.linalg.solve(self._factor, self.targets)

    def under(self, prior: Prior) -> Model:
        """The same results under another prior."""
        return self if prior == self.prior else Model(self.ratios, self.metrics, self.best, prior)

    @property
    def likelihood(self) -> float:
        """Logarithm of the marginal likelihood, up to a constant."""
        return float(-0.5 * self._whitened @ self._whitened - np.log(np.diag(self._factor)).sum())

    def posterior(self, ratios: Array) -> tuple[Array, Array, Array]:
        """Mean, standard deviation, and covariance with what is known, whitened (known, configurations)."""
        projected = np.linalg.solve(self._factor, covariance(self.ratios, ratios, self.prior))
        variance = _own_variance(ratios, self.prior) - (projected**2).sum(axis=0)
        return projected.T @ self._whitened, np.sqrt(np.maximum(variance, 1e-12)), projected


def _own_variance(ratios: Array, prior: Prior) -> Array:
    """The diagonal of `covariance`."""
    total, squares, genes = ratios.sum(axis=1) ** 2, (ratios**2).sum(axis=1), ratios.shape[1]
    common = COMMON**2 * (1 + (total + squares**2 + (total / genes) ** 2) / genes**2)
    curves = prior.curves**2 * (squares + (ratios**4).sum(axis=1) + (ratios**6).sum(axis=1))
    products = prior.products**2 * (squares**2 - (ratios**4).sum(axis=1)) / 2
    variance: Array = common + curves + products + prior.rest**2
    return variance


def fitted(ratios: Array, metrics: Array, best: float) -> Model:
    """The model with the largest marginal likelihood, found one setting after the other."""
    model = Model(ratios, metrics, best, Prior())
    for _ in range(3):
        before = model.prior
        for name, grid in GRIDS.items():
            others = [model.under(replace(model.prior, **{name: value})) for value in grid]
            model = max([model, *others], key=lambda each: each.likelihood)
        if model.prior == before:
            break
    return model


def expected_improvement(mean: Array, deviation: Array, best: float) -> Array:
    """How much better than `best` each one is expected to be, worse counting as zero."""
    z = (mean - best) / deviation
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    below = 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in z.tolist()]))
    gain: Array = (mean - best) * below + deviation * density
    return gain


@dataclass(frozen=True)
class Surrogate:
    """Batches of what a model of the metric expects most of; `informed` are metrics that were known before."""

    seed: int
    informed: Mapping[SparsityConfig, float] = field(default_factory=dict)
    batch: int = BATCH

    def propose(self, feasible: FeasibleSpace, generation: int, ranked: Sequence[Evaluation]) -> list[SparsityConfig]:
        """The next batch; empty where nothing promises a gain."""
        space = feasible.space
        scored = {config: metric for config, metric in self.informed.items() if config in space}
        scored |= {evaluation.config: evaluation.metric for evaluation in ranked}
        rng = np.random.default_rng(derive_seed(self.seed, "surrogate", generation))
        pool = _unseen(feasible.staircase(self.seed), _tenths([evaluation.config for evaluation in ranked], space))
        pool = _thinned(pool, _tenths([evaluation.config for evaluation in ranked[:NEAR]], space), rng)
        count = min(self.batch, len(pool))
        if not count:
            return []
        best = ranked[0].metric if ranked else max(scored.values(), default=0.0)
        nearest = sorted(scored, key=lambda config: (abs(scored[config] - best), config))[:MOST]
        known, metrics = _tenths(nearest, space), np.array([scored[config] for config in nearest])
        if len(known) < FIRST * pool.shape[1]:
            chosen = _explored(pool, known, count)
        else:
            model, within = fitted(known / 10, metrics, best), [config in feasible for config in nearest]
            chosen = _promising(model, np.flatnonzero(within), pool, count)
        return configurations(space, pool[chosen])


def _tenths(configs: Sequence[SparsityConfig], space: SearchSpace) -> Array:
    return tenths_of(configs) if configs else np.zeros((0, sum(space.pairs)), dtype=np.int8)


def _unseen(pool: Array, known: Array) -> Array:
    if not len(known):
        return pool
    seen = {row.tobytes() for row in known}
    return pool[[row.tobytes() not in seen for row in pool]]


def _thinned(pool: Array, best: Array, rng: np.random.Generator) -> Array:
    """At most about POOL members: those near the best ones, and a sample of the others."""
    if len(pool) <= POOL:
        return pool
    distance = np.full(len(pool), 10**6)
    for row in best:
        distance = np.minimum(distance, np.abs(pool - row).sum(axis=1))
    near = np.argsort(distance, kind="stable")[: POOL // 2] if len(best) else np.zeros(0, int)
    others = rng.choice(len(pool), POOL // 2, replace=False)
    return pool[np.union1d(near, others)]


def _explored(pool: Array, known: Array, count: int) -> list[int]:
    """The most even member first, then whatever the prior knows least of, among the half that skips less."""
    ratios = pool / 10
    unevenness = (ratios**2).sum(axis=1)
    chosen = [] if len(known) else [int(unevenness.argmin())]
    allowed = np.flatnonzero(unevenness <= np.median(unevenness))
    prior = Prior()
    while len(chosen) < count:
        rows = np.concatenate([known, pool[chosen]]) / 10
        factor = np.linalg.cholesky(covariance(rows, rows, prior) + prior.noise**2 * np.eye(len(rows)))
        projected = np.linalg.solve(factor, covariance(rows, ratios[allowed], prior))
        open_variance = _own_variance(ratios[allowed], prior) - (projected**2).sum(axis=0)
        chosen.append(int(allowed[open_variance.argmax()]))
    return chosen


def _promising(model: Model, rivals: Array, pool: Array, count: int) -> list[int]:
    """What promises most over the known ones numbered `rivals`, as long as that is worth an evaluation.

    A chosen one counts as scored, with its prediction: that moves no mean, and leaves less to learn near it.
    """
    ratios = pool / 10
    mean, deviation, projected = model.posterior(ratios)
    best = float(model.posterior(model.ratios[rivals])[0].max()) if len(rivals) else float(mean.max())
    worth = WORTH * max(0.0, -float(np.median(model.targets)))
    chosen: list[int] = []
    for _ in range(count):
        gain = expected_improvement(mean, deviation, best)
        gain[chosen] = -1
        pick = int(gain.argmax())
        if gain[pick] < worth:
            break
        chosen.append(pick)
        best = max(best, float(mean[pick]))
        shared = covariance(ratios[pick : pick + 1], ratios, model.prior)[0] - projected[:, pick] @ projected
        row = shared / math.sqrt(deviation[pick] ** 2 + model.prior.noise**2)
        projected = np.concatenate([projected, row[None]])
        deviation = np.sqrt(np.maximum(deviation**2 - row**2, 1e-12))
    return chosen
