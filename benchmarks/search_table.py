"""A trained model whose whole space was evaluated once, for `benchmarks/search.py`: its optimum is known.

The model is a small Swin with 9 * 9 * 45 = 3,645 configurations, trained and adapted on the embedded digits
(search_table.yaml). Each configuration was run on every image of the validation split. Kept are, per configuration and
per group of images, the mean probability of the true class and the number of right answers. The metric is that
probability in points: it is finer than the 0.29 points of accuracy that one image is worth.

usage: sparsevit pretrain --config benchmarks/search_table.yaml
       sparsevit adapt --config benchmarks/search_table.yaml
       python benchmarks/search_table.py
           writes benchmarks/results/search/table.npz
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparsevit_cli.search import AdditiveCost, Budget
from sparsevit_cli.search.enumeration import Enumeration
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig

HERE = Path(__file__).parent
TABLE = HERE / "results" / "search" / "table.npz"
GROUPS = 10
DEPTHS = (2, 2, 4)
STEPS = 2**16 - 1
"""Probabilities are kept as 16-bit integers."""
SHARES = (0.8, 0.7, 0.6)
"""Budgets, of the dense multiply-adds."""


@cache
def kept() -> dict[str, Any]:
    """`probability` and `right` (configurations, groups), `images` (groups,), and the parts of the cost."""
    with np.load(TABLE) as file:
        return dict(file)


@dataclass(frozen=True)
class Tabulated:
    """One problem: the best metric on all images within a share of the dense multiply-adds.

    A candidate is scored on `scored` groups of images, chosen by the seed: all of them, or what a search is given as
    its subset.
    """

    seed: int
    share: float
    scored: int = GROUPS

    @property
    def finalists(self) -> int:
        """How many are scored on all images in the end."""
        return 1 if self.scored == GROUPS else 5

    @cached_property
    def space(self) -> SearchSpace:
        """All configurations."""
        return SearchSpace(DEPTHS)

    @cached_property
    def cost(self) -> AdditiveCost:
        """Multiply-adds of one image."""
        rows = iter(kept()["pairs"].tolist())
        pairs = tuple(tuple(next(rows) for _ in range(count)) for count in self.space.pairs)
        return AdditiveCost(float(kept()["base"]), pairs, tuple(kept()["overhead"]))

    @cached_property
    def budget(self) -> Budget:
        """The share of dense."""
        return Budget(self.share * self.cost(self.space.dense), "macs")

    @cached_property
    def _numbers(self) -> dict[SparsityConfig, int]:
        return {config: number for number, config in enumerate(self.space)}

    def _metrics(self, groups: Any) -> Any:
        images = kept()["images"][groups]
        return kept()["probability"][:, groups] @ images / images.sum() / STEPS * 100

    @cached_property
    def _true(self) -> Any:
        return self._metrics(np.arange(GROUPS))

    @cached_property
    def _scored(self) -> Any:
        return self._metrics(np.sort(np.random.default_rng(self.seed).permutation(GROUPS)[: self.scored]))

    def true_metric(self, config: SparsityConfig) -> float:
        """On all images."""
        return float(self._true[self._numbers[config]])

    def evaluate(self, config: SparsityConfig) -> float:
        """On the images of the search."""
        return float(self._scored[self._numbers[config]])

    @cached_property
    def optimum(self) -> float:
        """The best true metric within the budget."""
        costs = Enumeration(self.space).costs(self.cost, np.arange(self.space.size))
        return float(self._true[costs <= self.budget.limit].max())


def make() -> None:
    """Run the adapted model at every configuration. What a stage makes of the same first stages is shared."""
    import torch

    from sparsevit_cli.config.loading import load_config
    from sparsevit_cli.data.loader import eval_batches
    from sparsevit_cli.profiling.macs import macs_cost
    from sparsevit_cli.reporting import SilentReporter
    from sparsevit_cli.swin import set_sparsity
    from sparsevit_cli.workflows.session import Session
    from sparsevit_cli.workflows.weights import trained_weights

    began = time.process_time()
    session = Session(load_config(HERE / "search_table.yaml"), SilentReporter())
    weights = trained_weights(session, "adapt", "benchmarks/search_table.py")
    data, model = session.data(weights), session.model(weights.categories, weights).eval()
    cost = macs_cost(session.workload(model))
    rows = [list(itertools.combinations_with_replacement(range(9), pairs)) for pairs in SearchSpace(DEPTHS).pairs]
    columns = []
    with torch.inference_mode():
        for batch in eval_batches(data.val, -(-len(data.val) // GROUPS)):

            def told(x: Any, truth: Any = batch.targets) -> tuple[float, int]:
                answer = model.forward_head(model.norm(x))
                probability = answer.softmax(1).gather(1, truth[:, None]).mean()
                return round(float(probability) * STEPS), int((answer.argmax(1) == truth).sum())

            def below(x: Any, chosen: tuple[tuple[int, ...], ...]) -> list[tuple[float, int]]:
                stage = len(chosen)
                if stage == len(rows):
                    return [told(x)]
                found = []
                for row in rows[stage]:
                    rest = [(0,) * len(each[0]) for each in rows[stage + 1 :]]
                    set_sparsity(model, SparsityConfig((*chosen, row, *rest)))
                    found += below(model.layers[stage](x), (*chosen, row))
                return found

            columns.append((below(model.patch_embed(batch.inputs), ()), len(batch)))
            print(f"{len(columns)} of {GROUPS} groups, {time.process_time() - began:.0f} s of CPU")
    values = np.array([column for column, _ in columns])  # groups, configurations, 2
    np.savez_compressed(
        TABLE,
        probability=values[:, :, 0].T.astype(np.uint16),
        right=values[:, :, 1].T.astype(np.uint8),
        images=np.array([images for _, images in columns]),
        base=cost.base,
        pairs=np.array([row for rows in cost.pairs for row in rows]),
        overhead=np.array(cost.overhead),
    )


if __name__ == "__main__":
    make()
