"""Patch embedding at inference: what an engine needs that has its own way; the others take timm's."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .linear import Affine
from .windowed import Norm, tensors_of


class EmbeddingWeights(NamedTuple):
    """What a patch embedding computes with: a convolution whose weight (out, C, side, side) strides by its side, and
    the norm after it, if there is one.
    """

    proj: Affine
    norm: Norm | None

    def tensors(self) -> list[Tensor] | None:
        """Weights and biases; None where the norm lacks one."""
        return tensors_of(() if self.norm is None else (self.norm,), (self.proj,))
