"""profile --rivals: ours against the best dense model a user can get, in one interleaved run per cell."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli import kernels
from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.atomic import write_json
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.profiling.device import device_identity
from sparsevit_cli.profiling.inputs import TORCH_DTYPE
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import flopcounter_macs, padding_macs
from sparsevit_cli.profiling.memory import peak_memory_mb
from sparsevit_cli.profiling.rivals import Memory, dense_variants, foreseen, frozen_variant, oracle
from sparsevit_cli.profiling.roofline import known_peak, roofline_ms
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.sparsity import Ratios, SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.swin.authors_flow import authors_flow
from sparsevit_cli.swin.fused import has_fused_attention, with_fused_attention

from .plots import plot_rivals
from .profile import built, profile_target, tell_of_timm, threads_set
from .profile_report import refuse_unsteady
from .rows import MeasuredRow
from .session import Session

PUBLISHED: Mapping[str, Ratios] = {
    "config 1": [[0.3], [0], [0.1, 0.2, 0.2], [0]],
    "config 2": [[0.6], [0], [0.2, 0.4, 0.5], [0]],
    "config 3": [[0.7], [0], [0.2, 0.4, 0.5], [0]],
}
"""The authors' configurations of a Swin-T (paper, table 2); other depths are measured at uniform ratios alone."""
PUBLISHED_DEPTHS = (2, 2, 6, 2)
UNIFORM: Mapping[str, Ratios] = {"60% everywhere": 0.6}
OURS_DENSE = "ours, ratio 0"
SMALLER_SHARES = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
"""Sides tried for the dense model at a lower resolution, as shares of the full ones."""


@dataclass(frozen=True, kw_only=True)
class RivalRow(MeasuredRow):
    """One contestant of one cell. `speedup` is the best dense timm's time over this one's, in the same rounds.

    `kind` is B1 (timm as installed), B2 (its variants), B2f (compiled and frozen), B0 (the authors' flow), B3 (dense at
    a lower resolution), ours or O (the oracle). `gmacs` are without padding where our kernels leave it out. `realised`
    is the share of latency saved over the share of multiply-adds saved, against our own dense; `tax` what the sparse
    model takes longer than its oracle; both from the same rounds, with 95 % intervals. `roofline` is the share of its
    time that the device would need at best, where the device's peaks are known. It `compares` with all dense rows.
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

    It is not known to be the best where one of those is not steady; then no row `compares`.
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


@dataclass(frozen=True)
class _Bench:
    """What is measured in every cell: the backbone of the task's model, which is all of it where `scope` is model."""

    session: Session
    scope: Scope

    def built(self, size: Size) -> nn.Module:
        """Dense, on the session's device, in the precision of the profile."""
        backbone = self.session.task.backbone(built(self.session, size))
        return backbone.to(self.session.device, TORCH_DTYPE[self.session.config.profile.precision])

    def timed(self, model: nn.Module, size: Size, batch: int) -> Workload:
        """`model` in the precision of the profile."""
        return self._workload(model, size, batch, self.session.config.profile.precision)

    def counted(self, model: nn.Module, size: Size) -> Workload:
        """`model` as it is, on one image."""
        return self._workload(model, size, 1, None)

    def _workload(self, model: nn.Module, size: Size, batch: int, precision: str | None) -> Workload:
        if self.scope == "backbone":
            return self.session.backbone_workload(model, size, batch, precision)
        return self.session.workload(model, size, batch, precision)


@dataclass(frozen=True)
class _Contestant:
    """What runs; `model` is what is counted, and `is_eager` says that it runs as it is, so that memory can be seen.

    `oracle` is the label of this sparse model's oracle.
    """

    kind: str
    run: Callable[[], object]
    model: nn.Module
    config: SparsityConfig | None
    size: Size
    is_eager: bool = True
    oracle: str | None = None


def measure_rivals(
    session: Session,
    *,
    model: str | None = None,
    img_size: str | None = None,
    ratios: str | None = None,
) -> RivalReport:
    """Measure every contestant at every batch and image size of the profile section. Needs neither data nor weights.

    The contestants are of the backbone alone where a task's model has modules around it.

    `ratios` as typed are measured besides the published configurations and 60 % everywhere.
    """
    target = profile_target(session, model=model, img_size=img_size, ratios=ratios or "0.6")
    typed = {str(target.config): target.config} if ratios is not None else {}
    session = target.session
    bench = _Bench(session, session.task.scopes(built(session, target.sizes[0]))[0])
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
        **section.model_dump(mode="json", exclude={"mode", "ratios"}), "threads": threads,
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


