"""Several configurations on the same images: stages whose ratios and map are those of the last forward run once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .stages import SparseStage


class _Repeated:
    """The forward of a stage, which remembers its last answer. Nobody writes into the map that a stage gives."""

    def __init__(self, stage: SparseStage) -> None:
        self.stage, self.compute = stage, stage.forward
        self.key: tuple[Any, ...] = ()
        self.map, self.answer = torch.empty(0), torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        key = (self.stage.sparsity_tenths, self.stage.as_timm, x.shape, x.dtype, x.device)
        if key != self.key or not (x is self.map or torch.equal(x, self.map)):
            self.key, self.map, self.answer = key, x, self.compute(x)
        return self.answer


@contextmanager
def shared_prefixes(model: nn.Module) -> Iterator[None]:
    """Inside the block a stage of a sparse `model` answers the last question again without computing it.

    The answer is the same to the bit. Where configurations come in the order of their ratios, each map of their common
    first stages is computed once. Held are two maps per stage, of one batch. For inference alone.
    """
    stages = [module for module in model.modules() if isinstance(module, SparseStage)]
    for stage in stages:
        stage.forward = _Repeated(stage)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for stage in stages:
            del stage.forward
