"""Files for other runtimes: fixed ratios, fixed height and width, any batch size; checked before they are called good.

    model.onnx         torch.onnx (dynamo), opset as asked; weights inside, or beside it where they are large
    model.pt2          torch.export
    model.safetensors  the weights under timm's names; sparsity.json: ratios and what builds the model
    manifest.json      shapes, hashes, differences to eager, latency; written last: without it a folder is not whole

Everything is made and checked in a hidden folder and moved into place at the end.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import math
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .atomic import TEMPORARY, disk_errors, failpoint, remove_leftovers, sha256_file, sync_folder, write_json
from .errors import CheckpointError, ConfigError, MeasurementError, NonFiniteError, SparseViTError
from .profiling.device import describe_versions, device_identity
from .profiling.inputs import InputSize, image_shape, uncompiled
from .profiling.latency import Latency, measure_interleaved
from .profiling.memory import is_out_of_memory, memory_errors
from .reporting import Reporter, SilentReporter
from .sparsity import SparsityConfig
from .swin import get_sparsity, model_depths, set_sparsity, sparse_stages, sparsify_
from .windows import IMPORTANCES, Importance

FORMATS = ("onnx", "pt2")
OPSETS = range(18, 26)
MANIFEST, WEIGHTS, SPARSITY = "manifest.json", "model.safetensors", "sparsity.json"
SIZE_NOTE = (
    "Window pruning skips computation at run time. The weights are those of the dense model: "
    "neither they nor the files get smaller."
)

_FILE = {"onnx": "model.onnx", "pt2": "model.pt2"}
_ONNX_DATA = "model.onnx.data"
_NAMES = (*_FILE.values(), _ONNX_DATA, WEIGHTS, SPARSITY)
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INPUT = "image"
_FORMAT_VERSION = 1
_LATENCY_SECONDS, _LATENCY_ROUNDS = 1.0, 15
_BUILD_ARGS = (
    "img_size in_chans num_classes embed_dim depths num_heads head_dim window_size patch_size mlp_ratio qkv_bias "
    "global_pool drop_rate drop_path_rate strict_img_size always_partition features_only out_indices"
)  # what a sparsity.json may hand to timm: nothing that downloads, or loads a pickle

Runner = Callable[[Tensor], list[Tensor]]
"""Images (B, C, H, W) to the outputs, in order."""
Reference = Callable[[int], list[tuple[Tensor, dict[str, Tensor]]]]
"""Seed to pairs, one per batch size to check: images, and eager's outputs by name."""


@dataclass(frozen=True)
class ModelInfo:
    """What sparsity.json tells about the model besides its weights; all of it optional.

    `name` and `args` build it with timm.create_model; `mean` and `std` normalise images in 0-1, per channel.
    """

    name: str | None = None
    args: Mapping[str, object] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


@dataclass(frozen=True)
class SparsityFile:
    """Content of a sparsity.json. `img_size` is (H, W) in pixels."""

    sparsity: SparsityConfig
    depths: tuple[int, ...]
    importance: Importance
    img_size: tuple[int, int]
    model: ModelInfo
    versions: Mapping[str, str]
    windows: tuple[tuple[int, int], ...] = ()
    """Of each stage, (height, width) in tokens; empty in files of before 2026-11-22."""


@dataclass(frozen=True)
class Difference:
    """Distance of a file's outputs from eager's at one batch size; `relative` to eager's largest absolute value.

    Each is the largest over all outputs.
    """

    batch: int
    absolute: float
    relative: float


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
    _check_info(info)
    shape = image_shape(model, input_size)
    model = _inference_copy(model)
    sparsity = get_sparsity(model)
    outputs = _reference(model, shape, check_batch_sizes)
    output_shapes = _output_shapes(outputs(seed))
    contents = _sparsity_json(model, shape, info)

    with memory_errors("export"), _staging(directory, model) as staging:
        reporter.say(f"export: {shape[1]} x {shape[2]} pixels, sparsity {sparsity}")
        program = _trace(model, shape, check_batch_sizes) if formats else None
        files = []
        for name in formats:
            before_step()
            assert program is not None
            path = staging / _FILE[name]
            if name == "onnx":
                _save_onnx(program, path, list(output_shapes), opset, contents)
            else:
                torch.export.save(program, path, extra_files={SPARSITY: json.dumps(contents)})
            found, first = _checked(path, outputs, seed=seed, tolerance=tolerance, reporter=reporter)
            final = directory / path.name
            files.append(ExportedFile(name, final, sha256_file(path), path.stat().st_size, found, first))
        dense_latency = sparse_latency = None
        before_step()
        if measure_ms and "onnx" in formats:
            dense_latency, sparse_latency = _measure(model, staging, shape, opset=opset, seed=seed, reporter=reporter)
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
            opset=opset,
            input_shape=("batch", *shape),
            output_shapes=output_shapes,
            tolerance=tolerance,
            threads=torch.get_num_threads(),
            dense_latency=dense_latency,
            sparse_latency=sparse_latency,
        )
        before_step()
        _publish(staging, directory, report, reporter)
    return report


