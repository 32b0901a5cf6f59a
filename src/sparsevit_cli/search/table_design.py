"""Which whole programs a latency table is made of, and how: for runtimes whose parts cannot be timed inside a run.

All stages but one skip most; that one takes each ratio in turn. What a ratio of a stage adds is a difference of two
programs, and the cheap other stages leave little for noise to come from. These programs share one pattern: every pair
skips windows, so one trace makes all of them.

A pair at ratio 0 has no gather. What that saves is read off the dense program: the difference between it and the lines
through the measured ratios, prolonged to all windows. It is shared out by the bytes that each stage moves. With
`own_dense` it is measured instead: two more programs per stage have all, or all but the last, of its pairs dense. Each
is a pattern of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Any

from sparsevit_cli.sparsity import SparsityConfig

from .latency_table import LatencyTable


@dataclass(frozen=True)
class TableDesign:
    """The design for a model.

    `kept[stage][tenths]` is the number of windows that the stage keeps, `pairs[stage]` the number of its block pairs,
    `moved[stage]` the size of its map, in any unit.
    """

    kept: tuple[tuple[int, ...], ...]
    pairs: tuple[int, ...]
    moved: tuple[float, ...]
    own_dense: bool = False

    @property
    def max_tenths(self) -> int:
        """Largest ratio of the table, in tenths."""
        return len(self.kept[0]) - 1

    @property
    def sparsest(self) -> SparsityConfig:
        """The reference: the largest ratio everywhere."""
        return self._config({})

    @property
    def dense(self) -> SparsityConfig:
        """No window is skipped."""
        return SparsityConfig(tuple((0,) * pairs for pairs in self.pairs))

    def configs(self) -> list[SparsityConfig]:
        """All configurations to be measured, the reference first; ratios that keep equally many windows are one."""
        found = [self.sparsest, self.dense]
        for stage, kept in enumerate(self.kept):
            ratios = [tenths for count, tenths in _first(kept).items() if count > kept[-1]]
            if not self._has_own_dense(stage):
                ratios = [tenths for tenths in ratios if tenths]
            elif self.pairs[stage] > 1 and ratios:
                found.append(self._probe(stage))
            found += [self._swept(stage, tenths) for tenths in ratios]
        return list(dict.fromkeys(found))

    def table(self, measured: Mapping[SparsityConfig, float], identity: Mapping[str, Any]) -> LatencyTable:
        """The table from milliseconds of all `configs()`. Ratios that keep equally many windows share one entry."""
        reference_ms = measured[self.sparsest]
        above_ms = [self._above_ms(stage, measured) for stage in range(len(self.kept))]
        lines = [_line(kept, above) for kept, above in zip(self.kept, above_ms, strict=True)]
        overhead_ms = [0.0] * len(self.kept)
        shared = [stage for stage in range(len(self.kept)) if self.kept[stage][0] not in above_ms[stage]]
        for stage in shared:
            slope, at_none = lines[stage]
            above_ms[stage][self.kept[stage][0]] = at_none + slope * self.kept[stage][0]
        for stage in range(len(self.kept)):
            if stage not in shared and self.pairs[stage] > 1 and len(above_ms[stage]) > 1:
                overhead_ms[stage] = self._take_overhead(stage, above_ms[stage], measured)
        total_ms = reference_ms - sum(overhead_ms)
        total_ms += sum(
            pairs * above[kept[0]] for pairs, above, kept in zip(self.pairs, above_ms, self.kept, strict=True)
        )
        moved = {stage: self.pairs[stage] * self.moved[stage] for stage in shared}
        for stage in shared:  # what dense pairs do without
            share_ms = (total_ms - measured[self.dense]) * moved[stage] / sum(moved.values())
            above_ms[stage][self.kept[stage][0]] -= share_ms / self.pairs[stage]
        least_ms = [max(0.0, slope) * kept[-1] for (slope, _), kept in zip(lines, self.kept, strict=True)]
        base_ms = reference_ms - sum(
            pairs * least + overhead for pairs, least, overhead in zip(self.pairs, least_ms, overhead_ms, strict=True)
        )
        pair_ms = tuple(
            (tuple(least + above[count] for count in kept),) * pairs
            for pairs, least, above, kept in zip(self.pairs, least_ms, above_ms, self.kept, strict=True)
        )
        return LatencyTable(base_ms, pair_ms, tuple(overhead_ms), identity)

    def _has_own_dense(self, stage: int) -> bool:
        """True where the dense stage is measured: no line goes through fewer than two pruned ratios."""
        return self.own_dense or len(set(self.kept[stage])) < 3

    def _above_ms(self, stage: int, measured: Mapping[SparsityConfig, float]) -> dict[int, float]:
        """Milliseconds of a pair above the pair that keeps least, by windows kept; dense only if it was measured."""
        found = {self.kept[stage][-1]: 0.0}
        for count, tenths in _first(self.kept[stage]).items():
            config = self._swept(stage, tenths)
            if count not in found and config in measured:
                found[count] = (measured[config] - measured[self.sparsest]) / self.pairs[stage]
        return found

    def _take_overhead(self, stage: int, above_ms: dict[int, float], measured: Mapping[SparsityConfig, float]) -> float:
        """What ranking costs, by the probe; it is taken out of the saving of dense pairs. None below zero."""
        pairs, full = self.pairs[stage], self.kept[stage][0]
        dense_ms = (measured[self._probe(stage)] - measured[self.sparsest]) / (pairs - 1)
        overhead = max(0.0, pairs * (dense_ms - above_ms[full]))
        above_ms[full] += overhead / pairs
        return overhead

    def _swept(self, stage: int, tenths: int) -> SparsityConfig:
        return self._config({stage: (tenths,) * self.pairs[stage]})

    def _probe(self, stage: int) -> SparsityConfig:
        """All pairs of a stage dense but its last."""
        return self._config({stage: (0,) * (self.pairs[stage] - 1) + (self.max_tenths,)})

    def _config(self, stages: Mapping[int, tuple[int, ...]]) -> SparsityConfig:
        return SparsityConfig(
            tuple(stages.get(stage, (self.max_tenths,) * pairs) for stage, pairs in enumerate(self.pairs))
        )


def _first(kept: Sequence[int]) -> dict[int, int]:
    """Number of windows kept to the smallest ratio, in tenths, that keeps so many; most windows first."""
    first: dict[int, int] = {}
    for tenths, count in enumerate(kept):
        first.setdefault(count, tenths)
    return first


def _line(kept: Sequence[int], above_ms: Mapping[int, float]) -> tuple[float, float]:
    """Milliseconds per window, and at none, of the line through the pruned ratios; zeros where there are too few."""
    pruned = [count for count in above_ms if count < kept[0]]
    if len(pruned) < 2:
        return 0.0, 0.0
    line = linear_regression(pruned, [above_ms[count] for count in pruned])
    return line.slope, line.intercept
