"""ONE training loop. Dense training, adaptation and finetuning differ only in their sparsity schedule.

Every random draw is a function of (seed, purpose, step), so a resumed run equals the straight one to the bit:
order of samples, augmentation, sparsity, dropout and mixup need no saved state.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial, reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .atomic import remove_leftovers
from .checkpoints import (
    STATE,
    Checkpoint,
    all_finite,
    latest_checkpoint,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from .config.experiment import LoopSection
from .config.fields import shown
from .data.loader import MAX_WAIT_SECONDS, train_batches
from .data.source import Batch, Source
from .documents import number, understood
from .errors import CheckpointError, NonFiniteError, ResourceError, StoppedError, is_out_of_memory
from .profiling.device import describe_versions
from .profiling.inputs import TORCH_DTYPE, trained_in
from .ranks import Ranks
from .reporting import Progress, Reporter
from .schedule import SparsitySchedule
from .seeding import step_seed
from .sizes import Size, as_pair
from .stopping import StopRequest
from .swin import set_sparsity
from .swin.geometry import set_image_size_in_training
from .tasks.task import Score, Task
from .weights import load_state

FP16_SCALE = 2.0**12
"""First loss scale of fp16; torch's own default needs more halvings than MAX_BAD_STEPS allows."""
MAX_BAD_STEPS = 3
"""Non-finite fp16 steps in a row before training ends; the loss scaler needs a few to settle."""
MAX_MEMORY_RETRIES = 6
"""Times that a step may halve its micro-batch after running out of memory."""
FUSED = ("adam", "adamw")
"""Optimizers of torch with one kernel for all parameters; with a loss scaler the usual form is taken."""


@dataclass(frozen=True)
class PhasePlan:
    """Steps `first_step` ... `first_step + steps - 1` with images of one size, at the peak learning rate `lr`.

    The rate warms up from `warmup_lr`; None if it does not: where the phase before ended no lower. So the phases of a
    `constant` schedule are a schedule in steps, as mmdet (the authors) and timm have it: both warm up once. After a
    cosine the rate has to rise again. timm lets it jump there; ours warms up, for images are of another size too.
    """

    img_size: Size
    first_step: int
    steps: int
    lr: float
    warmup_lr: float | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """What happens when: a pure function of the configuration and the number of training images."""

    phases: tuple[PhasePlan, ...]
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.phases[-1].first_step + self.phases[-1].steps

    def phase(self, step: int) -> PhasePlan:
        """The phase that `step` belongs to."""
        return next(phase for phase in self.phases if step < phase.first_step + phase.steps)

    def is_due(self, step: int, every_epochs: float) -> bool:
        """True after each `every_epochs` epochs' worth of steps, and at the end of the training."""
        every = max(1, round(every_epochs * self.steps_per_epoch))
        return step % every == 0 or step == self.total_steps


