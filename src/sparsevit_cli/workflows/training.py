"""pretrain, adapt and finetune: one loop, three sparsity schedules."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from statistics import fmean
from typing import Any

from timm.optim import list_optimizers
from torch import nn

from sparsevit_cli.atomic import write_atomic, write_json
from sparsevit_cli.checkpoints import load_checkpoint
from sparsevit_cli.commands import COMMANDS
from sparsevit_cli.config.experiment import LoopSection
from sparsevit_cli.config.loading import section_hash, settings_of
from sparsevit_cli.config.paths import as_path
from sparsevit_cli.data.chosen import refuse_unreadable
from sparsevit_cli.data.images import UnreadableImageError
from sparsevit_cli.data.shrunk import Scale, Shrunk
from sparsevit_cli.data.source import Data, Source
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.evaluation import evaluate, evaluate_each
from sparsevit_cli.reporting import Reporter, SilentReporter, optional_output
from sparsevit_cli.runs import HARMLESS, RunFolder
from sparsevit_cli.schedule import FixedSchedule, RandomSchedule, SparsitySchedule
from sparsevit_cli.sizes import Size
from sparsevit_cli.sparsity import SearchSpace, SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.swin.geometry import check_image_size, patch_size, recompute_blocks
from sparsevit_cli.tasks.task import Metric, Score
from sparsevit_cli.training import TrainingJob, TrainingPlan, TrainingResult, plan_training, train

from .plots import plot_training
from .ratios import ratios_to_finetune, typed_to_finetune
from .scopes import gmacs_of
from .session import Session, Weights
from .weights import file_weights, trained_weights

MOVABLE = ("data.root",)
"""The folder itself may move: the fingerprint knows its files."""
_READERS, _READ_AHEAD = 8, 256
"""Threads that read headers, most of which wait for a disk, and how many headers are asked for at once."""


@dataclass(frozen=True)
class CheckRow:
    """Score and cost of one fixed configuration; the backbone's if there are modules around it."""

    label: str
    score: float
    gmacs: float
    backbone_gmacs: float | None = None


@dataclass(frozen=True)
class TrainingSummary:
    """What a training command tells at its end."""

    command: str
    folder: RunFolder
    metric: Metric
    score: float
    seconds: float
    already_done: bool
    rows: tuple[CheckRow, ...] = ()


@dataclass(frozen=True)
class _Kind:
    """What differs between the three commands."""

    command: str
    section: LoopSection
    schedule: SparsitySchedule
    validate_at: SparsityConfig
    plan: TrainingPlan
    start: str
    """Hash of the weights that the training starts from."""
    teacher: nn.Module | None = None


def pretrain(session: Session) -> TrainingSummary:
    """Train a dense model: from scratch, from timm's weights, or from a checkpoint file."""
    section = session.config.train
    data = session.data()
    model = session.model(data.categories)
    dense = SparsityConfig.dense(model_depths(model))
    plan = checked_plan(session, "pretrain", section, model, data)
    check_headers(session, "pretrain", data)
    folder = session.folder("pretrain")  # once everything fits: --fresh sets an earlier run aside
    kind = _Kind("pretrain", section, FixedSchedule(dense), dense, plan, _start(session, None))
    return _train(session, folder, data, model, kind)


def adapt(session: Session) -> TrainingSummary:
    """Train on with a new random configuration at every step (paper section 3.2)."""
    section = session.config.adapt
    weights = dense_weights(session, "adapt")
    data = session.data(weights)
    model = session.model(data.categories, weights)
    space = session.space(model, section.max_ratio)
    middle = space.uniform(min(0.5, section.max_ratio))
    plan = checked_plan(session, "adapt", section, model, data)
    check_headers(session, "adapt", data)
    folder = session.folder("adapt")
    kind = _Kind(
        "adapt", section, RandomSchedule(space, session.config.seed), middle, plan, _start(session, weights),
        teacher=_teacher(session, section, data, weights),
    )  # fmt: skip
    summary = _train(session, folder, data, model, kind)
    return replace(summary, rows=_check_rows(session, folder, data, model, space))


