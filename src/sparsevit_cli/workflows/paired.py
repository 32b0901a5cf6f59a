"""Two models on the same images: the difference of their scores, and how far chance moves it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from sparsevit_cli.data.source import Batch, part_of
from sparsevit_cli.errors import DataError
from sparsevit_cli.tasks.task import Score, Scorer, Task

GROUPS = 20
"""Groups of images of which each is left out once."""


class PairedScorer:
    """A scorer that also remembers what its standard error needs, for each image or for each group of images.

    For a metric that is a mean over images that is the metric of each image. For another one it is the metric without
    each of `GROUPS` groups, if the task's scorer can `add`. Image number n belongs to group n modulo `GROUPS`.
    """

    def __init__(self, task: Task, make: Callable[[], Scorer]) -> None:
        self.task, self._make = task, make
        self._whole = make()
        self._groups: dict[int, Scorer] = {}
        self._of_image: dict[int, float] = {}

    def update(self, outputs: Any, batch: Batch) -> None:
        """Take in what the model gave for a batch."""
        self._whole.update(outputs, batch)
        if not self.task.metric.mean_over_images and not hasattr(self._whole, "add"):
            return
        for place, sample in enumerate(batch.parts(1)):
            number = int(sample.indices)
            of_sample = part_of(outputs, slice(place, place + 1))
            if self.task.metric.mean_over_images:
                alone = self._make()
                alone.update(of_sample, sample)
                self._of_image[number] = alone.compute()[self.task.metric.key]
            else:
                group = number % GROUPS
                self._groups.setdefault(group, self._make()).update(of_sample, sample)

    def compute(self) -> Mapping[str, float]:
        """As the task's scorer."""
        return self._whole.compute()

    def parts(self) -> dict[int, float]:
        """The metric of each image, or without each group; empty if neither is known."""
        if self._of_image:
            return self._of_image
        try:
            return {group: self._without(group) for group in self._groups} if len(self._groups) > 1 else {}
        except DataError:  # nothing to score in all but one group
            return {}

    def _without(self, group: int) -> float:
        scorer: Any = self._make()
        for number, other in self._groups.items():
            if number != group:
                scorer.add(other)
        found: float = scorer.compute()[self.task.metric.key]
        return found


@dataclass(frozen=True)
class Change:
    """What a model scores `after` against `before`, over the same images.

    `standard_error` is that of their difference; None if it is not known. `method` tells how it was found.
    """

    before: Score
    after: Score
    standard_error: float | None
    method: str

    @property
    def difference(self) -> float:
        """After less before; negative if the score fell."""
        return self.after.value - self.before.value

    def document(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "before": self.before.value,
            "after": self.after.value,
            "difference": self.difference,
            "standard_error": self.standard_error,
            "method": self.method,
            "count": self.after.count,
        }


def change(task: Task, before: tuple[Score, PairedScorer], after: tuple[Score, PairedScorer]) -> Change:
    """The change between two scores of the same images, each with the scorer that took them in."""
    (first, old), (second, new) = before, after
    olds, news = old.parts(), new.parts()
    differences = [news[key] - olds[key] for key in olds if key in news]
    error: float | None
    if len(differences) < 2:
        return Change(first, second, None, "not known")
    if task.metric.mean_over_images:
        error = stdev(differences) / math.sqrt(len(differences))
        return Change(first, second, error, f"paired over {len(differences)} images")
    middle, count = fmean(differences), len(differences)
    error = math.sqrt((count - 1) / count * sum((each - middle) ** 2 for each in differences))
    return Change(first, second, error, f"jackknife over {count} groups of images")
