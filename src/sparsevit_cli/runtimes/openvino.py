"""OpenVINO on the CPU."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .runtime import Activations, Run, Runtime

TELEMETRY = "openvino_telemetry"
"""The package by which OpenVINO and NNCF report their use to their makers; both do without it."""


def load_openvino() -> Any:
    """The module `openvino`, which sends nothing: imported as usual, it reports that to its makers by Google Analytics.

    All of this package imports it here.
    """
    if "openvino" not in sys.modules:
        with without_telemetry():
            import_module("openvino")
    return import_module("openvino")


@contextmanager
def without_telemetry() -> Iterator[None]:
    """Inside the block whoever imports TELEMETRY finds that it is not installed, and takes a stub for good.

    So nothing is sent, and no file is written to the home folder. The environment variables that switch it off leave
    the files.
    """
    missing = object()
    before: Any = sys.modules.get(TELEMETRY, missing)
    blocked: Any = None
    sys.modules[TELEMETRY] = blocked
    try:
        yield
    finally:
        if before is missing:
            sys.modules.pop(TELEMETRY, None)
        else:
            sys.modules[TELEMETRY] = before


@functools.cache
def core() -> Any:
    """The one `openvino.Core` of this process. It is never destroyed, and all of this package uses it.

    OpenVINO's CPU plug-in gives the thread that loads it a signal stack of its own. Where several were loaded, the last
    one puts back a stack that is freed, and the next Ctrl-C is a segmentation fault (2026.4, class SigAltStackSetup of
    src/plugins/intel_cpu/src/plugin.cpp).

    On Windows it maps no file of weights into memory: a mapped one can be neither replaced nor removed there.
    """
    openvino = load_openvino()
    found = openvino.Core()
    if sys.platform == "win32":
        found.set_property({openvino.properties.enable_mmap: False})
    return found


class SignalStack(ctypes.Structure):
    """The C type `stack_t` of Linux."""

    _fields_ = (("base", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def same_signal_stack() -> Iterator[SignalStack]:
    """After the block this thread has the signal stack that it had before, whatever cores others made and dropped."""
    stack = SignalStack()
    if sys.platform != "linux":
        yield stack
        return
    libc = ctypes.CDLL(None)
    libc.sigaltstack(None, ctypes.byref(stack))
    try:
        yield stack
    finally:
        libc.sigaltstack(ctypes.byref(stack), None)


class OpenVino(Runtime):
    """Runs OpenVINO's own files (`.xml`, with the `.bin` beside it) and `.onnx` files."""

    name = "openvino"
    suffixes = (".xml", ".onnx")
    packages = ("openvino",)
    extra = "openvino"
    otherwise = "; it would emulate bf16, slower than fp32"

    def activations(self) -> tuple[Activations, ...]:
        """float32, and bfloat16 where the CPU has it: emulated bfloat16 is slower than float32."""
        return ("fp32", "bf16") if "BF16" in _capabilities() else ("fp32",)

    def runs_int8(self) -> bool:
        """True if OpenVINO says so of this CPU."""
        return "INT8" in _capabilities()

    def _run(
        self,
        path: Path,
        activations: Activations,
        threads: int,
        shape: tuple[int, ...] | None,
        lengths: Mapping[str, int],
    ) -> Run:
        openvino = load_openvino()
        model = core().read_model(path)
        shapes = {name: openvino.PartialShape([length]) for name, length in lengths.items()}
        if shape is not None:
            shapes[model.inputs[0]] = openvino.PartialShape(list(shape))
        if shapes:
            model.reshape(shapes)
        return compiled(model, activations, threads)


@functools.cache
def _capabilities() -> tuple[str, ...]:
    """What OpenVINO computes in on this CPU by instructions of its own, in its own words."""
    return tuple(core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def compiled(model: object, activations: Activations, threads: int) -> Run:
    """An `openvino.Model` as a function, compiled as `compiled_model` says."""
    request = compiled_model(model, activations, threads).create_infer_request()
    others = [np.zeros(tuple(each.shape), np.uint8) for each in request.model_inputs[1:]]

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        found = request.infer([np.ascontiguousarray(images.numpy()), *others])
        return [torch.from_numpy(np.array(output)) for output in found.values()]

    return run


def compiled_model(model: object, activations: Activations, threads: int | None) -> Any:
    """An `openvino.CompiledModel` of one stream on `threads` threads, by default torch's number, bound to no core."""
    openvino = load_openvino()
    properties = openvino.properties
    hint = properties.hint
    settings = {
        hint.inference_precision: openvino.Type.bf16 if activations == "bf16" else openvino.Type.f32,
        hint.performance_mode: hint.PerformanceMode.LATENCY,
        hint.enable_cpu_pinning: False,
        properties.num_streams: 1,
        properties.inference_num_threads: threads or torch.get_num_threads(),
    }
    return core().compile_model(model, "CPU", settings)