def finetune(session: Session, *, ratios: str | None = None) -> TrainingSummary:
    """Train on from the adapted weights with one configuration fixed (paper section 3.4).

    `ratios` as typed (a winner file, say) stand in for `finetune.ratios`.
    """
    weights = trained_weights(session, "adapt", "sparsevit finetune")
    model = session.model(weights.categories, weights)
    depths = model_depths(model)
    if ratios is not None:
        typed = typed_to_finetune(session, ratios, depths, "sparsevit finetune", weights.sha256)
        section = session.config.finetune.model_copy(update={"ratios": typed.ratios})
        session = session.replaced(config=session.config.model_copy(update={"finetune": section}))
    section = session.config.finetune
    config = ratios_to_finetune(session, depths, "sparsevit finetune", weights.sha256)
    data = session.data(weights)
    plan = checked_plan(session, "finetune", section, model, data)
    teacher = _teacher(
        session, section, data, dense_weights(session, "finetune") if session.task.wants_teacher(section) else None
    )
    folder = session.folder("finetune")
    kind = _Kind("finetune", section, FixedSchedule(config), config, plan, f"{weights.sha256} at {config}", teacher)
    return _train(session, folder, data, model, kind)


def train_smaller_rival(
    session: Session, folder: RunFolder, model: nn.Module, weights: Weights | None, scale: Scale
) -> TrainingSummary:
    """Train the dense `model` on images shrunk by `scale`, with the schedule of finetune and without a teacher."""
    section = session.config.finetune
    data = session.data(weights)
    data = replace(data, train=Shrunk(data.train, scale), val=Shrunk(data.val, scale))
    dense = SparsityConfig.dense(model_depths(model))
    plan = checked_plan(session, "finetune", section, model, data)
    start = f"{_start(session, weights)} at {scale.small}"
    return _train(session, folder, data, model, _Kind("rival", section, FixedSchedule(dense), dense, plan, start))


def train_dense_baseline(session: Session) -> tuple[Weights, float]:
    """The dense weights trained on as long as the sparse model was, and the seconds that it took.

    Two trainings at ratio 0, without a teacher: the first with the settings of adapt, the second with those of
    finetune. So the images, their order, the sizes and the number of steps are the same. Each resumes.
    """
    weights, seconds = dense_weights(session, "run"), 0.0
    for command, section in (("dense_adapt", session.config.adapt), ("dense_finetune", session.config.finetune)):
        data = session.data(weights)
        model = session.model(data.categories, weights)
        dense = SparsityConfig.dense(model_depths(model))
        plan = checked_plan(session, COMMANDS[command].training or "", section, model, data)
        folder = session.folder(command)
        kind = _Kind(command, section, FixedSchedule(dense), dense, plan, _start(session, weights))
        seconds += _train(session, folder, data, model, kind).seconds
        weights = trained_weights(session, command, "sparsevit run")
    assert weights is not None
    return weights, seconds


def _train(session: Session, folder: RunFolder, data: Data, model: nn.Module, kind: _Kind) -> TrainingSummary:
    config, section, settings = session.config, kind.section, _settings(kind)
    job = TrainingJob(
        kind=kind.command,
        task=session.task,
        model=model,
        section=section,
        schedule=kind.schedule,
        plan=kind.plan,
        source=session.task.training_source(data, section),
        validate=_validator(session, data, kind),
        checkpoints=folder.checkpoints,
        device=session.device,
        seed=config.seed,
        workers=config.data.workers,
        max_wait_seconds=config.data.max_wait_seconds,
        teacher=kind.teacher,
        identity={
            "data": data.fingerprint,
            "categories": data.categories.saved(),
            "model": section_hash(config, "task", "model"),
            "start": kind.start,
            "steps": kind.plan.total_steps,
            "settings": section_hash(config, *settings),
            "data_settings": section_hash(config, "data", ignore=(*HARMLESS, *MOVABLE)),
        },
        settings=settings_of(config, "task", "model", "data", *settings),
        validation_fingerprint=data.val_fingerprint,
        ranks=session.ranks,
    )
    if section.grad_checkpointing:
        recompute_blocks(model)
    result = train(job, session.reporter, session.stop, on_row=lambda rows: _write_rows(folder, rows, session.reporter))
    set_sparsity(model, kind.validate_at)
    return session.ranks.on_first(lambda: _finished(session, folder, data, kind, result))


