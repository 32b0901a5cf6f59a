"""Where a model runs: exported files in torch, ONNX Runtime and OpenVINO, by one contract."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparsevit_cli.errors import ConfigError

from .module import ProgramModule
from .onnxruntime import OnnxRuntime
from .openvino import OpenVino
from .runtime import Activations, Precision, Program, Run, Runtime, precision_label, slow_in_int8
from .torch_export import TorchExport

RUNTIMES: Mapping[str, Runtime] = {each.name: each for each in (TorchExport(), OnnxRuntime(), OpenVino())}


def runtime(name: str) -> Runtime:
    """A runtime by its name. Raises ConfigError."""
    if name not in RUNTIMES:
        raise ConfigError("runtime", f"{name!r} is not known", f"Choose from {', '.join(RUNTIMES)}.")
    return RUNTIMES[name]


def runtime_for(path: Path) -> Runtime:
    """The runtime that prefers files of this kind. Raises ConfigError."""
    for found in RUNTIMES.values():
        if path.suffix == found.suffixes[0]:
            return found
    ends = ", ".join(found.suffixes[0] for found in RUNTIMES.values())
    raise ConfigError("runtime", f"none runs {path.name}", f"Give a file that ends in one of {ends}.")


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
    "runtime_for",
    "slow_in_int8",
]
