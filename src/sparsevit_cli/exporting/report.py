"""What an export tells: of its files, their checks, their latency; and the manifest that says so in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.profiling.device import device_identity
from sparsevit_cli.profiling.latency import Latency
from sparsevit_cli.runtimes import Activations, Precision
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.windows import Partition

from .checks import Difference, Lowered
from .folder import FORMAT_VERSION, SUFFIXES, ExportScope, ModelInfo, export_versions, file_name
from .precision import IN_EIGHT_BITS, LOWERING
from .programs import INPUT

SIZE_NOTE = (
    "Window pruning skips computation at run time. The weights are those of the dense model: "
    "neither they nor the files get smaller."
)
SERVING_VERSION = 2
"""Version 1 has the files of `programs` without their precision."""


@dataclass(frozen=True)
class ExportedFile:
    """One exported and checked program.

    `first_differences` is empty, or what a first set of images gave before a second one agreed: two windows of
    almost equal score may swap ranks between runtimes. Both are of float32. `lowered` is of the file as it is served
    if that is in less, else None.
    """

    format: str
    path: Path
    sha256: str
    size_bytes: int
    differences: tuple[Difference, ...]
    first_differences: tuple[Difference, ...] = ()
    lowered: Lowered | None = None


@dataclass(frozen=True)
class RuntimeLatency:
    """Dense and sparse program in one runtime, measured in turns at batch 1 on `threads` CPU threads."""

    runtime: str
    version: str
    activations: Activations
    threads: int
    dense: Latency
    sparse: Latency

    def document(self) -> dict[str, object]:
        """As JSON has it."""
        return {
            "runtime": f"{self.runtime}, {'CPUExecutionProvider' if self.runtime == 'onnxruntime' else 'CPU'}",
            "version": self.version,
            "activations": self.activations,
            "batch": 1,
            "threads": self.threads,
            "device": device_identity(torch.device("cpu")),
            "dense": _latency_json(self.dense),
            "sparse": _latency_json(self.sparse),
        }


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote. Shapes hold `batch` where any batch size goes, and `answers` for how many there are.

    `latencies` has one entry for each runtime that was measured. `eight_bits` tells of each format that has them:
    calibration, score before and after, windows that change, layers that stay in float. `onnx` tells opset and
    operators of the ONNX file.
    """

    directory: Path
    files: tuple[ExportedFile, ...]
    weights: Path
    sparsity_file: Path
    manifest: Path
    serving: Path
    sparsity: SparsityConfig
    partition: Partition
    opset: int
    precision: Precision
    activations: Activations
    input_shape: tuple[int | str, ...]
    output_shapes: Mapping[str, tuple[int | str, ...]]
    tolerance: float
    latencies: tuple[RuntimeLatency, ...]
    eight_bits: Mapping[str, Any] | None
    onnx: Mapping[str, Any] | None
    scope: ExportScope
    info: ModelInfo
    preprocessing: Preprocessing | None

    @property
    def dynamic_batch(self) -> bool:
        """True unless the programs take one image at a time."""
        return self.input_shape[0] == "batch"

    def inputs_and_outputs(self) -> dict[str, object]:
        """Names and shapes, as JSON has them."""
        return {
            "input": {"name": INPUT, "shape": self.input_shape, "dtype": "float32"},
            "outputs": [{"name": name, "shape": shape} for name, shape in self.output_shapes.items()],
        }


def manifest_json(report: ExportReport, files: Mapping[str, object]) -> dict[str, object]:
    """Content of manifest.json; `files` is of `describe_files`."""
    _, channels, height, width = report.input_shape
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "scope": report.scope,
        "task": report.info.task,
        "sparsity": report.sparsity.ratios,
        "partition": report.partition,
        "precision": report.precision,
        "activations": report.activations,
        "note": SIZE_NOTE,
        **report.inputs_and_outputs(),
        "dynamic_batch": report.dynamic_batch,
        "files": files,
        "tolerance": report.tolerance,
        "checked_against_eager": {file.path.name: _checks_json(file) for file in report.files},
        "latencies": [latency.document() for latency in report.latencies],
        "int8": report.eight_bits,
        "onnx": report.onnx,
        "versions": export_versions(),
    }
    if report.onnx is not None:
        sizes = {kind: f"{INPUT}:{n}x{channels}x{height}x{width}" for kind, n in (("min", 1), ("opt", 1), ("max", 8))}
        shapes = "".join(f" --{kind}Shapes={size}" for kind, size in sizes.items()) if report.dynamic_batch else ""
        file, engine = file_name(report.scope, "onnx"), file_name(report.scope, "engine")
        manifest["opset"] = report.opset
        manifest["tensorrt"] = {"command": f"trtexec --onnx={file} --saveEngine={engine}{shapes}", "tested": False}
    return manifest


def _checks_json(file: ExportedFile) -> dict[str, object]:
    found: dict[str, object] = {
        "differences": [asdict(difference) for difference in file.differences],
        "first_differences": [asdict(difference) for difference in file.first_differences],
    }
    return found if file.lowered is None else {**found, "lowered": asdict(file.lowered)}


def _latency_json(latency: Latency) -> dict[str, object]:
    """What is known; the numbers of an unsteady latency are none."""
    keys = ("median_ms", "low_ms", "high_ms", "speedup", "speedup_low", "speedup_high")
    numbers = {key: getattr(latency, key) if latency.stable else None for key in keys}
    return {**numbers, "rounds": latency.rounds, "stable": latency.stable, "unsteady": latency.unsteady}


def serving_json(report: ExportReport) -> dict[str, object]:
    """Content of serving.json: enough to serve from, without torch and without this package."""
    info = report.info
    return {
        "format": SERVING_VERSION,
        "task": info.task,
        "scope": report.scope,
        "programs": {file.format: _program(report, file.format) for file in report.files},
        **report.inputs_and_outputs(),
        "preprocessing": None if report.preprocessing is None else report.preprocessing.document(),
        "categories": info.categories,
        "category_ids": info.category_ids,
    }


def _program(report: ExportReport, kind: str) -> dict[str, str]:
    """The file of a format, and what it is computed in: of an export in less than float32 not all files are."""
    lowered = kind == LOWERING or (report.precision == "int8" and kind in IN_EIGHT_BITS)
    return {
        "file": file_name(report.scope, SUFFIXES[kind]),
        "precision": report.precision if lowered else "fp32",
        "activations": report.activations if kind == LOWERING else "fp32",
    }
