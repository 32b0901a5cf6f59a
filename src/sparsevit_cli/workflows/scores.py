"""What candidates score on the search split: all of them on few images, the best ones on more, the last ones on all."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass

from torch import nn

from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.data.source import Source
from sparsevit_cli.data.splits import fixed_subset
from sparsevit_cli.errors import NothingToScoreError
from sparsevit_cli.evaluation import CandidatesError
from sparsevit_cli.search.ledger import Ledger
from sparsevit_cli.search.race import race
from sparsevit_cli.search.results import Evaluation
from sparsevit_cli.sparsity import SparsityConfig

from .session import Session
from .training import score_each
from .workers import Workers

GROUP = 4
"""Candidates scored together: they share batches and first stages, and are lost where a search is killed."""
OF_TRAINING = ("model.pretrained", "model.checkpoint", "model.reset_head", "model.drop_path_rate", "model.weight_init")
"""Settings of a model that no trained weights depend on any more."""


@dataclass(frozen=True)
class Images:
    """`count` images of the search split: their name in the ledger, and their numbers, None for all of them."""

    name: str
    count: int
    numbers: tuple[int, ...] | None = None


def first_images(session: Session, total: int) -> Images:
    """Those that every candidate is scored on: `search.samples` of the `total`, or all."""
    samples, seed = session.config.search.samples, session.config.seed
    if samples is None or samples >= total:
        return Images("all", total)
    return Images(f"{samples} of seed {seed}", samples, tuple(fixed_subset(total, samples, seed)))


def ledger_settings(session: Session, images: Images) -> str:
    """What a metric depends on besides weights and data: how the weights came about does not matter."""
    settings = section_hash(session.config, "task", "model", ignore=OF_TRAINING)
    return f"{session.task.metric.key}: {settings} on {images.name}"


class Scores:
    """Scores of candidates with the weights of `model` as they are; each is in `ledger` before it is given.

    A lap is as many images as the `first` ones, in a random order in which none comes twice; lap 0 are the first ones.
    With `workers` these score the candidates, and `model` is not used.
    """

    def __init__(
        self, session: Session, model: nn.Module, source: Source, ledger: Ledger, first: Images,
        workers: Workers | None = None,
    ) -> None:  # fmt: skip
        self.session, self.model, self.source, self.ledger = session, model, source, ledger
        self.first, self.workers, self.seed = first, workers, session.config.seed
        self.is_subset = self.first.numbers is not None
        self.forwarded = 0
        """Images that went through the model."""
        self.used: dict[tuple[SparsityConfig, str], int] = {}
        """Images behind each score that was asked for, forwarded now or earlier."""

    def score(self, configs: Sequence[SparsityConfig], images: Images) -> dict[SparsityConfig, float]:
        """The metric of each in this process, whatever is in the ledger."""
        found = score_each(
            self.session, self.model, self.source, configs, subset=images.numbers, before_batch=self._check
        )
        self.forwarded += images.count * len(configs)
        return {config: each.value for config, each in found.items()}

    def _check(self) -> None:
        self.session.stop.check("search", "every evaluation so far is in the ledger")

    def of(self, configs: Sequence[SparsityConfig], images: Images) -> Iterator[float]:
        """The metric of each in this order, paid once: it is in the ledger as soon as it is there, in any order."""
        ledger = self.ledger.scoped(ledger_settings(self.session, images))
        found = {config: metric for config in configs if (metric := ledger.get(config)) is not None}
        missing = [config for config in configs if config not in found]
        with closing(self._arriving(missing, images)) as arriving:
            for config in configs:
                while config not in found:
                    metrics, seconds = next(arriving)
                    found |= {arrived: ledger.put(arrived, metric, seconds) for arrived, metric in metrics.items()}
                self.used[config, images.name] = images.count
                yield found[config]

    def _arriving(
        self, configs: Sequence[SparsityConfig], images: Images
    ) -> Generator[tuple[Mapping[SparsityConfig, float], float], None, None]:
        """Metrics and the seconds that each took; from workers in any order."""
        if self.workers is not None:
            self.forwarded += images.count * len(configs)
            yield from self.workers.scored(configs, images.count, images.numbers)
            return
        for start in range(0, len(configs), GROUP):
            group, began = configs[start : start + GROUP], time.monotonic()
            wrong: CandidatesError | None = None
            try:
                metrics = self.score(group, images)
            except CandidatesError as error:
                metrics, wrong = {config: each.value for config, each in error.finite.items()}, error
            yield metrics, (time.monotonic() - began) / len(group)
            if wrong is not None:
                raise wrong

    def of_all(self, configs: Sequence[SparsityConfig]) -> Iterator[float]:
        """The metric of candidates on the first images."""
        try:
            yield from self.of(configs, self.first)
        except NothingToScoreError as error:
            if not self.is_subset:
                raise
            raise NothingToScoreError(error.what, error.got, "Raise search.samples, or set it to null.") from error

    def let_go(self) -> None:
        """Workers leave this machine to a clock; the next candidates call them again."""
        if self.workers is not None:
            self.workers.let_go()

    def raced(self, judged: Sequence[Evaluation]) -> tuple[list[Evaluation], dict[SparsityConfig, tuple[float, ...]]]:
        """The same candidates, the best ones in the order in which a race left them, and the scores of each by lap.

        The race ends when half of the search split was seen: finalists take all of it. A lap whose images hold nothing
        to score leaves all as they are.
        """
        section, of = self.session.config.search, {candidate.config: candidate for candidate in judged}
        laps = len(self.source) // (2 * self.first.count)
        if laps < 2 or min(len(judged), section.racers) <= section.finalists:
            return list(judged), {config: (candidate.metric,) for config, candidate in of.items()}
        entrants = {candidate.config: candidate.metric for candidate in judged[: section.racers]}
        with self.session.reporter.progress("race", (laps - 1) * len(entrants)) as bar:

            def run_lap(configs: Sequence[SparsityConfig], lap: int) -> list[float]:
                ordered, found = sorted(configs), {}  # neighbours have first stages in common
                try:
                    for config, metric in zip(ordered, self.of(ordered, self._lap(lap)), strict=True):
                        found[config] = metric
                        bar.advance(1, lap=f"{lap}/{laps - 1}", left=len(configs))
                except NothingToScoreError as error:
                    if self.session.task.metric.mean_over_images:
                        raise  # `whole` counts every lap
                    self.session.reporter.warn(f"lap {lap} of the race decides nothing: {error.got}")
                    return [0.0] * len(configs)
                return [found[config] for config in configs]

            found = race(entrants, run_lap, laps=laps, keep=section.finalists)
        scores = {config: found.scores.get(config, (candidate.metric,)) for config, candidate in of.items()}
        return [*(of[config] for config in found.order), *judged[len(found.order) :]], scores

    def _lap(self, number: int) -> Images:
        count = self.first.count
        numbers = fixed_subset(len(self.source), count, self.seed, number * count)
        return Images(f"{count} of seed {self.seed}, lap {number}", count, tuple(numbers))

    def whole(self, laps: Mapping[SparsityConfig, Sequence[float]]) -> dict[SparsityConfig, float]:
        """The metric of each on the whole search split, from its scores by lap where the metric is a mean over images.

        Then the images of these laps are not forwarded again.
        """
        configs, total, count = sorted(laps), len(self.source), self.first.count
        if not self.is_subset:
            return {config: scores[0] for config, scores in laps.items()}
        if not self.session.task.metric.mean_over_images:
            return dict(zip(configs, self.of(configs, Images("all", total)), strict=True))
        found = {}
        for run in sorted({len(scores) for scores in laps.values()}):
            numbers = tuple(fixed_subset(total, total, self.seed, run * count))
            rest = Images(f"all but {run} laps of {count} of seed {self.seed}", len(numbers), numbers)
            having = [config for config in configs if len(laps[config]) == run]
            for config, metric in zip(having, self.of(having, rest), strict=True):
                mean = (count * sum(laps[config]) + rest.count * metric) / total
                found[config] = round(mean, 9)  # as many right answers are as high a score, however they add up
        return found
