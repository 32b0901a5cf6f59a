"""Time per stage (blocks, scoring and ranking, gather and scatter, merging), and per part of a model around a Swin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from sparsevit_cli import kernels
from sparsevit_cli.swin.geometry import sparsity_or_dense

from .inputs import evaluating
from .latency import Clock
from .memory import memory_errors
from .parts import REST, Parts, labelled
from .timeline import AFTER, Label, TimedEngine, Timeline, hooked, marked, timed_forward
from .workload import Workload

WARMUP_PASSES = 3


@dataclass(frozen=True)
class StageTime:
    """Milliseconds of one part of a forward pass; `name` is stem, stage 0 ..., or head (final norm, pooling, head).

    `blocks_ms` is norm, attention and MLP; `scoring_ms` scoring and ranking of windows; `moves_ms` gather and scatter,
    which the C++ and Triton kernels do inside their blocks; `merging_ms` patch merging. Stem and head have `other_ms`
    only.
    """

    name: str
    blocks_ms: float = 0.0
    scoring_ms: float = 0.0
    moves_ms: float = 0.0
    merging_ms: float = 0.0
    other_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """Sum of the parts."""
        return self.blocks_ms + self.scoring_ms + self.moves_ms + self.merging_ms + self.other_ms

    def scaled(self, factor: float) -> StageTime:
        """All times by `factor`."""
        return replace(self, **{part: factor * getattr(self, part) for part in _PARTS})


_PARTS = ("blocks_ms", "scoring_ms", "moves_ms", "merging_ms", "other_ms")


@dataclass(frozen=True)
class StageTimes:
    """The rows of a pass, which add up to `total_ms`.

    They were measured in marked passes of `marked_ms` and scaled to the total; `residual` is the share that the
    marked passes took longer: the marks themselves, and the change of the machine in between.
    """

    rows: tuple[StageTime, ...]
    total_ms: float
    marked_ms: float

    @property
    def residual(self) -> float:
        """Marked passes over the total, less one."""
        return self.marked_ms / self.total_ms - 1

    def share(self, part: str) -> float:
        """Share of the total that all rows spend on `part`, such as `scoring_ms`."""
        return sum(float(getattr(row, part)) for row in self.rows) / self.total_ms


def time_stages(
    workload: Workload, *, total_ms: float | None = None, passes: int = 15, clock: Clock | None = None
) -> StageTimes:
    """Where a forward pass of the workload spends its time, from passes made for this alone.

    Medians over `passes`, scaled to add up to `total_ms`, the latency measured without marks (None: not scaled).
    A dense timm model has blocks and merging only. Raises ConfigError for a compiled model, ResourceError.
    """
    timeline = Timeline(workload.device, clock)
    timed = partial(TimedEngine, timeline=timeline)
    with kernels.using(timed):
        times = _medians_ms(workload, hooked(workload.model, timeline), timeline, passes)
    rows = _rows(times, [any(tenths) for tenths in sparsity_or_dense(workload.model).tenths])
    marked_ms = sum(row.total_ms for row in rows)
    total_ms = marked_ms if total_ms is None else total_ms
    return StageTimes(tuple(row.scaled(total_ms / marked_ms) for row in rows), total_ms, marked_ms)


@dataclass(frozen=True)
class PartTimes:
    """Milliseconds of every part of a forward pass and of the `rest`, in their order; they add up to `total_ms`.

    Scaled from marked passes of `marked_ms`, as `StageTimes`. `after_ms` is what follows the model; it is in none of
    these, and not scaled. None if nothing follows.
    """

    ms: Mapping[str, float]
    total_ms: float
    marked_ms: float
    after_ms: float | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Share of the total by part."""
        return {name: ms / self.total_ms for name, ms in self.ms.items()}


def time_parts(
    workload: Workload,
    parts: Parts,
    *,
    total_ms: float | None = None,
    passes: int = 15,
    clock: Clock | None = None,
    after: Callable[[Any], object] | None = None,
) -> PartTimes:
    """Where a forward pass of a model around a Swin spends its time; settings and errors as in `time_stages`.

    A part that is not called takes no time. `after` is called with the outputs of each pass, and timed beside it.
    """
    timeline = Timeline(workload.device, clock)
    labels = [(module, (name,)) for module, name in labelled(parts)]
    found = _medians_ms(workload, marked(workload.model, labels, timeline), timeline, passes, after)
    times = {name: found.get((name,), 0.0) for name in (*parts, REST)}
    marked_ms = sum(times.values())
    total_ms = marked_ms if total_ms is None else total_ms
    scaled = {name: ms * total_ms / marked_ms for name, ms in times.items()}
    return PartTimes(scaled, total_ms, marked_ms, found.get(AFTER))


def _medians_ms(
    workload: Workload,
    marks: AbstractContextManager[None],
    timeline: Timeline,
    passes: int,
    after: Callable[[Any], object] | None = None,
) -> dict[Label, float]:
    """Median milliseconds per label over `passes` marked passes, after some to warm up."""
    samples: dict[Label, list[float]] = {}
    with evaluating(workload.model), memory_errors(str(workload)), marks:
        for _ in range(WARMUP_PASSES):
            timed_forward(workload, timeline, after)
        for _ in range(passes):
            for label, ms in timed_forward(workload, timeline, after).items():
                samples.setdefault(label, []).append(ms)
    return {label: median(values) for label, values in samples.items()}


def _rows(times: dict[Label, float], is_pruned: list[bool]) -> list[StageTime]:
    rows = [StageTime("stem", other_ms=times[("stem",)])] if ("stem",) in times else []
    for stage, pruned in enumerate(is_pruned):
        blocks_ms = sum(ms for label, ms in times.items() if label[:2] == ("pair", stage))
        own_ms = times[("scoring", stage)]  # of a dense stage: the loop over its blocks, nothing is scored
        rows.append(
            StageTime(
                f"stage {stage}",
                blocks_ms=blocks_ms if pruned else blocks_ms + own_ms,
                scoring_ms=own_ms if pruned else 0.0,
                moves_ms=times.get(("moves", stage), 0.0),
                merging_ms=times[("merging", stage)],
            )
        )
    return [*rows, StageTime("head", other_ms=times[("rest",)])]
