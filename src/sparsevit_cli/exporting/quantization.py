"""Eight bits by NNCF's post-training quantisation: which nodes stay in float, and which layers cost most.

Scores and ranking stay in float: what leads from a map to its `TopK` is left out (`ranking_nodes`), so that no window
is dropped because its score was rounded. What enters the scores is computed from eight bits, though. So windows can
still change: `changed_windows` counts them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsevit_cli import errors
from sparsevit_cli.errors import ConfigError, MeasurementError, in_one_line, pass_on
from sparsevit_cli.runtimes.openvino import compiled, core, load_openvino, same_signal_stack, without_telemetry

from .openvino_ir import keep_ranking_exact, ranking_nodes, rankings
from .programs import quiet

PACKAGES = ("nncf", "openvino")
_REPORT = "Take fp32 or bf16, and report it with your versions."
_PASSING = (
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "VariadicSplit", "Slice", "StridedSlice", "Gather",
    "GatherND", "Concat", "Pad", "Convert",
)  # fmt: skip
"""Nodes that move numbers and do not compute: a quantiser before one of them is the quantiser of what comes behind."""


Quantise = Callable[[Path, Path], Mapping[str, Any]]
"""Writes the first file, in float32, as the second, in eight bits, and tells what manifest.json says of it.

It raises MeasurementError for a result that is no good.
"""


@dataclass(frozen=True)
class LayerError:
    """What one layer alone costs in eight bits: `error` is that of the model's outputs, squared, over their square."""

    name: str
    error: float


def check_installed(setting: str = "export.precision") -> None:
    """Raise ConfigError that names the extra if NNCF or OpenVINO is missing; none is imported.

    `setting` is the one of int8, as users write it.
    """
    errors.check_installed(f"{setting} int8", PACKAGES, "openvino", f", or set {setting}: fp32")


def load_nncf() -> Any:
    """The module `nncf`, which sends nothing: NNCF reports every use to its makers unless it is told not to.

    It is imported without what does the sending. `NNCF_CI` is NNCF's own switch for the same. Raises ConfigError.
    """
    check_installed()
    load_openvino()
    import logging
    from importlib import import_module

    if "nncf" not in sys.modules:
        before, kind = os.environ.get("NNCF_CI"), logging.getLoggerClass()
        with quiet(), without_telemetry():
            os.environ["NNCF_CI"] = "1"
            try:
                import_module("nncf")
            finally:
                logging.setLoggerClass(kind)
                if before is None:
                    del os.environ["NNCF_CI"]
                else:
                    os.environ["NNCF_CI"] = before
    nncf = import_module("nncf")
    sending: Any = import_module("nncf.telemetry.decorator")
    assert hasattr(sending, "telemetry"), "NNCF sends by another way"
    sending.telemetry = import_module("nncf.telemetry.wrapper").NNCFTelemetryStub()  # if somebody imported it before us
    logging.getLogger("nncf").setLevel(logging.ERROR)  # its own function changes the handlers of others too
    return nncf


