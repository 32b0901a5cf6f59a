"""An exported file in the place of the model that it was made of, once both are known to be the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sparsevit_cli.commands import LEAVE_WEIGHTS
from sparsevit_cli.config.paths import as_path, is_there
from sparsevit_cli.data.loader import eval_batches
from sparsevit_cli.data.source import Categories, Data
from sparsevit_cli.errors import CheckpointError, ConfigError
from sparsevit_cli.exporting import (
    MANIFEST,
    WEIGHTS,
    ExportFolder,
    ExportScope,
    is_export,
    named_tensors,
    open_export,
    structured_images,
)
from sparsevit_cli.profiling.inputs import model_device
from sparsevit_cli.runs import RunFolder, missing_result
from sparsevit_cli.runtimes import ProgramModule, Runtime, runtime
from sparsevit_cli.sizes import size_text
from sparsevit_cli.swin import model_depths, set_sparsity
from sparsevit_cli.swin.geometry import window_sizes

from .session import Session, Weights
from .weights import BEST, file_weights

_OTHER = "Use the configuration that it was exported with, or export again."


@dataclass(frozen=True)
class FileRun:
    """How a file was run: `precision` is its label, `sha256` that of `file`, `files` those of all that belong to it."""

    runtime: str
    version: str
    precision: str
    threads: int
    scope: ExportScope
    file: str
    sha256: str
    files: Mapping[str, str]


@dataclass(frozen=True)
class Exported:
    """An export folder, and the file of it that a runtime runs, both whole."""

    content: ExportFolder
    runtime: Runtime
    path: Path
    hashes: Mapping[str, str]
    weights: Weights


def find_exported(session: Session, name: str, typed: str | None) -> Exported:
    """The file that the runtime `name` runs: of the folder `typed`, that file itself, or of this experiment's export.

    Raises ConfigError (runtime, path, precision), CheckpointError for what is missing, damaged or of another
    configuration, as far as the folder says it.
    """
    chosen = runtime(name)
    chosen.check_installed()
    folder, file = _folder(session, typed)
    content = open_export(folder)
    path = content.file_for(chosen) if file is None else file
    if path.suffix not in chosen.suffixes:
        do = f"Give a file that ends in {' or '.join(chosen.suffixes)}, or the folder."
        raise ConfigError("--weights", f"{chosen.name} does not read {path.name}", do)
    hashes = content.verified(path)
    chosen.check_activations(content.activations_of(path))
    _check_settings(session, content)
    whole = folder / WEIGHTS
    hashes_of_weights = content.verified(whole)
    model = content.saved.model
    weights = replace(
        file_weights(whole),
        name=str(path),
        sha256=hashes_of_weights[WEIGHTS],
        categories=Categories(model.categories or (), model.category_ids),
        result=RunFolder(folder, "export").read_result() or {},
    )
    return Exported(content, chosen, path, hashes, weights)


def _folder(session: Session, typed: str | None) -> tuple[Path, Path | None]:
    """The export folder, and the file in it if one is named."""
    if typed is None:
        own = session.earlier("export")
        if not is_export(own.path):
            raise missing_result(own, "sparsevit evaluate --runtime")
        return own.path, None
    if typed in (*LEAVE_WEIGHTS, BEST):
        got = f"{typed} are trained weights, and --runtime runs an exported file"
        raise ConfigError("--weights", got, "Give the folder of an export, or leave --runtime out.")
    path = as_path(typed, "--weights")
    if not is_there(path, "--weights"):
        raise ConfigError("--weights", f"{path} is not there", "Give the folder of an export, or a file in it.")
    folder = path if path.is_dir() else path.parent
    if not is_export(folder):
        got = f"{folder} has no {MANIFEST}, so no export finished in it"
        raise CheckpointError("--weights", got, "Give the folder of an export: runs/.../export.")
    return folder, None if path.is_dir() else path


def _check_settings(session: Session, content: ExportFolder) -> None:
    """Raise CheckpointError where the export is of another task, image or preprocessing than the configuration's."""
    saved, section = content.saved, session.config.model
    channels, *size = content.image_shape
    normalisation = session.task.normalisation()
    pairs: list[tuple[str, object, object]] = [
        ("task", saved.model.task, session.task.name),
        ("image size", size_text((size[0], size[1])), size_text(session.img_size)),
        ("channels", channels, section.in_chans),
        ("importance", saved.importance, section.importance),
        ("partition", saved.partition, section.partition),
    ]
    if content.preprocessing is None and normalisation is not None:
        pairs += [
            (name, getattr(saved.model, name), of) for name, of in zip(("mean", "std"), normalisation, strict=True)
        ]
    pairs = [pair for pair in pairs if pair[1] is not None]
    if content.preprocessing is not None and (steps := session.task.preprocessing()) is not None:
        wanted = json.loads(json.dumps(steps.document()))  # tuples are lists in a file
        pairs += [(name, content.preprocessing.get(name), wanted[name]) for name in wanted]
    _refuse(content, pairs)


