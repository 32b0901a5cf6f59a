"""profile: dense timm, ours at ratio 0 and ours sparse, interleaved, at every batch and image size."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from sparsevit_cli import kernels
from sparsevit_cli.atomic import write_atomic, write_json
from sparsevit_cli.config.experiment import Scope
from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.macs import flopcounter_macs, macs_cost, traced_macs
from sparsevit_cli.profiling.neighbours import Disturbed, Vigil
from sparsevit_cli.profiling.stages import PartTimes, StageTimes, time_parts, time_stages
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.reporting import optional_output
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, size_text
from sparsevit_cli.swin import get_sparsity

from .in_runtimes import chosen_runtimes
from .pages import layers_csv, parts_csv, profile_page
from .profile_cells import Cell, contenders_of, measured_cells, stop_check
from .profile_report import DENSE, LABELS, OURS_SPARSE, PartCost, PartCosts, ProfileReport, ProfileRow, RowKind
from .profile_target import profile_target, tell_of_timm, threads_set
from .scopes import per_image
from .session import Session

FILES = ("profile.json", "profile.html", "samples.npz", "layers.csv", "parts.csv", "metrics.json")
"""What one profile writes; an earlier one's are set aside."""
MACS_TOLERANCE = 0.005
"""Share by which the three counters may differ before a warning is given."""


def profile_model(
    session: Session,
    *,
    model: str | None = None,
    img_size: str | None = None,
    ratios: str | None = None,
) -> ProfileReport:
    """Measure the configuration's model, or timm's `model`, at `ratios` as typed, else the configured or the winner's.

    Each runtime of the profile section measures dense and sparse in the same rounds; times per stage are torch's.
    Weights do not matter to the clock: the architecture is built with random ones. Rows that stay unsteady are marked.
    Raises CheckpointError where there is no winner and no ratios are given.
    """
    target = profile_target(session, model=model, img_size=img_size, ratios=ratios)
    session, sizes, config = target.session, target.sizes, target.config
    section, runtimes = session.config.profile, chosen_runtimes(session, "profile")
    folder: RunFolder | None = None
    rows: list[ProfileRow] = []
    samples: dict[str, tuple[float, ...]] = {}
    stages: dict[str, StageTimes] = {}
    parts: PartCosts | None = None
    macs_check: dict[str, float] = {}
    with (
        threads_set(section.threads),
        session.reporter.progress("profile", len(sizes) * len(section.batch_sizes)) as bar,
    ):
        for size in sizes:
            models = contenders_of(session, size, config)
            scopes = session.task.scopes(models[DENSE])
            if folder is None:
                _check_mode(session, scopes)
                folder = session.folder("profile")
                tell_of_timm(session, "profile")
                macs_check = _macs_check(session, models[OURS_SPARSE], size, scopes[0])
            for batch in section.batch_sizes:
                cells = measured_cells(session, runtimes, models, size, batch)
                taken = per_image(session, size)
                for scope, cell in cells.items():
                    rows += cell.rows(session, taken)
                    told = f"{scope}, " if len(scopes) > 1 else ""
                    samples |= {
                        f"{told}{label} b{batch} {size_text(size)}": latency.samples_ms
                        for label, latency in cell.latencies.items()
                    }
                if not stages:
                    stages = _stage_times(session, cells[scopes[0]])
                if "model" in cells and len(scopes) > 1 and (parts is None or parts.rows[0].dense_ms is None):
                    parts = _part_costs(session, cells["model"])
                bar.advance()
        clock = session.config.clock.model_dump(mode="json")
        settings = {
            **section.model_dump(mode="json", exclude={"contestants"}),
            "threads": torch.get_num_threads(),
            "clock": clock,
            **runtimes.settings,
        }
    assert folder is not None, "there is a size"
    about = session.task.about()
    if parts is not None:
        del about["scope"]  # each row says its own
    report = ProfileReport(
        folder,
        session.config.model.name,
        config,
        tuple(rows),
        stages,
        macs_check,
        session.environment,
        settings,
        about,
        parts,
    )
    folder.set_aside(FILES, session.reporter)
    write_json(folder.path / "profile.json", report.document())
    folder.write_result(
        {
            **report.about,
            "rows": [asdict(row) for row in rows],
            "steady": all(row.stable for row in rows),
            "ratios": config.ratios,
            "image_sizes": sizes,
            "settings": profile_settings(session),
        },
        files=["profile.json"],
    )
    with optional_output(session.reporter, "samples.npz"):
        arrays: dict[str, Any] = {name: np.array(values) for name, values in samples.items()}
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        write_atomic(folder.path / "samples.npz", packed.getvalue())
    with optional_output(session.reporter, "layers.csv"):
        write_atomic(folder.path / "layers.csv", layers_csv(stages))
    if parts is not None:
        with optional_output(session.reporter, "parts.csv"):
            write_atomic(folder.path / "parts.csv", parts_csv(parts))
    with optional_output(session.reporter, "profile.html"):
        write_atomic(folder.path / "profile.html", profile_page(report))
    return report


