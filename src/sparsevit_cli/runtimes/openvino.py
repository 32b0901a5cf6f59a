"""OpenVINO on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .runtime import Activations, Run, Runtime


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
        import openvino

        capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return ("fp32", "bf16") if "BF16" in capabilities else ("fp32",)

    def _run(
        self,
        path: Path,
        activations: Activations,
        threads: int,
        shape: tuple[int, ...] | None,
        lengths: Mapping[str, int],
    ) -> Run:
        import openvino

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
    import openvino
    from openvino.properties import hint, inference_num_threads, num_streams

    settings = {
        hint.inference_precision: openvino.Type.bf16 if activations == "bf16" else openvino.Type.f32,
        hint.performance_mode: hint.PerformanceMode.LATENCY,
        hint.enable_cpu_pinning: False,
        num_streams: 1,
        inference_num_threads: threads or torch.get_num_threads(),
    }
    return openvino.Core().compile_model(model, "CPU", settings)
