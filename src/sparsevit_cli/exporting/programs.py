"""Programs for other runtimes: traced with a free batch, written as ONNX, run to be checked."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsevit_cli.errors import ConfigError, in_one_line, pass_on

from .folder import PACKAGES, SPARSITY
from .images import structured_images

OPSETS = range(18, 26)
INPUT = "image"
Runner = Callable[[Tensor], list[Tensor]]
"""Images (B, C, H, W) to the outputs, in order."""


def check_packages(formats: Sequence[str]) -> None:
    """Raise ConfigError where a package that writes one of `formats` is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None] if "onnx" in formats else []
    if missing:
        got = f"{', '.join(missing)} not installed"
        raise ConfigError("export to ONNX", got, 'Type: pip install "sparsevit-cli[export]", or export pt2 only.')


def trace(
    model: nn.Module, shape: tuple[int, int, int], avoid_batch_sizes: Sequence[int]
) -> torch.export.ExportedProgram:
    """Trace with a free batch, at a size above 1 (torch.export would fix 0 and 1) that no check uses."""
    batch = next(n for n in range(2, 100) if n not in avoid_batch_sizes)
    images = structured_images(shape, batch, seed=0)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:
        pass_on(error)
        got = f"torch.export cannot trace {type(model).__name__} ({in_one_line(error)})"
        raise ConfigError("export", got, "Export the Swin backbone alone, e.g. with features_only=True.") from error
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names this machine's folders in every file
    return program


def save_onnx(
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
                input_names=[INPUT],
                output_names=output_names,
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
    except Exception as error:
        pass_on(error)
        got = f"torch.onnx cannot translate the model ({in_one_line(error)})"
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


def onnx_runner(path: Path) -> Runner:
    """The file in onnxruntime on the CPU, with torch's number of threads.

    They do not spin once a run has ended, so that a program that is measured next has all cores to itself.
    """
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]


def pt2_runner(path: Path) -> Runner:
    """The file, read back."""
    with _quiet():
        module = torch.export.load(path).module()

    def run(images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [output for _, output in named_tensors(module(images))]

    return run


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