def _finished(session: Session, folder: RunFolder, data: Data, kind: _Kind, result: TrainingResult) -> TrainingSummary:
    """Write what a training came to."""
    last: Mapping[str, Any] = result.history[-1]
    metric = session.task.metric
    checkpoint = str(result.checkpoint.relative_to(folder.path))
    done = folder.done("sparsity.json").get("checkpoint") == checkpoint
    already_done = result.resumed_from == kind.plan.total_steps and done
    if already_done:
        session.reporter.say(f"{kind.command}: already done; the result of {folder.path} is used")
    else:
        write_json(folder.path / "sparsity.json", {"ratios": kind.validate_at.ratios})
        folder.write_result(
            {
                **session.task.about(),
                "score": last[metric.key],
                "seed": session.config.seed,
                "checkpoint": checkpoint,
                "categories": data.categories.saved(),
                "data_fingerprint": data.fingerprint,
                "steps": kind.plan.total_steps,
                "seconds": last["seconds"],
                "history": list(result.history),
                **session.environment,
            },
            files=["sparsity.json"],
        )
        plot_training(folder.path / "results.png", result.history, metric, session.reporter)
    return TrainingSummary(kind.command, folder, metric, float(last[metric.key]), float(last["seconds"]), already_done)


def _settings(kind: _Kind) -> list[str]:
    """Fields of the configuration that say what the training computes."""
    name = COMMANDS[kind.command].training
    return [f"{name}.{field}" for field in type(kind.section).model_fields if f"{name}.{field}" not in HARMLESS]


def checked_plan(session: Session, command: str, section: LoopSection, model: nn.Module, data: Data) -> TrainingPlan:
    """The steps of a training. Raises ConfigError for an optimizer or image size that timm would not take."""
    known = list_optimizers()
    if section.optimizer not in known:
        near = ", ".join(difflib.get_close_matches(section.optimizer, known, n=3)) or "adamw"
        got = f"{section.optimizer!r} is no optimizer of timm"
        raise ConfigError(f"{command}.optimizer", got, f"Did you mean {near}?")
    for number, phase in enumerate(section.curriculum):
        check_image_size(phase.img_size, patch_size(model), f"{command}.curriculum.{number}.img_size")
    return plan_training(section, len(data.train), session.img_size)


def check_headers(session: Session, command: str, data: Data) -> None:
    """Raises DataError for held-out files at which evaluation would end, hours later, as far as headers tell.

    Nothing is read if a checkpoint of `command` tells that the same files have passed before.
    """

    def check() -> None:
        if _have_passed(session, command, data):
            return
        for split, source in (("validation", data.val), ("search", data.search)):
            faults = {}
            has_files = len(source) > 0 and source.sample_file(0) is not None
            reporter = session.reporter if has_files else SilentReporter()
            with reporter.progress(f"{split} headers", len(source)) as progress:
                for index, reason in enumerate(_header_faults(source)):
                    session.stop.check(command, "nothing was trained since it was typed")
                    progress.advance()
                    if reason is not None:
                        faults[source.sample_name(index)] = reason
            refuse_unreadable(faults, split)

    session.ranks.on_first(check)


def _have_passed(session: Session, command: str, data: Data) -> bool:
    """True if a checkpoint of `command` was made with the very files of `data`."""
    if session.fresh:
        return False
    try:
        saved = load_checkpoint(session.earlier(command).checkpoints, only=(), warn=lambda _: None).state
        return (saved.get("validation"), saved["identity"]["data"]) == (data.val_fingerprint, data.fingerprint)
    except (CheckpointError, LookupError, TypeError):  # none, or none of ours: the training tells of it
        return False


def _header_faults(source: Source) -> Iterator[str | None]:
    """Why the header of each sample's files says that it cannot be read, or None; several are waited for at once."""

    def fault(index: int) -> str | None:
        try:
            source.check_header(index)
        except UnreadableImageError as error:
            return error.got
        return None

    readers = ThreadPoolExecutor(_READERS, "headers")
    try:
        for first in range(0, len(source), _READ_AHEAD):
            yield from readers.map(fault, range(first, min(first + _READ_AHEAD, len(source))))
    finally:
        readers.shutdown(wait=False, cancel_futures=True)


def _validator(session: Session, data: Data, kind: _Kind) -> Any:
    """Validation at one fixed configuration, whatever the schedule."""

    def validate(model: nn.Module, img_size: Size, before_batch: Callable[[], None]) -> Score:
        set_sparsity(model, kind.validate_at)
        return score(session, model, data.val.resized(img_size), before_batch=before_batch)

    return validate


def score(session: Session, model: nn.Module, source: Source, **options: Any) -> Score:
    """Score at the model's current sparsity, with the configuration's batch size and workers."""
    return evaluate(session.task, model, source, **_reading(session), **options)


