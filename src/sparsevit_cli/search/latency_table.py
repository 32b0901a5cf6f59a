"""Latency of any configuration as a sum of measured parts. Measuring is done elsewhere; this is the arithmetic."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from sparsevit_cli.documents import understood
from sparsevit_cli.errors import CheckpointError, ConfigError, MeasurementError
from sparsevit_cli.sparsity import SparsityConfig

from .additive import AdditiveCost

Measured = Sequence[tuple[SparsityConfig, float]]
"""Configurations with their measured milliseconds per batch."""

FORMAT = "sparsevit-latency-table-1"
PLATEAU = 0.1
"""Share of a stage's mean step that a step of a ratio must save, not to be on a plateau."""
OF_THE_MACHINE = (
    "clock", "device", "fused_attention", "kernels", "mode", "protocol", "runtime_version", "timm",
    "torch",
)  # fmt: skip
"""Fields of an identity that may differ where a table is used for another machine than this one."""


@dataclass(frozen=True)
class TableError:
    """Relative error of predictions against `n` measurements (0.01 is 1 %), mean and largest of the magnitudes."""

    mean: float
    largest: float
    n: int


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds per batch on one device, part by part.

    `base_ms`: everything outside the blocks. `pair_ms[stage][pair][tenths]`: both blocks of a pair at that ratio.
    `overhead_ms[stage]`: scoring and ranking, added once where any pair of the stage is pruned.
    `identity`: what the numbers hold for (device, batch, image size, dtype, versions ...), plain JSON values.
    `error`: that on held-out configurations, where they were measured. Raises ConfigError for shapes or numbers that
    cannot be.
    """

    base_ms: float
    pair_ms: tuple[tuple[tuple[float, ...], ...], ...]
    overhead_ms: tuple[float, ...]
    identity: Mapping[str, Any] = field(hash=False)
    error: TableError | None = None

    def __post_init__(self) -> None:
        pair_ms = tuple(tuple(tuple(float(ms) for ms in pair) for pair in stage) for stage in self.pair_ms)
        object.__setattr__(self, "pair_ms", pair_ms)
        object.__setattr__(self, "base_ms", float(self.base_ms))
        object.__setattr__(self, "overhead_ms", tuple(float(ms) for ms in self.overhead_ms))
        object.__setattr__(self, "identity", json.loads(json.dumps(dict(self.identity))))  # as it will be read back
        if len(self.overhead_ms) != len(pair_ms) or not pair_ms or not all(pair_ms):
            got = f"{len(pair_ms)} stages and {len(self.overhead_ms)} overheads; every stage needs one, and its pairs"
            raise ConfigError("latency table", got, "Measure it again.")
        entries = [len(pair) for stage in pair_ms for pair in stage]
        if not min(entries) or len(set(entries)) != 1:
            got = f"{min(entries)} to {max(entries)} ratios per pair; every pair needs the same ones, from 0 up"
            raise ConfigError("latency table", got, "Measure it again.")
        numbers = [self.base_ms, *self.overhead_ms, *(ms for stage in pair_ms for pair in stage for ms in pair)]
        if not all(math.isfinite(ms) for ms in numbers):
            raise ConfigError("latency table", "an entry is not finite", "Measure it again.")

    @property
    def max_tenths(self) -> int:
        """Largest ratio in the table, in tenths."""
        return len(self.pair_ms[0][0]) - 1

    @cached_property
    def cost(self) -> AdditiveCost:
        """`predict`, which can tell millions of configurations at once."""
        return AdditiveCost(self.base_ms, self.pair_ms, self.overhead_ms)

    def predict(self, config: SparsityConfig) -> float:
        """Milliseconds per batch. Raises ConfigError for a configuration of another model or outside the table."""
        return self.cost(config)

    @cached_property
    def plateaus(self) -> tuple[tuple[tuple[float, float], ...], ...]:
        """By stage the runs of ratios, first and last, in which a higher ratio is no faster if a whole stage is at it.

        A step of a run saves less than `PLATEAU` of the mean step of its stage, or costs time. Where skipping saves
        nothing at all, all ratios are one run.
        """
        return tuple(
            _runs([sum(entry[t] for entry in entries) + (overhead if t else 0.0) for t in range(self.max_tenths + 1)])
            for entries, overhead in zip(self.pair_ms, self.overhead_ms, strict=True)
        )

    @property
    def plateaus_told(self) -> str:
        """Stages that have any, with `stage 2: 0.3 to 0.5, 0.7 to 0.8`; empty if none has."""
        told = [
            f"stage {stage}: {', '.join(f'{first:g} to {last:g}' for first, last in runs)}"
            for stage, runs in enumerate(self.plateaus) if runs
        ]  # fmt: skip
        return f"by the latency table a higher ratio is no faster: {'; '.join(told)}" if told else ""

    def fit_error(self, measured: Measured) -> TableError:
        """Error against measurements that the table was not made of. Raises MeasurementError where there are none."""
        _check_measured(measured)
        errors = [abs(self.predict(config) - ms) / ms for config, ms in measured]
        return TableError(math.fsum(errors) / len(errors), max(errors), len(errors))

    def calibrated(self, measured: Measured) -> LatencyTable:
        """This table with one scale and one offset (least squares), which removes the bias of parts timed alone.

        Hand in other configurations than those `fit_error` will be told on. With a single distinct prediction only
        the offset is fitted. Raises MeasurementError where measured latency falls as predicted latency rises.
        """
        _check_measured(measured)
        predicted = [self.predict(config) for config, _ in measured]
        mean_predicted = math.fsum(predicted) / len(measured)
        mean_measured = math.fsum(ms for _, ms in measured) / len(measured)
        spread = math.fsum((p - mean_predicted) ** 2 for p in predicted)
        scale = 1.0
        if spread > 1e-18 * mean_predicted**2 * len(measured):
            pairs = zip(predicted, measured, strict=True)
            scale = math.fsum((p - mean_predicted) * (ms - mean_measured) for p, (_, ms) in pairs) / spread
        if scale <= 0:
            got = f"measured latency does not rise with the prediction over {len(measured)} configurations"
            raise MeasurementError("latency table", got, "Measure longer (search.seconds) or on an idle machine.")
        return replace(
            self,
            base_ms=scale * self.base_ms + mean_measured - scale * mean_predicted,
            pair_ms=tuple(tuple(tuple(scale * ms for ms in pair) for pair in stage) for stage in self.pair_ms),
            overhead_ms=tuple(scale * ms for ms in self.overhead_ms),
        )

    def check_identity(self, other: Mapping[str, Any], *, any_machine: bool = False) -> None:
        """Raise CheckpointError naming the differing fields where the table was measured under another identity.

        With `any_machine` the fields `OF_THE_MACHINE` do not count.
        """
        there, here = ({"runtime": "torch", **one} for one in (self.identity, json.loads(json.dumps(dict(other)))))
        names = {*there, *here} - set(OF_THE_MACHINE if any_machine else ())
        fields = sorted(name for name in names if there.get(name) != here.get(name))
        if fields:
            told = "; ".join(f"{name} {there.get(name)!r} there, {here.get(name)!r} here" for name in fields)
            raise CheckpointError("latency table", f"measured for something else: {told}", "Measure one here.")

    def to_json(self) -> str:
        """The table with a checksum, exact to the bit."""
        table = asdict(self)
        return json.dumps({"format": FORMAT, "sha256": _checksum(table), "table": table}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = "latency table") -> LatencyTable:
        """Table from `to_json`; `where` names the file in messages. Raises CheckpointError where it is damaged."""
        with understood(where, "Measure it again."):
            document = json.loads(text)
            if not isinstance(document, dict) or document.get("format") != FORMAT:
                raise ValueError(f"expected format {FORMAT}")
            table = document["table"]
            if document["sha256"] != _checksum(table):
                raise ValueError("the checksum does not match")
            error = table.pop("error", None)  # tables of before have none
            return cls(**table, error=None if error is None else TableError(**error))


def _runs(ms: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Runs of ratios whose steps save hardly anything, from the times at 0, 0.1, 0.2 ..."""
    least = PLATEAU * max(0.0, ms[0] - ms[-1]) / max(1, len(ms) - 1)
    runs: list[tuple[int, int]] = []
    for place in range(1, len(ms)):
        if ms[place - 1] - ms[place] <= least:
            first = runs.pop()[0] if runs and runs[-1][1] == place - 1 else place - 1
            runs.append((first, place))
    return tuple((first / 10, last / 10) for first, last in runs)


def _checksum(table: object) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _check_measured(measured: Measured) -> None:
    if not measured or not all(math.isfinite(ms) and ms > 0 for _, ms in measured):
        got = f"{len(measured)} measurements; at least one is needed, each positive and finite"
        raise MeasurementError("latency table", got, "Measure again.")
