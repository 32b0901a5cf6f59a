"""profile: dense timm, ours at ratio 0 and ours sparse, interleaved, at every batch and image size."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from sparsevit_cli import kernels
from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.atomic import write_atomic, write_json
from sparsevit_cli.config.experiment import ExperimentConfig, Scope
from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.data.source import Categories
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.inputs import TORCH_DTYPE
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import flopcounter_macs, macs_cost, traced_macs
from sparsevit_cli.profiling.memory import peak_memory_mb
from sparsevit_cli.profiling.neighbours import Disturbed, Vigil
from sparsevit_cli.profiling.stages import PartTimes, StageTimes, time_parts, time_stages
from sparsevit_cli.profiling.workload import Workload
from sparsevit_cli.reporting import optional_output
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sizes import Size, as_pair, size_text
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import get_sparsity, model_depths, set_sparsity
from sparsevit_cli.tasks.task import BuildOptions

from .pages import layers_csv, parts_csv, profile_page
from .profile_report import (
    DENSE,
    LABELS,
    OURS_DENSE,
    OURS_SPARSE,
    PartCost,
    PartCosts,
    ProfileReport,
    ProfileRow,
    RowKind,
)
from .ratios import ratios_to_profile
from .scopes import per_image
from .session import Session

FILES = ("profile.json", "profile.html", "samples.npz", "layers.csv", "parts.csv", "metrics.json")
"""What one profile writes; an earlier one's are set aside."""
MACS_TOLERANCE = 0.005
"""Share by which the three counters may differ before a warning is given."""


@dataclass(frozen=True)
class ProfileTarget:
    """What is measured: a model at a configuration, at image sizes (height, width) in pixels."""

    session: Session
    sizes: tuple[Size, ...]
    config: SparsityConfig


def profile_target(
    session: Session, *, model: str | None = None, img_size: str | None = None, ratios: str | None = None
) -> ProfileTarget:
    """The configuration's profile with the flags as typed. Raises ConfigError, CheckpointError."""
    if model is not None:
        session = session.replaced(config=_config_of(model, session.config))
    section = session.config.profile
    sizes = parse_sizes(img_size) if img_size is not None else tuple(map(as_pair, section.image_sizes))
    sizes = sizes or (session.img_size,)
    depths = model_depths(built(session, sizes[0]))
    return ProfileTarget(session, sizes, ratios_to_profile(session, depths, ratios, named=model is not None))


def profile_model(
    session: Session,
    *,
    model: str | None = None,
    img_size: str | None = None,
    ratios: str | None = None,
) -> ProfileReport:
    """Measure the configuration's model, or timm's `model`, at `ratios` as typed, else the configured or the winner's.

    Weights do not matter to the clock: the architecture is built with random ones. Rows that stay unsteady are marked.
    Raises CheckpointError where there is no winner and no ratios are given.
    """
    target = profile_target(session, model=model, img_size=img_size, ratios=ratios)
    session, sizes, config = target.session, target.sizes, target.config
    section = session.config.profile
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
            models = _models(session, size, config)
            scopes = session.task.scopes(models[DENSE])
            if folder is None:
                _check_mode(session, scopes)
                folder = session.folder("profile")
                tell_of_timm(session, "profile")
                macs_check = _macs_check(session, models[OURS_SPARSE], size, scopes[0])
            for batch in section.batch_sizes:
                taken = per_image(session, size)
                cells = {scope: _measured(session, models, size, batch, scope) for scope in scopes}
                for scope, cell in cells.items():
                    rows += _rows(session, cell, config, taken)
                    told = f"{scope}, " if len(scopes) > 1 else ""
                    samples |= {
                        f"{told}{LABELS[kind]} b{batch} {size_text(size)}": latency.samples_ms
                        for kind, latency in cell.latencies.items()
                    }
                if not stages:
                    stages = _stage_times(session, cells[scopes[0]])
                if len(scopes) > 1 and (parts is None or parts.rows[0].dense_ms is None):
                    parts = _part_costs(session, cells["model"])
                bar.advance()
        clock = session.config.clock.model_dump(mode="json")
        settings = {**section.model_dump(mode="json"), "threads": torch.get_num_threads(), "clock": clock}
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


def tell_of_timm(session: Session, command: str) -> None:
    """One line if timm's rows are not of the same numbers as ours."""
    if session.config.model.partition != "roll_first":
        session.reporter.say(
            f"{command}: rows called timm are timm as it is, which rolls before it pads; model.partition is "
            f"{session.config.model.partition}. Their latency compares with ours, their outputs differ"
        )


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


def _config_of(name: str, config: ExperimentConfig) -> ExperimentConfig:
    """An experiment of timm's model of that name. Nothing is trained: what `config` says of it fits another model."""
    try:
        trainings = {each: type(getattr(config, each))() for each in ("train", "adapt", "finetune")}
        model = type(config.model)(name=name)
        return config.model_copy(update={"experiment": name, "model": model, **trainings})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        if fault["loc"] == ("name",):
            raise ConfigError("--model", f"{name!r} is no timm Swin", "Type: sparsevit models") from error
        got = f"{name} cannot be configured by its name alone ({'.'.join(map(str, fault['loc']))}: {fault['msg']})"
        raise ConfigError("--model", got, "Profile the configuration's own model instead.") from error


def parse_sizes(text: str) -> tuple[Size, ...]:
    """`672`, `256x704` (height x width) or a list of them with commas. Raises ConfigError."""
    sizes = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", part)
        if match is None or "0" in (match[1], match[2]):
            raise ConfigError("--img-size", f"{part!r} is no size in pixels", "Write 672, 256x704 or 448,672.")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    return tuple(sizes)


