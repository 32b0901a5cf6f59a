"""The portable engine: every part of a Swin by torch's own functions, on any device.

A block runs on a few windows at a time on a CPU, on all at once elsewhere, and is written back in place. Windows of a
block are disjoint, so writing back is free of races.

Shapes: M windows of N slots, T rows of all maps, C channels, h heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsevit_cli import windows
from sparsevit_cli.windows import Importance, Kept

from . import held
from .engine import MOVES, Engine, Moves
from .linear import LinearOps, linear_ops, onednn_takes
from .weights import BlockWeights, EmbeddingWeights, MergingWeights, Norm, Weights

CHUNK_TOKENS = 4096
"""Tokens computed at once on a CPU: the hidden map of the MLP stays in the cache, and little memory is needed."""


def run_windows_(
    tokens: Tensor,
    rows: Tensor,
    block: BlockWeights,
    bias: Tensor,
    bias_class: Tensor | None,
    *,
    padded: bool,
    places: Tensor | None = None,
    moves: Moves = MOVES,
) -> None:
    """`Engine.run_windows_` by torch's own functions; `moves` gathers and scatters.

    Linear layers skip padding, on a CPU and when `places` is given. Elsewhere the host would have to wait to learn how
    much padding there is, so they compute it.
    """
    area = rows.shape[1]
    asynchronous = held.is_asynchronous(tokens.device)
    step = max(1, len(rows) if asynchronous else CHUNK_TOKENS // area)
    ops = linear_ops(tokens)
    bias = in_steps_of_8(bias) if asynchronous else bias
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        chosen = bias if bias_class is None else bias.index_select(0, bias_class[part])
        slots = _slots(tokens, rows[part], places) if padded else _Slots(rows[part].shape, rows[part].reshape(-1))
        _run_(ops, tokens, slots, block, chosen[..., :area], moves)


class _Slots(NamedTuple):
    """What is computed for the slots of M windows: R rows, of tokens and, when there is `padding`, of padding too."""

    shape: torch.Size
    """(M, N)"""
    rows: Tensor | None
    """(R,) rows of the tokens in the map; None for all rows of the map in order."""
    places: Tensor | None = None
    """(R,) the slots that hold them, in 0 ... M*N - 1; None for all slots in order."""
    padding: Tensor | None = None
    """(M, N, 1), True for padding that is computed: it stands in for the token at `standing` of its window."""
    standing: Tensor | None = None
    """(M, 1, 1), when there is `padding`: the slot of a token in each window."""


def _slots(tokens: Tensor, rows: Tensor, places: Tensor | None) -> _Slots:
    """Of padded windows: `rows` (M, N) are len(tokens) for padding."""
    flat, shape = rows.reshape(-1), rows.shape
    if not held.is_asynchronous(tokens.device):
        of_tokens = (flat < len(tokens)).nonzero().squeeze(1)
        return _Slots(shape, flat.index_select(0, of_tokens), of_tokens)
    if places is not None:
        return _Slots(shape, None, places)
    padding = rows == len(tokens)
    standing = rows.argmin(1, keepdim=True)  # padding has the highest row, and every window holds a token
    filled = torch.where(padding, rows.gather(1, standing), rows)
    return _Slots(shape, filled.reshape(-1), padding=padding.unsqueeze(-1), standing=standing.unsqueeze(-1))


def _run_(ops: LinearOps, tokens: Tensor, slots: _Slots, block: BlockWeights, bias: Tensor, moves: Moves) -> None:
    """The block on M windows of `tokens` (T, C), in place; `bias` (1 or M, h, N, N)."""
    shape, rows, places, padding, standing = slots
    kept = tokens if rows is None else moves.gather_rows(tokens, rows)  # R, C
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
    if padding is not None and standing is not None:
        # a token that is written more than once gets the same bits every time: no race
        each = kept.view(*shape, -1)
        token = each.gather(1, standing.expand(-1, 1, each.shape[-1]))  # M, 1, C
        kept = torch.where(padding, token, each).reshape(kept.shape)
    if rows is None:
        tokens.copy_(kept)
    else:
        moves.scatter_rows_(tokens, rows, kept)


def in_steps_of_8(bias: Tensor) -> Tensor:
    """`bias` (..., N) with zeros after each row, up to a multiple of 8 numbers.

    torch's memory-efficient `scaled_dot_product_attention` on a GPU wants rows that start at such multiples. It takes a
    slice [..., :N] of this tensor as it is, and would copy any other.
    """
    return F.pad(bias, (0, -bias.shape[-1] % 8))


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """x (..., C) normalised over its channels."""
    return F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def _with_padding(qkv: Tensor, places: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """(count, 3C): qkv (R, 3C) of tokens at `places` (R,), and the bias (3C,), or zeros, for padding."""
    full = qkv.new_zeros(count, qkv.shape[1]) if bias is None else bias.repeat(count, 1)
    return full.index_copy_(0, places, qkv)


def _attention(qkv: Tensor, block: BlockWeights, bias: Tensor) -> Tensor:
    """Window attention: qkv (M, N, 3C) to (M*N, C); `bias` (1 or M, h, N, N) is added to the scores."""
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
    """Attention as two batched products: q, k, v (M, h, N, d) to (M, h, N, d).

    In bfloat16 on a CPU it is 15 to 35 % faster than fused attention, in float32 slower. It keeps N x N scores of the
    windows of one chunk.
    """
    count, heads, area, _ = q.shape
    bias = bias.expand(count, heads, area, area).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view(count, heads, area, -1)


def merge_patches(x: Tensor, weights: MergingWeights) -> Tensor:
    """`Engine.merge_patches`: (B, H, W, C) to (B, H/2, W/2, out), odd sides padded with zeros."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2)) if height % 2 or width % 2 else x
    rows, cols = (height + 1) // 2, (width + 1) // 2
    merged = x.view(batch, rows, 2, cols, 2, channels).permute(0, 1, 3, 4, 2, 5).reshape(-1, 4 * channels)
    if weights.norm_first:
        merged = linear_ops(x).linear(layer_norm(merged, weights.norm), weights.reduction)
    else:
        merged = layer_norm(linear_ops(x).linear(merged, weights.reduction), weights.norm)
    return merged.view(batch, rows, cols, -1)