def score_each(
    session: Session, model: nn.Module, source: Source, configs: Collection[SparsityConfig], **options: Any
) -> dict[SparsityConfig, Score]:
    """Score at each of `configs`, with the configuration's batch size and workers."""
    return evaluate_each(session.task, model, source, configs, **_reading(session), **options)


def _reading(session: Session) -> dict[str, Any]:
    data = session.config.data
    return {"batch_size": data.eval_batch_size, "device": session.device, "workers": data.workers,
            "max_wait_seconds": data.max_wait_seconds}  # fmt: skip


def _check_rows(
    session: Session, folder: RunFolder, data: Data, model: nn.Module, space: SearchSpace
) -> tuple[CheckRow, ...]:
    """The closing table of adapt: dense, uniform ratios, and the mean of random configurations.

    Each row is kept as soon as it is there. The first rank scores one configuration after the other, and the others
    wait for each: none of these waits is as long as the table.
    """
    section = session.config.adapt
    rng = Random(f"check:{session.config.seed}")
    wanted = [("dense", [space.dense])]
    wanted += [
        (f"uniform {ratio:g}", [space.uniform(ratio)]) for ratio in section.check_ratios if ratio <= space.max_ratio
    ]
    wanted += [(f"random, mean of {section.check_random}", [space.sample(rng) for _ in range(section.check_random)])]
    above = [f"{ratio:g}" for ratio in section.check_ratios if ratio > space.max_ratio]
    if above:
        session.reporter.warn(f"adapt.check_ratios {', '.join(above)} left out: above adapt.max_ratio")
    on_first = session.ranks.on_first
    saved = on_first(lambda: folder.done("sparsity.json").get("check", {}))
    done = {label: saved[label] for label, _ in wanted if label in saved}
    missing = [(label, configs) for label, configs in wanted if label not in done]
    check = partial(session.stop.check, "adapt", "the training is saved, and so are finished rows of its closing table")

    def load() -> None:
        model.load_state_dict(trained_weights(session, "adapt", "sparsevit adapt").state_dict)  # if they were averaged

    def scored(config: SparsityConfig) -> float:
        set_sparsity(model, config)
        return score(session, model, data.val, before_batch=check).value

    def keep(label: str, mean: float, configs: Sequence[SparsityConfig]) -> dict[str, float]:
        found = [gmacs(config) for config in configs]
        row = {"score": mean, **{name: fmean(each[name] for each in found) for name in found[0]}}
        rows = {**done, label: row}
        folder.write_result({**(folder.read_result() or {}), "check": rows}, files=["sparsity.json"])
        return row

    if missing:
        on_first(load)
        gmacs = gmacs_of(session, model)
        with session.reporter.progress("check", sum(len(configs) for _, configs in missing)) as progress:
            for label, configs in missing:
                mean = 0.0
                for config in configs:
                    mean += on_first(partial(scored, config)) / len(configs)
                    progress.advance()
                done[label] = on_first(partial(keep, label, mean, configs))
    return tuple(CheckRow(label, **done[label]) for label, _ in wanted)


def dense_weights(session: Session, needed_by: str) -> Weights | None:
    """Weights of `pretrain`; None where the configuration names weights of its own instead."""
    if has_own_weights(session) and session.earlier("pretrain").read_result() is None:
        return None
    return trained_weights(session, "pretrain", f"sparsevit {needed_by}")


def has_own_weights(session: Session) -> bool:
    """True where the configuration names whole weights; timm's pretrained ones come with a new, untrained head."""
    section = session.config.model
    return section.checkpoint is not None and not section.reset_head and session.task.checkpoint_is_whole


def _start(session: Session, weights: Weights | None) -> str:
    """Hash of the weights that a training starts from, or of what makes them."""
    if weights is not None:
        return weights.sha256
    own = session.config.model.checkpoint
    if own is None:
        return section_hash(session.config, "task", "model")
    return file_weights(as_path(own, "model.checkpoint")).sha256


def _teacher(session: Session, section: LoopSection, data: Data, weights: Weights | None) -> nn.Module | None:
    if not session.task.wants_teacher(section):
        return None
    return session.model(data.categories, weights).eval().requires_grad_(False)


def _write_rows(folder: RunFolder, rows: tuple[Mapping[str, float], ...], reporter: Reporter) -> None:
    """results.csv: one row per validation; a value that a row lacks is an empty cell."""
    with optional_output(reporter, "results.csv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(folder.path / "results.csv", text.getvalue())