def plan_training(section: LoopSection, num_samples: int, img_size: Size) -> TrainingPlan:
    """Lay out the section's curriculum; without one a single phase at `img_size` for `section.epochs`."""
    steps_per_epoch = max(1, num_samples // section.batch_size)
    wanted = [(as_pair(p.img_size), p.epochs, p.lr or section.lr) for p in section.curriculum]
    phases, first, before = [], 0, section.min_lr
    for size, epochs, lr in wanted or [(img_size, section.epochs, section.lr)]:
        steps = max(1, round(epochs * steps_per_epoch))
        phases.append(PhasePlan(size, first, steps, lr, before if before < lr else None))
        first, before = first + steps, lr if section.schedule == "constant" else section.min_lr
    return TrainingPlan(tuple(phases), steps_per_epoch)


class Validate(Protocol):
    """Score of a model on the validation data at a size of images, at a fixed configuration.

    `before_batch` may raise, to stop early.
    """

    def __call__(self, model: nn.Module, img_size: Size, before_batch: Callable[[], None]) -> Score: ...


@dataclass(frozen=True)
class TrainingJob:
    """Everything a training needs. `model` is changed in place; it must already be sparse (ratio 0 for dense)."""

    kind: str
    task: Task
    model: nn.Module
    section: LoopSection
    schedule: SparsitySchedule
    plan: TrainingPlan
    source: Source
    validate: Validate
    checkpoints: Path
    device: torch.device
    seed: int
    workers: int = 0
    max_wait_seconds: float = MAX_WAIT_SECONDS
    teacher: nn.Module | None = None
    identity: Mapping[str, object] = field(default_factory=dict)
    """What a checkpoint must agree with to be resumed, besides the seed: data, categories, start weights, settings."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """The values behind the hashes in `identity`, to name those that differ."""
    validation_fingerprint: str = ""
    ranks: Ranks = field(default_factory=Ranks)
    """The processes that share every batch."""


@dataclass(frozen=True)
class TrainingResult:
    """The end of a training: the last checkpoint, and one row of metrics per validation."""

    checkpoint: Path
    history: tuple[Mapping[str, float], ...]
    resumed_from: int | None
    """Step at which this process took over, None for a start from the beginning."""
    seconds: float


def train(
    job: TrainingJob,
    reporter: Reporter,
    stop: StopRequest,
    on_row: Callable[[tuple[Mapping[str, float], ...]], None] = lambda rows: None,
) -> TrainingResult:
    """Train to the end of the plan, from the newest whole checkpoint where there is one.

    Several ranks take every step together, each with its part of the batch. They stop, refuse a step and run out of
    memory together. The first one validates and saves; `on_row` is called there alone.

    Raises NonFiniteError; the weights before the bad step are saved. Raises StoppedError after a signal, once a
    checkpoint is saved. Raises CheckpointError for a checkpoint of another run, ConfigError for a batch that the ranks
    cannot share, PeerError if another rank ended, and ResourceError.
    """
    began = time.monotonic()
    ranks = job.ranks
    run = _Run(job, reporter)
    resumed_from = run.resume()
    earlier_seconds = run.seconds
    total = job.plan.total_steps
    with reporter.progress(job.kind, total) as progress:
        progress.advance(run.step)
        while run.step < total or run.owes_validation:
            best = False
            if not run.owes_validation:
                run.saved_on(lambda: run.train_until_event(stop, progress), NonFiniteError)
                run.seconds = earlier_seconds + time.monotonic() - began
            if run.owes_validation and not ranks.stops(stop):
                done = f"step {run.step} of {total} is saved"
                validate = partial(run.validate, partial(stop.check, job.kind, done))
                run.saved_on(validate, Exception, StoppedError)  # the steps are good; the validation is made up for
                if ranks.is_first:
                    on_row(tuple(run.history))
                best = run.is_best()
            stops = ranks.stops(stop)
            if best or stops or job.plan.is_due(run.step, job.section.save_every):
                run.save(best=best)
            if stops:
                raise ranks.shared(stop.error(job.kind, f"step {run.step} of {total} is saved"))
    newest = ranks.on_first(lambda: latest_checkpoint(job.checkpoints, reporter.warn))
    assert newest is not None, "the last step always saves"
    return TrainingResult(newest, tuple(run.history), resumed_from, run.seconds)


ROW = {"step", "epoch", "height", "width", "lr", "train_loss", "seconds"}
"""What every row of the history holds, besides the metric."""
LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")
"""State of an optimizer in the shape of its parameter, where torch's fused kernels do not look twice."""
ADDED = ("data_settings",)
"""Parts of an identity that checkpoints from before 2026-11-28 lack."""
HASH_DIGITS = 64


class _Run:
    """The mutable state of one training: step, optimizer, scaler, EMA and the rows so far."""

    def __init__(self, job: TrainingJob, reporter: Reporter) -> None:
        self.job, self.reporter, self.ranks = job, reporter, job.ranks
        section = job.section
        self.batch_size = min(section.batch_size, len(job.source))
        self.ranks.share(self.batch_size, f"{job.kind}.batch_size")
        self.model = job.model.to(job.device)
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=section.optimizer,
            lr=section.lr,
            weight_decay=section.weight_decay,
            layer_decay=section.layer_decay,
            param_group_fn=_groups(self.model, section),
            **({"fused": True} if section.optimizer in FUSED and section.precision != "fp16" else {}),
        )
        self.precision = trained_in(section.precision, job.device)
        if self.precision != section.precision:
            reporter.warn(f"{job.kind}: this CPU emulates {section.precision}, slowly; training in {self.precision}")
        self.ema = ModelEmaV3(self.model, decay=section.ema_decay, use_warmup=True) if section.ema_decay else None
        self.scaler = torch.amp.GradScaler(job.device.type, FP16_SCALE, enabled=section.precision == "fp16")
        self.lr_of_phase = {phase: self._scheduler(phase) for phase in job.plan.phases}
        self.step = 0
        self.history: list[Mapping[str, float]] = []
        self.losses: list[float] = []
        self.accumulation = section.accumulation
        self.bad_steps = 0
        self.seconds = 0.0

    # -- learning rate ------------------------------------------------------------------------------------------

    def _scheduler(self, phase: PhasePlan) -> Any:
        """timm's scheduler over the steps of `phase`; its value is a function of the step alone."""
        section = self.job.section
        if section.schedule == "constant":
            sched: dict[str, Any] = {"sched": "step", "decay_epochs": phase.steps + 1, "decay_rate": 1.0}
        else:
            sched = {"sched": {"cosine": "cosine", "linear": "poly"}[section.schedule], "min_lr": section.min_lr}
            sched |= {"decay_rate": 1.0} if section.schedule == "linear" else {}
        for group in self.optimizer.param_groups:
            group["lr"] = phase.lr
            group.pop("initial_lr", None)
        warmup = min(phase.steps - 1, round(section.warmup_epochs * self.job.plan.steps_per_epoch))
        scheduler, _ = create_scheduler_v2(
            self.optimizer,
            num_epochs=phase.steps,
            warmup_epochs=0 if phase.warmup_lr is None else warmup,
            warmup_lr=phase.lr if phase.warmup_lr is None else phase.warmup_lr,
            step_on_epochs=False,
            updates_per_epoch=1,
            **sched,
        )
        return scheduler

    # -- steps --------------------------------------------------------------------------------------------------

    def train_until_event(self, stop: StopRequest, progress: Progress) -> None:
        """Step until a validation or checkpoint is due, the images change, or a signal arrives."""
        plan, section = self.job.plan, self.job.section
        phase = plan.phase(self.step)
        source = self.job.source.resized(phase.img_size)
        self._set_size(source.image_size)
        for batch, whole in self._together(source, stop):
            self._step(batch, phase, whole)
            self.step += 1
            progress.advance(1, loss=f"{self.losses[-1]:.3f}" if self.losses else "-", size=source.image_size[0])
            if (
                self.ranks.stops(stop)
                or plan.is_due(self.step, section.eval_every)
                or plan.is_due(self.step, section.save_every)
            ):
                return
            if self.step == phase.first_step + phase.steps:
                return

    def _set_size(self, img_size: Size) -> None:
        """Make model, EMA and teacher take the images of this phase; parameters stay the optimizer's."""
        for model in (self.model, self.ema.module if self.ema is not None else None, self.job.teacher):
            if model is not None:
                set_image_size_in_training(model, img_size, f"{self.job.kind}.curriculum")

    def _together(self, source: Source, stop: StopRequest) -> Iterator[tuple[Batch, float]]:
        """This rank's batches and the weight of the batch of all ranks, as long as every rank has one."""
        batches = self._batches(source, stop)
        while True:
            batch = next(batches, None)
            rows = self.ranks.gathered(batch is None, 0.0 if batch is None else self.job.task.weight(batch))
            if batch is None or any(is_missing for is_missing, _ in rows):
                return
            yield batch, sum(weight for _, weight in rows)

    def _batches(self, source: Source, stop: StopRequest) -> Iterator[Batch]:
        """Batches from the current step to the end of its epoch; a signal ends the waiting for one."""
        epoch, start = divmod(self.step, self.job.plan.steps_per_epoch)
        return train_batches(
            source,
            batch_size=self.batch_size,
            seed=self.job.seed,
            epoch=epoch,
            start=start,
            workers=self.job.workers,
            max_wait_seconds=self.job.max_wait_seconds,
            check=lambda: stop.requested,
            part=self.ranks.rank,
            parts=self.ranks.size,
        )

    def _step(self, batch: Batch, phase: PhasePlan, whole: float) -> None:
        """A step on this rank's `batch`, of which the batch of all ranks weighs `whole`."""
        job, section = self.job, self.job.section
        set_sparsity(self.model, job.schedule.at(self.step))
        self.lr_of_phase[phase].step_update(self.step - phase.first_step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._backward_with_retries(batch, whole)
        self.ranks.sum_gradients_(list(self.model.parameters()))
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), section.clip_grad or math.inf)
        numbers = f"loss {loss} and gradient norm {float(norm)}"
        if math.isfinite(loss) and torch.isfinite(norm):
            self.bad_steps = 0
            self._update(batch, numbers)
        else:
            self._refuse_step(batch, numbers)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.model, step=self.step)
        if math.isfinite(loss):  # a step that fp16 skipped has no loss to average
            self.losses.append(loss)

    def _backward_with_retries(self, batch: Batch, whole: float) -> float:
        """Forward and backward of a step; out of memory on any rank halves the micro-batch, the step stays the same."""
        for _ in range(MAX_MEMORY_RETRIES + 1):
            loss, ran_out = 0.0, False
            try:
                loss = self._backward(batch, whole)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                ran_out = True
            rows = self.ranks.gathered(ran_out, loss)
            if not any(row[0] for row in rows):
                return sum(row[1] for row in rows)
            self.optimizer.zero_grad(set_to_none=True)
            micro = math.ceil(len(batch) / self.accumulation)
            if micro == 1:
                break
            self.accumulation *= 2
            self.reporter.warn(f"out of memory at micro-batch {micro}: going on with {math.ceil(micro / 2)}")
            if self.job.device.type == "cuda":
                torch.cuda.empty_cache()
        got = f"step {self.step} runs out of memory at micro-batch {math.ceil(len(batch) / self.accumulation)}"
        do = "Lower batch_size, or turn grad_checkpointing on."
        raise self.ranks.shared(ResourceError(f"{self.job.kind}.batch_size", got, do))

    def _backward(self, batch: Batch, whole: float) -> float:
        job, task, rank = self.job, self.job.task, self.ranks.rank
        drawn = f"step of rank {rank}" if rank else "step"  # dropout and stochastic depth
        torch.manual_seed(step_seed(job.seed, drawn, self.step))
        batch, total = batch.to(job.device), 0.0
        for part in batch.parts(math.ceil(len(batch) / self.accumulation)):
            share = task.weight(part) / whole if whole else len(part) / (len(batch) * self.ranks.size)
            if not share:  # a mean over nothing
                continue
            with self._autocast():
                losses = task.loss(self.model, part, job.section, job.teacher)
                loss = reduce(operator.add, losses.values()) * share
            self.scaler.scale(loss).backward()
            total += loss.item()
        return total

    def _autocast(self) -> Any:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.job.device.type, TORCH_DTYPE[self.precision])

    def _update(self, batch: Batch, numbers: str) -> None:
        """The optimizer's step; one that leaves weights or state that are not finite is taken back and refused.

        The copies live only here, where the activations are gone: the peak of memory stays that of the forward pass.
        """
        weights = [parameter.detach() for parameter in self.model.parameters()]
        tensors, packed = pack_optimizer(self.optimizer.state_dict())
        before = [tensor.clone() for tensor in weights], {name: tensor.clone() for name, tensor in tensors.items()}
        overflow = ""
        try:
            self.scaler.step(self.optimizer)
        except RuntimeError as error:  # a factor, such as lr times weight decay, that torch cannot hold in float32
            if "without overflow" not in str(error):
                raise
            overflow = str(error)
        if not overflow and all_finite([*weights, *pack_optimizer(self.optimizer.state_dict())[0].values()]):
            return
        for tensor, old in zip(weights, before[0], strict=True):
            tensor.copy_(old)
        self.optimizer.load_state_dict(unpack_optimizer(before[1], packed))
        self._end_training(batch, f"the step makes weights that are not finite, from {numbers}")

    def _refuse_step(self, batch: Batch, numbers: str) -> None:
        """Leave the weights as they are; end the training at once, in fp16 after a few in a row."""
        self.bad_steps += 1
        if self.scaler.is_enabled() and self.bad_steps < MAX_BAD_STEPS:
            self.scaler.step(self.optimizer)  # skips itself, and remembers to lower its scale
            return
        self._end_training(batch, numbers)

    def _end_training(self, batch: Batch, why: str) -> None:
        """Raise NonFiniteError with all that tells of the present step."""
        found = self.ranks.listed((batch.indices, ~batch.is_finite()))  # the culprits, if it was the images
        indices, is_bad = (torch.cat(each) for each in zip(*found, strict=True))
        indices = indices[is_bad] if is_bad.any() else indices
        names = ", ".join(self.job.source.sample_name(int(i)) for i in indices[:5])
        lr = self.optimizer.param_groups[0]["lr"]
        got = f"{why} at step {self.step}, lr {lr:.3g}, sparsity {self.job.schedule.at(self.step)}, files {names}"
        do = f"The weights before it are saved. Lower {self.job.kind}.lr or train in fp32, with --fresh."
        raise self.ranks.shared(NonFiniteError(self.job.kind, got, do))

    # -- validation and checkpoints -----------------------------------------------------------------------------

    @property
    def owes_validation(self) -> bool:
        """True at a step whose validation is due and not done; a resumed run begins with it."""
        is_due = self.step > 0 and self.job.plan.is_due(self.step, self.job.section.eval_every)
        return is_due and not (self.history and self.history[-1]["step"] == self.step)

    def validate(self, before_batch: Callable[[], None]) -> None:
        """Append one row of metrics, of the EMA weights where they are kept."""
        model = self.ema.module if self.ema is not None else self.model
        img_size = self.job.plan.phase(self.step - 1).img_size
        seen = self.job.source.resized(img_size).image_size
        self._set_size(seen)
        score = self.ranks.on_first(lambda: self.job.validate(model, img_size, before_batch))
        metric = self.job.task.metric
        others = {f"val_{name}": value for name, value in score.values.items() if name != metric.key}
        row: dict[str, float] = {
            "step": self.step,
            "epoch": round(self.step / self.job.plan.steps_per_epoch, 3),
            "height": seen[0],
            "width": seen[1],
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sum(self.losses) / max(1, len(self.losses)),
            "seconds": round(self.seconds, 1),
        }
        self.losses = []
        self.history.append(row | {metric.key: score.value} | others)

    def saved_on(self, work: Callable[[], None], *errors: type[BaseException]) -> None:
        """Do `work`; where one of `errors` ends it, save the present step, and only then let it pass."""
        ended: BaseException | None = None
        try:
            work()
        except errors as error:
            ended = error
        if ended is not None:  # outside of the handler: a save that fails is an error of its own
            self.save(best=False)
            raise ended

    def is_best(self) -> bool:
        """True if the newest row has the best metric of all rows at its image size."""
        newest, key = self.history[-1], self.job.task.metric.key
        size = newest["height"], newest["width"]
        rivals = [row[key] for row in self.history if (row["height"], row["width"]) == size]
        return newest[key] >= max(rivals)

    def save(self, *, best: bool) -> None:
        """Write a whole checkpoint of the current step, on the first rank."""
        self.ranks.on_first(lambda: self._save(best))

    def _save(self, best: bool) -> None:
        optimizer_tensors, optimizer_state = pack_optimizer(self.optimizer.state_dict())
        tensors: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.state_dict(), "optimizer": optimizer_tensors,
        }  # fmt: skip
        if self.ema is not None:
            tensors["ema"] = self.ema.module.state_dict()
        state = {
            "kind": self.job.kind,
            "step": self.step,
            "total_steps": self.job.plan.total_steps,
            "epoch": self.step / self.job.plan.steps_per_epoch,
            "versions": describe_versions(),
            "validation": self.job.validation_fingerprint,
            "seed": self.job.seed,
            "optimizer": optimizer_state,
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "history": self.history,
            "accumulation": self.accumulation,
            "identity": dict(self.job.identity),
            "settings": dict(self.job.settings),
        }
        save_checkpoint(
            self.job.checkpoints, self.step, tensors, state,
            keep=self.job.section.keep, best=best, warn=self.reporter.warn,
        )  # fmt: skip

    def resume(self) -> int | None:
        """Take over the newest whole checkpoint; returns its step, None where there is none."""

        def find() -> Path | None:
            remove_leftovers(self.job.checkpoints)
            return latest_checkpoint(self.job.checkpoints, self.reporter.warn)

        newest = self.ranks.on_first(find)
        saved = None if newest is None else load_checkpoint(newest, device="cpu")
        self.ranks.refuse_differing(self.job.kind, {"seed": self.job.seed, **self.job.identity})
        if newest is None or saved is None:
            return None
        with understood(newest / STATE, "Move it away, or give --fresh to start anew."):
            self._refuse_another_run(newest, saved.state)
            self._take_over(saved)
        if saved.state.get("validation") != self.job.validation_fingerprint:
            self.reporter.warn(f"{self.job.kind}: the validation data changed; earlier rows are of the old ones")
        if self.step < self.job.plan.total_steps:
            self.reporter.say(f"{self.job.kind}: going on from step {self.step} of {self.job.plan.total_steps}")
        return self.step

    def _take_over(self, saved: Checkpoint) -> None:
        """Load what a checkpoint of this very run holds. Raises one of `documents.MALFORMED` where it cannot be."""
        state: Any = saved.state
        history, losses, seconds = list(state["history"]), list(map(number, state["losses"])), number(state["seconds"])
        for row in history:
            if not row.keys() >= {*ROW, self.job.task.metric.key}:  # other values may be missing: AP of large objects
                raise ValueError(f"a row of the history holds {', '.join(map(str, row))}")
            list(map(number, row.values()))
        accumulation = operator.index(state["accumulation"])
        if not 1 <= accumulation <= self.job.section.batch_size or saved.step > self.job.plan.total_steps:
            got = f"accumulation {accumulation} of batch {self.job.section.batch_size}"
            raise ValueError(f"step {saved.step} of {self.job.plan.total_steps}, {got}")
        load_state(self.model, saved.tensors["model"], str(saved.path))
        if self.ema is not None:
            load_state(self.ema.module, saved.tensors["ema"], str(saved.path))
        self._load_optimizer(unpack_optimizer(saved.tensors["optimizer"], state["optimizer"]))
        if self.scaler.is_enabled():
            for value in state["scaler"].values():
                number(value)
            self.scaler.load_state_dict(state["scaler"])
        self.history, self.losses, self.seconds = history, losses, seconds
        self.accumulation, self.step = accumulation, saved.step

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load an optimizer's state whose settings and tensors have the kinds and shapes of ours."""
        for ours, theirs in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            keys = (ours.keys() & theirs.keys()) - {"params", "lr"}
            wrong = [key for key in keys if type(theirs[key]) is not type(ours[key])]
            if wrong:
                raise TypeError(f"the optimizer's {', '.join(sorted(wrong))}")
        self.optimizer.load_state_dict(state)
        for parameter, values in self.optimizer.state.items():
            for key, value in values.items():
                is_like = key in LIKE_PARAMETER and getattr(value, "shape", None) != parameter.shape
                if is_like or (key == "step" and not isinstance(value, (int, float)) and value.numel() != 1):
                    raise ValueError(f"the optimizer's {key} does not fit its parameter")

    def _refuse_another_run(self, path: Path, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError that names all that differs, with both values."""
        saved = {"seed": state.get("seed"), **state.get("identity", {})}
        wanted = {"seed": self.job.seed, **self.job.identity}
        compared = [key for key in wanted if key in saved or key not in ADDED]
        differing = [key for key in compared if saved.get(key) != wanted[key]]
        if not differing:
            return
        told = [f"{key.replace('_', ' ')} ({_short(saved.get(key))}, now {_short(wanted[key])})" for key in differing]
        settings = state.get("settings", {})
        told += [
            f"{name} ({_short(settings[name])}, now {_short(value)})"
            for name, value in self.job.settings.items()
            if name in settings and settings[name] != value
        ]
        got = f"it was made with another {', '.join(told)}"
        raise CheckpointError(str(path), got, "Use another experiment name, or --fresh to start anew.")


def _groups(model: nn.Module, section: LoopSection) -> Callable[[nn.Module], Any] | None:
    """timm's groups of parameters for a Swin inside of other modules, its tables of position biases without decay.

    timm asks the model alone for parameters without decay (`no_weight_decay`); None if it can tell.
    """
    if hasattr(model, "no_weight_decay"):
        return None
    exempt = {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        for parameter in (module.no_weight_decay() if hasattr(module, "no_weight_decay") else ())
    }
    shared = {"weight_decay": section.weight_decay, "no_weight_decay_list": exempt}
    if section.layer_decay is not None:
        return partial(param_groups_layer_decay, layer_decay=section.layer_decay, **shared)
    return partial(param_groups_weight_decay, **shared)


def _short(value: object) -> str:
    """A hash by its first digits, anything else in a line."""
    return repr(value)[:14] + "..." if isinstance(value, str) and len(value) == HASH_DIGITS else shown(value)
