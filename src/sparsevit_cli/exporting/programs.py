"""Programs for other runtimes: traced with a free batch, written as ONNX, run to be checked.

A model that gives one answer per image, as detectors do, has no fixed number of outputs. It is taken for one image at
a time (`OneImage`). torch.export refuses torchvision's detectors, so torch's older TorchScript exporter writes them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsevit_cli.errors import ConfigError, check_installed, in_one_line, pass_on
from sparsevit_cli.runtimes import runtime

from .folder import PACKAGES, SPARSITY
from .images import structured_images

OPSET = 20
OPSETS = range(18, 26)
TORCHSCRIPT_OPSETS = range(18, 21)
"""What torch's TorchScript exporter writes."""
INPUT = "image"
ANSWERS = "answers"
"""Name of the first dimension of outputs for one image: how many boxes, labels, masks there are."""


def check_packages(formats: Sequence[str]) -> None:
    """Raise ConfigError where a package that writes one of `formats` is not installed."""
    if "openvino" in formats:
        runtime("openvino").check_installed()
    if {"onnx", "openvino"} & set(formats):
        check_installed("export to ONNX", PACKAGES, "export", ", or export pt2 only")


class UntraceableError(ConfigError):
    """A model that torch.export cannot trace; the operator is named if torch names it."""


class Around(nn.Module):
    """A model as torch.export can take it; messages name the model itself."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training


class OneImage(Around):
    """A model that answers each image of a batch by a dict of tensors, for one image: (1, C, H, W) to that dict."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return dict(self.model(images)[0])


class PlainOutputs(Around):
    """A model whose outputs are of a class of its own, as transformers' are: they become a dict of named tensors."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name.removeprefix("output_"): tensor for name, tensor in named_tensors(self.model(images))}


def with_fixed_outputs(model: nn.Module, images: Callable[[int], Tensor], batch_sizes: Sequence[int]) -> nn.Module:
    """The model, or a wrapper that gives tensors in builtin lists and dicts, their number the same for all images.

    `images` draws a batch. A model is for one image (`OneImage`) if it answers each image by a dict of its own.
    Raises what the model raises.
    """
    with torch.no_grad():
        for batch in sorted(set(batch_sizes)):
            outputs = model(images(batch))
            answers = isinstance(outputs, (list, tuple)) and all(isinstance(each, Mapping) for each in outputs)
            if not answers or len(outputs) != batch:
                return model if _is_plain(outputs) else PlainOutputs(model)
    return OneImage(model)


def batched(model: nn.Module, images: Callable[[int], Tensor], batch_sizes: Sequence[int]) -> nn.Module:
    """As `with_fixed_outputs`, of a model that takes a batch. Raises UntraceableError if it answers each image."""
    found = with_fixed_outputs(model, images, batch_sizes)
    if isinstance(found, OneImage):
        got = f"{type(model).__name__} answers each image with as many answers as it finds"
        raise UntraceableError("program", got, "Take its backbone.")
    return found


def _is_plain(output: object) -> bool:
    """True for tensors in builtin lists, tuples and dicts, which a .pt2 file holds without anybody's code."""
    if isinstance(output, (list, tuple, dict)) and type(output) in (list, tuple, dict, OrderedDict):
        return all(map(_is_plain, output.values() if isinstance(output, dict) else output))
    return isinstance(output, Tensor)


def trace(
    model: nn.Module, shape: tuple[int, int, int], avoid_batch_sizes: Sequence[int]
) -> torch.export.ExportedProgram:
    """Trace with a free batch, at a size above 1 (torch.export would fix 0 and 1) that no check uses.

    A `OneImage` is traced with one image. Raises UntraceableError.
    """
    batch = next(n for n in range(2, 100) if n not in avoid_batch_sizes)
    images = structured_images(shape, 1 if isinstance(model, OneImage) else batch, seed=0)
    dims: Any = None if isinstance(model, OneImage) else ({0: torch.export.Dim("batch")},)
    return trace_inputs(model, (images,), dims)


