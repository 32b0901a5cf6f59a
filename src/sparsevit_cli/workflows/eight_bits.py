"""int8: an exported OpenVINO file quantised on images of the training split, and scored before and after.

Where more than `export.max_loss` is lost, the layers that cost most stay in float. They are ranked on calibration
images. How many of them stay is decided by the score on the validation data.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli.data.loader import eval_batches
from sparsevit_cli.data.source import Data, Source
from sparsevit_cli.data.splits import fixed_subset
from sparsevit_cli.errors import DataError, MeasurementError
from sparsevit_cli.exporting import ExportScope, structured_images
from sparsevit_cli.exporting.quantization import LayerError, layer_errors, quantize
from sparsevit_cli.exporting.rankings import ChangedWindows, Rankings, changed_windows
from sparsevit_cli.runtimes import Activations, ProgramModule, runtime
from sparsevit_cli.tasks.task import Metric, Score

from .paired import Change, PairedScorer, change
from .session import Session
from .training import score

RANKING_IMAGES = 8
"""Calibration images on which the layers are ranked by their errors."""
WINDOW_IMAGES = 128
"""Validation images on which changed windows are counted, at most."""
KEPT = "an earlier export is as it was"


@dataclass(frozen=True)
class EightBits:
    """What eight bits did to a model, the same exported graph in float32 against int8, in the runtime.

    `in_float` are the layers that were kept out because too much was lost, those that cost most first; `without` is
    the change with all layers in eight bits then.
    """

    metric: Metric
    calibration_images: int
    change: Change
    windows: ChangedWindows
    window_images: int
    in_float: tuple[LayerError, ...] = ()
    without: Change | None = None

    def document(self) -> dict[str, Any]:
        """As manifest.json has it."""
        return {
            "calibration_images": self.calibration_images,
            "metric": self.metric.key,
            **self.change.document(),
            "windows": {"kept": self.windows.kept, "changed": self.windows.changed, "images": self.window_images},
            "in_float": [layer.name for layer in self.in_float],
            "before_accuracy_control": None if self.without is None else self.without.document(),
        }

    def lines(self) -> list[str]:
        """For people."""
        found = [f"int8: {told(self.change, self.metric)}"]
        if self.without is not None:
            names = ", ".join(layer.name for layer in self.in_float)
            found.append(f"with all layers in eight bits: {told(self.without, self.metric)}")
            found.append(f"{len(self.in_float)} layers that cost most stay in float: {names}")
        if self.windows.kept:
            found.append(
                f"{self.windows.share:.2%} of the kept windows change: {self.windows.changed} of {self.windows.kept}, "
                f"over {self.window_images} images"
            )
        return found


def told(found: Change, metric: Metric) -> str:
    """`top-1 93.14 % in fp32, 94.00 % in int8: +0.86, standard error 0.60 (paired over 350 images)`"""
    unit = f" {metric.unit}".rstrip()
    moved = f"{found.difference:+.{metric.digits}f}"
    error = (
        "standard error not known"
        if found.standard_error is None
        else f"standard error {found.standard_error:.{metric.digits}f} ({found.method})"
    )
    return (
        f"{metric.label} {metric.text(found.before.value)}{unit} in fp32, {metric.text(found.after.value)}{unit} "
        f"in int8: {moved}, {error}"
    )


class _TakenError(Exception):
    """Raised to leave a forward pass once the exported part was called: what follows is not needed."""


class Deployed:
    """A copy of a model that runs an exported file in the place of the part that it was exported from.

    `program` may be changed. While `taking` is a list, what the part gets is put there, and nothing is computed.
    """

    def __init__(self, session: Session, model: nn.Module, scope: ExportScope) -> None:
        self.session, self.scope = session, scope
        self.model = copy.deepcopy(model).eval()
        self.taking: list[Tensor] | None = None
        task = session.task
        part = task.exported_features(self.model) if scope == "features" else self.model
        shape = (session.config.model.in_chans, *session.img_size)
        image = structured_images(shape, 1, seed=0).to(session.device)
        with torch.inference_mode():
            like = part(image)
        self._shape, self._like = shape, like
        self._module: ProgramModule | None = None
        (task.replace_features_ if scope == "features" else task.replace_model_)(self.model, self._run)

    def load(self, path: Path, activations: Activations) -> None:
        """Run this file from now on."""
        program = runtime("openvino").load(path, activations=activations)
        self._module = ProgramModule(program, self._like, name=path.name, shape=self._shape)

    def _run(self, images: Tensor) -> Any:
        if self.taking is None:
            assert self._module is not None, "no file is loaded"
            return self._module(images)
        if tuple(images.shape[1:]) == self._shape:
            self.taking.append(images[:1].detach().float().cpu().contiguous())
        raise _TakenError

    def inputs(self, source: Source, subset: Sequence[int], title: str) -> list[Tensor]:
        """What the part gets for samples of `source`: images (1, C, H, W), one of each.

        Of a detector that is what its backbone gets, padded; of sliding windows the first one. Raises DataError for
        samples that cannot be read, and for those that never reach the part at the size that the file takes.
        """
        session, data = self.session, self.session.config.data
        found = self.taking = []
        batches = eval_batches(
            source, 1, data.workers, subset, max_wait_seconds=data.max_wait_seconds,
            check=lambda: session.stop.requested,
        )  # fmt: skip
        try:
            with session.reporter.progress(title, len(subset)) as progress, torch.inference_mode():
                for batch in batches:
                    with suppress(_TakenError):
                        self.model(batch.to(session.device).inputs)
                    progress.advance()
        finally:
            self.taking = None
        session.stop.check("export", KEPT)
        if len(found) < len(subset):
            _, height, width = self._shape
            got = f"{len(subset) - len(found)} of {len(subset)} images are not {height} x {width} pixels at the model"
            raise DataError(
                "data: images for eight bits", got, "Evaluate at model.img_size, or export in fp32 or bf16."
            )
        return found

    def score(self, path: Path, activations: Activations, source: Source, title: str) -> tuple[Score, PairedScorer]:
        """Score of a file on all samples of `source`, and what its standard error needs."""
        session = self.session
        self.load(path, activations)
        scorer = PairedScorer(session.task, partial(session.task.scorer, source, session.device))
        check = partial(session.stop.check, "export", KEPT)
        with session.reporter.progress(title, -(-len(source) // session.config.data.eval_batch_size)) as progress:
            return score(session, self.model, source, progress=progress, before_batch=check, scorer=scorer), scorer


def quantise_export(
    session: Session,
    model: nn.Module,
    data: Data,
    source: Path,
    target: Path,
    *,
    scope: ExportScope,
    activations: Activations,
) -> EightBits:
    """Write `source`, an OpenVINO file in float32, as `target` in eight bits, and tell what that did to the score.

    `source` is what `scope` exports of `model`. What has no eight bits is computed in `activations`. Raises DataError
    (nothing to calibrate on, unreadable images), MeasurementError if more than `export.max_loss` is lost whatever
    stays in float.
    """
    section, reporter, metric = session.config.export, session.reporter, session.task.metric
    check = partial(session.stop.check, "export", KEPT)
    count = min(section.calibration_images, len(data.search))
    if not count:
        got = "the search split, which is held out of the training images, is empty"
        raise DataError("data: images for eight bits", got, "Add training images, or export in fp32 or bf16.")
    deployed = Deployed(session, model, scope)
    chosen = fixed_subset(len(data.search), count, session.config.seed)
    images = deployed.inputs(data.search, chosen, "calibration images")
    before = deployed.score(source, "fp32", data.val, "file in fp32")

    def tried(in_float: Sequence[LayerError]) -> Change:
        reporter.say(f"export: NNCF quantises {source.name} on {count} images")
        quantize(source, target, images, in_float=[layer.name for layer in in_float], check=check)
        return change(session.task, before, deployed.score(target, activations, data.val, "file in int8"))

    without = found = tried(())
    in_float: tuple[LayerError, ...] = ()
    if -found.difference > section.max_loss:
        allowed = f"{section.max_loss:g} may be lost (export.max_loss)"
        reporter.warn(f"export: {told(found, metric)}; {allowed}: looking for the layers that cost most")
        errors = layer_errors(source, images[:RANKING_IMAGES], images, check=check)
        ranked = sorted(errors, key=lambda layer: -layer.error)
        number = 1
        while -found.difference > section.max_loss:
            if number >= len(ranked):
                got = f"{told(found, metric)}, with {len(in_float)} of {len(ranked)} layers in float"
                raise MeasurementError(
                    "export.precision int8", got, "Set export.precision: bf16, or raise export.max_loss."
                )
            in_float, number = tuple(ranked[:number]), 2 * number
            found = tried(in_float)
            reporter.say(f"export: {len(in_float)} layers in float: {told(found, metric)}")
    windows, counted = _windows(session, deployed, data.val, source, target, activations)
    return EightBits(metric, count, found, windows, counted, in_float, without if in_float else None)


def _windows(
    session: Session, deployed: Deployed, source: Source, float_file: Path, file: Path, activations: Activations
) -> tuple[ChangedWindows, int]:
    """How many windows the file keeps that the float file does not, and over how many images."""
    rankings = Rankings(float_file, "fp32"), Rankings(file, activations)
    found = ChangedWindows(0, 0)
    if not rankings[0].counts:
        return found, 0
    samples = fixed_subset(len(source), min(WINDOW_IMAGES, len(source)), session.config.seed)
    for images in deployed.inputs(source, samples, "kept windows"):
        session.stop.check("export", KEPT)
        found += changed_windows(*rankings, images)
    return found, len(samples)
