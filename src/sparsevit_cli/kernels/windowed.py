"""A whole Swin block on some of its windows, written back in place, a few windows at a time on a CPU.

Shapes: M windows of N tokens, C channels, h heads. Windows of a block are disjoint, so writing back is free of races.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevit_cli import windows
from sparsevit_cli.windows import Padded

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
    tokens: Tensor, rows: Tensor, block: BlockWeights, bias: Tensor, bias_class: Tensor | None, *, padded: Padded
) -> None:
    """Replace the tokens of M windows by what `block` makes of them, in place.

    `tokens` (T, C) are the rows of all maps; `rows` (M, N) says where each window's tokens stand, T for padding.
    `padded` says whether there may be any, and where all windows of all maps are here, where it is not. Padding enters
    attention as timm has it (zeros, so keys and values are the qkv bias). Nothing else is computed for it, except where
    the host would have to wait to learn how much of it there is. `bias` (classes, h, N, N) is added to the attention
    scores, `bias_class` (M,) chooses; None takes the only one for all. For inference: nothing here can be
    differentiated.
    """
    area = rows.shape[1]
    asynchronous = windows.is_asynchronous(tokens.device)
    step = max(1, len(rows) if asynchronous else CHUNK_TOKENS // area)
    ops = linear_ops(tokens)
    bias = in_steps_of_8(bias) if asynchronous else bias
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        chosen = bias if bias_class is None else bias.index_select(0, bias_class[part])
        _run_(ops, tokens, _slots(tokens, rows[part], padded), block, chosen[..., :area])


class _Slots(NamedTuple):
    """What is computed for the slots of M windows: R rows, of true tokens and, where there is `padding`, of others."""

    shape: torch.Size
    """(M, N)"""
    rows: Tensor | None
    """(R,) of the tokens; None for all of them as they stand."""
    places: Tensor | None = None
    """(R,) among M*N; None for all in order."""
    padding: Tensor | None = None
    """(M, N, 1), True for padding that has a row all the same: that of the first token of its window."""


def _slots(tokens: Tensor, rows: Tensor, padded: Padded) -> _Slots:
    flat, shape = rows.reshape(-1), rows.shape
    if not padded:
        return _Slots(shape, flat)
    if not windows.is_asynchronous(tokens.device):
        places = (flat < len(tokens)).nonzero().squeeze(1)
        return _Slots(shape, flat.index_select(0, places), places)
    if isinstance(padded, windows.TokenPlaces):
        return _Slots(shape, None, padded.places)
    padding = rows == len(tokens)  # never the first of a window: maps are padded at the bottom and right
    return _Slots(shape, torch.where(padding, rows[:, :1], rows).reshape(-1), padding=padding.unsqueeze(-1))


def _run_(ops: LinearOps, tokens: Tensor, slots: _Slots, block: BlockWeights, bias: Tensor) -> None:
    shape, rows, places, padding = slots
    kept = tokens if rows is None else windows.gather_rows(tokens, rows)  # R, C
    entering = layer_norm(kept, block.norm1) if block.norm_first else kept
    if padding is not None:
        entering = entering.masked_fill(padding.reshape(-1, 1), 0)
    qkv = ops.linear(entering, block.qkv)
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
    if padding is not None:  # a token that is written more than once gets the same bits every time: no race
        each = kept.view(*shape, -1)
        kept = torch.where(padding, each[:, :1], each).reshape(kept.shape)
    if rows is None:
        tokens.copy_(kept)
    else:
        windows.scatter_rows_(tokens, rows, kept)


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
