"""OpenVINO on the CPU."""

from __future__ import annotations

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


class OpenVino(Runtime):
    """Runs OpenVINO's own files (`.xml`, with the `.bin` beside it) and `.onnx` files."""

    name = "openvino"
    suffixes = (".xml", ".onnx")
    packages = ("openvino",)
    extra = "openvino"
    runs_int8 = True

    @functools.cache  # noqa: B019 - runtimes live as long as the process
    def activations(self) -> tuple[Activations, ...]:
        """float32, and bfloat16 where the CPU has it: emulated bfloat16 is slower than float32."""
        capabilities = load_openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("fp32", "bf16") if "BF16" in capabilities else ("fp32",)

    def _run(
        self,
        path: Path,
        activations: Activations,
        threads: int,
        shape: tuple[int, ...] | None,
        lengths: Mapping[str, int],
    ) -> Run:
        openvino = load_openvino()
        model = openvino.Core().read_model(path)
        shapes = {name: openvino.PartialShape([length]) for name, length in lengths.items()}
        if shape is not None:
            shapes[model.inputs[0]] = openvino.PartialShape(list(shape))
        if shapes:
            model.reshape(shapes)
        return compiled(model, activations, threads)


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
    return openvino.Core().compile_model(model, "CPU", settings)