def embed_patches(x: Tensor, weights: EmbeddingWeights) -> Tensor:
    """`Engine.embed_patches`: images (B, C, H, W) to a map (B, H/side, W/side, out), equal to timm's to the bit."""
    conv = weights.proj
    embedded = F.conv2d(x, conv.weight, conv.bias, stride=conv.weight.shape[-1]).permute(0, 2, 3, 1)
    return embedded if weights.norm is None else layer_norm(embedded, weights.norm)


@dataclass(frozen=True)
class PortableEngine:
    """torch's own functions, on any device and for any weights; `moves` gathers and scatters."""

    moves: Moves = MOVES
    name = "portable"

    def version(self) -> str:
        return ""

    def with_moves(self, moves: Moves) -> Engine:
        return PortableEngine(moves)

    def takes(self, x: Tensor, weights: Weights | None) -> bool:
        return True

    def leaves_out_padding(self, x: Tensor, weights: BlockWeights) -> bool:
        return not held.is_asynchronous(x.device)

    def run_windows_(
        self,
        tokens: Tensor,
        rows: Tensor,
        weights: BlockWeights,
        bias: Tensor,
        bias_class: Tensor | None,
        *,
        padded: bool,
        places: Tensor | None = None,
    ) -> None:
        run_windows_(tokens, rows, weights, bias, bias_class, padded=padded, places=places, moves=self.moves)

    def merge_patches(self, x: Tensor, weights: MergingWeights) -> Tensor:
        return merge_patches(x, weights)

    def embed_patches(self, x: Tensor, weights: EmbeddingWeights) -> Tensor:
        return embed_patches(x, weights)

    def score_and_rank(
        self, x: Tensor, token_indices: Sequence[Tensor], count: int, importance: Importance
    ) -> list[Kept]:
        return windows.score_and_rank(x, token_indices, count, importance, self.moves.rows_of)


PORTABLE = PortableEngine()