def _cell(bench: _Bench, size: Size, batch: int, typed: Mapping[str, SparsityConfig]) -> RivalCell:
    session = bench.session
    section = session.config.profile
    torch._dynamo.reset()
    contestants = _contestants(bench, size, batch, typed)
    session.reporter.say(f"rivals: {len(contestants)} contestants at batch {batch}, {size_text(size)}")
    latencies = measure_interleaved(
        {label: contestant.run for label, contestant in contestants.items()},
        device=session.device, seconds=section.seconds, rounds=section.rounds, seed=session.config.seed,
        max_spread=section.max_spread, strict=False, retries=session.config.clock.retries,
        patience=session.patience, together=True,
        before_round=partial(session.stop.check, "rivals", "nothing of this cell is saved"),
    )  # fmt: skip
    dense = [label for label, contestant in contestants.items() if contestant.kind in ("B1", "B2")]
    best = min(dense, key=lambda label: latencies[label].median_ms)
    is_best = all(latencies[label].stable for label in dense)
    rows = {
        label: _row(bench, label, contestant, batch, latencies[label], latencies[best], is_best)
        for label, contestant in contestants.items()
    }
    return RivalCell(
        best, tuple(_compared(contestants[label], row, rows[OURS_DENSE], latencies) for label, row in rows.items())
    )


def _contestants(bench: _Bench, size: Size, batch: int, typed: Mapping[str, SparsityConfig]) -> dict[str, _Contestant]:
    session = bench.session
    section = session.config.profile
    dense = bench.built(size)
    x = bench.timed(dense, size, batch).inputs
    found: dict[str, _Contestant] = {}
    for number, variant in enumerate(dense_variants(dense, max_autotune=section.max_autotune)):
        kind, run = "B2" if number else "B1", partial(variant.run, x)
        found[variant.label] = _Contestant(kind, run, variant.counted, None, size, variant.is_eager)
    if session.device.type == "cpu":
        frozen = partial(frozen_variant(dense), x)
        found["timm compile, frozen"] = _Contestant("B2f", frozen, dense, None, size, is_eager=False)
    depths = model_depths(dense)
    chosen = {**(PUBLISHED if depths == PUBLISHED_DEPTHS else {}), **UNIFORM}
    configs = {label: SparsityConfig.from_ratios(ratios, depths) for label, ratios in chosen.items()} | dict(typed)
    ours_dense = session.sparsified_(with_fused_attention(dense, fused=False))
    set_sparsity(ours_dense, 0.0, exact=False)
    zero = SparsityConfig.dense(depths)
    found[OURS_DENSE] = _Contestant("ours", partial(_fastest(ours_dense), x), ours_dense, zero, size)
    for label, config in configs.items():
        sparse = session.sparsified_(with_fused_attention(dense, fused=False))
        set_sparsity(sparse, config)
        ours, name = partial(_fastest(sparse), x), f"oracle, {label}"
        found[f"ours, {label}"] = _Contestant("ours", ours, sparse, config, size, oracle=name)
        perfect = partial(_as_oracle, _fastest(sparse), x, foreseen(sparse, x))
        found[name] = _Contestant("O", perfect, sparse, config, size, is_eager=False)
        theirs = authors_flow(sparse) if label in ("config 3", "60% everywhere") else None
        if theirs is not None:
            found[f"authors' flow, {label}"] = _Contestant("B0", partial(_fastest(theirs), x), theirs, config, size)
    middle = found["ours, config 2" if "config 2" in configs else "ours, 60% everywhere"]
    found |= _smaller(bench, size, batch, middle)
    return found


def _fastest(model: nn.Module) -> nn.Module:
    """`model` as users would run it: on a GPU a copy that replays CUDA graphs, as the dense rivals may."""
    return accelerate_(copy.deepcopy(model)) if next(model.parameters()).is_cuda else model


def _as_oracle(model: nn.Module, x: Tensor, memory: Memory) -> None:
    with oracle(memory):
        model(x)


