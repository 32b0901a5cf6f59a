"""Patch merging at inference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from .linear import Affine, linear_ops
from .windowed import Norm, layer_norm, tensors_of


class MergingWeights(NamedTuple):
    """What a patch merging computes with; V1 and V2-CR normalise before the reduction, V2 after."""

    norm: Norm
    reduction: Affine
    norm_first: bool

    def tensors(self) -> list[Tensor] | None:
        """Weights and biases; None where the norm lacks one, which only the portable kernels take."""
        return tensors_of((self.norm,), (self.reduction,))


def merge_patches(x: Tensor, weights: MergingWeights) -> Tensor:
    """Four neighbours into one token: (B, H, W, C) to (B, H/2, W/2, out), odd sides padded with zeros.

    As timm's PatchMerging (timm/models/swin_transformer.py and its V2). For inference.
    """
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x
    rows, cols = (height + 1) // 2, (width + 1) // 2
    merged = x.view(batch, rows, 2, cols, 2, channels).permute(0, 1, 3, 4, 2, 5).reshape(-1, 4 * channels)
    if weights.norm_first:
        merged = linear_ops(x).linear(layer_norm(merged, weights.norm), weights.reduction)
    else:
        merged = layer_norm(linear_ops(x).linear(merged, weights.reduction), weights.norm)
    return merged.view(batch, rows, cols, -1)
