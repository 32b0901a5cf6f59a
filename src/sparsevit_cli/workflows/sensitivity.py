"""search --sensitivity: how much the metric falls when one block pair is pruned, one pair at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from sparsevit_cli.atomic import write_atomic
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.tasks.task import Metric

from .plots import plot_sensitivity
from .search import opened_search
from .session import Session

STEP = 2
"""Tenths between the ratios that are scored."""


@dataclass(frozen=True)
class Slot:
    """One block pair; where it is pruned, so are the pairs after it in its stage: a skipped window never returns."""

    stage: int
    pair: int

    def __str__(self) -> str:
        return f"stage {self.stage}, pair {self.pair}"

    def pruned(self, space: SearchSpace, tenths: int) -> SparsityConfig:
        """This slot at `tenths`, everything before it and in other stages dense."""
        genes = [[0] * pairs for pairs in space.pairs]
        genes[self.stage][self.pair :] = [tenths] * (space.pairs[self.stage] - self.pair)
        return SparsityConfig(tuple(map(tuple, genes)))


@dataclass(frozen=True)
class SensitivitySummary:
    """`scores[slot]` at each of `ratios`; the ratio 0 is the dense model, one for all."""

    folder: RunFolder
    metric: Metric
    ratios: tuple[float, ...]
    slots: tuple[str, ...]
    scores: tuple[tuple[float, ...], ...]
    gmacs: tuple[tuple[float, ...], ...]
    evaluated: int


def measure_sensitivity(session: Session) -> SensitivitySummary:
    """The score of the adapted weights with one block pair pruned at a time; writes sensitivity.csv and .png.

    On the same images as a search, into the same ledger: what was scored before is not scored again, and a search
    with a surrogate is informed by it. Raises what `search` raises before it evaluates.
    """
    with opened_search(session) as work:
        space = work.space
        tenths = range(0, space.max_tenths + 1, STEP)
        slots = tuple(_slots(space))
        wanted = {(slot, t): slot.pruned(space, t) for slot in slots for t in tenths}
        missing = [config for config in dict.fromkeys(wanted.values()) if work.ledger.get(config) is None]
        with session.reporter.progress("sensitivity", len(missing)) as bar:
            for _ in work.scores.of_all(sorted(missing)):
                bar.advance()
        known = work.ledger.known()
        summary = SensitivitySummary(
            work.folder, session.task.metric, tuple(t / 10 for t in tenths), tuple(map(str, slots)),
            tuple(tuple(known[wanted[slot, t]] for t in tenths) for slot in slots),
            tuple(tuple(work.macs(wanted[slot, t]) / 1e9 for t in tenths) for slot in slots), len(missing),
        )  # fmt: skip
    _write(summary, session)
    return summary


def _slots(space: SearchSpace) -> Iterator[Slot]:
    return (Slot(stage, pair) for stage, pairs in enumerate(space.pairs) for pair in range(pairs))


def _write(summary: SensitivitySummary, session: Session) -> None:
    summary.folder.set_aside(("sensitivity.csv", "sensitivity.png"), session.reporter)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["slot", "ratio", summary.metric.key, "gmacs"])
    for slot, scores, gmacs in zip(summary.slots, summary.scores, summary.gmacs, strict=True):
        for row in zip(summary.ratios, scores, gmacs, strict=True):
            writer.writerow([slot, *row])
    write_atomic(summary.folder.path / "sensitivity.csv", text.getvalue())
    lines = dict(zip(summary.slots, summary.scores, strict=True))
    plot_sensitivity(summary.folder.path / "sensitivity.png", summary.ratios, lines, summary.metric, session.reporter)
