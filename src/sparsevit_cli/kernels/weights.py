"""What the parts of a Swin compute with: tensors as torch's layers keep them, and a few numbers.

Shapes: C channels, h heads.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Affine(NamedTuple):
    """A linear layer: weight (out, in) and bias (out,) or None; of a convolution, weight (out, in, side, side)."""

    weight: Tensor
    bias: Tensor | None


class Norm(NamedTuple):
    """LayerNorm over the channels: weight and bias (C,), or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class BlockWeights(NamedTuple):
    """A Swin block.

    `norm_first` is True when the norms come before attention and MLP (V1), False when they come after (V2, V2-CR).
    `scale` multiplies the attention scores. `cosine_scale` (h, 1, 1), when given, replaces it: it multiplies the
    cosines of queries and keys (V2, V2-CR).
    """

    norm1: Norm
    qkv: Affine
    proj: Affine
    norm2: Norm
    fc1: Affine
    fc2: Affine
    num_heads: int
    norm_first: bool = True
    scale: float = 1.0
    cosine_scale: Tensor | None = None

    def tensors(self) -> list[Tensor] | None:
        """Weights and biases of all layers; None when a norm lacks one, which only the portable engine takes."""
        return _tensors_of((self.norm1, self.norm2), (self.qkv, self.proj, self.fc1, self.fc2))


class MergingWeights(NamedTuple):
    """A patch merging: `reduction` (out, 4C). The norm comes before it (`norm_first`: V1, V2-CR) or after (V2)."""

    norm: Norm
    reduction: Affine
    norm_first: bool

    def tensors(self) -> list[Tensor] | None:
        """Weights and biases; None when the norm lacks one, which only the portable engine takes."""
        return _tensors_of((self.norm,), (self.reduction,))


class EmbeddingWeights(NamedTuple):
    """A patch embedding: a convolution (out, C, side, side) whose stride is its side, and the norm after it, if any."""

    proj: Affine
    norm: Norm | None

    def tensors(self) -> list[Tensor] | None:
        """Weights and biases; None when the norm lacks one, which only the portable engine takes."""
        return _tensors_of(() if self.norm is None else (self.norm,), (self.proj,))


Weights = BlockWeights | MergingWeights | EmbeddingWeights


def _tensors_of(norms: tuple[Norm, ...], layers: tuple[Affine, ...]) -> list[Tensor] | None:
    if any(norm.weight is None or norm.bias is None for norm in norms):
        return None
    parts: tuple[Norm | Affine, ...] = (*norms, *layers)
    return [tensor for part in parts for tensor in (part.weight, part.bias) if tensor is not None]
