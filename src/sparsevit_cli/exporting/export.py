"""From a sparsified model to a folder of checked files."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsevit_cli.atomic import sha256_file, write_json
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.device import device_identity
from sparsevit_cli.profiling.inputs import InputSize, image_shape, uncompiled
from sparsevit_cli.profiling.latency import Latency, measure_interleaved
from sparsevit_cli.profiling.memory import memory_errors
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.reporting import Reporter, SilentReporter
from sparsevit_cli.sparsity import SparsityConfig
from sparsevit_cli.swin import get_sparsity, set_sparsity, sparse_stages
from sparsevit_cli.windows import Partition

from .checks import Difference, checked, eager_reference, output_shapes_of
from .folder import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    SPARSITY,
    WEIGHTS,
    ModelInfo,
    check_info,
    describe_files,
    export_versions,
    publish,
    sparsity_json,
    staging_folder,
)
from .images import structured_images
from .programs import INPUT, OPSETS, check_packages, onnx_runner, save_onnx, trace

FORMATS = ("onnx", "pt2")
SIZE_NOTE = (
    "Window pruning skips computation at run time. The weights are those of the dense model: "
    "neither they nor the files get smaller."
)
_LATENCY_SECONDS, _LATENCY_ROUNDS = 1.0, 15


@dataclass(frozen=True)
class ExportedFile:
    """One exported and checked program.

    `first_differences` is empty, or what a first set of images gave before a second one agreed: two windows of
    almost equal score may swap ranks between runtimes.
    """

    format: str
    path: Path
    sha256: str
    size_bytes: int
    differences: tuple[Difference, ...]
    first_differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote. Shapes hold `batch` where any batch size goes.

    `dense_latency` and `sparse_latency` are onnxruntime's on `threads` CPU threads at batch 1; None where not measured.
    """

    directory: Path
    files: tuple[ExportedFile, ...]
    weights: Path
    sparsity_file: Path
    manifest: Path
    sparsity: SparsityConfig
    partition: Partition
    opset: int
    input_shape: tuple[int | str, ...]
    output_shapes: Mapping[str, tuple[int | str, ...]]
    tolerance: float
    threads: int
    dense_latency: Latency | None
    sparse_latency: Latency | None

    dynamic_batch: bool = True


def export_model(
    model: nn.Module,
    output_dir: Path | str,
    *,
    input_size: InputSize,
    formats: Sequence[str] = FORMATS,
    opset: int = 20,
    check_batch_sizes: Sequence[int] = (1, 3),
    tolerance: float = 1e-3,
    measure_ms: bool = True,
    seed: int = 0,
    info: ModelInfo | None = None,
    reporter: Reporter | None = None,
    patience: Patience | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> ExportReport:
    """Export a sparsified float32 model at its present ratios to `output_dir`; the model itself is not touched.

    `input_size` is a side in pixels, (H, W) or (C, H, W). Every file is run and compared with eager on seeded
    images at each of `check_batch_sizes`, on the CPU; `tolerance` bounds the difference over eager's largest value.
    `measure_ms` measures the ONNX file in onnxruntime, interleaved with the same weights at ratio 0.
    Files of an earlier export are replaced once all new ones are good, and not before; `before_step` may raise, to
    stop early.
    Raises ConfigError (settings, missing packages, a model that cannot be traced), NonFiniteError, ResourceError,
    and MeasurementError where a file disagrees with eager.
    """
    directory, reporter, info = Path(output_dir), reporter or SilentReporter(), info or ModelInfo()
    _check_settings(formats, opset, check_batch_sizes, tolerance)
    check_packages(formats)
    check_info(info)
    shape = image_shape(model, input_size)
    model = _inference_copy(model)
    sparsity = get_sparsity(model)
    outputs = eager_reference(model, shape, check_batch_sizes)
    output_shapes = output_shapes_of(outputs(seed))
    contents = sparsity_json(model, shape, info)

    with memory_errors("export"), staging_folder(directory, model) as staging:
        reporter.say(f"export: {shape[1]} x {shape[2]} pixels, sparsity {sparsity}")
        program = trace(model, shape, check_batch_sizes) if formats else None
        files = []
        for name in formats:
            before_step()
            assert program is not None
            path = staging / FILES[name]
            if name == "onnx":
                save_onnx(program, path, list(output_shapes), opset, contents)
            else:
                torch.export.save(program, path, extra_files={SPARSITY: json.dumps(contents)})
            found, first = checked(path, outputs, seed=seed, tolerance=tolerance, reporter=reporter)
            final = directory / path.name
            files.append(ExportedFile(name, final, sha256_file(path), path.stat().st_size, found, first))
        dense_latency = sparse_latency = None
        before_step()
        if measure_ms and "onnx" in formats:
            dense_latency, sparse_latency = _measure(
                model, staging, shape, opset=opset, seed=seed, reporter=reporter, patience=patience, check=before_step
            )
        elif measure_ms:
            reporter.warn("export: latency is measured on the ONNX file only, and `onnx` is not among the formats")
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in _weights(model)}
        (staging / WEIGHTS).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        write_json(staging / SPARSITY, contents)
        report = ExportReport(
            directory=directory,
            files=tuple(files),
            weights=directory / WEIGHTS,
            sparsity_file=directory / SPARSITY,
            manifest=directory / MANIFEST,
            sparsity=sparsity,
            partition=sparse_stages(model)[0].partition,
            opset=opset,
            input_shape=("batch", *shape),
            output_shapes=output_shapes,
            tolerance=tolerance,
            threads=torch.get_num_threads(),
            dense_latency=dense_latency,
            sparse_latency=sparse_latency,
        )
        before_step()
        write_json(staging / MANIFEST, _manifest(report, describe_files(staging)))
        publish(staging, directory, reporter)
    return report