def trace_fixed(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """Trace for the shape of `images` (B, C, H, W) and no other. Raises UntraceableError."""
    return trace_inputs(model, (images,), None)


def trace_inputs(model: nn.Module, inputs: tuple[Tensor, ...], dims: Any) -> torch.export.ExportedProgram:
    """Trace a model of any number of inputs; `dims` are torch.export's `dynamic_shapes`. Raises UntraceableError."""
    try:
        with quiet(), torch.no_grad():
            program = torch.export.export(model, inputs, dynamic_shapes=dims)
    except Exception as error:
        pass_on(error)
        inner = model
        while isinstance(inner, Around):
            inner = inner.model
        got = f"torch.export cannot trace {type(inner).__name__} ({_named_operator(error)})"
        do = "Export backbone and neck alone: export.scope: features, or that module in Python."
        raise UntraceableError("export", got, do) from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders in every file
    return program


def _named_operator(error: Exception) -> str:
    """The error in one line, with the operator that torch blames for it behind."""
    cause = re.search(r"^Caused by: \(\S*?([^/\s]+/[^/\s]+:\d+) in (\w+)\)", str(error), re.MULTILINE)
    return in_one_line(error) + (f" in {cause[2]}, {cause[1]}" if cause else "")


def save_onnx_of_one_image(
    model: OneImage,
    shape: tuple[int, int, int],
    path: Path,
    output_names: list[str],
    opset: int,
    contents: Mapping[str, object],
) -> None:
    """Write an ONNX file for images (1, C, H, W) by torch's TorchScript exporter. Raises ConfigError.

    What depends on the images may not depend on the traced one: torchvision's detectors take care of that. This
    exporter is deprecated, and has bugs: no file of it is good before it was checked.
    """
    import onnx

    if opset not in TORCHSCRIPT_OPSETS:
        last = TORCHSCRIPT_OPSETS[-1]
        got = f"{opset}; for a model that answers each image, torch writes {TORCHSCRIPT_OPSETS[0]} to {last}"
        raise ConfigError("export opset", got, f"Take {last}.")
    try:
        with quiet(), torch.no_grad():
            torch.onnx.export(
                model,
                (structured_images(shape, 1, seed=0),),
                path,
                dynamo=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=output_names,
                dynamic_axes={name: {0: ANSWERS} for name in output_names},
            )
    except Exception as error:
        pass_on(error)
        got = f"torch.onnx cannot translate {type(model.model).__name__} ({in_one_line(error)})"
        raise ConfigError("export to ONNX", got, "Export backbone and neck alone: export.scope: features.") from error
    proto = onnx.load(str(path))
    onnx.helper.set_model_props(proto, {SPARSITY: json.dumps(contents)})
    for node in proto.graph.node:
        node.ClearField("doc_string")  # may name this machine's folders
    onnx.save(proto, str(path))


def save_onnx(
    program: torch.export.ExportedProgram,
    path: Path,
    output_names: list[str],
    opset: int,
    contents: Mapping[str, object],
    *,
    dynamic_batch: bool = True,
    lengths: Sequence[str] = (),
) -> None:
    """Write an ONNX file, with a free batch if the program has one. Raises ConfigError.

    `lengths` are names of further inputs, vectors of a free length of the same name. torch puts weights above 1.5 GiB
    beside the file.
    """
    import onnx

    dims = ({0: "batch"} if dynamic_batch else None, *({0: name} for name in lengths))
    try:
        with quiet(), torch.no_grad():
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=[INPUT, *lengths],
                output_names=output_names,
                dynamic_shapes=dims if dynamic_batch or lengths else None,
                verbose=False,
            )
    except Exception as error:
        pass_on(error)
        got = f"torch.onnx cannot translate the model ({in_one_line(error)})"
        do = "Export pt2 only, or backbone and neck alone: export.scope: features."
        raise ConfigError("export to ONNX", got, do) from error
    assert onnx_program is not None
    for node in onnx_program.model.graph.all_nodes():
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    onnx_program.model.metadata_props[SPARSITY] = json.dumps(contents)
    onnx_program.save(path)
    proto = onnx.load(str(path), load_external_data=False)
    got_opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    if got_opset != opset:
        raise ConfigError("export opset", f"{opset} asked, the exporter wrote {got_opset}", "Choose another opset.")
    free = bool(proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param)
    assert free == dynamic_batch, "the batch became fixed"


def describe_onnx(path: Path) -> dict[str, object]:
    """Opset, and how often each operator occurs, subgraphs and functions included."""
    import onnx

    proto = onnx.load(str(path), load_external_data=False)
    counts: Counter[str] = Counter()
    waiting: list[Any] = [proto.graph.node, *(function.node for function in proto.functions)]
    while waiting:
        for node in waiting.pop():
            counts[f"{node.domain}::{node.op_type}" if node.domain else node.op_type] += 1
            inner = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
            inner += [graph for attribute in node.attribute for graph in attribute.graphs]
            waiting += [graph.node for graph in inner]
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    return {"opset": opset, "operators": dict(sorted(counts.items()))}


def named_tensors(output: object, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Named tensors of a model's output, in the order of torch's pytrees: a tensor, or lists and dicts of them."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, (list, tuple, Mapping)):
        parts = output.items() if isinstance(output, Mapping) else enumerate(output)
        for key, part in parts:
            yield from named_tensors(part, f"{name}_{key}")
    else:
        got = f"the model returns a {type(output).__name__}"
        raise ConfigError("export", got, "Wrap the model so that it returns tensors, or lists or dicts of them.")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what exporters print, warn and log off the terminal."""
    disabled = logging.root.manager.disable
    try:
        said = io.StringIO()  # torch prints the whole graph where it cannot trace a model
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            logging.disable(logging.ERROR)
            yield
    finally:
        logging.disable(disabled)
