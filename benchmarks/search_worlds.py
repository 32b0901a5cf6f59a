"""Synthetic worlds for `benchmarks/search.py`: a metric, its evaluation noise, a latency table and a budget, by seed.

A world is a function of its seed (numpy's PCG64 of `[seed, 20231230]`). With r_g the sparsity ratio of gene g:

- a gene alone loses `l_g = 1.5 * exp(0.8 z_g) * r_g ** p_g` points, `z_g` standard normal, `p_g` uniform in 1 to 5;
- every second gene has a knee too: it loses `b_g / (1 + exp((k_g - r_g) / 0.04))` more, less its value at 0, `b_g`
  uniform in 0 to 1.5 points, `k_g` uniform in 0.3 to 0.8;
- together they lose `L = sum_g l_g + sum_{g<h} w_gh * sqrt(l_g * l_h)`, `w_gh` uniform in -0.15 to 0.45: two genes may
  share a loss or add to it, so that the metric is nearly monotone in each ratio, not quite;
- the metric is `90 - L - 0.04 * L ** 2`: it falls faster and faster;
- an evaluation adds noise of 0.05 points, normal, the same whenever the configuration is asked for again;
- a block pair of `c` milliseconds costs `c * (f + (1 - f) * kept share of its windows)`, f uniform in 0.1 to 0.3, with
  the whole numbers of windows that a Swin of 672 pixels keeps; a pruned stage pays an overhead of 0.1 to 0.4 ms;
- the budget is 60 to 85 % of the dense latency, uniform.

The optimum is the best true metric of all configurations within the budget, not of the staircase alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sparsevit_cli.search.additive import AdditiveCost
from sparsevit_cli.search.budget import Budget
from sparsevit_cli.search.enumeration import BLOCK, Enumeration, tenths_of
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

NOISE = 0.05
"""Standard deviation of one evaluation, in points."""
WINDOWS = (576, 144, 36, 9)
"""Of each stage, at 672 pixels and windows of 7."""
STAGE_MS = (9.0, 8.0, 5.0, 6.0)
BASE_MS = 6.0


@dataclass(frozen=True)
class World:
    """One problem: find the best metric within the budget."""

    seed: int
    depths: tuple[int, ...] = (2, 2, 6, 2)
    noise: float = NOISE

    @property
    def finalists(self) -> int:
        """How many are scored again, without noise, in the end."""
        return 5 if self.noise else 1

    @cached_property
    def space(self) -> SearchSpace:
        """All configurations."""
        return SearchSpace(self.depths)

    @cached_property
    def cost(self) -> AdditiveCost:
        """Milliseconds per batch."""
        rng = np.random.default_rng([self.seed, 20231231])
        pairs = tuple(
            tuple(_entries(ms * rng.uniform(0.7, 1.3), rng.uniform(0.1, 0.3), windows) for _ in range(count))
            for ms, windows, count in zip(STAGE_MS, WINDOWS, self.space.pairs, strict=True)
        )
        return AdditiveCost(BASE_MS, pairs, tuple(rng.uniform(0.1, 0.4, len(self.depths)).tolist()))

    @cached_property
    def budget(self) -> Budget:
        """60 to 85 % of dense."""
        share = np.random.default_rng([self.seed, 20240101]).uniform(0.6, 0.85)
        return Budget(float(share * self.cost(self.space.dense)), "latency_ms")

    @cached_property
    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Points that each gene loses alone at each ratio (genes, 9), and weights of pairs (genes, genes)."""
        rng, genes, ratios = np.random.default_rng([self.seed, 20231230]), sum(self.space.pairs), np.arange(9) / 10
        scale, power = 1.5 * np.exp(0.8 * rng.standard_normal(genes)), rng.uniform(1, 5, genes)
        together = rng.uniform(-0.15, 0.45, (genes, genes))
        height, place = rng.uniform(0, 1.5, genes) * (rng.permutation(genes) % 2), rng.uniform(0.3, 0.8, genes)
        knees = height[:, None] / (1 + np.exp((place[:, None] - ratios) / 0.04))
        return scale[:, None] * ratios ** power[:, None] + knees - knees[:, :1], together

    def true_metrics(self, tenths: np.ndarray) -> np.ndarray:
        """Without noise, for tenths of shape (configurations, genes)."""
        table, together = self._losses
        alone = np.stack([losses[tenths[:, gene]] for gene, losses in enumerate(table)], axis=1)
        roots = np.sqrt(alone)
        lost = alone.sum(axis=1)
        for gene in range(1, len(table)):
            lost += roots[:, gene] * (roots[:, :gene] @ together[:gene, gene])
        return 90 - lost - 0.04 * lost**2

    def true_metric(self, config: SparsityConfig) -> float:
        """Of one configuration."""
        return float(self.true_metrics(tenths_of([config]))[0])

    def evaluate(self, config: SparsityConfig) -> float:
        """With the noise that belongs to this configuration."""
        genes = [tenths for stage in config.tenths for tenths in stage]
        draw = np.random.default_rng([self.seed, 20240102, *genes]).standard_normal()
        return self.true_metric(config) + self.noise * float(draw)

    @cached_property
    def optimum(self) -> float:
        """The best true metric within the budget."""
        enumeration, best = Enumeration(self.space), -np.inf
        for start in range(0, len(enumeration), BLOCK):
            numbers = np.arange(start, min(start + BLOCK, len(enumeration)))
            numbers = numbers[enumeration.costs(self.cost, numbers) <= self.budget.limit]
            if len(numbers):
                best = max(best, float(self.true_metrics(enumeration.tenths(numbers)).max()))
        return best


def _entries(ms: float, fixed: float, windows: int) -> tuple[float, ...]:
    kept = [max(1, windows * (10 - tenths) // 10) for tenths in range(9)]
    return tuple(float(ms * (fixed + (1 - fixed) * keep / windows)) for keep in kept)
