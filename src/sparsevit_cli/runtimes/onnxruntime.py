"""ONNX Runtime on the CPU. Its CPU provider has no 16-bit kernels that are faster than 32 bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from .runtime import Activations, Run, Runtime


class OnnxRuntime(Runtime):
    """Runs `.onnx` files."""

    name = "onnxruntime"
    suffixes = (".onnx",)
    packages = ("onnxruntime", "onnx")
    extra = "export"

    def activations(self) -> tuple[Activations, ...]:
        """float32 alone."""
        return ("fp32",)

    def runs_int8(self) -> bool:
        """True: of eight bits it has kernels for every CPU."""
        return True

    def _run(
        self,
        path: Path,
        activations: Activations,
        threads: int,
        shape: tuple[int, ...] | None,
        lengths: Mapping[str, int],
    ) -> Run:
        import onnx
        import onnxruntime

        onnx.checker.check_model(str(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for name, length in lengths.items():  # the free dimension has its input's name
            options.add_free_dimension_override_by_name(name, length)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        image, *others = (each.name for each in session.get_inputs())
        fixed = {name: np.zeros(lengths[name], np.uint8) for name in others}

        def run(images: torch.Tensor) -> list[torch.Tensor]:
            return [torch.from_numpy(output) for output in session.run(None, {image: images.numpy(), **fixed})]

        return run
