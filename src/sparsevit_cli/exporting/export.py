"""From a sparsified model to a folder of checked files."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsevit_cli.atomic import sha256_file, write_json
from sparsevit_cli.backbones import SwinBackbone, SwinFPN
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

from .checks import (
    Difference,
    batches,
    checked,
    eager_reference,
    output_shapes_of,
    runs_on,
    single_images,
    with_most_different_answers,
)
from .folder import (
    FORMAT_VERSION,
    FORMATS,
    MANIFEST,
    SPARSITY,
    WEIGHTS,
    ExportScope,
    ModelInfo,
    builds,
    check_info,
    describe_files,
    export_versions,
    file_name,
    publish,
    sparsity_json,
    staging_folder,
)
from .images import structured_images
from .programs import (
    INPUT,
    OPSETS,
    OneImage,
    UntraceableError,
    check_packages,
    onnx_runner,
    save_onnx,
    save_onnx_of_one_image,
    trace,
    with_fixed_outputs,
)

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
    """What `export_model` wrote. Shapes hold `batch` where any batch size goes, and `answers` for how many there are.

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
    scope: ExportScope
    info: ModelInfo

    @property
    def dynamic_batch(self) -> bool:
        """True unless the programs take one image at a time."""
        return self.input_shape[0] == "batch"


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
    scope: ExportScope = "model",
    whole: nn.Module | None = None,
    check_images: Tensor | None = None,
    reporter: Reporter | None = None,
    patience: Patience | None = None,
    before_step: Callable[[], None] = lambda: None,
) -> ExportReport:
    """Export a sparsified float32 model at its present ratios to `output_dir`; the model itself is not touched.

    The model takes images (B, C, H, W). It gives tensors, or lists and dicts of them: then the files take any batch.
    Or it answers each image by a dict of tensors, as torchvision's detectors do: then they take one image, and `onnx`
    is the only format. Of `scope` features it is the backbone and neck of `whole`, whose weights are written too.

    `input_size` is a side in pixels, (H, W) or (C, H, W). Every file is run and compared with eager on seeded
    images at each of `check_batch_sizes`, on the CPU; `tolerance` bounds the difference over eager's largest value.
    Files for one image are compared on two images, the ones with most and fewest answers among some; `check_images`
    (N, C, H, W) replaces the drawn ones.
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
    module = inference_copy(model)
    sparsity = get_sparsity(module)
    info = _buildable(module, shape, info, reporter)
    contents = sparsity_json(module, shape, info, scope)
    with runs_on((min(check_batch_sizes), *shape)):
        model = with_fixed_outputs(module, lambda batch: structured_images(shape, batch, seed), check_batch_sizes)
    one_image = isinstance(model, OneImage)
    draw = single_images(shape, check_images) if one_image else batches(shape, check_batch_sizes)
    outputs = eager_reference(model, draw, "level" if scope == "features" else "output")
    outputs = with_most_different_answers(outputs) if one_image else outputs
    output_shapes = output_shapes_of(outputs(seed), one_image)

    with memory_errors("export"), staging_folder(directory, model) as staging:
        reporter.say(f"export: {shape[1]} x {shape[2]} pixels, sparsity {sparsity}")
        program = _traced(model, shape, check_batch_sizes, formats, reporter) if formats else None
        files = []
        for name in formats:
            before_step()
            path = staging / file_name(scope, name)
            if name == "onnx":
                _save_onnx(model, program, shape, path, list(output_shapes), opset, contents)
            else:
                assert program is not None
                torch.export.save(program, path, extra_files={SPARSITY: json.dumps(contents)})
            found, first = checked(path, outputs, seed=seed, tolerance=tolerance, reporter=reporter)
            final = directory / path.name
            files.append(ExportedFile(name, final, sha256_file(path), path.stat().st_size, found, first))
        dense_latency = sparse_latency = None
        before_step()
        if measure_ms and "onnx" in formats:
            dense_latency, sparse_latency = _measure(
                model, staging / file_name(scope, "onnx"), shape, outputs(seed)[0][0][:1], opset=opset, seed=seed,
                reporter=reporter, patience=patience, check=before_step, names=list(output_shapes),
                as_program=program is not None,
            )  # fmt: skip
        elif measure_ms:
            reporter.warn("export: latency is measured on the ONNX file only, and `onnx` is not among the formats")
        weights = file_name(scope, "safetensors")
        for file, of in {WEIGHTS: whole, weights: module}.items():
            if of is not None:
                (staging / file).write_bytes(safetensors.torch.save(_weights(of), metadata={"format": "pt"}))
        write_json(staging / SPARSITY, contents)
        report = ExportReport(
            directory=directory,
            files=tuple(files),
            weights=directory / weights,
            sparsity_file=directory / SPARSITY,
            manifest=directory / MANIFEST,
            sparsity=sparsity,
            partition=sparse_stages(model)[0].partition,
            opset=opset,
            input_shape=(1 if one_image else "batch", *shape),
            output_shapes=output_shapes,
            tolerance=tolerance,
            threads=torch.get_num_threads(),
            dense_latency=dense_latency,
            sparse_latency=sparse_latency,
            scope=scope,
            info=info,
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


def _buildable(module: nn.Module, shape: tuple[int, int, int], info: ModelInfo, reporter: Reporter) -> ModelInfo:
    """`info`, with what a Swin of `build_model` says that it was built with, if nobody else says it and it is true."""
    body = module.body if isinstance(module, SwinFPN) else module
    swin = body.swin if isinstance(body, SwinBackbone) else body
    built_with = dict(getattr(swin, "built_with", {}))
    if info.name is not None or not built_with:
        return info
    named = replace(info, name=built_with.pop("name"), args=built_with)
    if builds(module, sparsity_json(module, shape, named)):
        return named
    reporter.warn("export: load_exported cannot build the model again: it is not what it was built as")
    return info


def _traced(
    model: nn.Module,
    shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
    formats: Sequence[str],
    reporter: Reporter,
) -> torch.export.ExportedProgram | None:
    """The traced program; None where torch's TorchScript exporter writes all files. Raises UntraceableError."""
    one_image = isinstance(model, OneImage)
    if one_image and set(formats) == {"onnx"}:
        reporter.say("export: the model answers each image: torch's TorchScript exporter writes it, for one image")
        return None
    try:
        return trace(model, shape, batch_sizes)
    except UntraceableError as error:
        if not one_image:
            raise
        do = "Set export.formats: [onnx] for one image at a time, or export.scope: features for backbone and neck."
        raise UntraceableError("export to .pt2", error.got, do) from error


