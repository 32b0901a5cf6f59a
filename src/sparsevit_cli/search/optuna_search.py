"""Optuna's TPE sampler as a source of candidates (extra `optuna`): asked here, told what our evaluations found.

The ledger alone lasts. A search that was stopped asks again, is told the same metrics from the ledger, and goes on as
it was. What is over budget is never evaluated: the sampler hears by how much it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from sparsevit_cli.errors import from_extra
from sparsevit_cli.sparsity import SparsityConfig

from .feasible import FeasibleSpace
from .results import Evaluation
from .strategy import Strategy


def loaded_optuna() -> Any:
    """The package. Raises ConfigError if it is not installed."""
    return from_extra("optuna", "search.strategy", "optuna")


class OptunaSearch(Strategy):
    """`batch` candidates per generation, from the sampler with Optuna's own defaults."""

    def __init__(self, seed: int, batch: int = 4) -> None:
        optuna = loaded_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
        self.seed, self.batch = seed, batch
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        self.asked: dict[SparsityConfig, Any] = {}
        """Trials whose metric is awaited."""

    def propose(self, feasible: FeasibleSpace, generation: int, ranked: Sequence[Evaluation]) -> list[SparsityConfig]:
        """The candidates of `generation`; the sampler is told of all `ranked` that it has asked for."""
        scored = {evaluation.config: evaluation.metric for evaluation in ranked}
        for config, trial in self.asked.items():
            if config in scored:
                self.study.tell(trial, scored[config])
        self.asked = {}

        def ask(_: Random) -> SparsityConfig:
            trial, space = self.study.ask(), feasible.space
            genes = [
                [trial.suggest_int(f"stage {stage} pair {pair}", 0, space.max_tenths) for pair in range(pairs)]
                for stage, pairs in enumerate(space.pairs)
            ]
            config = feasible.keeping_more(space.repair(genes))
            trial.set_constraint("over budget", feasible.overrun(config))
            if config in scored or config not in feasible:
                self.study.tell(trial, scored.get(config, 0.0))
            else:
                self.asked.setdefault(config, trial)
            return config

        rngs = [Random(f"{self.seed}/{generation}/{slot}") for slot in range(self.batch)]
        return feasible.fill(rngs, scored.keys(), [ask] * self.batch)