def _refuse(content: ExportFolder, pairs: list[tuple[str, object, object]]) -> None:
    """Raise CheckpointError where what the export has differs from the configuration's."""
    differing = [f"{name} {found}, the configuration has {wanted}" for name, found, wanted in pairs if found != wanted]
    if differing:
        raise CheckpointError(str(content.directory), f"it is of another model: {'; '.join(differing)}", _OTHER)


def set_as_exported(content: ExportFolder, model: nn.Module) -> None:
    """Set `model` to the export's ratios. Raises CheckpointError if its stages or windows are others."""
    saved = content.saved
    windows = saved.windows or window_sizes(model)
    _refuse(content, [("depths", saved.depths, model_depths(model)), ("windows", windows, window_sizes(model))])
    set_sparsity(model, saved.sparsity)


def with_file(session: Session, exported: Exported, model: nn.Module, data: Data) -> FileRun:
    """Let the file compute its part of `model`, and run it on the first validation sample.

    `model` has weights and ratios of the folder. Raises CheckpointError (another model, a file that does not run),
    ConfigError (a model that never runs the file), DataError (images of another size), NonFiniteError.
    """
    content, task = exported.content, session.task
    like = _answers(content, task.exported_features(model) if content.scope == "features" else model)
    program = exported.runtime.load(exported.path, activations=content.activations_of(exported.path))
    module = ProgramModule(
        program, like, name=str(exported.path), shape=content.image_shape, one_image=not content.any_batch
    )
    if content.scope == "features":
        task.replace_features_(model, module)
    else:
        task.replace_model_(model, module)
    first = next(eval_batches(data.val, 1, subset=[0])).to(session.device)
    with torch.inference_mode():
        model(first.inputs)
    if not module.runs:
        got = f"the model of task {task.name} gives an answer without running the {content.scope} that was exported"
        raise ConfigError("evaluate --runtime", got, "Export the other scope: export.scope.")
    if not isinstance(first.inputs, torch.Tensor) and task.images_in(first.inputs) is not None:
        session.reporter.warn(
            "evaluate: where an image does not fill its canvas, the file computes the padding; PyTorch leaves it out"
        )
    return FileRun(
        runtime=program.runtime,
        version=program.version,
        precision=content.label_of(exported.path),
        threads=program.threads,
        scope=content.scope,
        file=str(exported.path),
        sha256=exported.hashes[exported.path.name],
        files=exported.hashes,
    )


def _answers(content: ExportFolder, module: nn.Module) -> object:
    """What `module` gives for one image. Raises CheckpointError if names or shapes are not those of the export."""
    image = structured_images(content.image_shape, 1, seed=0).to(model_device(module))
    with torch.inference_mode():
        given = module(image)
    like: object = given if content.any_batch else dict(given[0])
    found = {name: tuple(tensor.shape) for name, tensor in named_tensors(like, content.prefix)}
    wanted = content.outputs
    same = list(found) == list(wanted) and all(
        len(shape) == len(wanted[name])
        and all(side == other for side, other in zip(shape, wanted[name], strict=True) if isinstance(other, int))
        for name, shape in found.items()
    )
    if not same:
        told, asked = (", ".join(f"{name} {shape}" for name, shape in each.items()) for each in (wanted, found))
        got = f"it is of another model: its outputs are {told}; the configuration's are {asked}"
        raise CheckpointError(str(content.directory), got, _OTHER)
    return like