def load_sparsity(path: Path | str) -> SparsityFile:
    """Read a sparsity.json, or the one of an export folder. Raises CheckpointError."""
    path = Path(path)
    path = path / SPARSITY if path.is_dir() else path
    parsed = _read_json(path)
    try:
        if parsed["format"] != _FORMAT_VERSION:
            got = f"format {parsed['format']!r}, this version reads {_FORMAT_VERSION}"
            raise CheckpointError(str(path), got, "Read it with the version of sparsevit-cli that wrote it.")
        depths = tuple(int(depth) for depth in parsed["depths"])
        height, width = (int(side) for side in parsed["img_size"])
        if parsed["importance"] not in IMPORTANCES:
            raise ValueError(f"importance {parsed['importance']!r}")
        model = parsed["model"]
        return SparsityFile(
            sparsity=SparsityConfig.from_ratios(parsed["ratios"], depths),
            depths=depths,
            importance=parsed["importance"],
            img_size=(height, width),
            model=ModelInfo(
                name=model["name"],
                args={key: tuple(arg) if isinstance(arg, list) else arg for key, arg in model["args"].items()},
                **{key: None if model[key] is None else tuple(model[key]) for key in ("class_names", "mean", "std")},
            ),
            versions=dict(parsed["versions"]),
            windows=tuple((int(height), int(width)) for height, width in parsed.get("windows", ())),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        got = f"is not a sparsity file ({type(error).__name__}: {error})"
        raise CheckpointError(str(path), got, _AGAIN) from error


def load_exported(directory: Path | str) -> nn.Module:
    """Build the model of an export folder with timm, load its weights and set its ratios; in evaluation mode.

    The weights are checked against the manifest. Raises CheckpointError where a file is missing, damaged or does
    not fit, or where the export was made without the model's name.
    """
    import timm

    directory = Path(directory)
    _verify(directory, (WEIGHTS, SPARSITY))
    saved = load_sparsity(directory)
    if saved.model.name is None:
        raise CheckpointError(
            str(directory / SPARSITY), "holds no model name", "Build the model, then load its weights."
        )
    strange = sorted(set(saved.model.args) - set(_BUILD_ARGS.split()))
    if strange or not saved.model.name.startswith(("swin_", "swinv2_")):
        got = f"asks timm for {saved.model.name!r} with {strange or 'known arguments'}"
        raise CheckpointError(str(directory / SPARSITY), got, "Build the model yourself, then load its weights.")
    try:
        args = {"img_size": saved.img_size, **saved.model.args}
        if saved.windows and saved.model.name.startswith("swinv2_"):  # no weight of theirs tells the window
            args["window_size"] = saved.windows
        model: nn.Module = timm.create_model(saved.model.name, pretrained=False, **args)
        model.load_state_dict(safetensors.torch.load_file(directory / WEIGHTS))
    except Exception as error:
        got = f"does not load into {saved.model.name} ({_first_line(error)})"
        raise CheckpointError(str(directory / WEIGHTS), got, _AGAIN) from error
    set_sparsity(sparsify_(model, importance=saved.importance), saved.sparsity)
    return model.eval()


def structured_images(shape: tuple[int, int, int], batch: int, seed: int) -> Tensor:
    """Images (B, C, H, W) whose windows differ: smooth ground, three textured blobs each, a little noise.

    Plain noise gives all windows almost the same score, and then runtimes may rank them differently. A function
    of the arguments alone.
    """
    channels, height, width = shape
    rng = torch.Generator().manual_seed(1009 * seed + batch)
    x = 0.1 * torch.randn(batch, *shape, generator=rng)
    for cells, strength in ((3, 0.5), (11, 0.3)):
        coarse = strength * torch.randn(batch, channels, cells, cells, generator=rng)
        x += F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    rows, cols = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)
    for _ in range(3):
        row, col, size, pitch = (torch.rand(batch, 1, 1, 1, generator=rng) for _ in range(4))
        blob = torch.exp(-((rows - row) ** 2 + (cols - col) ** 2) / (0.05 + 0.15 * size) ** 2)
        x += 2 * blob * torch.sin((40 + 80 * pitch) * (rows + 0.6 * cols))
    return x


