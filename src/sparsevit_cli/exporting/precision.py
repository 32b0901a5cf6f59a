"""What an exported file holds, and what its runtime computes in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sparsevit_cli.errors import ConfigError
from sparsevit_cli.runtimes import Activations, runtime

Precision = Literal["fp32", "bf16"]
"""`fp32` and `bf16` files hold float32; a runtime is asked to compute `bf16` ones in bfloat16."""
ActivationsAsked = Literal["auto", "fp32", "bf16"]
PRECISIONS = ("fp32", "bf16")
LOWERING = "openvino"
"""The format, and the runtime of that name, that computes in less than 32 bits on a CPU."""


def resolved_activations(precision: str, asked: str, formats: Sequence[str]) -> Activations:
    """What the runtime of `LOWERING` is asked to compute in.

    Raises ConfigError for settings that contradict each other, for a precision that no file of `formats` has, for a
    runtime that is not installed, and for a CPU that would emulate bfloat16, slower than float32.
    """
    if precision not in PRECISIONS:
        raise ConfigError("export.precision", f"{precision!r}; allowed are {', '.join(PRECISIONS)}", "Take fp32.")
    if asked not in ("auto", "fp32", "bf16"):
        raise ConfigError("export.activations", f"{asked!r}; allowed are auto, fp32, bf16", "Take auto.")
    if asked not in ("auto", precision):
        got = f"{asked}, and export.precision is {precision}"
        raise ConfigError("export.activations", got, f"Set export.precision: {asked}, or export.activations: auto.")
    if precision == "fp32":
        return "fp32"
    if LOWERING not in formats:
        got = f"{precision}, and of all formats only {LOWERING} computes in less than 32 bits on a CPU"
        raise ConfigError("export.precision", got, f"Add {LOWERING} to export.formats, or set export.precision: fp32.")
    runs_in = runtime(LOWERING)
    runs_in.check_installed()
    runs_in.check_activations("bf16")
    return "bf16"


def precision_label(precision: str, activations: str) -> str:
    """`fp32`, `bf16`, or `int8+bf16`: what tables call it."""
    return precision if precision in ("fp32", "bf16") else f"{precision}+{activations}"
