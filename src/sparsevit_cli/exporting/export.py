"""From a sparsified model to a folder of checked files."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparsevit_cli.atomic import sha256_file, write_json
from sparsevit_cli.backbones import SwinBackbone, SwinFPN
from sparsevit_cli.data.preprocessing import Preprocessing
from sparsevit_cli.errors import ConfigError
from sparsevit_cli.profiling.inputs import InputSize, image_shape, uncompiled
from sparsevit_cli.profiling.memory import memory_errors
from sparsevit_cli.profiling.neighbours import Patience
from sparsevit_cli.reporting import Reporter, SilentReporter
from sparsevit_cli.runtimes import Activations, Precision
from sparsevit_cli.swin import get_sparsity, sparse_stages

from .checks import (
    Lowered,
    Reference,
    batches,
    checked,
    checked_lowered,
    eager_reference,
    output_shapes_of,
    runs_on,
    single_images,
    with_most_different_answers,
)
from .folder import (
    DEFAULT_FORMATS,
    FORMATS,
    MANIFEST,
    SERVING,
    SPARSITY,
    WEIGHTS,
    ExportScope,
    ModelInfo,
    builds,
    check_info,
    describe_files,
    file_name,
    output_prefix,
    publish,
    sparsity_json,
    staging_folder,
)
from .images import structured_images
from .latency import MEASURED, measured_latency
from .light import random_images
from .precision import IN_EIGHT_BITS, ActivationsAsked, activations_of, resolved_activations
from .programs import OPSET, OPSETS, OneImage, check_packages, describe_onnx, with_fixed_outputs
from .quantization import Quantise, quantize
from .report import ExportedFile, ExportReport, RuntimeLatency, manifest_json, serving_json
from .writing import Writer, traced


def export_model(
    model: nn.Module,
    output_dir: Path | str,
    *,
    input_size: InputSize,
    formats: Sequence[str] = DEFAULT_FORMATS,
    opset: int = OPSET,
    precision: Precision = "fp32",
    activations: ActivationsAsked = "auto",
    calibration: Sequence[Tensor] = (),
    quantise: Quantise | None = None,
    check_batch_sizes: Sequence[int] = (1, 3),
    tolerance: float = 1e-3,
    measure_ms: bool = True,
    seed: int = 0,
    info: ModelInfo | None = None,
    preprocessing: Preprocessing | None = None,
    scope: ExportScope = "model",
    whole: nn.Module | None = None,
    check_images: Tensor | None = None,
    reporter: Reporter | None = None,
    patience: Patience | None = None,
    max_spread: float = 0.10,
    retries: int = 1,
    before_step: Callable[[], None] = lambda: None,
) -> ExportReport:
    """Export a sparsified float32 model at its present ratios to `output_dir`; the model itself is not touched.

    The model takes images (B, C, H, W). It gives tensors, or lists and dicts of them: then the files take any batch.
    Or it answers each image by a dict of tensors, as torchvision's detectors do: then they take one image, `pt2` is
    refused, and so is another `precision` than fp32. Of `scope` features it is the backbone and neck of `whole`, whose
    weights are written too.

    `input_size` is a side in pixels, (H, W) or (C, H, W). Every file is run and compared with eager on seeded
    images at each of `check_batch_sizes`, on the CPU; `tolerance` bounds the difference over eager's largest value.
    Files for one image are compared on two images, the ones with most and fewest answers among some; `check_images`
    (N, C, H, W) replaces the drawn ones. `precision` and `activations` say what OpenVINO computes in; such a file is
    compared in float32 first, and then in what it will be served in (`checked_lowered`). With int8 it is replaced by
    one in eight bits then, which is compared with eager too: `calibration` images (1, C, H, W) tell the ranges of
    activations. `quantise` does that, and judges the result; what it returns stands in the manifest. By default
    `quantization.quantize` does.
    `measure_ms` measures the files in ONNX Runtime and OpenVINO, in turns with the same weights at ratio 0; `patience`,
    `max_spread` and `retries` are those of `measure_interleaved`.
    `preprocessing` goes into serving.json.
    Files of an earlier export are replaced once all new ones are good, and not before; `before_step` may raise, to
    stop early.
    Raises ConfigError (settings, missing packages, a model that cannot be traced), NonFiniteError, ResourceError,
    and MeasurementError where a file disagrees with eager.
    """
    directory, reporter, info = Path(output_dir), reporter or SilentReporter(), info or ModelInfo()
    _check_settings(formats, opset, check_batch_sizes, tolerance, precision, calibration)
    check_packages(formats)
    computed_in = resolved_activations(precision, activations, formats)
    calibrated = partial(_quantised, images=calibration, check=before_step)
    check_info(info)
    shape = image_shape(model, input_size)
    module = inference_copy(model)
    sparsity = get_sparsity(module)
    _check_scores(module, formats)
    info = _buildable(module, shape, info, reporter)
    contents = sparsity_json(module, shape, info, scope)
    with runs_on((min(check_batch_sizes), *shape)):
        model = with_fixed_outputs(module, lambda batch: structured_images(shape, batch, seed), check_batch_sizes)
    one_image = isinstance(model, OneImage)
    check_answers(one_image, precision)
    draw = single_images(shape, check_images) if one_image else batches(shape, check_batch_sizes)
    outputs = eager_reference(model, draw, output_prefix(scope))
    outputs = with_most_different_answers(outputs) if one_image else outputs
    output_shapes = output_shapes_of(outputs(seed), one_image)

    with memory_errors("export"), staging_folder(directory, model) as staging:
        reporter.say(f"export: {shape[1]} x {shape[2]} pixels, sparsity {sparsity}")
        program = traced(model, shape, check_batch_sizes, formats, reporter)
        writer = Writer(model, program, shape, scope, list(output_shapes), opset, contents)
        files = []
        for name in (name for name in FORMATS if name in formats):  # OpenVINO's is made from the ONNX file
            before_step()
            path = writer.write(name, staging)
            lowered_to = activations_of(path, computed_in) if precision == "bf16" else "fp32"
            files.append(_checked_file(name, path, outputs, lowered_to, seed, tolerance, reporter))
        before_step()
        eight_bits: Mapping[str, Any] | None = None
        if precision == "int8":
            look = partial(checked_lowered, outputs=outputs, seed=seed, reporter=reporter)
            files, eight_bits = _rounded(files, quantise or calibrated, computed_in, look)
        files = [replace(_sized(file), path=directory / file.path.name) for file in files]
        before_step()
        latencies: tuple[RuntimeLatency, ...] = ()
        if measure_ms:
            lower = partial(_quantised, images=random_images(shape), check=before_step) if precision == "int8" else None
            measure = partial(
                measured_latency, image=outputs(seed)[0][0][:1], seed=seed, reporter=reporter, check=before_step,
                patience=patience, max_spread=max_spread, retries=retries,
            )  # fmt: skip
            latencies = _latencies(writer, formats, staging, computed_in, lower, reporter, measure)
        weights = file_name(scope, "safetensors")
        _write_weights(staging, {WEIGHTS: whole, weights: module})
        write_json(staging / SPARSITY, contents)
        report = ExportReport(
            directory=directory,
            files=tuple(files),
            weights=directory / weights,
            sparsity_file=directory / SPARSITY,
            manifest=directory / MANIFEST,
            serving=directory / SERVING,
            sparsity=sparsity,
            partition=sparse_stages(model)[0].partition,
            opset=opset,
            precision=precision,
            activations=computed_in,
            input_shape=(1 if one_image else "batch", *shape),
            output_shapes=output_shapes,
            tolerance=tolerance,
            latencies=latencies,
            eight_bits=eight_bits,
            onnx=describe_onnx(staging / file_name(scope, "onnx")) if "onnx" in formats else None,
            scope=scope,
            info=info,
            preprocessing=preprocessing,
        )
        write_json(staging / SERVING, serving_json(report))
        before_step()
        write_json(staging / MANIFEST, manifest_json(report, describe_files(staging)))
        publish(staging, directory, reporter)
    return report


def _check_scores(module: nn.Module, formats: Sequence[str]) -> None:
    random = sparse_stages(module)[0].importance == "random"
    if "openvino" in formats and random and not get_sparsity(module).is_dense:
        got = "openvino, and the scores `random` are whole numbers of 64 bits, which OpenVINO's CPU plug-in cuts to 32"
        raise ConfigError("export.formats", got, "Set model.importance to mean_abs_l2 or l2, or export onnx or pt2.")


def check_answers(one_image: bool, precision: str) -> None:
    """Raise ConfigError for a model of one image that is to be rounded."""
    if one_image and precision != "fp32":
        got = f"{precision}, but the model answers each image: rounding changes how many answers there are"
        raise ConfigError("export.precision", got, "Export backbone and neck (export.scope: features), or fp32.")


def _checked_file(
    name: str,
    path: Path,
    outputs: Reference,
    computed_in: Activations,
    seed: int,
    tolerance: float,
    reporter: Reporter,
) -> ExportedFile:
    """A written file that agrees with eager in float32, and in what it is served in. Raises MeasurementError."""
    found, first = checked(path, outputs, seed=seed, tolerance=tolerance, reporter=reporter)
    lowered = None
    if computed_in != "fp32":
        lowered = checked_lowered(path, outputs, seed=seed, activations=computed_in, reporter=reporter)
    return ExportedFile(name, path, "", 0, found, first, lowered)


def _sized(file: ExportedFile) -> ExportedFile:
    """With hash and size of what stands there now."""
    beside = file.path.with_suffix(".bin") if file.format == "openvino" else None
    size = file.path.stat().st_size + (beside.stat().st_size if beside else 0)
    return replace(file, sha256=sha256_file(file.path), size_bytes=size)


def _quantised(source: Path, target: Path, *, images: Sequence[Tensor], check: Callable[[], None]) -> dict[str, Any]:
    """Quantise without a judgement."""
    quantize(source, target, images, check=check)
    return {"calibration_images": len(images)}


def _rounded(
    files: Sequence[ExportedFile], quantise: Quantise, computed_in: Activations, look: Callable[..., Lowered]
) -> tuple[list[ExportedFile], dict[str, Mapping[str, Any]]]:
    """The files, those that can be in eight bits, and what `quantise` tells by format. `look` is `checked_lowered`."""
    found: list[ExportedFile] = []
    told: dict[str, Mapping[str, Any]] = {}
    for file in files:
        if file.format not in IN_EIGHT_BITS:
            found.append(file)
            continue
        seen = partial(look, exact=file.path, activations=activations_of(file.path, computed_in))
        told[file.format], lowered = _replaced(file.path, quantise, seen)
        found.append(replace(file, lowered=lowered))
    return found, told


def _replaced(
    path: Path, quantise: Quantise, look: Callable[[Path], Lowered] | None = None
) -> tuple[Mapping[str, Any], Lowered | None]:
    """Put a file of eight bits, and all that belongs to it, in the place of a file and what belonged to that.

    Returns what `quantise` tells, and what `look` sees in the new file while the old one is there.
    """
    folder = path.parent / "int8"
    folder.mkdir()
    told = quantise(path, folder / path.name)
    lowered = None if look is None else look(folder / path.name)
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # weights of a large ONNX file
    for made in folder.iterdir():
        made.replace(path.parent / made.name)
    folder.rmdir()
    return told, lowered


def _latencies(
    writer: Writer,
    formats: Sequence[str],
    staging: Path,
    computed_in: Activations,
    lower: Quantise | None,
    reporter: Reporter,
    measure: Callable[..., RuntimeLatency],
) -> tuple[RuntimeLatency, ...]:
    """Dense against sparse of each format of MEASURED that was written. Leaves the model at ratio 0.

    `lower` makes a dense file of eight bits, if the sparse one is such: on drawn images, for it is for the clock alone.
    """
    measured = [name for name in MEASURED if name in formats]
    if not measured:
        reporter.warn(f"export: latency is measured of {' and '.join(MEASURED)} files, and neither is written")
        return ()
    sparse = {name: staging / writer.file_name(name) for name in measured}
    dense: dict[str, Path] = {}
    if not get_sparsity(writer.model).is_dense:
        folder = staging / "dense"
        folder.mkdir()
        writer = writer.dense()
        dense = {name: writer.write(name, folder) for name in measured}
        if lower is not None:
            reporter.say("export: the dense model is quantised too, to be measured")
            for path in dense.values():
                _replaced(path, lower)
    found = tuple(
        measure(sparse[name], dense.get(name), activations=activations_of(sparse[name], computed_in))
        for name in measured
    )
    if dense:
        shutil.rmtree(folder)
    return found


def _check_settings(
    formats: Sequence[str],
    opset: int,
    batch_sizes: Sequence[int],
    tolerance: float,
    precision: Precision,
    calibration: Sequence[Tensor],
) -> None:
    if isinstance(formats, str) or len(set(formats)) != len(formats) or not set(formats) <= set(FORMATS):
        raise ConfigError("export formats", f"{formats!r}; allowed are {', '.join(FORMATS)}", "Name each once.")
    if isinstance(opset, bool) or opset not in OPSETS:
        got = f"{opset!r}; the exporter writes {OPSETS[0]} to {OPSETS[-1]}"
        raise ConfigError("export opset", got, f"Take {OPSET} if in doubt.")
    whole = all(isinstance(batch, int) and not isinstance(batch, bool) and batch >= 1 for batch in batch_sizes)
    if not whole or len(set(batch_sizes)) < 2:
        got = f"{tuple(batch_sizes)!r}; one batch size cannot show that the batch is free"
        raise ConfigError("export check_batch_sizes", got, "Give two different sizes, e.g. (1, 3).")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise ConfigError("export tolerance", f"{tolerance!r} is not positive", "Give e.g. 1e-3.")
    if precision == "int8" and not calibration:
        raise ConfigError("export calibration", "there is no image to calibrate on", "Give images as the model gets.")


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


def _write_weights(folder: Path, models: Mapping[str, nn.Module | None]) -> None:
    for name, model in models.items():
        if model is not None:
            (folder / name).write_bytes(safetensors.torch.save(_weights(model), metadata={"format": "pt"}))


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state, on the CPU, no two tensors in one memory."""
    state = {name: tensor.detach().cpu() for name, tensor in uncompiled(model).state_dict().items()}
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
