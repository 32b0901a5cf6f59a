"""profile: dense timm, ours at ratio 0 and ours sparse, interleaved, at every batch and image size."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from sparsevit_cli import kernels
from sparsevit_cli.acceleration import accelerate_
from sparsevit_cli.atomic import write_atomic, write_json
from sparsevit_cli.config.experiment import ExperimentConfig
from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.data.source import Categories
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.inputs import TORCH_DTYPE
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.macs import flopcounter_macs, macs_cost, traced_macs
from sparsevit_cli.profiling.memory import peak_memory_mb
from sparsevit_cli.profiling.neighbours import Disturbed, Vigil
from sparsevit_cli.profiling.stages import StageTimes, time_stages
from sparsevit_cli.reporting import optional_output
from sparsevit_cli.sizes import Size, as_pair, size_text
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import get_sparsity, model_depths, set_sparsity
from sparsevit_cli.tasks.task import BuildOptions

from .pages import layers_csv, profile_page
from .profile_report import DENSE, LABELS, OURS_DENSE, OURS_SPARSE, Kind, ProfileReport, ProfileRow
from .ratios import ratios_to_profile
from .session import Session

FILES = ("profile.json", "profile.html", "samples.npz", "layers.csv", "metrics.json")
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
    if session.config.profile.mode == "graph" and session.device.type != "cuda":
        got = f"graph, but {session.device} has no CUDA graphs"
        raise ConfigError("profile.mode", got, "Choose eager or compile, or give --device cuda.")
    target = profile_target(session, model=model, img_size=img_size, ratios=ratios)
    session, sizes, config = target.session, target.sizes, target.config
    section = session.config.profile
    folder = session.folder("profile")
    tell_of_timm(session, "profile")
    rows: list[ProfileRow] = []
    samples: dict[str, tuple[float, ...]] = {}
    stages: dict[str, StageTimes] = {}
    macs_check: dict[str, float] = {}
    with (
        threads_set(section.threads),
        session.reporter.progress("profile", len(sizes) * len(section.batch_sizes)) as bar,
    ):
        for size in sizes:
            models = _models(session, size, config)
            if not macs_check:
                macs_check = _macs_check(session, models[OURS_SPARSE], size)
            for batch in section.batch_sizes:
                cell, latencies = _cell(session, models, config, size, batch)
                rows += cell
                samples |= {f"{LABELS[kind]} b{batch} {size_text(size)}": x.samples_ms for kind, x in latencies.items()}
                if not stages and latencies[DENSE].stable and latencies[OURS_SPARSE].stable:
                    stages = _stage_times(session, models, size, batch, latencies)
                bar.advance()
        clock = session.config.clock.model_dump(mode="json")
        settings = {**section.model_dump(mode="json"), "threads": torch.get_num_threads(), "clock": clock}
    report = ProfileReport(
        folder,
        session.config.model.name,
        config,
        tuple(rows),
        stages,
        macs_check,
        session.environment,
        settings,
        session.task.about(),
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


def _models(session: Session, size: Size, config: SparsityConfig) -> dict[Kind, nn.Module]:
    """The three rivals with the same weights, on the device and in the precision of the profile."""
    section = session.config.profile
    dense = built(session, size).to(session.device, TORCH_DTYPE[section.precision])
    ours_dense = session.sparsified_(copy.deepcopy(dense))
    set_sparsity(ours_dense, 0.0, exact=False)
    ours_sparse = session.sparsified_(copy.deepcopy(dense))
    set_sparsity(ours_sparse, config)
    return {DENSE: dense, OURS_DENSE: ours_dense, OURS_SPARSE: ours_sparse}


def _cell(
    session: Session, models: Mapping[Kind, nn.Module], config: SparsityConfig, size: Size, batch: int
) -> tuple[list[ProfileRow], dict[Kind, Latency]]:
    section = session.config.profile
    workload = session.workload(models[DENSE], size, batch, section.precision)
    runnable: dict[Kind, Any] = dict(models)
    if section.mode == "compile":
        torch._dynamo.reset()  # each cell is compiled anew; past a limit torch would fall back to eager in silence
        session.reporter.say(f"profile: compiling at batch {batch}, {size_text(size)}")
        runnable = {kind: torch.compile(model, dynamic=False) for kind, model in models.items()}
    elif section.mode == "graph":
        runnable = {kind: accelerate_(copy.deepcopy(model)) for kind, model in models.items()}
    by_label = measure_interleaved(
        {LABELS[kind]: workload.of(model).run for kind, model in runnable.items()},
        device=session.device,
        seconds=section.seconds,
        rounds=section.rounds,
        seed=session.config.seed,
        max_spread=section.max_spread,
        strict=False,
        retries=session.config.clock.retries,
        patience=session.patience,
        before_round=partial(session.stop.check, "profile", "nothing of this profile is saved"),
    )
    latencies = {kind: by_label[LABELS[kind]] for kind in models}
    rows = []
    for kind, model in models.items():
        latency = latencies[kind]
        rows.append(
            ProfileRow(
                kind=kind,
                label=LABELS[kind],
                ratios=None if kind == DENSE else (config if kind == OURS_SPARSE else _dense_of(config)).ratios,
                batch=batch,
                image_size=size,
                dtype=section.precision,
                mode=section.mode,
                gmacs=traced_macs(session.workload(model, size)).gmacs,
                **latency.as_row(),
                throughput=1000 * batch / latency.median_ms,
                peak_memory_mb=peak_memory_mb(workload.of(model)),
                parameters=sum(parameter.numel() for parameter in model.parameters()),
                rounds=latency.rounds,
                outliers=latency.outliers,
                stable=latency.stable,
                unsteady=latency.unsteady,
                compares=latency.stable and latencies[DENSE].stable,
            )
        )
    return rows, latencies


def _dense_of(config: SparsityConfig) -> SparsityConfig:
    return SparsityConfig(tuple((0,) * pairs for pairs in config.pairs))


def _macs_check(session: Session, model: nn.Module, size: Size) -> dict[str, float]:
    """The sparse model counted three ways; a difference is told, never averaged away."""
    workload = session.workload(model, size)
    traced, analytic = traced_macs(workload), macs_cost(workload)(get_sparsity(model))
    counts = {"fvcore": traced.gmacs, "analytic": analytic / 1e9, "torch": flopcounter_macs(workload).gmacs}
    if max(counts.values()) - min(counts.values()) > MACS_TOLERANCE * counts["fvcore"]:
        session.reporter.warn(f"the multiply-add counters disagree: {json.dumps(counts)}")
    if traced.uncounted:
        session.reporter.warn(f"operators without a multiply-add count: {dict(traced.uncounted)}")
    return counts


def _stage_times(
    session: Session, models: Mapping[Kind, nn.Module], size: Size, batch: int, latencies: Mapping[Kind, Latency]
) -> dict[str, StageTimes]:
    """Where the time goes, dense and sparse, in instrumented passes scaled to the measured latency."""
    workload = session.workload(models[DENSE], size, batch, session.config.profile.precision)
    check = partial(session.stop.check, "profile", "nothing of this profile is saved")

    def times_of(kind: Kind) -> StageTimes:
        def take() -> StageTimes:
            return time_stages(workload.of(models[kind]), total_ms=latencies[kind].median_ms)

        return Vigil(session.patience, session.device, check).collect(take, bool)[0]

    try:
        return {LABELS[kind]: times_of(kind) for kind in (DENSE, OURS_SPARSE)}
    except Disturbed as neighbour:
        session.reporter.warn(f"times per stage are left out: {neighbour}")
        return {}


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
