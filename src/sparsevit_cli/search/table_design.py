"""Which whole programs a latency table is made of, and how: for runtimes whose parts cannot be timed inside a run.

All stages but one skip most; that one takes each ratio in turn. What a ratio of a stage adds is a difference of two
programs, and the cheap other stages leave little for noise to come from. Two more programs per stage have all, or all
but the last, of its pairs dense: they tell what gathering and ranking cost.
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

    `kept[stage][tenths]` is the number of windows that the stage keeps, `pairs[stage]` the number of its block pairs.
    """

    kept: tuple[tuple[int, ...], ...]
    pairs: tuple[int, ...]

    @property
    def max_tenths(self) -> int:
        """Largest ratio of the table, in tenths."""
        return len(self.kept[0]) - 1

    @property
    def sparsest(self) -> SparsityConfig:
        """The reference: the largest ratio everywhere."""
        return self._config({})

    def configs(self) -> list[SparsityConfig]:
        """All configurations to be measured, the reference first; ratios that keep equally many windows are one."""
        found = [self.sparsest]
        for stage, kept in enumerate(self.kept):
            found += [self._swept(stage, tenths) for count, tenths in _first(kept).items() if count > kept[-1]]
            if self.pairs[stage] > 1 and kept[0] > kept[-1]:
                found.append(self._probe(stage))
        return list(dict.fromkeys(found))

    def table(self, measured: Mapping[SparsityConfig, float], identity: Mapping[str, Any]) -> LatencyTable:
        """The table from milliseconds of all `configs()`. Ratios that keep equally many windows share one entry."""
        base_ms = reference_ms = measured[self.sparsest]
        pair_ms, overhead_ms = [], []
        for stage, (kept, pairs) in enumerate(zip(self.kept, self.pairs, strict=True)):
            first = _first(kept)
            # Milliseconds of one pair above the pair that keeps least, by windows kept.
            above_ms = {
                count: 0.0 if count == kept[-1] else (measured[self._swept(stage, tenths)] - reference_ms) / pairs
                for count, tenths in first.items()
            }
            pruned = [count for count in first if count < kept[0]]
            least_ms = _slope(pruned, above_ms) * kept[-1] if len(pruned) > 1 else 0.0
            overhead = 0.0
            if pairs > 1 and pruned:
                dense_above_ms = (measured[self._probe(stage)] - reference_ms) / (pairs - 1)
                overhead = max(0.0, pairs * (dense_above_ms - above_ms[kept[0]]))
                above_ms[kept[0]] += overhead / pairs  # dense has none of it
            base_ms -= pairs * least_ms + overhead
            curve = tuple(least_ms + above_ms[count] for count in kept)
            pair_ms.append((curve,) * pairs)
            overhead_ms.append(overhead)
        return LatencyTable(base_ms, tuple(pair_ms), tuple(overhead_ms), identity)

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


def _slope(counts: Sequence[int], above_ms: Mapping[int, float]) -> float:
    """Milliseconds per window, from a line through the pruned ratios; none below zero."""
    return max(0.0, linear_regression(list(counts), [above_ms[count] for count in counts]).slope)
