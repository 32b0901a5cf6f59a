"""export: the finetuned model at the winner's ratios, as files for other runtimes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from sparsevit_cli.config.loading import section_hash
from sparsevit_cli.documents import read_json
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.exporting import ExportReport, ModelInfo, export_model
from sparsevit_cli.runs import RunFolder
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import model_depths, set_sparsity

from .ratios import ratios_of_weights
from .session import Session
from .weights import chosen_weights

KEPT = ("config.yaml", "env.json", "command.txt", "log.txt")
"""Files of an export folder that belong to no single export."""


@dataclass(frozen=True)
class ExportSummary:
    """Where the files are and how they were checked."""

    folder: RunFolder
    weights: str
    config: SparsityConfig
    report: ExportReport

    def document(self) -> dict[str, Any]:
        """The JSON document of `sparsevit export --json`."""
        return {
            "schema_version": 2,
            "folder": str(self.folder.path),
            "weights": self.weights,
            "ratios": self.config.ratios,
            **read_json(self.report.manifest),
        }


def check_exportable(session: Session) -> None:
    """Raise ConfigError for a task whose model takes anything but one tensor of images (B, C, H, W)."""
    inputs = session.task.example(session.img_size, 1)
    if not (isinstance(inputs, Tensor) and inputs.ndim == 4):
        name, kind = session.task.name, type(inputs).__name__
        got = f"the model of task {name} takes a {kind}, and files take one tensor of images"
        raise ConfigError("export", got, "Export a part of it from Python: sparsevit_cli.export_model.")


def export_settings(session: Session) -> str:
    """Hash of what an export depends on besides weights and ratios."""
    return section_hash(session.config, "export", "task", "model")


def export_winner(session: Session, *, weights: str | None = None, ratios: str | None = None) -> ExportSummary:
    """Export the last trained weights (or `weights`: a command or a path) at `ratios` as typed, else the winner's.

    Raises MeasurementError where an exported file does not agree with PyTorch; nothing is left of it then.
    """
    check_exportable(session)
    section = session.config.export
    trained = chosen_weights(session, weights, "sparsevit export")
    model = session.model(trained.categories, trained).eval()
    config = ratios_of_weights(session, model_depths(model), ratios, trained)
    folder = session.folder("export")
    set_sparsity(model, config)
    # A copy: the export replaces its files only once the new ones are good.
    folder.set_aside(
        [path.name for path in folder.path.iterdir() if path.name not in KEPT], session.reporter, copy=True
    )
    name, arguments = session.task.timm_model(trained.like) or (None, {})
    mean, std = session.task.normalisation() or (None, None)
    report = export_model(
        model,
        folder.path,
        input_size=(session.config.model.in_chans, *session.img_size),
        formats=section.formats,
        opset=section.opset,
        check_batch_sizes=section.check_batch_sizes,
        tolerance=section.tolerance,
        measure_ms=section.latency,
        seed=session.config.seed,
        info=ModelInfo(name=name, args=arguments, categories=trained.categories.names or None, mean=mean, std=std),
        reporter=session.reporter,
        patience=session.patience,
        before_step=partial(session.stop.check, "export", "an earlier export is as it was"),
    )
    folder.write_result(
        {
            "weights": trained.told,
            "weights_sha256": trained.sha256,
            "ratios": config.ratios,
            "settings": export_settings(session),
            "manifest": report.manifest.name,
        },
        files=[*read_json(report.manifest)["files"], report.manifest.name],
    )
    return ExportSummary(folder, trained.told, config, report)