# -- before anything is written -----------------------------------------------------------------------------------


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


def check_packages(formats: Sequence[str]) -> None:
    """Raise ConfigError where a package that writes one of `formats` is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None] if "onnx" in formats else []
    if missing:
        got = f"{', '.join(missing)} not installed"
        raise ConfigError("export to ONNX", got, 'Type: pip install "sparsevit-cli[export]", or export pt2 only.')


def _check_info(info: ModelInfo) -> None:
    try:
        json.dumps(asdict(info), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "export info", f"does not fit into JSON ({error})", "Give plain numbers and texts."
        ) from error


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


def _reference(model: nn.Module, shape: tuple[int, int, int], batch_sizes: Sequence[int]) -> Reference:
    """Eager's outputs, computed once per seed. The function raises ConfigError, NonFiniteError, ResourceError."""

    @lru_cache
    def of_seed(seed: int) -> list[tuple[Tensor, dict[str, Tensor]]]:
        pairs = []
        for batch in batch_sizes:
            images = structured_images(shape, batch, seed)
            try:
                with torch.no_grad(), memory_errors(f"forward of {tuple(images.shape)}"):
                    outputs = dict(_flatten(model(images)))
            except SparseViTError:
                raise
            except Exception as error:
                got = f"the model does not run on {tuple(images.shape)} ({_first_line(error)})"
                raise ConfigError("export input size", got, "Give the size that the model was built for.") from error
            bad = [name for name, output in outputs.items() if not output.isfinite().all()]
            if bad:
                got = f"{bad[0]} of the model has NaN or infinite values on a check image"
                raise NonFiniteError("export", got, "Export weights that give finite outputs.")
            pairs.append((images, outputs))
        return pairs

    return of_seed


def _flatten(output: object, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a model's output, in the order of torch's pytrees: a tensor, or lists and dicts of them."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, (list, tuple, Mapping)):
        parts = output.items() if isinstance(output, Mapping) else enumerate(output)
        for key, part in parts:
            yield from _flatten(part, f"{name}_{key}")
    else:
        got = f"the model returns a {type(output).__name__}"
        raise ConfigError("export", got, "Wrap the model so that it returns tensors, or lists or dicts of them.")


def _output_shapes(pairs: Sequence[tuple[Tensor, dict[str, Tensor]]]) -> dict[str, tuple[int | str, ...]]:
    """Shape of every output; `batch` where two batch sizes give two lengths."""
    (_, one), (_, other) = min(pairs, key=lambda pair: len(pair[0])), max(pairs, key=lambda pair: len(pair[0]))
    return {
        name: tuple(a if a == b else "batch" for a, b in zip(one[name].shape, other[name].shape, strict=True))
        for name in one
    }


def _sparsity_json(model: nn.Module, shape: tuple[int, int, int], info: ModelInfo) -> dict[str, object]:
    return {
        "format": _FORMAT_VERSION,
        "ratios": get_sparsity(model).ratios,
        "depths": model_depths(model),
        "importance": sparse_stages(model)[0].importance,
        "img_size": shape[1:],
        "windows": [tuple(stage.blocks[0].window_size) for stage in sparse_stages(model)],
        "model": asdict(info),
        "versions": _versions(),
    }


# -- programs -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what exporters print, warn and log off the terminal."""
    disabled = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            yield
    finally:
        logging.disable(disabled)


def _trace(
    model: nn.Module, shape: tuple[int, int, int], avoid_batch_sizes: Sequence[int]
) -> torch.export.ExportedProgram:
    """Trace with a free batch, at a size above 1 (torch.export would fix 0 and 1) that no check uses."""
    batch = next(n for n in range(2, 100) if n not in avoid_batch_sizes)
    images = structured_images(shape, batch, seed=0)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:
        if isinstance(error, SparseViTError) or is_out_of_memory(error):
            raise
        got = f"torch.export cannot trace {type(model).__name__} ({_first_line(error)})"
        raise ConfigError("export", got, "Export the Swin backbone alone, e.g. with features_only=True.") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders in every file
    return program


def _save_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    output_names: list[str],
    opset: int,
    contents: Mapping[str, object],
) -> None:
    """Write an ONNX file with a free batch; torch puts weights above 1.5 GiB beside it. Raises ConfigError."""
    import onnx

    try:
        with _quiet(), torch.no_grad():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[_INPUT],
                output_names=output_names,
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
    except Exception as error:
        if isinstance(error, SparseViTError) or is_out_of_memory(error):
            raise
        got = f"torch.onnx cannot translate the model ({_first_line(error)})"
        raise ConfigError("export to ONNX", got, "Export pt2 only, or the Swin backbone alone.") from error
    assert onnx_program is not None
    for node in onnx_program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    onnx_program.model.metadata_props[SPARSITY] = json.dumps(contents)
    onnx_program.save(path)
    proto = onnx.load(str(path), load_external_data=False)
    got_opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    if got_opset != opset:
        raise ConfigError("export opset", f"{opset} asked, the exporter wrote {got_opset}", "Choose another opset.")
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch became fixed"


