"""A model's program as a file of any format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sparsevit_cli.reporting import Reporter
from sparsevit_cli.swin import set_sparsity

from .folder import SPARSITY, SUFFIXES, ExportScope, file_name
from .openvino_ir import save_openvino
from .programs import OneImage, UntraceableError, save_onnx, save_onnx_of_one_image, trace


@dataclass(frozen=True)
class Writer:
    """Writes the program of `model` for images of `shape` (C, H, W).

    `program` is None where torch's TorchScript exporter writes the ONNX file. `contents` are of sparsity.json; they
    stand in every file.
    """

    model: nn.Module
    program: torch.export.ExportedProgram | None
    shape: tuple[int, int, int]
    scope: ExportScope
    output_names: list[str]
    opset: int
    contents: Mapping[str, object]

    def file_name(self, name: str) -> str:
        """That of the file of format `name`."""
        return file_name(self.scope, SUFFIXES[name])

    def write(self, name: str, folder: Path) -> Path:
        """The file of format `name` in `folder`. Raises ConfigError."""
        path = folder / self.file_name(name)
        if name == "onnx":
            self._write_onnx(path)
        elif name == "openvino":
            self._write_openvino(path)
        else:
            assert self.program is not None
            torch.export.save(self.program, path, extra_files={SPARSITY: json.dumps(self.contents)})
        return path

    def _write_onnx(self, path: Path) -> None:
        names, opset, contents = self.output_names, self.opset, self.contents
        if self.program is not None:
            dynamic = not isinstance(self.model, OneImage)
            save_onnx(self.program, path, names, opset, contents, dynamic_batch=dynamic)
            return
        assert isinstance(self.model, OneImage)
        save_onnx_of_one_image(self.model, self.shape, path, names, opset, contents)

    def _write_openvino(self, path: Path) -> None:
        """From the ONNX file beside it, or from one that is made for it and removed."""
        beside = path.with_suffix(".onnx")
        if beside.exists():
            save_openvino(beside, path, self.contents)
            return
        source = path.parent / "onnx" / beside.name
        source.parent.mkdir()
        self._write_onnx(source)
        save_openvino(source, path, self.contents)
        shutil.rmtree(source.parent)

    def dense(self) -> Writer:
        """The same at ratio 0, and so is `model` from now on."""
        set_sparsity(self.model, 0)
        program = None if self.program is None else trace(self.model, self.shape, ())
        return replace(self, program=program, contents={})


def traced(
    model: nn.Module,
    shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
    formats: Sequence[str],
    reporter: Reporter,
) -> torch.export.ExportedProgram | None:
    """The traced program; None where no format needs one. Raises UntraceableError."""
    one_image = isinstance(model, OneImage)
    if not formats:
        return None
    if one_image and "pt2" not in formats:
        reporter.say("export: the model answers each image: torch's TorchScript exporter writes it, for one image")
        return None
    try:
        return trace(model, shape, batch_sizes)
    except UntraceableError as error:
        if not one_image:
            raise
        do = "Set export.formats: [onnx] for one image at a time, or export.scope: features for backbone and neck."
        raise UntraceableError("export to .pt2", error.got, do) from error
