"""profile --rivals: ours against the best dense model a user can get, in one interleaved run per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from sparsevit_cli import kernels
from sparsevit_cli.atomic import write_json
from sparsevit_cli.profiling.device import device_identity
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import flopcounter_macs, padding_macs
from sparsevit_cli.profiling.memory import peak_memory_mb
from sparsevit_cli.profiling.roofline import known_peak, roofline_ms
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import SparsityConfig

from .contestants import Bench, Contestant, contestants
from .in_runtimes import chosen_runtimes
from .plots import plot_rivals
from .profile_report import refuse_unsteady
from .profile_target import built, profile_target, tell_of_timm, threads_set
from .rows import TORCH, MeasuredRow, measured
from .session import Session


@dataclass(frozen=True, kw_only=True)
class RivalRow(MeasuredRow):
    """One contestant of one cell. `speedup` is the best dense's time over this one's, in the same rounds.

    The best dense is the fastest timm of the same precision in any runtime that takes part. `kind` is B1 (timm as
    installed), B2 (its variants, and its programs in other runtimes), B2f (compiled and frozen), B0 (the authors'
    flow), B3 (dense at a lower resolution), ours or O (the oracle). `gmacs` are without padding if our kernels leave it
    out.

    `realised` is sparsity's own share, without what a faster kernel or runtime gains: the share of latency saved over
    the share of multiply-adds saved, against our own dense model in torch, and against the dense program in another
    runtime. `tax` is what a sparse model in torch takes longer than its oracle. Both are from the same rounds, with
    95 % intervals. `roofline` is the share of its time that the device would need at best, if the device's peaks are
    known. It `compares` with all dense rows.
    """

    peak_memory_mb: float | None = None
    realised: float | None = None
    realised_low: float | None = None
    realised_high: float | None = None
    tax: float | None = None
    tax_low: float | None = None
    tax_high: float | None = None
    roofline: float | None = None


@dataclass(frozen=True)
class RivalCell:
    """All contestants at one batch and image size, measured in turns; `best_dense` is the fastest of B1 and B2.

    All compute in one precision. If one of B1 and B2 is not steady, the best is not known, and no row `compares`.
    """

    best_dense: str
    rows: tuple[RivalRow, ...]


@dataclass(frozen=True)
class RivalReport:
    """The benchmark of one model, or of its backbone alone where that is a part of it: what our kernels compute."""

    folder: RunFolder
    model: str
    cells: tuple[RivalCell, ...]
    environment: Mapping[str, object]
    settings: Mapping[str, object]
    about: Mapping[str, str]

    def document(self) -> dict[str, Any]:
        """The JSON document of `sparsevit profile --rivals --json`."""
        return {
            "schema_version": 2, **self.about, **self.environment, "model": self.model, "settings": self.settings,
            "cells": [asdict(cell) for cell in self.cells],
        }  # fmt: skip

    def refuse_unsteady(self) -> None:
        """As `profile.refuse_unsteady`."""
        rows = [row for cell in self.cells for row in cell.rows]
        refuse_unsteady({f"{row.label}, batch {row.batch}": row.unsteady for row in rows})


def measure_rivals(
    session: Session,
    *,
    model: str | None = None,
    img_size: str | None = None,
    ratios: str | None = None,
) -> RivalReport:
    """Measure every contestant at every batch and image size of the profile section. Needs neither data nor weights.

    The contestants are of the backbone alone where a task's model has modules around it.

    `ratios` as typed are measured besides the published configurations and 60 % everywhere. On a CPU every runtime that
    is installed takes part, unless `profile.runtimes` names some. Raises ConfigError, and MeasurementError if a program
    of another runtime does not give the model's outputs.
    """
    target = profile_target(session, model=model, img_size=img_size, ratios=ratios or "0.6")
    typed = {str(target.config): target.config} if ratios is not None else {}
    session = target.session
    runtimes = chosen_runtimes(session, "rivals", all_installed=True)
    bench = Bench(session, session.task.scopes(built(session, target.sizes[0]))[0], runtimes)
    folder, section = session.folder("rivals"), session.config.profile
    tell_of_timm(session, "rivals")
    cells = []
    total = len(target.sizes) * len(section.batch_sizes)
    with threads_set(section.threads), session.reporter.progress("rivals", total) as bar:
        for size in target.sizes:
            for batch in section.batch_sizes:
                cells.append(_cell(bench, size, batch, typed))
                bar.advance()
        threads = torch.get_num_threads()
    settings = {
        **section.model_dump(mode="json", exclude={"mode", "ratios"}), "threads": threads, **runtimes.settings,
        "clock": session.config.clock.model_dump(mode="json"),
        "kernels": f"{kernels.running(session.config.kernels, session.device)}, {kernels.VERSION}",
    }  # fmt: skip
    about = session.task.about(bench.scope)
    report = RivalReport(folder, session.config.model.name, tuple(cells), session.environment, settings, about)
    folder.set_aside(["rivals.json", "rivals.png", "metrics.json"], session.reporter)
    write_json(folder.path / "rivals.json", report.document())
    folder.write_result({**report.about, "model": report.model, "best_dense": [cell.best_dense for cell in cells]})
    plot_rivals(folder.path / "rivals.png", [[asdict(row) for row in cell.rows] for cell in cells], session.reporter)
    return report


def _cell(bench: Bench, size: Size, batch: int, typed: Mapping[str, SparsityConfig]) -> RivalCell:
    session = bench.session
    section = session.config.profile
    torch._dynamo.reset()
    taking_part = contestants(bench, size, batch, typed)
    session.reporter.say(f"rivals: {len(taking_part)} contestants at batch {batch}, {size_text(size)}")
    latencies = measure_interleaved(
        {label: contestant.run for label, contestant in taking_part.items()},
        device=session.device, seconds=section.seconds, rounds=section.rounds, seed=session.config.seed,
        max_spread=section.max_spread, strict=False, retries=session.config.clock.retries,
        patience=session.patience, together=True, pause_seconds=bench.runtimes.pause_seconds,
        before_round=partial(session.stop.check, "rivals", "nothing of this cell is saved"),
    )  # fmt: skip
    dense = [label for label, contestant in taking_part.items() if contestant.kind in ("B1", "B2")]
    best = min(dense, key=lambda label: latencies[label].median_ms)
    is_best = all(latencies[label].stable for label in dense)
    rows = {
        label: _row(bench, label, contestant, batch, latencies[label], latencies[best], is_best)
        for label, contestant in taking_part.items()
    }
    return RivalCell(best, tuple(_compared(taking_part[label], row, rows, latencies) for label, row in rows.items()))


def _row(
    bench: Bench, label: str, contestant: Contestant, batch: int, latency: Latency, best: Latency, is_best: bool
) -> RivalRow:
    session, workload = bench.session, bench.workload(contestant.model, contestant.size, batch)
    precision, is_torch = session.config.profile.precision, contestant.place.runtime == TORCH
    device_peak = known_peak(str(device_identity(session.device).get("name")), precision)
    least_ms = None if device_peak is None else roofline_ms(workload, device_peak, precision)
    by_our_kernels = is_torch and contestant.kind in ("ours", "O")
    padding = padding_macs(workload) if by_our_kernels else 0
    return RivalRow(
        kind=contestant.kind,
        **measured(label, contestant.place, workload, contestant.config, latency, best),
        gmacs=flopcounter_macs(bench.workload(contestant.model, contestant.size)).gmacs - padding / 1e9,
        compares=latency.stable and is_best,
        peak_memory_mb=peak_memory_mb(workload) if contestant.is_eager else None,
        roofline=None if least_ms is None else least_ms / latency.median_ms,
    )


def _compared(
    contestant: Contestant, row: RivalRow, rows: Mapping[str, RivalRow], latencies: Mapping[str, Latency]
) -> RivalRow:
    """The row with its realised efficiency and tax: a sparse model's, against its dense and its oracle among `rows`."""
    samples = latencies[row.label].samples_ms
    dense = None if contestant.dense is None else rows[contestant.dense]
    saved = 0.0 if dense is None else 1 - row.gmacs / dense.gmacs
    if dense is not None and saved and row.stable and dense.stable:
        middle, low, high = _time_shares(samples, latencies[dense.label].samples_ms)
        row = replace(
            row, realised=(1 - middle) / saved, realised_low=(1 - high) / saved, realised_high=(1 - low) / saved
        )
    perfect = None if contestant.oracle is None else latencies[contestant.oracle]
    if perfect is None or not (row.stable and perfect.stable):
        return row
    middle, low, high = _time_shares(samples, perfect.samples_ms)
    return replace(row, tax=middle - 1, tax_low=low - 1, tax_high=high - 1)


def _time_shares(samples_ms: Sequence[float], reference_ms: Sequence[float]) -> tuple[float, float, float]:
    """Time over the reference's in the same rounds: the median, and its 95 % interval."""
    compared = Latency.from_samples(reference_ms, samples_ms)
    return compared.speedup, compared.speedup_low, compared.speedup_high
