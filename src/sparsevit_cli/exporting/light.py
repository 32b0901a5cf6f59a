"""Programs to be timed: made for one shape, in a folder that is gone afterwards, with a look at their outputs.

What `export_model` writes is for users: any batch, all checks. This is for a clock.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsevit_cli.errors import ConfigError, MeasurementError
from sparsevit_cli.runtimes import Precision, Program, precision_label, runtime

from .images import structured_images
from .openvino_ir import save_openvino
from .precision import LOWERING, format_of, resolved_activations
from .programs import (
    OPSET,
    batched,
    check_packages,
    named_tensors,
    save_onnx,
    trace_fixed,
)
from .quantization import check_installed as check_nncf
from .quantization import quantize

FARTHEST: Mapping[str, float] = {"fp32": 0.02, "bf16": 0.5}
"""Largest distance of a program's outputs from eager's, over the length of eager's: rounding may swap two windows."""


def check_timed(name: str, precision: str) -> None:
    """Raises ConfigError if runtime `name` is not installed here, or does not compute in `precision`."""
    found = runtime(name)
    found.check_installed()
    check_packages(("onnx",))
    if precision == "int8":
        check_nncf("profile.precision")
        found.check_int8("profile.precision")
    elif precision in ("fp32", "bf16"):
        found.check_activations("bf16" if precision == "bf16" else "fp32", "profile.precision")
    else:
        got = f"{precision}: there are no programs of it for {name}"
        raise ConfigError(f"runtime {name}", got, "Choose fp32, or bf16 where the runtime has it.")


def timed_programs(
    model: nn.Module, images: Tensor, runtimes: Sequence[str], precision: Precision, *, threads: int
) -> dict[str, Program]:
    """`model`, float32 and on the CPU, at the shape of `images` (B, C, H, W) and no other; by the name of the runtime.

    All come from one ONNX file and run on `threads` threads; that of int8 is quantised on random images. Raises
    UntraceableError, ConfigError, CheckpointError, and MeasurementError for outputs that are not the model's.
    """
    shape, batch = (images.shape[1], images.shape[2], images.shape[3]), len(images)
    with torch.no_grad():
        plain = batched(model, lambda count: structured_images(shape, count, 0), (batch,))
        seen = structured_images(shape, batch, 0)
        expected = dict(named_tensors(plain(seen)))
    programs = {}
    with tempfile.TemporaryDirectory(prefix="sparsevit-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(trace_fixed(plain, seen), path, list(expected), OPSET, {}, dynamic_batch=False)
        for name in runtimes:
            activations = resolved_activations(precision, "auto", (format_of(name),), "profile.precision")
            file = timed_file(path, name, (batch, *shape), eight_bits=precision == "int8")
            program = runtime(name).load(file, activations=activations, threads=threads, shape=images.shape)
            _look_at(program.run(seen), list(expected.values()), name, precision_label(precision, activations))
            programs[name] = program
    return programs


def timed_file(
    onnx: Path,
    runtime_name: str,
    shape: tuple[int, int, int, int],
    *,
    eight_bits: bool,
    lengths: Mapping[str, int] | None = None,
    check: Callable[[], object] = lambda: None,
) -> Path:
    """An ONNX file as a runtime is served with it, itself or written beside it.

    OpenVINO takes an .xml, which marks what ranks windows as float32. For eight bits random images of `shape`
    (B, C, H, W) tell the ranges; `lengths` are those of further inputs.
    """
    path = onnx
    if runtime_name == LOWERING:
        path = onnx.with_suffix(".xml")
        save_openvino(onnx, path, {})
    if not eight_bits:
        return path
    quantised = path.with_name(f"{path.stem}-int8{path.suffix}")
    batch, *sides = shape
    quantize(path, quantised, random_images((sides[0], sides[1], sides[2]), batch), lengths=lengths, check=check)
    return quantised


def random_images(shape: tuple[int, int, int], batch: int = 1) -> list[Tensor]:
    """What an eight-bit program for the clock is calibrated on: its outputs mean nothing, and its latency is the same.

    `shape` is (C, H, W).
    """
    return [structured_images(shape, batch, seed) for seed in range(2)]


def _look_at(found: Sequence[Tensor], expected: Sequence[Tensor], name: str, label: str) -> None:
    """Raises MeasurementError unless the outputs are as many, as large, finite, and near."""
    shapes = [tuple(each.shape) for each in found]
    if shapes != [tuple(each.shape) for each in expected] or not all(each.isfinite().all() for each in found):
        raise MeasurementError(f"{name}, {label}", f"outputs {shapes} are not the model's", _DO)
    ours, theirs = (torch.cat([each.float().flatten() for each in outputs]) for outputs in (found, expected))
    distance = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
    if distance > FARTHEST.get(label, float("inf")):
        raise MeasurementError(f"{name}, {label}", f"outputs are off by {distance:.0%} of the model's", _DO)


_DO = "It does not compute what is measured: leave the runtime out, and report it."
