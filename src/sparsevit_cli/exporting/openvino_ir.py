"""OpenVINO's own files: an xml with the graph, and a bin with the weights. All of them rank windows in float32.

A runtime that computes in bfloat16 would round the scores to 8 bits, and windows would be dropped by rounding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from torch import Tensor

from sparsevit_cli.errors import ConfigError, first_line, in_one_line, pass_on
from sparsevit_cli.runtimes import Activations
from sparsevit_cli.runtimes.openvino import compiled_model, core, load_openvino

from .folder import SPARSITY

_ELEMENTWISE = ("Abs", "Convert", "Power", "Sqrt")
_MOVING = ("Gather", "GatherND", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_REDUCING = ("ReduceL2", "ReduceMean", "ReduceSum")
_PRECISE = {"name": "precise", "version": "0"}
"""OpenVINO's mark of a node whose type no plug-in may lower (`ov::DisableFP16Compression`; bfloat16 obeys it too)."""
_DIGIT = 128
"""Window numbers leave a model in two digits of this base: bfloat16 holds whole numbers up to 256."""


@dataclass(frozen=True)
class Ranking:
    """The node that ranks the windows of a stage, and the nodes that compute their scores."""

    top: Any
    scoring: tuple[Any, ...]


def rankings(model: Any) -> list[Ranking]:
    """The rankings of windows in an `openvino.Model`, in the order of its nodes. Any other TopK is left out."""
    found = []
    for node in model.get_ordered_ops():
        if node.get_type_name() == "TopK" and (scoring := _scoring(node)) is not None:
            found.append(Ranking(node, scoring))
    return found


def _scoring(top: Any) -> tuple[Any, ...] | None:
    """The nodes from a TopK back to the map that is scored; None unless they are those of `windows.window_scores`.

    That is: two reductions, of channels and of tokens, what moves values between them, and |x| or x * x before the
    first. The control `random` has none: its scores are constants, or whole numbers that become float.
    """
    scoring: list[Any] = []
    reductions = 0
    node = top.input_value(0).get_node()
    while True:
        kind = node.get_type_name()
        squares = kind == "Multiply" and node.input_value(0) == node.input_value(1)
        if kind not in (*_ELEMENTWISE, *_MOVING, *_REDUCING) and not squares:
            return None
        scoring.append(node)
        reductions += kind in _REDUCING
        if reductions == 2 and (squares or kind in ("Abs", "Power")):
            return tuple(scoring)
        node = node.input_value(0).get_node()


def save_openvino(source: Path, path: Path, contents: Mapping[str, object]) -> None:
    """Write an ONNX file as `path` (.xml) and the .bin beside it, weights in float32. Raises ConfigError."""
    openvino = load_openvino()
    try:
        model = core().read_model(source)
        model.set_rt_info(json.dumps(contents), ["sparsevit_cli", SPARSITY])
        openvino.save_model(model, path, compress_to_fp16=False)
        keep_ranking_exact(path)
    except Exception as error:
        pass_on(error)
        told = str(error).strip().rpartition("\n")[2] or in_one_line(error)  # OpenVINO puts places in its code first
        got = f"OpenVINO cannot translate the model ({first_line(told)})"
        raise ConfigError("export to OpenVINO", got, "Export onnx or pt2.") from error


def keep_ranking_exact(path: Path) -> None:
    """Mark the nodes of an .xml file that score and rank windows, so that they stay in float32.

    The file is changed in place: it is one that is being made. Python cannot set such a mark on a model in memory.
    """
    marked = {node.get_friendly_name() for node in ranking_nodes(core().read_model(path))}
    tree = ElementTree.parse(path)
    for layer in tree.iter("layer"):
        if layer.get("name") not in marked:
            continue
        marks = layer.find("rt_info")
        marks = ElementTree.SubElement(layer, "rt_info") if marks is None else marks
        if not any(mark.get("name") == _PRECISE["name"] for mark in marks):
            ElementTree.SubElement(marks, "attribute", _PRECISE)
    tree.write(path, encoding="utf-8", xml_declaration=True)


def ranking_nodes(model: Any) -> Iterator[Any]:
    """The nodes of an `openvino.Model` that score and rank windows."""
    for ranking in rankings(model):
        yield ranking.top
        yield from ranking.scoring


def changed_windows(
    path: Path, batches: Sequence[Tensor], activations: Activations, lowered_path: Path | None = None
) -> tuple[int, int]:
    """Windows that all rankings of an .xml file keep in float32 of images (B, C, H, W), and how many of them go.

    Instead of those, `lowered_path` (by default the same file) keeps others in `activations`. The order of what is kept
    does not count.
    """
    exact = _kept_windows(path, batches, "fp32")
    lowered = _kept_windows(lowered_path or path, batches, activations)
    kept = sum(len(row) for row in exact)
    return kept, sum(len(ours - theirs) for ours, theirs in zip(exact, lowered, strict=True))


def _kept_windows(path: Path, batches: Sequence[Tensor], activations: Activations) -> list[set[int]]:
    """The windows that each ranking keeps of each image."""
    openvino = load_openvino()
    opset13 = openvino.opset13
    model = core().read_model(path)
    outputs = len(model.outputs)
    base = opset13.constant(np.int32(_DIGIT))
    for ranking in rankings(model):
        number = opset13.convert(ranking.top.output(1), "i32")
        for digit in (opset13.divide(number, base), opset13.mod(number, base)):
            # In float32 they would keep all in float32 that leads up to them, and so hide what bfloat16 does.
            model.add_results([opset13.result(opset13.convert(digit, "bf16").output(0))])
    request = compiled_model(model, activations, threads=None).create_infer_request()
    kept = []
    for images in batches:
        request.infer([np.ascontiguousarray(images.numpy())])
        digits = [_floats(request.get_output_tensor(number).data) for number in range(outputs, len(model.outputs))]
        for high, low in zip(digits[::2], digits[1::2], strict=True):
            kept += [set(row) for row in (high * _DIGIT + low).astype(int).tolist()]
    return kept


def _floats(bfloat16: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Numbers of OpenVINO's bfloat16 outputs, which come under the name of another type of 16 bits."""
    return (bfloat16.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