def _onnx_runner(path: Path) -> Runner:
    """The file in onnxruntime on the CPU, with torch's number of threads."""
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {_INPUT: images.numpy()})]


def _pt2_runner(path: Path) -> Runner:
    """The file, read back."""
    with _quiet():
        module = torch.export.load(path).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [output for _, output in _flatten(module(images))]

    return run


def _checked(
    path: Path, outputs: Reference, *, seed: int, tolerance: float, reporter: Reporter
) -> tuple[tuple[Difference, ...], tuple[Difference, ...]]:
    """Differences that are within the tolerance, and those of the first images where a second try was needed.

    Raises MeasurementError where both tries disagree with eager.
    """
    tries: list[tuple[Difference, ...]] = []
    try:
        run = (_onnx_runner if path.suffix == ".onnx" else _pt2_runner)(path)
        for attempt in (seed, seed + 1):
            tries.append(tuple(_difference(run(images), list(named.values())) for images, named in outputs(attempt)))
            worst = _worst(tries[-1])
            if worst <= tolerance:
                sizes = " and ".join(str(difference.batch) for difference in tries[-1])
                reporter.say(
                    f"export: {path.name} agrees with eager at batch {sizes} ({worst:.1e} of its largest output)"
                )
                return tries[-1], tries[-2] if attempt > seed else ()
            if not math.isfinite(worst):
                break
            if attempt == seed:
                reporter.warn(
                    f"export: {path.name} differs from eager by {worst:.1e} of its largest output on the first images; "
                    "windows of almost equal score may have swapped ranks: trying others"
                )
    except Exception as error:
        if isinstance(error, SparseViTError) or is_out_of_memory(error):
            raise
        got = f"does not run where the model does ({_first_line(error)})"
        raise MeasurementError(path.name, got, _NOT_KEPT) from error
    found = " and ".join(f"{_worst(differences):.1e}" for differences in tries)
    got = f"differs from eager by {found} of its largest output; {tolerance:g} is allowed"
    raise MeasurementError(path.name, got, _NOT_KEPT)


_NOT_KEPT = "The file was not kept. Try another opset or format; if all fail, report it with your versions."


def _worst(differences: Sequence[Difference]) -> float:
    """Largest relative difference; infinite where one is NaN."""
    return max(math.inf if math.isnan(d.relative) else d.relative for d in differences)


def _difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> Difference:
    """Compare outputs; an output of another shape differs infinitely."""
    pairs = list(zip(actual, expected, strict=True))
    absolute = [float((a.double() - e.double()).abs().max()) if a.shape == e.shape else math.inf for a, e in pairs]
    largest = [max(float(e.abs().max()), torch.finfo(torch.float32).tiny) for e in expected]
    relative = [a / e for a, e in zip(absolute, largest, strict=True)]
    # torch's max, unlike Python's, is NaN where one value is
    return Difference(len(expected[0]), float(torch.tensor(absolute).max()), float(torch.tensor(relative).max()))


def _measure(
    model: nn.Module, staging: Path, shape: tuple[int, int, int], *, opset: int, seed: int, reporter: Reporter
) -> tuple[Latency, Latency]:
    """onnxruntime latency of the dense and the sparse program at batch 1. Leaves `model` at ratio 0."""
    sparse = _onnx_runner(staging / _FILE["onnx"])
    image = structured_images(shape, 1, seed)
    candidates = {"dense": lambda: sparse(image)}
    if not get_sparsity(model).is_dense:
        reporter.say("export: measuring onnxruntime latency, dense against sparse")
        path = staging / "dense" / _FILE["onnx"]
        path.parent.mkdir()
        set_sparsity(model, 0)
        _save_onnx(_trace(model, shape, ()), path, [], opset, {})
        dense = _onnx_runner(path)
        shutil.rmtree(path.parent)
        candidates = {"dense": lambda: dense(image), "sparse": lambda: sparse(image)}
    latencies = measure_interleaved(
        candidates,
        device=torch.device("cpu"),
        seconds=_LATENCY_SECONDS,
        rounds=_LATENCY_ROUNDS,
        retries=1,
        strict=False,
        seed=seed,
    )
    unsteady = [name for name, latency in latencies.items() if not latency.stable]
    if unsteady:
        reporter.warn(f"export: the latency of {' and '.join(unsteady)} did not settle; the machine is busy")
    return latencies["dense"], latencies.get("sparse", latencies["dense"])