def _check_mode(session: Session, scopes: Sequence[Scope]) -> None:
    """Raises ConfigError where CUDA graphs are asked for and cannot be had."""
    if session.config.profile.mode != "graph":
        return
    if session.device.type != "cuda":
        got = f"graph, but {session.device} has no CUDA graphs"
        raise ConfigError("profile.mode", got, "Choose eager or compile, or give --device cuda.")
    if len(scopes) > 1:
        got = f"graph, but what {session.task.name} has around its backbone cannot be captured as a whole"
        raise ConfigError("profile.mode", got, "Choose eager or compile.")


def profile_settings(session: Session) -> str:
    """Hash of what a profile depends on besides ratios and image sizes."""
    engine = kernels.running(session.config.kernels, session.device)
    return f"{section_hash(session.config, 'profile', 'task', 'model', 'clock')} kernels {kernels.VERSION} {engine}"


def _macs_check(session: Session, model: nn.Module, size: Size, scope: Scope) -> dict[str, float]:
    """The sparse model counted three ways; a difference is told, never averaged away.

    Where modules stand around the backbone, the backbone alone: fvcore traces no model whose inputs steer it.
    """
    workload = session.workload(model, size, scope=scope)
    traced, analytic = traced_macs(workload), macs_cost(workload)(get_sparsity(model))
    counts = {"fvcore": traced.gmacs, "analytic": analytic / 1e9, "torch": flopcounter_macs(workload).gmacs}
    if max(counts.values()) - min(counts.values()) > MACS_TOLERANCE * counts["fvcore"]:
        session.reporter.warn(f"the multiply-add counters disagree: {json.dumps(counts)}")
    if traced.uncounted:
        session.reporter.warn(f"operators without a multiply-add count: {dict(traced.uncounted)}")
    return counts


T = TypeVar("T")


def _dense_and_sparse(session: Session, cell: Cell, take: Callable[[Workload, float], T]) -> dict[RowKind, T]:
    """What `take` finds in marked passes of both in torch, given their latency; nothing if neighbours do not let it."""
    known = {kind: latency.median_ms for kind in (DENSE, OURS_SPARSE) if (latency := cell.in_torch(kind)) is not None}
    if len(known) < 2:
        return {}
    try:
        return {
            kind: Vigil(session.patience, session.device, stop_check(session)).collect(
                partial(take, cell.workloads[kind], latency_ms), bool
            )[0]
            for kind, latency_ms in known.items()
        }
    except Disturbed as neighbour:
        session.reporter.warn(f"times per stage and part are left out: {neighbour}")
        return {}


def _stage_times(session: Session, cell: Cell) -> dict[str, StageTimes]:
    """Where the time of the Swin goes, in marked passes scaled to the measured latency."""
    found = _dense_and_sparse(session, cell, lambda workload, ms: time_stages(workload, total_ms=ms))
    return {LABELS[kind]: times for kind, times in found.items()}


def _part_costs(session: Session, cell: Cell) -> PartCosts:
    """Where the time and the multiply-adds of the whole model go, and the time of what follows it."""
    size = cell.workloads[DENSE].image_size
    after = (lambda outputs: session.task.finish(outputs, size)) if session.task.finishing else None

    def take(workload: Workload, ms: float) -> PartTimes:
        return time_parts(workload, session.parts(workload.model), total_ms=ms, after=after)

    times = _dense_and_sparse(session, cell, take)
    macs = {}
    for kind in (DENSE, OURS_SPARSE):
        workload = cell.counted[kind]
        report = flopcounter_macs(workload, session.parts(workload.model))
        if report.uncounted:
            session.reporter.warn(f"operators without a multiply-add count: {dict(report.uncounted)}")
        macs[kind] = report.parts
    rows = [
        PartCost(
            name,
            times[DENSE].ms[name] if times else None,
            times[OURS_SPARSE].ms[name] if times else None,
            macs[DENSE][name] / 1e9,
            macs[OURS_SPARSE][name] / 1e9,
        )
        for name in macs[DENSE]
    ]
    following = None
    if after is not None:
        following = PartCost(
            f"after the model: {session.task.finishing}",
            times[DENSE].after_ms if times else None,
            times[OURS_SPARSE].after_ms if times else None,
            0.0,
            0.0,
        )
    return PartCosts(cell.workloads[DENSE].batch, size, tuple(rows), following)