def _smaller(bench: _Bench, size: Size, batch: int, ours: _Contestant) -> dict[str, _Contestant]:
    """B3: the dense model, compiled and with fused attention, at the side that takes nearest to ours uncompiled."""
    session = bench.session
    sides = {_rounded(size, share) for share in SMALLER_SHARES}
    models = {s: with_fused_attention(bench.built(s), fused=True) for s in sides}
    calls: dict[str, Any] = {"ours": ours.run}
    calls |= {str(s): bench.timed(model, s, batch).of(_fastest(model)).run for s, model in models.items()}
    quick = measure_interleaved(
        calls, device=session.device, seconds=0.01, rounds=3, strict=False, retries=0, max_spread=1.0,
        patience=session.patience, before_round=partial(session.stop.check, "rivals", "nothing is measured yet"),
    )  # fmt: skip
    costs = {name: latency.median_ms for name, latency in quick.items()}
    if not all(latency.stable for latency in quick.values()):
        session.reporter.warn("the smaller dense model is chosen by multiply-adds: latencies are not steady")
        costs = {str(s): flopcounter_macs(bench.counted(model, s)).gmacs for s, model in models.items()}
        costs["ours"] = flopcounter_macs(bench.counted(ours.model, size)).gmacs
    nearest = min(sides, key=lambda s: abs(costs[str(s)] - costs["ours"]))
    model, x = models[nearest], bench.timed(models[nearest], nearest, batch).inputs
    fused = ", fused" if has_fused_attention(model) else ""
    label = f"timm at {size_text(nearest)}{fused}"
    compiled: Any = torch.compile(
        model, dynamic=False, mode="reduce-overhead" if session.device.type == "cuda" else None
    )
    return {
        label: _Contestant("B3", partial(_fastest(model), x), model, None, nearest),
        f"{label}, compiled": _Contestant("B3", partial(compiled, x), model, None, nearest, is_eager=False),
    }


def _rounded(size: Size, share: float, multiple: int = 32) -> Size:
    height, width = (max(multiple, round(side * share / multiple) * multiple) for side in size)
    return height, width


def _row(
    bench: _Bench, label: str, contestant: _Contestant, batch: int, latency: Latency, best: Latency, is_best: bool
) -> RivalRow:
    session, workload = bench.session, bench.timed(contestant.model, contestant.size, batch)
    precision = session.config.profile.precision
    device_peak = known_peak(str(device_identity(session.device).get("name")), precision)
    least_ms = None if device_peak is None else roofline_ms(workload, device_peak, precision)
    ours = contestant.kind in ("ours", "O")
    padding = padding_macs(workload) if ours else 0
    gmacs = flopcounter_macs(bench.counted(contestant.model, contestant.size)).gmacs - padding / 1e9
    return RivalRow(
        label=label,
        kind=contestant.kind,
        scope=bench.scope,
        ratios=None if contestant.config is None else contestant.config.ratios,
        batch=batch,
        image_size=contestant.size,
        dtype=precision,
        gmacs=gmacs,
        **Latency.from_samples(latency.samples_ms, best.samples_ms).as_row(),
        stable=latency.stable,
        unsteady=latency.unsteady,
        compares=latency.stable and is_best,
        peak_memory_mb=peak_memory_mb(workload) if contestant.is_eager else None,
        roofline=None if least_ms is None else least_ms / latency.median_ms,
    )


def _compared(contestant: _Contestant, row: RivalRow, dense: RivalRow, latencies: Mapping[str, Latency]) -> RivalRow:
    """The row with its realised efficiency and tax; sparse models of ours have them, against `dense` and an oracle."""
    if contestant.oracle is None:
        return row
    samples = latencies[row.label].samples_ms
    saved = 1 - row.gmacs / dense.gmacs
    if saved and row.stable and dense.stable:
        middle, low, high = _time_shares(samples, latencies[dense.label].samples_ms)
        row = replace(
            row, realised=(1 - middle) / saved, realised_low=(1 - high) / saved, realised_high=(1 - low) / saved
        )
    perfect = latencies[contestant.oracle]
    if not (row.stable and perfect.stable):
        return row
    middle, low, high = _time_shares(samples, perfect.samples_ms)
    return replace(row, tax=middle - 1, tax_low=low - 1, tax_high=high - 1)


def _time_shares(samples_ms: Sequence[float], reference_ms: Sequence[float]) -> tuple[float, float, float]:
    """Time over the reference's in the same rounds: the median, and its 95 % interval."""
    compared = Latency.from_samples(reference_ms, samples_ms)
    return compared.speedup, compared.speedup_low, compared.speedup_high
