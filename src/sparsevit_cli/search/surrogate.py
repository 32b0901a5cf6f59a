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
from functools import cached_property
from typing import Any

import numpy as np

from sparsevit_cli.seeding import derive_seed
from sparsevit_cli.sparsity import MAX_TENTHS, SearchSpace, SparsityConfig

from .enumeration import Array, configurations, tenths_of
from .feasible import FeasibleSpace
from .results import Evaluation
from .strategy import Strategy

BATCH = 4
"""Candidates per generation: few enough to learn from each other, enough for several devices."""
FIRST = 2
"""First generations that explore, for every gene."""
DRAWN = 500
"""Members of the staircase that a first generation chooses from."""
POOL = 20_000
"""Members of the staircase that are looked at in one generation."""
NEAR = 5
"""Best results near which a staircase of more than POOL members is looked at closely."""
MOST = 300
"""Results that the model is fitted to: the best ones."""
WORTH = 1e-4
"""The search ends where the expected improvement is below this share of what was gained over the median so far."""


@dataclass(frozen=True)
class Prior:
    """Standard deviations of the parts of the metric, its spread being 1."""

    curves: float = 1.0
    knees: float = 0.3
    products: float = 1.0
    rest: float = 0.1
    noise: float = 0.05


GRIDS: dict[str, tuple[float, ...]] = {
    "curves": (0.3, 1.0, 3.0, 10.0),
    "knees": (0.03, 0.1, 0.3, 1.0),
    "products": (0.1, 0.3, 1.0, 3.0),
    "rest": (0.03, 0.1, 0.3, 1.0),
    "noise": (0.01, 0.03, 0.1, 0.3),
}
COMMON = 10.0
"""Standard deviation of what all genes share: level, slope and curvature."""
KNEE = 0.15
"""Length over which a curve may bend, as a ratio."""
LENGTH = 0.5
"""Distance over which the rest changes, in ratios of all genes together."""
TOLERANCE = 0.1
"""Share of its distance to the best that a result may be off: far below the best nobody needs the model to be right."""
RATIOS = np.arange(MAX_TENTHS + 1) / 10


def curve_covariance(knees: float) -> Array:
    """Of what one gene loses, between all ratios (9, 9): a parabola, and bends of any shape; nothing is lost at 0."""
    bends = np.exp(-((RATIOS[:, None] - RATIOS) ** 2) / (2 * KNEE**2))
    bends = bends - bends[:, :1] - bends[:1] + 1  # of the difference to ratio 0
    product = RATIOS[:, None] * RATIOS
    total: Array = product + product**2 + knees**2 * bends
    return total


@dataclass(frozen=True)
class Points:
    """Configurations as the covariance needs them: tenths (configurations, genes), and which ratio each gene has."""

    tenths: Array

    @cached_property
    def ratios(self) -> Array:
        """As fractions."""
        return self.tenths / 10

    @cached_property
    def marks(self) -> Array:
        """1 at the ratio of each gene, else 0 (configurations, 9 * genes)."""
        marks: Array = self.tenths[:, :, None] == np.arange(MAX_TENTHS + 1)
        return marks.reshape(len(self.tenths), -1).astype(np.float64)

    @cached_property
    def shared(self) -> Array:
        """Level, mean ratio, mean square and squared mean (configurations, 4)."""
        mean = self.ratios.mean(axis=1)
        return np.stack([np.ones_like(mean), mean, (self.ratios**2).mean(axis=1), mean**2], axis=1)

    def __getitem__(self, chosen: Any) -> Points:
        return Points(self.tenths[chosen])

    def through(self, table: Array) -> Array:
        """`marks` times a table (9, 9) of each gene."""
        steps = self.marks.reshape(len(self.tenths), -1, MAX_TENTHS + 1)
        product: Array = steps @ table
        return product.reshape(len(self.tenths), -1)


def covariance(a: Points, b: Points, prior: Prior) -> Array:
    """Of the metrics of two sets of configurations."""
    curve = curve_covariance(prior.knees)
    curves = a.through(curve) @ b.marks.T
    squares = a.through(curve**2) @ b.marks.T
    distance = (a.ratios**2).sum(axis=1)[:, None] + (b.ratios**2).sum(axis=1) - 2 * a.ratios @ b.ratios.T
    total: Array = (
        COMMON**2 * a.shared @ b.shared.T
        + prior.curves**2 * curves
        + prior.products**2 * (curves**2 - squares) / 2
        + prior.rest**2 * np.exp(-np.maximum(distance, 0) / (2 * LENGTH**2))
    )
    return total


def own_variance(points: Points, prior: Prior) -> Array:
    """The diagonal of `covariance`."""
    curve = np.diag(curve_covariance(prior.knees))[points.tenths]
    curves, squares = curve.sum(axis=1), (curve**2).sum(axis=1)
    variance: Array = (
        COMMON**2 * (points.shared**2).sum(axis=1)
        + prior.curves**2 * curves
        + prior.products**2 * (curves**2 - squares) / 2
        + prior.rest**2
    )
    return variance


