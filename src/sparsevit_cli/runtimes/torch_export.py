"""torch's own exported programs, run by PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from sparsevit_cli.errors import ConfigError

from .runtime import Activations, Run, Runtime


class TorchExport(Runtime):
    """Runs `.pt2` files, on the threads that torch has: `threads` of another number is refused."""

    name = "torch"
    suffixes = (".pt2",)
    packages = ("torch",)

    def activations(self) -> tuple[Activations, ...]:
        """float32 alone: a program holds its types."""
        return ("fp32",)

    def _run(
        self,
        path: Path,
        activations: Activations,
        threads: int,
        shape: tuple[int, ...] | None,
        lengths: Mapping[str, int],
    ) -> Run:
        if threads != torch.get_num_threads():
            got = f"{threads} threads, torch has {torch.get_num_threads()} for the whole process"
            raise ConfigError("runtime torch", got, "Set OMP_NUM_THREADS before Python starts.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = torch.export.load(path).module()

        others = [torch.zeros(length, dtype=torch.uint8) for length in lengths.values()]

        def run(images: torch.Tensor) -> list[torch.Tensor]:
            with torch.no_grad():
                return [leaf for leaf in tree_leaves(module(images, *others)) if isinstance(leaf, torch.Tensor)]

        return run