def quantize(
    source: Path,
    target: Path,
    images: Sequence[Tensor],
    *,
    in_float: Sequence[str] = (),
    lengths: Mapping[str, int] | None = None,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Write `source`, an .xml or .onnx file in float32, as `target` with weights and activations of eight bits.

    `images` (1, C, H, W) tell the ranges of activations. Nodes of the names `in_float`, and all that ranks windows,
    stay as they are. `lengths` are those of further inputs. `check` is called before each image, and may raise. Raises
    ConfigError (packages, no images), MeasurementError if NNCF fails, or puts eight bits into what should have none.
    """
    if source.suffix == ".onnx":
        import onnx

        model = _by_nncf(source, onnx.load(source), images, in_float, check, lengths or {})
        onnx.save(model, target)
    else:
        model = _by_nncf(source, core().read_model(source), images, in_float, check, lengths or {})
        load_openvino().save_model(model, target, compress_to_fp16=False)
        keep_ranking_exact(target)
    try:
        before, after = (core().read_model(path) for path in (source, target))
        _check_ranking(before, after)
        _check_in_float(before, after, in_float)
    except MeasurementError:
        for path in (target, target.with_suffix(".bin")):
            path.unlink(missing_ok=True)
        raise


def _by_nncf(
    source: Path,
    model: Any,
    images: Sequence[Tensor],
    in_float: Sequence[str],
    check: Callable[[], object],
    lengths: Mapping[str, int],
    **backend: object,
) -> Any:
    """The quantised model of that of a file, `openvino.Model` or ONNX; `backend` are parameters of NNCF's backend."""
    nncf = load_nncf()
    if not images:
        raise ConfigError("export.precision int8", "there is no image to calibrate on", "Add images to the data.")
    graph = core().read_model(source)
    ignored = [*(node.get_friendly_name() for node in ranking_nodes(graph)), *behind_means(graph), *in_float]
    if not isinstance(model, type(graph)):  # of ONNX; OpenVINO splits a layer in two and names both after it
        ignored = [name.removesuffix("/WithoutBiases") for name in ignored]
    try:
        with quiet(), same_signal_stack():
            return nncf.quantize(
                model,
                nncf.Dataset(_Supply(images, check, graph.inputs[0].get_any_name(), lengths)),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                ignored_scope=nncf.IgnoredScope(names=ignored, validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(backend_params=backend),
            )
    except Exception as error:
        pass_on(error)
        got = f"NNCF cannot quantise it ({in_one_line(error)})"
        raise MeasurementError(source.name, got, _REPORT) from error


def _check_ranking(before: Any, after: Any) -> None:
    """Raises MeasurementError unless two `openvino.Model` rank alike, and the second one has no eight bits in it."""
    ranking = rankings(after)
    total = len(rankings(before))
    exact = sum(not _is_rounded(each.scoring[-1].input_value(0).get_node()) for each in ranking)
    if exact < total:
        got = f"eight bits in {total - exact} of {total} rankings of windows"
        raise MeasurementError("int8", got, _REPORT)


def _check_in_float(before: Any, after: Any, names: Sequence[str]) -> None:
    """Raises MeasurementError unless layers of these names were there, and have no eight bits now.

    NNCF passes over a name that it does not know without a word.
    """
    there, rounded = {node.get_friendly_name() for node in before.get_ops()}, quantised_layers(after)
    if wrong := [name for name in names if name not in there or name in rounded]:
        raise MeasurementError("int8", f"{', '.join(wrong)} should stay in float and did not", _REPORT)


def _passes(node: Any) -> bool:
    """True for nodes of `_PASSING`, and for those that make floats of whole numbers of eight bits, as ONNX files do."""
    of_eight_bits = node.get_type_name() in ("Subtract", "Multiply") and _are_whole(node.input_value(0).get_node())
    return node.get_type_name() in _PASSING or of_eight_bits


def _are_whole(node: Any) -> bool:
    if node.get_type_name() == "Subtract":
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Convert" and node.get_input_element_type(0).get_type_name() in ("i8", "u8")


def _is_rounded(node: Any) -> bool:
    while _passes(node):
        node = node.input_value(0).get_node()
    return bool(node.get_type_name() == "FakeQuantize")


def behind_means(model: Any) -> list[str]:
    """Names of the matrices that take a mean over positions: the classifier behind average pooling.

    They stay in float. OpenVINO 2026.4 on a CPU is silently wrong there, by a third and more: NNCF puts a scale of each
    channel between mean and matrix, and the fused mean takes it for one of another axis (a test holds that). They are
    one row an image, so that nothing is lost.
    """
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        before = node.input_value(0).get_node()
        while before.get_type_name() in _PASSING:
            before = before.input_value(0).get_node()
        if before.get_type_name().startswith("Reduce"):
            found.append(node.get_friendly_name())
    return found


class _Supply:
    """Images as NNCF reads them, several times; each asks first whether to stop."""

    def __init__(
        self, images: Sequence[Tensor], check: Callable[[], object], name: str, lengths: Mapping[str, int]
    ) -> None:
        self.images, self.check, self.name = images, check, name
        self.others = {other: np.zeros(length, np.uint8) for other, length in lengths.items()}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        self.check()
        return {self.name: self.images[index].numpy(), **self.others}

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))


def layer_errors(
    source: Path,
    images: Sequence[Tensor],
    calibration: Sequence[Tensor],
    *,
    threads: int | None = None,
    check: Callable[[], object] = lambda: None,
) -> Iterator[LayerError]:
    """The error of the outputs of `source` on `images` if one layer alone has eight bits, for each layer.

    One quantised model is made; all its quantisers but those of one layer are taken out, and that is run against the
    float model. Errors of single layers are small and add up: the sum of all is close to what the whole loses.
    """
    model = _by_nncf(source, core().read_model(source), calibration, (), check, {}, compress_weights=False)
    reference = _outputs(core().read_model(source), images, threads)
    for name, quantisers in quantised_layers(model).items():
        check()
        alone = model.clone()
        for node in alone.get_ordered_ops():
            if node.get_type_name() == "FakeQuantize" and node.get_friendly_name() not in quantisers:
                node.output(0).replace(node.input_value(0))
        error = size = 0.0
        for ours, theirs in zip(_outputs(alone, images, threads), reference, strict=True):
            error += float((ours - theirs).square().sum())
            size += float(theirs.square().sum())
        yield LayerError(name, error / max(size, torch.finfo(torch.float32).tiny))


def _outputs(model: Any, images: Sequence[Tensor], threads: int | None) -> list[Tensor]:
    run = compiled(model, "fp32", threads or torch.get_num_threads())
    return [output.double() for image in images for output in run(image)]


def quantised_layers(model: Any) -> Mapping[str, frozenset[str]]:
    """Names of the nodes that compute in eight bits, each with the names of its `FakeQuantize` nodes."""
    layers: dict[str, set[str]] = {}
    for node in model.get_ordered_ops():
        if node.get_type_name() in ("FakeQuantize", "ShapeOf") or _passes(node):
            continue
        waiting = [value.get_node() for value in node.input_values()]
        while waiting:
            before = waiting.pop()
            if before.get_type_name() == "FakeQuantize":
                layers.setdefault(node.get_friendly_name(), set()).add(before.get_friendly_name())
            elif _passes(before):
                waiting += [value.get_node() for value in before.input_values()]
    return {name: frozenset(quantisers) for name, quantisers in layers.items()}
