"""--dry-run: what a command would do, how large it is and how long it takes; nothing is written."""

from __future__ import annotations

import operator
import time
from functools import reduce

import torch

from sparsevit_cli.config.experiment import LoopSection
from sparsevit_cli.data.loader import train_batches
from sparsevit_cli.profiling.device import synchronize
from sparsevit_cli.profiling.inputs import TORCH_DTYPE, trained_in
from sparsevit_cli.profiling.latency_table import measure_configs
from sparsevit_cli.sparsity import SearchSpace
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.training import plan_training

from .profile import ProfileTarget, profile_target
from .scopes import BACKBONE, gmacs_of
from .session import Session

OPTIMIZER_COPIES = 3
"""A checkpoint of AdamW holds the weights and two moments; an EMA adds one more."""
TIMED_STEPS = 3
PROFILE_ROWS = 3
"""Dense, ours at ratio 0, ours sparse."""
RIVAL_ROWS = 18
"""Contestants of a Swin-T; others have fewer."""
WARMUP_SHARE = 2.0
"""Warm-up takes as long as the measurement itself."""


def plan_lines(
    session: Session,
    command: str,
    *,
    model: str | None = None,
    img_size: str | None = None,
    ratios: str | None = None,
    runtime: str | None = None,
) -> list[str]:
    """The plan of `command`, line by line, from a few timed passes. The flags are those of profile and evaluate.

    Raises what reading the data and building the model raise.
    """
    if command in ("profile", "rivals"):
        ratios = ratios or ("0.6" if command == "rivals" else None)
        return _profile_lines(profile_target(session, model=model, img_size=img_size, ratios=ratios), command)
    if command == "check-data":
        return [*_folder_lines(session, command), *(f"{name}: {value}" for name, value in session.data().describe())]
    plan = _Plan(session)
    lines = [*_folder_lines(session, command), *plan.model_lines()]
    trainings = {"pretrain": session.config.train, "adapt": session.config.adapt, "finetune": session.config.finetune}
    for name, section in trainings.items():
        if command in (name, "run"):
            lines += plan.training_lines(name, section)
    if command == "run" and session.config.run.dense_baseline:
        for name in ("adapt", "finetune"):
            lines += plan.training_lines(f"dense_{name}", trainings[name])
    if command in ("search", "run"):
        lines += plan.search_lines()
    if command in ("evaluate", "run"):
        seconds = f"{plan.seconds_of(len(plan.data.val)):.0f} s dense in PyTorch"
        of_file = "" if runtime is None else f"; an exported file in {runtime} is scored, whose time is not known"
        lines.append(f"evaluate: {len(plan.data.val)} images, {seconds}{of_file}")
    if command == "export":
        lines.append(f"export: {', '.join(session.config.export.formats) or 'weights'}, safetensors and sparsity.json")
    return lines


def _folder_lines(session: Session, command: str) -> list[str]:
    folder = session.earlier(command).path
    return [f"command: {command}", f"folder: {folder}{' (exists)' if folder.exists() else ''}"]


