"""A whole Swin block on some of its windows, written back in place, a few windows at a time on a CPU.

Shapes: M windows of N tokens, C channels, h heads. Windows of a block are disjoint, so writing back is free of races.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevit_cli import windows

from .linear import Affine, LinearOps, linear_ops, onednn_takes

CHUNK_TOKENS = 4096
"""Tokens computed at once on a CPU: the hidden map of the MLP stays in the cache, and memory low."""


class Norm(NamedTuple):
    """LayerNorm over the channels; weight and bias (C,), or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


class BlockWeights(NamedTuple):
    """What a Swin block computes with.

    `norm_first` says whether norms stand before attention and MLP (V1) or after (V2). `scale` multiplies the scores;
    `cosine_scale` (h, 1, 1), where given, stands for it and multiplies the cosines of queries and keys (V2).
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
        """Weights and biases of all layers; None where a norm lacks one, which only the portable kernels take."""
        return tensors_of((self.norm1, self.norm2), (self.qkv, self.proj, self.fc1, self.fc2))


def tensors_of(norms: tuple[Norm, ...], layers: tuple[Affine, ...]) -> list[Tensor] | None:
    """Weights and biases; None where a norm lacks one."""
    if any(norm.weight is None or norm.bias is None for norm in norms):
        return None
    parts: tuple[Norm | Affine, ...] = (*norms, *layers)
    return [tensor for part in parts for tensor in (part.weight, part.bias) if tensor is not None]


def run_windows_(
    tokens: Tensor, rows: Tensor, block: BlockWeights, bias: Tensor, bias_class: Tensor | None, *, padded: bool
) -> None:
    """Replace the tokens of M windows by what `block` makes of them, in place.

    `tokens` (T, C) are the rows of all maps; `rows` (M, N) says where each window's tokens stand, T for padding.
    `padded` says whether there may be any. Padding enters attention as timm has it (zeros, so keys and values are
    the qkv bias), and nothing else is computed for it. `bias` (classes, h, N, N) is added to the
    attention scores, `bias_class` (M,) chooses; None takes the only one for all. For inference: nothing here can be
    differentiated.
    """
    area = rows.shape[1]
    step = max(1, CHUNK_TOKENS // area if tokens.device.type == "cpu" else len(rows))
    ops = linear_ops(tokens)
    bias = bias if tokens.device.type == "cpu" else in_steps_of_8(bias)
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        chosen = bias if bias_class is None else bias.index_select(0, bias_class[part])
        chosen = chosen[..., :area]
        _run_(ops, tokens, rows[part], block, chosen, padded)


def _run_(ops: LinearOps, tokens: Tensor, rows: Tensor, block: BlockWeights, bias: Tensor, padded: bool) -> None:
    shape = rows.shape
    flat = rows.reshape(-1)  # M*N
    places = None
    if padded:  # padding has no row; how many tokens are left is known on a CPU without waiting
        places = (flat < len(tokens)).nonzero().squeeze(1)
        flat = flat.index_select(0, places)
    kept = windows.gather_rows(tokens, flat)  # true tokens, C
    qkv = ops.linear(layer_norm(kept, block.norm1) if block.norm_first else kept, block.qkv)
    if places is not None:
        qkv = _with_padding(qkv, places, block.qkv.bias, shape.numel())
    attended = _attention(qkv.view(*shape, -1), block, bias)
    if places is not None:
        attended = attended.index_select(0, places)
    if block.norm_first:
        kept = ops.linear_add(attended, block.proj, kept)
        hidden = ops.linear_gelu(layer_norm(kept, block.norm2), block.fc1)
        kept = ops.linear_add(hidden, block.fc2, kept)
    else:
        kept = kept + layer_norm(ops.linear(attended, block.proj), block.norm1)
        hidden = ops.linear_gelu(kept, block.fc1)
        kept = layer_norm(ops.linear(hidden, block.fc2), block.norm2).add_(kept)
    windows.scatter_rows_(tokens, flat, kept)


def in_steps_of_8(bias: Tensor) -> Tensor:
    """(..., N) with zeros after it up to a multiple of 8: a GPU's fused attention copies a mask whose rows start
    elsewhere, and takes a slice of this one as it is (torch's `scaled_dot_product_attention`, memory-efficient kernel).
    """
    return F.pad(bias, (0, -bias.shape[-1] % 8))


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """x (..., C) normalised over its channels."""
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def _with_padding(qkv: Tensor, places: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """Rows of true tokens at `places` among `count`, the qkv bias everywhere else."""
    full = qkv.new_zeros(count, qkv.shape[1]) if bias is None else bias.repeat(count, 1)
    return full.index_copy_(0, places, qkv)


def _attention(qkv: Tensor, block: BlockWeights, bias: Tensor) -> Tensor:
    """(M, N, 3C) to (M*N, C)."""
    count, area, _ = qkv.shape
    q, k, v = qkv.view(count, area, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)  # each M, h, N, d
    if block.cosine_scale is not None:
        q, k = F.normalize(q, dim=-1) * block.cosine_scale, F.normalize(k, dim=-1)
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and onednn_takes(qkv.dtype):
        attended = _two_products(q, k, v, bias, block.scale)
    else:
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=block.scale)
    return attended.transpose(1, 2).reshape(count * area, -1)


def _two_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention (M, h, N, d) as two batched products: in bfloat16 on a CPU 15 to 35 % faster than the fused one,
    which is the faster one in float32. It keeps N x N scores, of one chunk of windows.
    """
    count, heads, area, _ = q.shape
    bias = bias.expand(count, heads, area, area).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(count, heads, area, -1)