def _check_settings(formats: Sequence[str], opset: int, batch_sizes: Sequence[int], tolerance: float) -> None:
    if isinstance(formats, str) or len(set(formats)) != len(formats) or not set(formats) <= set(FORMATS):
        raise ConfigError("export formats", f"{formats!r}; allowed are {', '.join(FORMATS)}", "Name each once.")
    if isinstance(opset, bool) or opset not in OPSETS:
        got = f"{opset!r}; the exporter writes {OPSETS[0]} to {OPSETS[-1]}"
        raise ConfigError("export opset", got, "Take 20 if in doubt.")
    whole = all(isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1 for batch in batch_sizes)
    if not whole or len(set(batch_sizes)) < 2:
        got = f"{tuple(batch_sizes)!r}; one batch size cannot show that the batch is free"
        raise ConfigError("export check_batch_sizes", got, "Give two different sizes, e.g. (1, 3).")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError("export tolerance", f"{tolerance!r} is not positive", "Give e.g. 1e-3.")


def _inference_copy(model: nn.Module) -> nn.Module:
    """A frozen copy on the CPU in evaluation mode. Raises ConfigError unless it is sparse and float32."""
    model = uncompiled(model)
    sparse_stages(model)
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if dtypes:
        got = f"parameters are {', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
        raise ConfigError("export", f"{got}, the files hold float32", "Call model.float() first.")
    on_cpu: dict[int, object] = {id(b): b.detach().to("cpu", copy=True) for b in model.buffers()}
    on_cpu |= {id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False) for p in model.parameters()}
    clone = copy.deepcopy(model, on_cpu).cpu().eval()  # never two copies on the accelerator
    for stage in sparse_stages(clone):
        stage.grad_checkpointing = False
    return clone


def _measure(
    model: nn.Module,
    staging: Path,
    shape: tuple[int, int, int],
    *,
    opset: int,
    seed: int,
    reporter: Reporter,
    patience: Patience | None,
    check: Callable[[], None],
) -> tuple[Latency, Latency]:
    """onnxruntime latency of the dense and the sparse program at batch 1. Leaves `model` at ratio 0."""
    sparse = onnx_runner(staging / FILES["onnx"])
    image = structured_images(shape, 1, seed)
    candidates = {"dense": lambda: sparse(image)}
    if not get_sparsity(model).is_dense:
        reporter.say("export: measuring onnxruntime latency, dense against sparse")
        path = staging / "dense" / FILES["onnx"]
        path.parent.mkdir()
        set_sparsity(model, 0)
        save_onnx(trace(model, shape, ()), path, [], opset, {})
        dense = onnx_runner(path)
        shutil.rmtree(path.parent)
        candidates = {"dense": lambda: dense(image), "sparse": lambda: sparse(image)}
    latencies = measure_interleaved(
        candidates,
        device=torch.device("cpu"),
        seconds=_LATENCY_SECONDS,
        rounds=_LATENCY_ROUNDS,
        retries=1,
        strict=False,
        patience=patience,
        before_round=check,
        seed=seed,
    )
    unsteady = [name for name, latency in latencies.items() if not latency.stable]
    if unsteady:
        reporter.warn(f"export: the latency of {' and '.join(unsteady)} did not settle; the machine is busy")
    return latencies["dense"], latencies.get("sparse", latencies["dense"])


def _manifest(report: ExportReport, files: Mapping[str, object]) -> dict[str, object]:
    _, channels, height, width = report.input_shape
    manifest: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "sparsity": report.sparsity.ratios,
        "partition": report.partition,
        "note": SIZE_NOTE,
        "input": {"name": INPUT, "shape": report.input_shape, "dtype": "float32"},
        "outputs": [{"name": name, "shape": shape} for name, shape in report.output_shapes.items()],
        "dynamic_batch": report.dynamic_batch,
        "files": files,
        "tolerance": report.tolerance,
        "checked_against_eager": {
            file.path.name: {
                "differences": [asdict(difference) for difference in file.differences],
                "first_differences": [asdict(difference) for difference in file.first_differences],
            }
            for file in report.files
        },
        "latency": None,
        "versions": export_versions(),
    }
    if any(file.format == "onnx" for file in report.files):
        sizes = {kind: f"{INPUT}:{n}x{channels}x{height}x{width}" for kind, n in (("min", 1), ("opt", 1), ("max", 8))}
        shapes = " ".join(f"--{kind}Shapes={size}" for kind, size in sizes.items())
        manifest["opset"] = report.opset
        manifest["tensorrt"] = {
            "command": f"trtexec --onnx={FILES['onnx']} --saveEngine=model.engine {shapes}",
            "tested": False,
        }
    if report.dense_latency and report.sparse_latency:
        manifest["latency"] = {
            "runtime": "onnxruntime, CPUExecutionProvider",
            "batch": 1,
            "threads": report.threads,
            "device": device_identity(torch.device("cpu")),
            "dense": _latency_json(report.dense_latency),
            "sparse": _latency_json(report.sparse_latency),
        }
    return manifest


def _latency_json(latency: Latency) -> dict[str, object]:
    """What is known; the numbers of an unsteady latency are none."""
    keys = ("median_ms", "low_ms", "high_ms", "speedup", "speedup_low", "speedup_high")
    numbers = {key: getattr(latency, key) if latency.stable else None for key in keys}
    return {**numbers, "rounds": latency.rounds, "stable": latency.stable, "unsteady": latency.unsteady}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach()) for name, tensor in model.state_dict().items())