class Model:
    """The metric over the ratios, as far as `metrics` of the `points` tell.

    Means and deviations are in units of `scale`, relative to `best`: what is to be beaten.
    """

    def __init__(self, points: Points, metrics: Array, best: float, prior: Prior) -> None:
        self.points, self.metrics, self.best, self.prior = points, metrics, best, prior
        self.scale = float(metrics[metrics >= np.median(metrics)].std()) or float(metrics.std()) or 1.0
        self.targets = (metrics - best) / self.scale
        tolerated = TOLERANCE * np.minimum(self.targets, 0)
        covariances = covariance(points, points, prior) + np.diag(prior.noise**2 + tolerated**2)
        self._factor = np.linalg.cholesky(covariances)
        self._whitened = np.linalg.solve(self._factor, self.targets)

    def under(self, prior: Prior) -> Model:
        """The same results under another prior."""
        return self if prior == self.prior else Model(self.points, self.metrics, self.best, prior)

    @property
    def likelihood(self) -> float:
        """Logarithm of the marginal likelihood, up to a constant."""
        return float(-0.5 * self._whitened @ self._whitened - np.log(np.diag(self._factor)).sum())

    def posterior(self, points: Points) -> tuple[Array, Array, Array]:
        """Mean, standard deviation, and covariance with what is known, whitened (known, configurations)."""
        projected = np.linalg.solve(self._factor, covariance(self.points, points, self.prior))
        variance = own_variance(points, self.prior) - (projected**2).sum(axis=0)
        return projected.T @ self._whitened, np.sqrt(np.maximum(variance, 1e-12)), projected


def fitted(points: Points, metrics: Array, best: float) -> Model:
    """The model with the largest marginal likelihood, found one setting after the other."""
    model = Model(points, metrics, best, Prior())
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
class Surrogate(Strategy):
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
        asked = _tenths([evaluation.config for evaluation in ranked], space)
        pool = _unseen(_thinned(feasible.staircase(self.seed), asked[:NEAR], rng), asked)
        count = min(self.batch, len(pool))
        if not count:
            return []
        best = ranked[0].metric if ranked else max(scored.values(), default=0.0)
        nearest = sorted(scored, key=lambda config: (abs(scored[config] - best), config))[:MOST]
        known, metrics = _tenths(nearest, space), np.array([scored[config] for config in nearest])
        if len(known) < FIRST * pool.shape[1]:
            chosen = _explored(pool, known, count, rng)
        else:
            model, within = fitted(Points(known), metrics, best), [config in feasible for config in nearest]
            chosen = _promising(model, np.flatnonzero(within), pool, count)
        return configurations(space, pool[chosen])

    def judged(self, ranked: Sequence[Evaluation]) -> list[Evaluation]:
        """Best first by what the model makes of the scores: a lucky one counts for less than its neighbours say.

        Where scores hold no noise, as far as they tell, that is their own order.
        """
        if len(ranked) < FIRST * sum(len(stage) for stage in ranked[0].config.tenths):
            return list(ranked)
        head = ranked[:MOST]
        metrics = np.array([evaluation.metric for evaluation in head])
        model = fitted(Points(tenths_of([evaluation.config for evaluation in head])), metrics, float(metrics[0]))
        means = model.posterior(model.points)[0].tolist()
        order = sorted(range(len(head)), key=lambda place: (-means[place], place))
        return [*(head[place] for place in order), *ranked[MOST:]]


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
    distance = np.full(len(pool), np.iinfo(np.int16).max, dtype=np.int16)
    for row in best:
        np.minimum(distance, np.abs(pool - row).sum(axis=1, dtype=np.int16), out=distance)
    near = np.argsort(distance, kind="stable")[: POOL // 2 if len(best) else 0]
    return pool[np.union1d(near, rng.integers(len(pool), size=POOL // 2))]


def _explored(pool: Array, known: Array, count: int, rng: np.random.Generator) -> list[int]:
    """The most even member first, then whatever the prior knows least of, among members drawn from the evener half."""
    points = Points(pool)
    unevenness = (points.ratios**2).sum(axis=1)
    chosen = [] if len(known) else [int(unevenness.argmin())]
    even = np.flatnonzero(unevenness <= (np.median(unevenness) if len(pool) >= 2 * count else np.inf))
    allowed = even if len(even) <= DRAWN else np.sort(rng.choice(even, DRAWN, replace=False))
    among, prior = points[allowed], Prior()
    while len(chosen) < count:
        rows = Points(np.concatenate([known, pool[chosen]]))
        factor = np.linalg.cholesky(covariance(rows, rows, prior) + prior.noise**2 * np.eye(len(rows.tenths)))
        projected = np.linalg.solve(factor, covariance(rows, among, prior))
        unknown = own_variance(among, prior) - (projected**2).sum(axis=0)
        unknown[np.isin(allowed, chosen)] = -1
        chosen.append(int(allowed[unknown.argmax()]))
    return chosen


def _promising(model: Model, rivals: Array, pool: Array, count: int) -> list[int]:
    """What promises most over the known ones numbered `rivals`, as long as that is worth an evaluation.

    A chosen one counts as scored, with its prediction: that moves no mean, and leaves less to learn near it.
    """
    points = Points(pool)
    mean, deviation, projected = model.posterior(points)
    best = float(model.posterior(model.points[rivals])[0].max()) if len(rivals) else float(mean.max())
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
        shared = covariance(points[[pick]], points, model.prior)[0] - projected[:, pick] @ projected
        row = shared / math.sqrt(deviation[pick] ** 2 + model.prior.noise**2)
        projected = np.concatenate([projected, row[None]])
        deviation = np.sqrt(np.maximum(deviation**2 - row**2, 1e-12))
    return chosen