class _Plan:
    """One model and its data, and what a pass costs here."""

    def __init__(self, session: Session) -> None:
        self.session, self.data = session, session.data()
        self.model = session.model(self.data.categories).eval()
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())

    def model_lines(self) -> list[str]:
        """Data, model, space."""
        config = self.session.config
        space = self.session.space(self.model, config.search.max_ratio)
        gmacs = gmacs_of(self.session, self.model)
        dense, sparsest = gmacs(space.dense), gmacs(space.sparsest)
        of_backbone = (
            [f"of these in the backbone: {dense[BACKBONE]:.3f} G dense, {sparsest[BACKBONE]:.3f} G sparsest"]
            if BACKBONE in dense
            else []
        )
        return [
            *(f"{name}: {value}" for name, value in self.data.describe()),
            f"model: {config.model.name}, {self.parameters / 1e6:.2f} M parameters, "
            f"depths {list(model_depths(self.model))}",
            f"multiply-adds per image: {dense['gmacs']:.3f} G dense, {sparsest['gmacs']:.3f} G sparsest",
            *of_backbone,
            f"configurations: {space.size}",
        ]

    def training_lines(self, name: str, section: LoopSection) -> list[str]:
        """Steps, time and disk of one training."""
        height, width = self.session.img_size
        plan = plan_training(section, len(self.data.train), self.session.img_size)
        pixels = sum(phase.steps * phase.img_size[0] * phase.img_size[1] for phase in plan.phases) / (height * width)
        copies = OPTIMIZER_COPIES + (section.ema_decay is not None)
        minutes = pixels * self._step_seconds(section) / 60
        return [
            f"{name}: {plan.total_steps} steps of {section.batch_size} images, {minutes:.1f} min from {TIMED_STEPS} "
            f"timed dense steps, validation left out; {(section.keep + 1) * copies * 4 * self.parameters / 1e6:.0f} MB "
            "of checkpoints at most"
        ]

    def search_lines(self) -> list[str]:
        """Candidates and their time."""
        section = self.session.config.search
        space = self.session.space(self.model, section.max_ratio)
        asked = min(section.population * (section.generations + 1), section.max_evaluations or space.size, space.size)
        samples = min(section.samples or len(self.data.search), len(self.data.search))
        return [
            f"search: {asked} candidates at most, {samples} images each, "
            f"{asked * self.seconds_of(samples) / 60:.1f} min at most, finalists and latencies left out"
        ]

    def seconds_of(self, images: int) -> float:
        """Seconds of a dense evaluation, from a few timed batches of the search's size."""
        section, session = self.session.config.search, self.session
        dense = SearchSpace(model_depths(self.model)).dense
        latency = measure_configs(
            session.workload(self.model, batch_size=section.batch_size), [dense],
            seconds=0.1, rounds=TIMED_STEPS, retries=0, patience=session.patience.without_waiting(),
        )[dense]  # fmt: skip
        return images * latency.median_ms / section.batch_size / 1000

    def _step_seconds(self, section: LoopSection) -> float:
        """Seconds of one dense step, forward and backward, in the precision of the training; the best of a few."""
        session, device = self.session, self.session.device
        precision = trained_in(section.precision, device)
        source = session.task.training_source(self.data, section)
        batch = next(train_batches(source, batch_size=section.batch_size, seed=session.config.seed, epoch=0)).to(device)
        set_sparsity(self.model, 0.0)
        self.model.train()  # some models compute a loss in training alone
        best = float("inf")
        for _ in range(TIMED_STEPS):
            synchronize(device)
            began = time.perf_counter()
            for part in batch.parts(-(-len(batch) // section.accumulation)):
                with torch.autocast(device.type, TORCH_DTYPE[precision], enabled=precision != "fp32"):
                    losses = session.task.loss(self.model, part, section, None)
                    loss = reduce(operator.add, losses.values())
                loss.backward()
            synchronize(device)
            best = min(best, time.perf_counter() - began)
        self.model.zero_grad(set_to_none=True)
        self.model.eval()
        return best


def _profile_lines(target: ProfileTarget, command: str) -> list[str]:
    section = target.session.config.profile
    cells = len(target.sizes) * len(section.batch_sizes)
    rows = PROFILE_ROWS if command == "profile" else RIVAL_ROWS
    seconds = cells * rows * section.seconds * WARMUP_SHARE
    sizes = ", ".join(f"{height}x{width}" for height, width in target.sizes)
    return [
        *_folder_lines(target.session, command),
        f"model: {target.session.config.model.name} at {target.config}",
        f"cells: {cells}, image sizes {sizes}, batch sizes {', '.join(map(str, section.batch_sizes))}, "
        f"{section.precision}, {section.mode}",
        f"time: {seconds / 60:.1f} min at least, {rows} rows each, more where {section.rounds} rounds take "
        "longer or latencies do not settle",
    ]
