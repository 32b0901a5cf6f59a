"""--dry-run: what a command would do, how large it is and how long it takes; nothing is written."""

from __future__ import annotations

import operator
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import nn

from sparsevit_cli.config.experiment import LoopSection
from sparsevit_cli.data.loader import train_batches
from sparsevit_cli.data.source import Data
from sparsevit_cli.errors import DataError
from sparsevit_cli.profiling.device import synchronize
from sparsevit_cli.profiling.inputs import TORCH_DTYPE, trained_in
from sparsevit_cli.profiling.latency_table import measure_configs, program_design
from sparsevit_cli.search.engine import most_evaluations
from sparsevit_cli.sizes import size_text
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.training import plan_training

from .eight_bits import passes_told
from .in_runtimes import chosen_runtimes
from .profile_target import ProfileTarget, built, profile_target
from .scopes import BACKBONE, gmacs_of, image_told, per_image
from .session import Session

OPTIMIZER_COPIES = 3
"""A checkpoint of AdamW holds the weights and two moments; an EMA adds one more."""
TIMED_STEPS = 3
PROFILE_ROWS = 3
"""Dense, ours at ratio 0, ours sparse."""
RIVAL_ROWS = 18
"""Contestants of a Swin-T; others have fewer."""
EXPORTED_ROWS, EXPORTED_RIVAL_ROWS = 2, 4
"""The same in each other runtime: dense and sparse; with --rivals two sparse ones, and dense on smaller images."""
WARMUP_SHARE = 2.0
"""Warm-up takes as long as the measurement itself."""


@dataclass(frozen=True)
class Plan:
    """What a command would do, line by line; `missing` says why the data could not be read, if they could not."""

    lines: tuple[str, ...]
    missing: DataError | None = None

    def refuse_incomplete(self) -> None:
        """Raise `missing`, after the lines were told: the command itself would end so."""
        if self.missing is not None:
            raise self.missing


def plan_of(
    session: Session,
    command: str,
    *,
    model: str | None = None,
    img_size: str | None = None,
    ratios: str | None = None,
    runtime: str | None = None,
    budgets: Sequence[str] = (),
    latency_table: str | None = None,
) -> Plan:
    """The plan of `command`, from a few timed passes. The flags are those of profile, evaluate and search.

    Without data it says what the configuration alone tells. Raises what building the model raises.
    """
    if command in ("profile", "rivals"):
        ratios = ratios or ("0.6" if command == "rivals" else None)
        target = profile_target(session, model=model, img_size=img_size, ratios=ratios)
        of_table = None if latency_table is None else _table_lines(target, latency_table)
        return Plan(tuple(of_table or _profile_lines(target, command)))
    known = _Known(session, with_model=command != "check-data")
    lines = [*_folder_lines(session, command), *known.data_lines()]
    if command == "check-data":
        return Plan(tuple(lines), known.missing)
    lines += known.model_lines()
    trainings = {"pretrain": session.config.train, "adapt": session.config.adapt, "finetune": session.config.finetune}
    for name, section in trainings.items():
        if command in (name, "run"):
            lines.append(known.training_line(name, section))
    if command == "run" and session.config.run.dense_baseline:
        for name in ("adapt", "finetune"):
            lines.append(known.training_line(f"dense_{name}", trainings[name]))
    if command in ("search", "run"):
        lines.append(known.search_line())
        if budgets:
            lines.append(f"budgets: {', '.join(budgets)}, each searched like that; later ones use what was paid before")
    if command in ("evaluate", "run"):
        lines.append(known.evaluation_line())
    if runtime is not None:
        lines.append(f"runtime: an exported file in {runtime} is scored, whose time is not known")
    if command == "export":
        lines.append(f"export: {', '.join(session.config.export.formats) or 'weights'}, safetensors and sparsity.json")
    if command in ("export", "run") and session.config.export.precision == "int8":
        lines.append(known.int8_line())
    return Plan(tuple(lines), known.missing)


def _folder_lines(session: Session, command: str) -> list[str]:
    folder = session.earlier(command).path
    return [f"command: {command}", f"folder: {folder}{' (exists)' if folder.exists() else ''}"]