def built(session: Session, size: Size) -> nn.Module:
    """The configuration's dense timm model at an image size, with random weights, in evaluation mode."""
    folders = [session.earlier(name) for name in ("pretrain", "adapt")]
    results = [(found, folder.result) for folder in folders if (found := folder.read_result())]
    known = Categories.from_saved(results[0][0], str(results[0][1])) if results else None
    return session.task.build(known or None, BuildOptions(img_size=size, initial_weights=False)).eval()


def _models(session: Session, size: Size, config: SparsityConfig) -> dict[RowKind, nn.Module]:
    """The three rivals with the same weights, on the device and in the precision of the profile."""
    section = session.config.profile
    dense = built(session, size).to(session.device, TORCH_DTYPE[section.precision])
    ours_dense = session.sparsified_(copy.deepcopy(dense))
    set_sparsity(ours_dense, 0.0, exact=False)
    ours_sparse = session.sparsified_(copy.deepcopy(dense))
    set_sparsity(ours_sparse, config)
    return {DENSE: dense, OURS_DENSE: ours_dense, OURS_SPARSE: ours_sparse}


@dataclass(frozen=True)
class _Cell:
    """The three rivals at one batch, size and scope, measured in turns. `workloads` are eager, `counted` one image."""

    workloads: Mapping[RowKind, Workload]
    counted: Mapping[RowKind, Workload]
    latencies: Mapping[RowKind, Latency]

    @property
    def compares(self) -> bool:
        """True where the times of the dense and of the sparse model are facts."""
        return self.latencies[DENSE].stable and self.latencies[OURS_SPARSE].stable


def _measured(session: Session, models: Mapping[RowKind, nn.Module], size: Size, batch: int, scope: Scope) -> _Cell:
    section = session.config.profile
    workloads = {kind: session.workload(model, size, batch, section.precision, scope) for kind, model in models.items()}
    runnable: dict[RowKind, Any] = {kind: workload.model for kind, workload in workloads.items()}
    if section.mode == "compile":
        torch._dynamo.reset()  # each cell is compiled anew; past a limit torch would fall back to eager in silence
        session.reporter.say(f"profile: compiling at batch {batch}, {size_text(size)}")
        runnable = {kind: torch.compile(model, dynamic=False) for kind, model in runnable.items()}
    elif section.mode == "graph":
        runnable = {kind: accelerate_(copy.deepcopy(model)) for kind, model in runnable.items()}
    by_label = measure_interleaved(
        {LABELS[kind]: workloads[kind].of(model).run for kind, model in runnable.items()},
        device=session.device,
        seconds=section.seconds,
        rounds=section.rounds,
        seed=session.config.seed,
        max_spread=section.max_spread,
        strict=False,
        retries=session.config.clock.retries,
        patience=session.patience,
        before_round=_check(session),
    )
    counted = {kind: session.workload(model, size, scope=scope) for kind, model in models.items()}
    return _Cell(workloads, counted, {kind: by_label[LABELS[kind]] for kind in models})


def _check(session: Session) -> Callable[[], None]:
    return partial(session.stop.check, "profile", "nothing of this profile is saved")


def _rows(session: Session, cell: _Cell, config: SparsityConfig, taken: float | None) -> list[ProfileRow]:
    section, rows = session.config.profile, []
    for kind, workload in cell.workloads.items():
        latency, size = cell.latencies[kind], workload.image_size
        rows.append(
            ProfileRow(
                kind=kind,
                label=LABELS[kind],
                scope=workload.scope,
                ratios=None if kind == DENSE else (config if kind == OURS_SPARSE else _dense_of(config)).ratios,
                batch=workload.batch,
                image_size=size,
                dtype=section.precision,
                mode=section.mode,
                gmacs=flopcounter_macs(cell.counted[kind]).gmacs,
                **latency.as_row(),
                throughput=1000 * workload.batch / latency.median_ms,
                peak_memory_mb=peak_memory_mb(workload),
                parameters=sum(parameter.numel() for parameter in workload.model.parameters()),
                rounds=latency.rounds,
                outliers=latency.outliers,
                per_image=taken,
                stable=latency.stable,
                unsteady=latency.unsteady,
                compares=latency.stable and cell.latencies[DENSE].stable,
            )
        )
    return rows


def _dense_of(config: SparsityConfig) -> SparsityConfig:
    return SparsityConfig(tuple((0,) * pairs for pairs in config.pairs))


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


def _dense_and_sparse(session: Session, cell: _Cell, take: Callable[[Workload, float], T]) -> dict[RowKind, T]:
    """What `take` finds in marked passes of both, given their latency; nothing where neighbours do not let it."""
    if not cell.compares:
        return {}
    try:
        return {
            kind: Vigil(session.patience, session.device, _check(session)).collect(
                partial(take, cell.workloads[kind], cell.latencies[kind].median_ms), bool
            )[0]
            for kind in (DENSE, OURS_SPARSE)
        }
    except Disturbed as neighbour:
        session.reporter.warn(f"times per stage and part are left out: {neighbour}")
        return {}


def _stage_times(session: Session, cell: _Cell) -> dict[str, StageTimes]:
    """Where the time of the Swin goes, in marked passes scaled to the measured latency."""
    found = _dense_and_sparse(session, cell, lambda workload, ms: time_stages(workload, total_ms=ms))
    return {LABELS[kind]: times for kind, times in found.items()}


def _part_costs(session: Session, cell: _Cell) -> PartCosts:
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


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """PyTorch on `count` CPU threads inside the block; with None nothing is touched.

    torch.set_num_threads, even with the number there is, makes MKL's products inside parallel loops slower from then
    on (it turns MKL's dynamic threads off), and fused attention consists of such products.
    """
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
