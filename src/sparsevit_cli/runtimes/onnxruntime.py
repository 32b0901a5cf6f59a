"""ONNX Runtime on the CPU. Its CPU provider has no 16-bit kernels that are faster than 32 bits."""

from __future__ import annotations

from pathlib import Path

import torch

from .runtime import Activations, Run, Runtime


class OnnxRuntime(Runtime):
    """Runs `.onnx` files."""

    name = "onnxruntime"
    suffixes = (".onnx",)
    packages = ("onnxruntime", "onnx")
    extra = "export"
    runs_int8 = True

    def activations(self) -> tuple[Activations, ...]:
        """float32 alone."""
        return ("fp32",)

    def _run(self, path: Path, activations: Activations, threads: int, shape: tuple[int, ...] | None) -> Run:
        import onnx
        import onnxruntime

        onnx.checker.check_model(str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        image = session.get_inputs()[0].name
        return lambda images: [torch.from_numpy(output) for output in session.run(None, {image: images.numpy()})]