class _Known:
    """The data and the model as far as they are there, and what a pass costs here.

    Without data the model is the architecture alone. Where the data name its outputs, there is no model either.
    """

    def __init__(self, session: Session, *, with_model: bool) -> None:
        self.session = session
        self.data: Data | None = None
        self.model: nn.Module | None = None
        self.missing: DataError | None = None
        try:
            self.data = session.data()
        except DataError as error:
            self.missing = error
        if with_model:
            self.model = self._model()

    def _model(self) -> nn.Module | None:
        session = self.session
        if self.data is not None:
            return session.model(self.data.categories).eval()
        try:
            return session.sparsified_(built(session, session.img_size)).to(session.device)
        except DataError:
            return None

    def data_lines(self) -> list[str]:
        """What the data say of themselves, or what is missing."""
        if self.data is None:
            assert self.missing is not None
            return [f"data: missing, {self.missing.what}: {self.missing.got}"]
        return [f"{name}: {value}" for name, value in self.data.describe()]

    def model_lines(self) -> list[str]:
        """Model and space."""
        session, config = self.session, self.session.config
        if self.model is None:
            return [f"model: {config.model.name}, its outputs are named by the data"]
        space = session.space(self.model, config.search.max_ratio)
        gmacs = gmacs_of(session, self.model)
        dense, sparsest = gmacs(space.dense), gmacs(space.sparsest)
        of_backbone = (
            [f"of these in the backbone: {dense[BACKBONE]:.3f} G dense, {sparsest[BACKBONE]:.3f} G sparsest"]
            if BACKBONE in dense
            else []
        )
        guessed = "" if self.data is not None else ", outputs as far as they are known without the data"
        return [
            f"model: {config.model.name}, {_parameters(self.model) / 1e6:.2f} M parameters, "
            f"depths {list(model_depths(self.model))}{guessed}",
            f"multiply-adds per {session.task.per}: {dense['gmacs']:.3f} G dense, {sparsest['gmacs']:.3f} G sparsest",
            *of_backbone,
            *image_told(
                session.task.per,
                per_image(session, session.img_size),
                session.img_size,
                {"dense": (dense["gmacs"], None), "sparsest": (sparsest["gmacs"], None)},
            ),
            f"configurations: {space.size}",
        ]

    def training_line(self, name: str, section: LoopSection) -> str:
        """Steps, time and disk of one training."""
        copies = (section.keep + 1) * (OPTIMIZER_COPIES + (section.ema_decay is not None))
        megabytes = 0.0 if self.model is None else copies * 4 * _parameters(self.model) / 1e6
        disk = f"; {megabytes:.0f} MB of checkpoints at most" if megabytes else ""
        if self.data is None or self.model is None:
            epochs = sum(phase.epochs for phase in section.curriculum) or section.epochs
            told = f"{name}: {epochs:g} epochs in batches of {section.batch_size} images"
            return f"{told}; steps and time need the data{disk}"
        height, width = self.session.img_size
        plan = plan_training(section, len(self.data.train), self.session.img_size)
        pixels = sum(phase.steps * phase.img_size[0] * phase.img_size[1] for phase in plan.phases) / (height * width)
        minutes = pixels * self._step_seconds(self.data, self.model, section) / 60
        return (
            f"{name}: {plan.total_steps} steps of {section.batch_size} images, {minutes:.1f} min from {TIMED_STEPS} "
            f"timed dense steps, validation left out{disk}"
        )

    def search_line(self) -> str:
        """Candidates and their time."""
        section = self.session.config.search
        most = [most_evaluations(section.strategy, section.population, section.generations, section.max_evaluations)]
        most += [self.session.space(self.model, section.max_ratio).size] if self.model is not None else []
        asked, samples = min(most), section.samples
        if self.data is not None:
            samples = min(samples or len(self.data.search), len(self.data.search))
        each = (
            f"{samples} images each" if samples else "all search images each; their number and the time need the data"
        )
        time_told = ""
        if samples and self.model is not None:
            minutes = asked * self._seconds_of(self.model, samples) / 60
            time_told = f", {minutes:.1f} min at most, finalists and latencies left out"
        return f"search: {asked} candidates at most, {each}{time_told}"

    def evaluation_line(self) -> str:
        """Images and their time."""
        if self.data is None or self.model is None:
            return "evaluate: images and time need the data"
        images = len(self.data.val)
        return f"evaluate: {images} images, {self._seconds_of(self.model, images):.0f} s dense"

    def int8_line(self) -> str:
        """Passes over the validation data."""
        return "int8: images need the data" if self.data is None else (
            f"int8: {passes_told(self.session, len(self.data.val))}"
        )  # fmt: skip

    def _seconds_of(self, model: nn.Module, images: int) -> float:
        """Seconds of a dense evaluation, from a few timed batches of the search's size."""
        section, session = self.session.config.search, self.session
        dense = SearchSpace(model_depths(model)).dense
        latency = measure_configs(
            session.workload(model, batch_size=section.batch_size), [dense],
            seconds=0.1, rounds=TIMED_STEPS, retries=0, patience=session.patience.without_waiting(),
        )[dense]  # fmt: skip
        return images * latency.median_ms / section.batch_size / 1000

    def _step_seconds(self, data: Data, model: nn.Module, section: LoopSection) -> float:
        """Seconds of one dense step, forward and backward, in the precision of the training; the best of a few."""
        session, device = self.session, self.session.device
        precision = trained_in(section.precision, device)
        source = session.task.training_source(data, section)
        batch = next(train_batches(source, batch_size=section.batch_size, seed=session.config.seed, epoch=0)).to(device)
        set_sparsity(model, 0.0)
        model.train()  # some models compute a loss in training alone
        best = float("inf")
        for _ in range(TIMED_STEPS):
            synchronize(device)
            began = time.perf_counter()
            for part in batch.parts(-(-len(batch) // section.accumulation)):
                with torch.autocast(device.type, TORCH_DTYPE[precision], enabled=precision != "fp32"):
                    losses = session.task.loss(model, part, section, None)
                    loss = reduce(operator.add, losses.values())
                loss.backward()
            synchronize(device)
            best = min(best, time.perf_counter() - began)
        model.zero_grad(set_to_none=True)
        model.eval()
        return best


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _table_lines(target: ProfileTarget, path: str) -> list[str]:
    """Of a latency table in a file: search.runtime decides how it is made."""
    session, section = target.session, target.session.config.search
    size = target.sizes[0]
    model = session.sparsified_(built(session, size)).to(session.device)
    made = "every block pair at every ratio, by marked passes; their time is not known"
    if section.runtime != "torch":
        workload = session.workload(model, size, section.batch_size, scope=section.scope)
        programs = len(program_design(workload).configs())
        minutes = programs * section.seconds * WARMUP_SHARE / 60
        made = f"{programs} whole programs, {minutes:.1f} min at least, making them left out"
    return [
        f"command: profile --latency-table, into {path}",
        f"model: {session.config.model.name}, {size_text(size)} pixels, batch {section.batch_size}, {section.scope}",
        f"runtime: {section.runtime}, {section.precision}",
        f"table: {made}",
    ]


def _profile_lines(target: ProfileTarget, command: str) -> list[str]:
    section = target.session.config.profile
    cells = len(target.sizes) * len(section.batch_sizes)
    is_profile = command == "profile"
    runtimes = chosen_runtimes(target.session, command, all_installed=not is_profile)
    in_torch, elsewhere = (PROFILE_ROWS, EXPORTED_ROWS) if is_profile else (RIVAL_ROWS, EXPORTED_RIVAL_ROWS)
    rows = in_torch * runtimes.has_torch + elsewhere * len(runtimes.others)
    seconds = cells * rows * section.seconds * WARMUP_SHARE
    sizes = ", ".join(f"{height}x{width}" for height, width in target.sizes)
    return [
        *_folder_lines(target.session, command),
        f"model: {target.session.config.model.name} at {target.config}",
        f"cells: {cells}, image sizes {sizes}, batch sizes {', '.join(map(str, section.batch_sizes))}, "
        f"{section.precision}, {section.mode}",
        f"runtimes: {', '.join(runtimes.names)}",
        f"time: {seconds / 60:.1f} min at least, {rows} rows each, more where {section.rounds} rounds take "
        "longer or latencies do not settle",
    ]