# -- files --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staging(directory: Path, model: nn.Module) -> Iterator[Path]:
    """A hidden folder inside `directory`, removed at the end; so is `directory` where nothing came into it."""
    if directory.exists() and not directory.is_dir():
        raise ConfigError(str(directory), "is a file", "Choose another output folder.")
    blocked = [name for name in (*_NAMES, MANIFEST) if (directory / name).is_dir()]
    if blocked:
        raise ConfigError(str(directory / blocked[0]), "is a folder", "Choose another output folder.")
    staging = directory / f"{TEMPORARY}export-{secrets.token_hex(8)}"
    new_folders = [folder for folder in (directory, *directory.absolute().parents) if not folder.exists()]
    with disk_errors(directory, 3 * _size_bytes(model)):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(directory)
            staging.mkdir()
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in new_folders:
                    folder.rmdir()


def _publish(staging: Path, directory: Path, report: ExportReport, reporter: Reporter) -> None:
    """Move the good files into place, the manifest last; remove programs of an earlier export that is now replaced."""
    names = [name for name in _NAMES if (staging / name).exists()]
    files = {name: {"sha256": sha256_file(staging / name), "bytes": (staging / name).stat().st_size} for name in names}
    write_json(staging / MANIFEST, _manifest(report, files))
    for name in names:
        with (staging / name).open("rb") as file:
            os.fsync(file.fileno())
    failpoint("export.before_publish")
    (directory / MANIFEST).unlink(missing_ok=True)
    for name in _NAMES:
        if name in names:
            (staging / name).replace(directory / name)
            failpoint("export.mid_publish")
        elif (directory / name).exists():
            (directory / name).unlink()
            reporter.say(f"export: removed {directory / name}, which an earlier export wrote")
    (staging / MANIFEST).replace(directory / MANIFEST)
    sync_folder(directory)


def _manifest(report: ExportReport, files: Mapping[str, object]) -> dict[str, object]:
    _, channels, height, width = report.input_shape
    manifest: dict[str, Any] = {
        "format": _FORMAT_VERSION,
        "sparsity": report.sparsity.ratios,
        "note": SIZE_NOTE,
        "input": {"name": _INPUT, "shape": report.input_shape, "dtype": "float32"},
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
        "versions": _versions(),
    }
    if any(file.format == "onnx" for file in report.files):
        sizes = {kind: f"{_INPUT}:{n}x{channels}x{height}x{width}" for kind, n in (("min", 1), ("opt", 1), ("max", 8))}
        shapes = " ".join(f"--{kind}Shapes={size}" for kind, size in sizes.items())
        manifest["opset"] = report.opset
        manifest["tensorrt"] = {
            "command": f"trtexec --onnx={_FILE['onnx']} --saveEngine=model.engine {shapes}",
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
    keys = ("median_ms", "low_ms", "high_ms", "rounds", "speedup", "speedup_low", "speedup_high", "stable")
    return {key: getattr(latency, key) for key in keys}


def _versions() -> dict[str, str]:
    versions = describe_versions()
    for package in (*_PACKAGES, "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.detach()) for name, tensor in model.state_dict().items())


def _size_bytes(model: nn.Module | torch.export.ExportedProgram) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


_AGAIN = "Export the model again."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(str(path), "is missing", _AGAIN) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"cannot be read ({_first_line(error)})", _AGAIN) from error
    if not isinstance(parsed, dict):
        raise CheckpointError(str(path), "is not a JSON object", _AGAIN)
    return parsed


def _verify(directory: Path, names: Sequence[str]) -> None:
    """Compare files with the manifest's hashes. Raises CheckpointError."""
    manifest = _read_json(directory / MANIFEST)
    for name in names:
        path = directory / name
        if not path.is_file():
            raise CheckpointError(str(path), "is missing", _AGAIN)
        try:
            expected = manifest["files"][name]["sha256"]
        except (KeyError, TypeError) as error:
            raise CheckpointError(str(directory / MANIFEST), f"does not list {name}", _AGAIN) from error
        if sha256_file(path) != expected:
            got = "has another SHA-256 than the manifest says: its content changed"
            raise CheckpointError(str(path), got, _AGAIN)
