"""Measure a `LatencyTable`: every block pair at every ratio, inside the running model.

One marked pass of the model at a uniform ratio times all its pairs at that ratio at once, with the caches and the
memory it will have in earnest; nine ratios fill the table of any Swin. Marked and unmarked passes take turns in random
order, and the unmarked ones set the table's scale, which the marks and the sum of medians would leave biased.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import fmean, median
from typing import Any

import torch
from torch import nn

from sparsevit_cli import kernels
from sparsevit_cli.search.latency_table import LatencyTable
from sparsevit_cli.search.table_design import TableDesign
from sparsevit_cli.sparsity import MAX_TENTHS, SparsityConfig
from sparsevit_cli.swin import get_sparsity, model_depths, set_sparsity, sparse_stages
from sparsevit_cli.swin.geometry import images_seen, map_sizes, stage_channels, uses_fused_attention, window_sizes
from sparsevit_cli.windows import num_keep, window_grid

from .device import describe_versions, device_identity
from .inputs import evaluating
from .latency import Clock, Latency, measure_interleaved, stopwatch_of
from .memory import memory_errors
from .neighbours import UNWATCHED, Disturbed, Patience, Vigil, unsteady
from .timeline import Label, Timeline, hooked, timed_forward
from .workload import Workload, sparsity_kept

WARMUP_ROUNDS = 2
PROTOCOL = 2
"""Version of how latencies are taken; earlier ones may have been taken beside a neighbour."""

log = logging.getLogger(__name__)


def measure_latency_table(
    workload: Workload,
    *,
    max_tenths: int = MAX_TENTHS,
    seconds: float = 0.3,
    rounds: int = 10,
    seed: int = 0,
    clock: Clock | None = None,
    patience: Patience | None = None,
    max_spread: float = 0.10,
    retries: int = 3,
    check: Callable[[], None] = lambda: None,
    on_round: Callable[[float], None] = lambda share: None,
) -> LatencyTable:
    """The latency table of a workload whose model is sparsified, on its device, for ratios of 0 to `max_tenths` tenths.

    `seconds` is the measuring time per entry: rounds are taken until the marked passes have lasted `seconds` times
    the number of entries, and at least `rounds` of them. Rounds beside a neighbour are taken again. All rounds are,
    `retries` times at most, where the medians of their halves are further apart than the share `max_spread`. `on_round`
    is told the share done after each; `check` may raise, to stop early. `clock` and `patience` as in
    `measure_interleaved`. The model and its ratios are left as they were. Raises ConfigError, ResourceError, and
    UnsteadyError where the times stay unsteady.
    """
    model = workload.model
    pairs = get_sparsity(model).pairs
    uniform = [SparsityConfig(tuple((t,) * n for n in pairs)) for t in range(max_tenths + 1)]
    session = _TableSession(workload, uniform, Random(seed), clock)
    budget_ms = seconds * 1000 * sum(pairs) * len(uniform)

    def enough(taken: Sequence[_Round]) -> bool:
        check()
        share = min(len(taken) / rounds, sum(one.spent_ms for one in taken) / budget_ms)
        on_round(min(share, 1))
        return share >= 1

    vigil = Vigil(patience or (Patience() if clock is None else UNWATCHED), workload.device, check)
    with evaluating(model), sparsity_kept(model), memory_errors(f"latency table at batch {workload.batch}"):
        try:
            vigil.until_quiet()
            vigil.collect(session.round, lambda taken: len(taken) >= WARMUP_ROUNDS)
            for number in range(retries + 1):
                taken = vigil.collect(session.round, enough)
                change = max(_change(_whole_ms(taken, t)) for t in session.anchors)
                if change <= max_spread:
                    break
                told = f"times changed by {change:.0%} while they were measured ({max_spread:.0%} allowed)"
                if number == retries:
                    raise unsteady("latency table", f"{told}, after {retries} repetitions")
                log.warning(
                    "not steady: latency table, %s; measuring again, %d of %d at most", told, number + 1, retries
                )
        except Disturbed as neighbour:
            raise unsteady("latency table", str(neighbour)) from None
        kept = _kept_windows(model, _maps(workload), max_tenths)
    return _scaled_to_whole(_table(taken, uniform, kept, table_identity(workload)), taken, uniform)


def measure_configs(
    workload: Workload,
    configs: Iterable[SparsityConfig],
    *,
    seconds: float = 1.0,
    strict: bool = False,
    **settings: Any,
) -> dict[SparsityConfig, Latency]:
    """Latency of the whole model at each configuration, interleaved; the first is the reference of `speedup`.

    Dense is ours at ratio 0 (`exact=False`): what the kernels gain is no merit of sparsity.

    Other `settings`, and errors, as in `measure_interleaved`. The model and its ratios are left as they were.
    """
    by_name = {str(config): config for config in configs}
    with evaluating(workload.model), sparsity_kept(workload.model):
        result = measure_interleaved(
            {name: partial(_run_at, workload, config) for name, config in by_name.items()},
            device=workload.device,
            seconds=seconds,
            strict=strict,
            **settings,
        )
    return {by_name[name]: latency for name, latency in result.items()}


def table_identity(workload: Workload) -> dict[str, object]:
    """What a latency table of the workload holds for: it is of no use elsewhere."""
    model, x = workload.model, workload.images
    stages = sparse_stages(model)
    return {
        **_model_identity(workload),
        "device": device_identity(x.device),
        "dtype": str(x.dtype).removeprefix("torch."),
        "mode": "eager",
        "kernels": " ".join(
            (kernels.running(stages[0].kernels, x.device), type(kernels.linear_ops(x)).__name__, str(kernels.VERSION))
        ),
        "fused_attention": uses_fused_attention(model),
    }


def program_identity(workload: Workload, program: Mapping[str, object]) -> dict[str, object]:
    """The same for programs that run on the CPU; `program` says in what: runtime, its version, precision, opset."""
    return {**_model_identity(workload), "device": device_identity(torch.device("cpu")), **program}


def _model_identity(workload: Workload) -> dict[str, object]:
    model, versions = workload.model, describe_versions()
    stages = sparse_stages(model)
    return {
        "scope": workload.scope,
        "batch": workload.batch,
        "image_size": list(workload.image_size),
        "protocol": PROTOCOL,
        "torch": versions["torch"],
        "timm": versions["timm"],
        "importance": stages[0].importance,
        "depths": list(model_depths(model)),
        "channels": list(stage_channels(model)),
        "windows": [list(window) for window in window_sizes(model)],
        "parameters": sum(p.numel() for p in model.parameters()),
        **({"partition": stages[0].partition} if stages[0].partition != "roll_first" else {}),  # as tables of before
    }


@dataclass(frozen=True)
class _Round:
    """Milliseconds: `parts[tenths][label]` of one marked pass per ratio, `whole[tenths]` of unmarked ones."""

    parts_ms: Mapping[int, Mapping[Label, float]]
    whole_ms: Mapping[int, float]

    @property
    def spent_ms(self) -> float:
        """Time of the marked passes."""
        return sum(sum(times.values()) for times in self.parts_ms.values())


class _TableSession:
    """Takes rounds of a model at uniform ratios; `anchors` are the ratios of its unmarked passes, in tenths."""

    def __init__(self, workload: Workload, uniform: list[SparsityConfig], rng: Random, clock: Clock | None) -> None:
        self.workload, self.uniform, self.rng = workload, uniform, rng
        self.timeline, self.stopwatch = Timeline(workload.device, clock), stopwatch_of(workload.device, clock)
        self.anchors = sorted({0, len(uniform) // 2, len(uniform) - 1})

    def round(self) -> _Round:
        """One marked pass at each ratio and one unmarked pass at each anchor, in random order."""
        jobs = [(True, t) for t in range(len(self.uniform))] + [(False, t) for t in self.anchors]
        self.rng.shuffle(jobs)
        model = self.workload.model
        parts_ms: dict[int, Mapping[Label, float]] = {}
        whole_ms: dict[int, float] = {}
        for marked, tenths in jobs:
            set_sparsity(model, self.uniform[tenths], exact=False)  # as the dense stages of a sparse model
            if marked:
                with hooked(model, self.timeline):
                    parts_ms[tenths] = timed_forward(self.workload, self.timeline)
            else:
                whole_ms[tenths] = self.stopwatch(self.workload.run, 1)
        return _Round(parts_ms, whole_ms)


def _whole_ms(taken: Sequence[_Round], tenths: int) -> list[float]:
    return [one.whole_ms[tenths] for one in taken]


def _change(samples_ms: Sequence[float]) -> float:
    """How far the median of the second half is from that of the first, as a share."""
    half = (len(samples_ms) + 1) // 2
    first = median(samples_ms[:half])
    return abs(median(samples_ms[-half:]) - first) / first


def _table(
    taken: Sequence[_Round], uniform: list[SparsityConfig], kept: list[list[int]], identity: Mapping[str, object]
) -> LatencyTable:
    """Medians of rounds; `kept[stage][tenths]` windows. Ratios that keep equally many share their samples."""
    num_tenths = len(uniform)

    def middle(label: Label, *tenths: int) -> float:
        return median(one.parts_ms[t][label] for t in tenths for one in taken)

    def pooled(label: Label, stage: int, tenths: int) -> float:
        return middle(label, *(t for t in range(num_tenths) if kept[stage][t] == kept[stage][tenths]))

    pair_ms = tuple(
        tuple(tuple(pooled(("pair", stage, pair), stage, t) for t in range(num_tenths)) for pair in range(pairs))
        for stage, pairs in enumerate(uniform[0].pairs)
    )
    base_ms = sum(middle(label, 0) for label in taken[0].parts_ms[0] if label[0] != "pair")
    overhead_ms = []
    for stage, counts in enumerate(kept):
        label = ("scoring", stage)
        pruned = [middle(label, t) for t in range(num_tenths) if counts[t] < counts[0]]
        overhead_ms.append(max(0.0, fmean(pruned) - middle(label, 0)) if pruned else 0.0)
    return LatencyTable(base_ms, pair_ms, tuple(overhead_ms), identity)


def _scaled_to_whole(table: LatencyTable, taken: Sequence[_Round], uniform: list[SparsityConfig]) -> LatencyTable:
    """All entries by one factor, so that the unmarked passes are met on average.

    One factor and no offset: where noise is larger than what sparsity saves, a fitted slope could be anything.
    """
    anchors = taken[0].whole_ms
    whole_ms = sum(median(_whole_ms(taken, t)) for t in anchors)
    factor = whole_ms / sum(table.predict(uniform[t]) for t in anchors)
    return replace(
        table,
        base_ms=factor * table.base_ms,
        pair_ms=tuple(tuple(tuple(factor * ms for ms in pair) for pair in stage) for stage in table.pair_ms),
        overhead_ms=tuple(factor * ms for ms in table.overhead_ms),
    )


def program_design(workload: Workload, max_tenths: int = MAX_TENTHS, *, own_dense: bool = False) -> TableDesign:
    """Which programs of a workload's model make a table, for ratios of 0 to `max_tenths` tenths."""
    model = workload.model
    with evaluating(model):
        maps = _maps(workload)
    kept = _kept_windows(model, maps, max_tenths)
    moved = [h * w * channels for (h, w), channels in zip(maps, stage_channels(model), strict=True)]
    return TableDesign(tuple(map(tuple, kept)), get_sparsity(model).pairs, tuple(map(float, moved)), own_dense)


def _maps(workload: Workload) -> tuple[tuple[int, int], ...]:
    """Height and width of every stage's map, of the first images that enter the Swin."""
    with images_seen(workload.model) as seen:
        workload.run()
    _, _, *image = seen[0]
    return map_sizes(workload.model, image)


def _kept_windows(model: nn.Module, maps: Sequence[tuple[int, int]], max_tenths: int) -> list[list[int]]:
    """Windows computed per stage at 0 ... `max_tenths` tenths, on maps of these sizes."""
    counts = []
    for (height, width), window in zip(maps, window_sizes(model), strict=True):
        rows, cols = window_grid(height, width, window)
        counts.append([num_keep(rows * cols, t) for t in range(max_tenths + 1)])
    return counts


def _run_at(workload: Workload, config: SparsityConfig) -> None:
    set_sparsity(workload.model, config, exact=False)
    workload.run()
