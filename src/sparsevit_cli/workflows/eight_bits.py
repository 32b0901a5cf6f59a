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
from sparsevit_cli.exporting.openvino_ir import changed_windows
from sparsevit_cli.exporting.precision import IN_EIGHT_BITS, activations_of
from sparsevit_cli.exporting.quantization import LayerError, layer_errors, quantize
from sparsevit_cli.runtimes import Activations, ProgramModule, runtime_for, slow_in_int8
from sparsevit_cli.tasks.task import Metric, Score

from .paired import Change, PairedScorer, change
from .session import Session
from .training import score

RANKING_IMAGES = 8
"""Calibration images on which the layers are ranked by their errors."""
WINDOW_IMAGES = 128
"""Validation images on which changed windows are counted, at most."""
AS_BEFORE = "an earlier export is as it was"


@dataclass(frozen=True)
class EightBits:
    """What eight bits did to a model, the same exported graph in float32 against int8, in the runtime.

    Of `kept` windows of `window_images` validation images int8 keeps `changed` others.
    `in_float` are the layers that were kept out because too much was lost, those that cost most first; `without` is
    the change with all layers in eight bits then.
    """

    metric: Metric
    calibration_images: int
    change: Change
    kept: int
    changed: int
    window_images: int
    in_float: tuple[LayerError, ...] = ()
    without: Change | None = None

    def document(self) -> dict[str, Any]:
        """As manifest.json has it."""
        return {
            "calibration_images": self.calibration_images,
            "metric": self.metric.key,
            **self.change.document(),
            "windows": {"kept": self.kept, "changed": self.changed, "images": self.window_images},
            "in_float": [layer.name for layer in self.in_float],
            "before_accuracy_control": None if self.without is None else self.without.document(),
        }

    def lines(self, name: str) -> list[str]:
        """For people; `name` is that of the file."""
        found = [f"{name} in int8: {told(self.change, self.metric)}"]
        if self.without is not None:
            names = ", ".join(layer.name for layer in self.in_float)
            found.append(f"with all layers in eight bits: {told(self.without, self.metric)}")
            found.append(f"{len(self.in_float)} layers that cost most stay in float: {names}")
        if self.kept:
            found.append(
                f"{self.changed} of {self.kept} kept windows are others in int8 ({self.changed / self.kept:.2%}), "
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


def passes_told(session: Session, images: int) -> str:
    """How often int8 scores the validation data: that takes most of its time."""
    formats = [name for name in IN_EIGHT_BITS if name in session.config.export.formats]
    return (
        f"{images:,} validation images are scored {1 + len(formats)} times, in fp32 and in int8 for "
        f"{' and '.join(formats)}; once more for each step in which layers stay in float"
    )


class _TakenError(Exception):
    """Raised to leave a forward pass once the exported part was called: what follows is not needed."""


class Deployed:
    """A copy of a model that runs an exported file in the place of the part that it was exported from.

    While `taking` is a list, what the part gets is put there, and nothing is computed.
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
        program = runtime_for(path).load(path, activations=activations)
        self._module = ProgramModule(program, self._like, name=path.name, shape=self._shape)

    def unload(self) -> None:
        """Let the file go: while it is mapped, Windows neither writes nor renames it."""
        self._module = None

    def _run(self, images: Tensor) -> Any:
        if self.taking is None:
            assert self._module is not None, "no file is loaded"
            return self._module(images)
        if tuple(images.shape[1:]) == self._shape:
            self.taking.append(images.detach().float().cpu())
        raise _TakenError

    def input_of(self, source: Source, sample: int) -> Tensor:
        """What the part gets for a sample of `source`: an image (1, C, H, W).

        Of a detector that is what its backbone gets, padded. Of sliding windows it is one of those that come first,
        another one for another sample. Raises DataError for one that cannot be read, and one that never reaches the
        part at the size that the file takes.
        """
        session = self.session
        session.stop.check("export", AS_BEFORE)
        found = self.taking = []
        try:
            with suppress(_TakenError), torch.inference_mode():
                self.model(next(eval_batches(source, 1, subset=[sample])).to(session.device).inputs)
        finally:
            self.taking = None
        if not found:
            _, height, width = self._shape
            got = f"{source.sample_name(sample)} is not {height} x {width} pixels at the model"
            raise DataError(
                "data: images for eight bits", got, "Evaluate at model.img_size, or export in fp32 or bf16."
            )
        number = sample % len(found[0])
        return found[0][number : number + 1].clone(memory_format=torch.contiguous_format)

    def score(self, path: Path, activations: Activations, source: Source, title: str) -> tuple[Score, PairedScorer]:
        """Score of a file on all samples of `source`, and what its standard error needs."""
        session = self.session
        self.load(path, activations)
        scorer = PairedScorer(session.task, partial(session.task.scorer, source, session.device))
        check = partial(session.stop.check, "export", AS_BEFORE)
        with session.reporter.progress(title, -(-len(source) // session.config.data.eval_batch_size)) as progress:
            return score(session, self.model, source, progress=progress, before_batch=check, scorer=scorer), scorer


class Inputs(Sequence[Tensor]):
    """What the exported part gets for samples of a source, read whenever it is asked for: 128 images may be 3 GB."""

    def __init__(self, deployed: Deployed, source: Source, samples: Sequence[int]) -> None:
        self.deployed, self.source, self.samples = deployed, source, samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Inputs(self.deployed, self.source, self.samples[index])
        return self.deployed.input_of(self.source, self.samples[index])


class Quantiser:
    """Writes exported files in eight bits, and judges each by the score of the whole model in its runtime.

    `images` are the calibration images. `found` tells what eight bits did to each file that was written, by its name.
    What `scope` exports of `model` is what the files hold. OpenVINO computes in `activations` what has no eight bits.
    """

    def __init__(
        self, session: Session, model: nn.Module, data: Data, scope: ExportScope, activations: Activations
    ) -> None:
        """Read the calibration images once. Raises DataError if there are none, or one cannot be read."""
        self.session, self.data, self.activations = session, data, activations
        count = min(session.config.export.calibration_images, len(data.search))
        if not count:
            got = "the search split, which is held out of the training images, is empty"
            raise DataError("data: images for eight bits", got, "Add training images, or export in fp32 or bf16.")
        if slow := slow_in_int8():
            session.reporter.warn(f"export: {slow}")
        self.deployed = Deployed(session, model, scope)
        chosen = fixed_subset(len(data.search), count, session.config.seed)
        self.images = Inputs(self.deployed, data.search, chosen)
        with session.reporter.progress("calibration images", count) as progress:
            for _ in self.images:
                progress.advance()
        self.found: dict[str, EightBits] = {}
        self._before: tuple[Score, PairedScorer] | None = None

    def __call__(self, source: Path, target: Path) -> dict[str, Any]:
        """Write `source`, in float32, as `target`, and tell what manifest.json says.

        Raises MeasurementError if more than `export.max_loss` is lost whatever stays in float.
        """
        try:
            told_of = self._judged(source, target)
        finally:
            self.deployed.unload()
        self.found[source.name] = told_of
        return told_of.document()

    def _judged(self, source: Path, target: Path) -> EightBits:
        metric, say = self.session.task.metric, self.session.reporter.say
        before = self._in_float(source)
        without: Change | None
        without = found = self._tried(source, target, (), before)
        in_float: tuple[LayerError, ...] = ()
        if self._lost_too_much(found):
            say(f"export: {told(found, metric)}; {self._allowed}: looking for the layers that cost most")
            ranked = self._ranked(source)
            while self._lost_too_much(found):
                number = 2 * len(in_float) or 1
                if number >= len(ranked):
                    got = (
                        f"{told(found, metric)}, with {len(in_float)} of {len(ranked)} layers in float; {self._allowed}"
                    )
                    raise MeasurementError("export.precision int8", got, "Set export.precision: bf16, or allow more.")
                in_float = ranked[:number]
                found = self._tried(source, target, in_float, before)
                say(f"export: {len(in_float)} layers in float: {told(found, metric)}")
        kept, changed, counted = self._windows(source, target)
        without = without if in_float else None
        return EightBits(metric, len(self.images), found, kept, changed, counted, in_float, without)

    def _in_float(self, source: Path) -> tuple[Score, PairedScorer]:
        """The score of the first file stands for all: each was compared with eager, and it is the same graph."""
        if self._before is None:
            self.session.reporter.say(f"export: {passes_told(self.session, len(self.data.val))}")
            self._before = self.deployed.score(source, "fp32", self.data.val, f"{source.name} in fp32")
        return self._before

    @property
    def _allowed(self) -> str:
        return f"{self.session.config.export.max_loss:g} may be lost (export.max_loss)"

    def _lost_too_much(self, found: Change) -> bool:
        return -found.difference > self.session.config.export.max_loss

    def _check(self) -> None:
        self.session.stop.check("export", AS_BEFORE)

    def _tried(
        self, source: Path, target: Path, in_float: Sequence[LayerError], before: tuple[Score, PairedScorer]
    ) -> Change:
        self.session.reporter.say(f"export: NNCF quantises {source.name} on {len(self.images)} images")
        names = [layer.name for layer in in_float]
        self.deployed.unload()
        quantize(source, target, self.images, in_float=names, check=self._check)
        after = self.deployed.score(
            target, activations_of(target, self.activations), self.data.val, f"{target.name} in int8"
        )
        return change(self.session.task, before, after)

    def _ranked(self, source: Path) -> tuple[LayerError, ...]:
        """All layers, those that cost most first."""
        errors = layer_errors(source, self.images[:RANKING_IMAGES], self.images, check=self._check)
        return tuple(sorted(errors, key=lambda layer: -layer.error))

    def _windows(self, source: Path, target: Path) -> tuple[int, int, int]:
        """Windows that the float file keeps, how many the other one does not, and over how many images.

        OpenVINO ranks those of both formats: it reads ONNX files too.
        """
        samples = fixed_subset(len(self.data.val), min(WINDOW_IMAGES, len(self.data.val)), self.session.config.seed)
        images = Inputs(self.deployed, self.data.val, samples)
        kept, changed = changed_windows(source, images, activations_of(target, self.activations), target)
        return kept, changed, len(images)
