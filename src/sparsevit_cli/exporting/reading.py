"""An export folder read back to run its files: what they compute, which one a runtime takes, and if they are whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sparsevit_cli.documents import read_json, understood
from sparsevit_cli.errors import CheckpointError
from sparsevit_cli.runtimes import Activations, Precision, Runtime, precision_label

from .folder import (
    AGAIN,
    MANIFEST,
    SERVING,
    SPARSITY,
    ExportScope,
    SparsityFile,
    file_name,
    load_sparsity,
    output_prefix,
    verify,
)
from .precision import activations_of


@dataclass(frozen=True)
class ExportFolder:
    """What a folder's manifest.json, sparsity.json and serving.json say.

    `input_shape` is (B, C, H, W), `outputs` are the shapes by name in the files' order; their first dimension is text
    where it is free. `any_batch` is false if the files take one image at a time. `hashes` are SHA-256 by file name.
    """

    directory: Path
    saved: SparsityFile
    scope: ExportScope
    precision: Precision
    activations: Activations
    any_batch: bool
    input_shape: tuple[int | str, ...]
    outputs: Mapping[str, tuple[int | str, ...]]
    hashes: Mapping[str, str]
    preprocessing: Mapping[str, object] | None = None
    """That of serving.json (`Preprocessing.document`); None if the folder is older, or nobody said it."""

    def activations_of(self, path: Path) -> Activations:
        """What a runtime is asked to compute in for a file: `precision` and `activations` are those of the `.xml`."""
        return activations_of(path, self.activations)

    def label_of(self, path: Path) -> str:
        """Precision of a file as tables have it: `int8+bf16`."""
        rounded = self.precision == "int8" and path.suffix != ".pt2"
        return precision_label("int8" if rounded else "fp32", self.activations_of(path))

    @property
    def prefix(self) -> str:
        """How the names of its outputs begin."""
        return output_prefix(self.scope)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = map(int, self.input_shape[1:])
        return channels, height, width

    def file_for(self, runtime: Runtime) -> Path:
        """The file that a runtime reads, whether it is still there or not. Raises CheckpointError if there is none."""
        names = [file_name(self.scope, suffix.removeprefix(".")) for suffix in runtime.suffixes]
        for name in names:
            if name in self.hashes:
                return self.directory / name
        got = f"{runtime.name} reads {' or '.join(names)}; it holds {', '.join(self.hashes)}"
        raise CheckpointError(str(self.directory), got, "Export that format too (export.formats), or choose a runtime.")

    def verified(self, path: Path) -> dict[str, str]:
        """SHA-256 by name of a file and of those that belong to it, compared with the manifest.

        Raises CheckpointError where one is missing or damaged.
        """
        parts = {".xml": [path.with_suffix(".bin").name], ".onnx": [f"{path.name}.data"]}.get(path.suffix, [])
        names = [path.name, *(name for name in parts if name in self.hashes or path.suffix == ".xml")]
        verify(self.directory, names)
        return {name: self.hashes[name] for name in names}


def is_export(path: Path) -> bool:
    """True for a folder that an export finished in."""
    return (path / MANIFEST).is_file()


def open_export(directory: Path) -> ExportFolder:
    """Read a folder's manifest.json, sparsity.json and serving.json. Raises CheckpointError."""
    path = directory / MANIFEST
    manifest = read_json(path, AGAIN)
    verify(directory, (SPARSITY,))
    saved = load_sparsity(directory)
    with understood(path, AGAIN):
        serving: Any = {}
        if SERVING in manifest["files"]:
            verify(directory, (SERVING,))
            serving = read_json(directory / SERVING, AGAIN)
        precision: Any = manifest.get("precision", "fp32")
        activations: Any = manifest.get("activations", "fp32")
        if precision not in get_args(Precision) or activations not in get_args(Activations):
            raise ValueError(f"precision {precision!r} with activations {activations!r}")
        found = ExportFolder(
            directory=directory,
            saved=saved,
            scope=saved.scope,
            precision=precision,
            activations=activations,
            any_batch=bool(manifest["dynamic_batch"]),
            input_shape=tuple(manifest["input"]["shape"]),
            outputs={str(output["name"]): tuple(output["shape"]) for output in manifest["outputs"]},
            hashes={str(name): str(entry["sha256"]) for name, entry in manifest["files"].items()},
            preprocessing=serving.get("preprocessing"),
        )
        _ = found.image_shape
    return found
