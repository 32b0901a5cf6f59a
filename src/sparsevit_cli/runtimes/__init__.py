"""Where a model runs: exported files in torch, ONNX Runtime and OpenVINO, by one contract."""

from __future__ import annotations

from collections.abc import Mapping

from sparsevit_cli.errors import ConfigError

from .module import ProgramModule
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .runtime import Activations, Precision, Program, Run, Runtime, precision_label
from .torch_export import TorchExport

RUNTIMES: Mapping[str, Runtime] = {each.name: each for each in (TorchExport(), OnnxRuntime(), OpenVino())}


def runtime(name: str) -> Runtime:
    """A runtime by its name. Raises ConfigError."""
    if name not in RUNTIMES:
        raise ConfigError("runtime", f"{name!r} is not known", f"Choose from {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]


__all__ = [
    "RUNTIMES",
    "Activations",
    "Precision",
    "Program",
    "ProgramModule",
    "Run",
    "Runtime",
    "precision_label",
    "runtime",
]
