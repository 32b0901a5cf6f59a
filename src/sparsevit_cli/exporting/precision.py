"""What an exported file holds, and what its runtime computes in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.runtimes import Activations, Precision, runtime, runtime_for

from .quantization import check_installed

ActivationsAsked = Literal["auto", "fp32", "bf16"]
LOWERING = "openvino"
"""The format, and the runtime of that name, that computes in 16 bits on a CPU."""
IN_EIGHT_BITS = ("onnx", "openvino")
"""The formats whose files have eight bits with precision int8."""


def format_of(runtime_name: str) -> str:
    """The format that a runtime prefers."""
    return {"onnxruntime": "onnx", "torch": "pt2"}.get(runtime_name, runtime_name)


def activations_of(path: Path, asked: Activations) -> Activations:
    """What a file is computed in where those of `LOWERING` are in `asked`: all others are in float32."""
    return asked if runtime_for(path).name == LOWERING else "fp32"


def resolved_activations(
    precision: str, asked: str, formats: Sequence[str], setting: str = "export.precision"
) -> Activations:
    """What the runtime of `LOWERING` is asked to compute in; `setting` is where `precision` stands.

    Raises ConfigError for settings that contradict each other, for a precision that no file of `formats` has, for a
    runtime that is not installed, and for a CPU that would emulate bfloat16, slower than float32.
    """
    if precision not in get_args(Precision):
        allowed = ", ".join(get_args(Precision))
        raise ConfigError(setting, f"{precision!r}; allowed are {allowed}", "Take fp32.")
    if asked not in ("auto", "fp32", "bf16"):
        raise ConfigError("export.activations", f"{asked!r}; allowed are auto, fp32, bf16", "Take auto.")
    if precision != "int8" and asked not in ("auto", precision):
        got = f"{asked}, and {setting} is {precision}"
        raise ConfigError("export.activations", got, f"Set {setting}: {asked}, or export.activations: auto.")
    if precision == "fp32":
        return "fp32"
    do = f"Add {LOWERING} to export.formats, or set {setting}: fp32."
    if precision == "int8" and not set(IN_EIGHT_BITS) & set(formats):
        got = f"int8, and of all formats only {' and '.join(IN_EIGHT_BITS)} have eight bits"
        raise ConfigError(setting, got, do)
    if precision == "int8":
        check_installed(setting)
        for name in ("onnxruntime", LOWERING):
            if format_of(name) in formats:
                runtime(name).check_int8(setting)
        if LOWERING not in formats and asked != "bf16":
            return "fp32"
    if LOWERING not in formats:
        got = f"bf16, and of all formats only {LOWERING} computes in less than 32 bits on a CPU"
        raise ConfigError(setting if precision == "bf16" else "export.activations", got, do)
    runs_in = runtime(LOWERING)
    runs_in.check_installed()
    if precision == "int8" and asked == "auto":
        return "bf16" if "bf16" in runs_in.activations() else "fp32"
    activations: Activations = "fp32" if asked == "fp32" else "bf16"
    runs_in.check_activations(activations, "export.activations" if precision == "int8" else setting)
    return activations
