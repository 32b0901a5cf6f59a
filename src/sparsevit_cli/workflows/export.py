"""export: the finetuned model at the winner's ratios, as files for other runtimes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.data.source import Data
from sparsevit_cli.documents import read_json
from sparsevit_cli.errors import ConfigError, SparseViTError
from sparsevit_cli.exporting import (
    ExportReport,
    ModelInfo,
    UntraceableError,
    check_answers,
    export_model,
    resolved_activations,
)
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.runtimes import Activations
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity

from .eight_bits import AS_BEFORE, EightBits, Quantiser
from .exported_part import Part, exported_part
from .latency_budget import BudgetCheck, check_budget
from .ratios import ratios_of_weights
from .session import Session, Weights
from .weights import chosen_weights

KEPT = ("config.yaml", "env.json", "command.txt", "log.txt")
"""Files of an export folder that belong to no single export."""
CHECK_IMAGES = 8
"""Validation images on which a model of one image may be checked."""


@dataclass(frozen=True)
class ExportSummary:
    """Where the files are and how they were checked."""

    folder: RunFolder
    weights: str
    config: SparsityConfig
    report: ExportReport
    eight_bits: Mapping[str, EightBits] = field(default_factory=dict)
    """What eight bits did to each file that has them, by its name."""
    budget: BudgetCheck | None = None
    """Whether the file keeps the latency budget of the search, if that is a program's."""

    def document(self) -> dict[str, Any]:
        """The JSON document of `sparsevit export --json`."""
        return {
            "schema_version": 2,
            "folder": str(self.folder.path),
            "weights": self.weights,
            "ratios": self.config.ratios,
            "budget": None if self.budget is None else self.budget.document(),
            **read_json(self.report.manifest),
        }


def check_exportable(session: Session, model: nn.Module) -> None:
    """Raise ConfigError for what `export_winner` would refuse, as far as that is known without tracing."""
    _checked_activations(session, exported_part(session, model))


def _checked_activations(session: Session, part: Part) -> Activations:
    """What the files of `part` are computed in. Raises ConfigError for settings that do not go with it."""
    section = session.config.export
    activations = resolved_activations(section.precision, section.activations, section.formats)
    check_answers(part.one_image, section.precision)
    if part.one_image and "pt2" in section.formats:
        got = f"pt2, but the model of task {session.task.name} gives as many answers as it finds: .pt2 cannot hold that"
        do = "Set export.formats: [onnx] for one image at a time, or export.scope: features for backbone and neck."
        raise ConfigError("export.formats", got, do)
    return activations


def export_settings(session: Session) -> str:
    """Hash of what an export depends on besides weights and ratios."""
    of_data = ("data",) if session.config.export.precision == "int8" else ()  # calibration, and the score that judges
    return section_hash(session.config, "export", "task", "model", *of_data)


def export_winner(session: Session, *, weights: str | None = None, ratios: str | None = None) -> ExportSummary:
    """Export the last trained weights (or `weights`: a command or a path) at `ratios` as typed, else the winner's.

    Raises MeasurementError where an exported file does not agree with PyTorch; nothing is left of it then.
    """
    trained = chosen_weights(session, weights, "sparsevit export")
    model = session.model(trained.categories, trained).eval()
    part = exported_part(session, model)
    config = ratios_of_weights(session, model_depths(model), ratios, trained)
    activations = _checked_activations(session, part)
    data = session.data(trained) if session.config.export.precision == "int8" else None
    folder = session.folder("export")
    set_sparsity(model, config)
    # A copy: the export replaces its files only once the new ones are good.
    folder.set_aside(
        [path.name for path in folder.path.iterdir() if path.name not in KEPT], session.reporter, copy=True
    )
    try:
        report, eight_bits = _export(session, part, model, folder, trained, data, activations)
    except UntraceableError as error:
        if part.unless is None:
            raise
        session.reporter.warn(f"export: {error.got}: backbone and neck are exported, not the whole model")
        part = Part("features", part.unless)
        report, eight_bits = _export(session, part, model, folder, trained, data, activations)
    result = {
        "weights": trained.told,
        "weights_sha256": trained.sha256,
        "ratios": config.ratios,
        "settings": export_settings(session),
        "manifest": report.manifest.name,
        "scope": report.scope,
        **({"seed": trained.result["seed"]} if trained.result.get("seed") is not None else {}),
    }
    files = [*read_json(report.manifest)["files"], report.manifest.name]
    folder.write_result(result, files)
    budget = check_budget(session, config)  # now that nothing can be lost: a busy machine, or Ctrl-C, costs no export
    if budget is not None:
        folder.write_result({**result, "budget": budget.document()}, files)
        if not budget.kept:
            session.reporter.warn(f"export: {budget.told}")
    return ExportSummary(folder, trained.told, config, report, eight_bits, budget)


def _export(
    session: Session,
    part: Part,
    model: nn.Module,
    folder: RunFolder,
    trained: Weights,
    data: Data | None,
    activations: Activations,
) -> tuple[ExportReport, Mapping[str, EightBits]]:
    """The files; with `data`, which precision int8 needs, also what eight bits did."""
    section = session.config.export
    quantiser = None
    if data is not None:
        quantiser = Quantiser(session, model, data, part.scope, activations)
    report = export_model(
        part.module,
        folder.path,
        input_size=(session.config.model.in_chans, *session.img_size),
        formats=section.formats,
        opset=section.opset,
        precision=section.precision,
        activations=section.activations,
        calibration=() if quantiser is None else quantiser.images,
        quantise=quantiser,
        check_batch_sizes=section.check_batch_sizes,
        tolerance=section.tolerance,
        measure_ms=section.latency,
        info=_info(session, part, trained),
        preprocessing=session.task.preprocessing(),
        scope=part.scope,
        whole=model if part.scope == "features" else None,
        check_images=_images(session, trained) if part.one_image else None,
        reporter=session.reporter,
        patience=session.patience,
        before_step=partial(session.stop.check, "export", AS_BEFORE),
        **session.measuring,
    )
    return report, {} if quantiser is None else quantiser.found


def _info(session: Session, part: Part, trained: Weights) -> ModelInfo:
    """What sparsity.json tells of the model: how timm builds it, if the task says it, and what its images are."""
    task = session.task
    mean, std = task.normalisation() or (None, None)
    built = task.timm_model(trained.like) if part.scope == "model" else None
    name, args = built or (None, {})
    return ModelInfo(name, args, task.name, trained.categories.names or None, trained.categories.ids, mean, std)


def _images(session: Session, trained: Weights) -> Tensor | None:
    """Validation images (N, C, H, W) to check a model on that finds nothing in drawn ones; None if there are none."""
    try:
        source = session.data(trained).val
        inputs, _ = source.collate([source[number] for number in range(min(CHECK_IMAGES, len(source)))], None)
    except SparseViTError as error:
        session.reporter.say(f"export: checked on drawn images: {error.got}")
        return None
    images = session.task.images_in(inputs)
    if images is None or tuple(images.shape[2:]) != session.img_size:
        session.reporter.say("export: checked on drawn images: those of validation have another size")
        return None
    return images