def _save_onnx(
    model: nn.Module,
    program: torch.export.ExportedProgram | None,
    shape: tuple[int, int, int],
    path: Path,
    names: list[str],
    opset: int,
    contents: Mapping[str, object],
) -> None:
    if program is not None:
        save_onnx(program, path, names, opset, contents, dynamic_batch=not isinstance(model, OneImage))
        return
    assert isinstance(model, OneImage)
    save_onnx_of_one_image(model, shape, path, names, opset, contents)


def inference_copy(model: nn.Module) -> nn.Module:
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
    path: Path,
    shape: tuple[int, int, int],
    image: Tensor,
    *,
    names: list[str],
    as_program: bool,
    opset: int,
    seed: int,
    reporter: Reporter,
    patience: Patience | None,
    check: Callable[[], None],
) -> tuple[Latency, Latency]:
    """onnxruntime latency of the dense and the sparse program on one image. Leaves `model` at ratio 0."""
    sparse = onnx_runner(path)
    candidates = {"dense": lambda: sparse(image)}
    if not get_sparsity(model).is_dense:
        reporter.say("export: measuring onnxruntime latency, dense against sparse")
        path = path.parent / "dense" / path.name
        path.parent.mkdir()
        set_sparsity(model, 0)
        _save_onnx(model, trace(model, shape, ()) if as_program else None, shape, path, names, opset, {})
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
        "scope": report.scope,
        "task": report.info.task,
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
        shapes = "".join(f" --{kind}Shapes={size}" for kind, size in sizes.items()) if report.dynamic_batch else ""
        file, engine = file_name(report.scope, "onnx"), file_name(report.scope, "engine")
        manifest["opset"] = report.opset
        manifest["tensorrt"] = {"command": f"trtexec --onnx={file} --saveEngine={engine}{shapes}", "tested": False}
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


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state, on the CPU, no two tensors in one memory."""
    state = {name: tensor.detach().cpu() for name, tensor in uncompiled(model).state_dict().items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
